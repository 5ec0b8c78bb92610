"""What every rank found out for itself, made known to all: nobody waits for a rank that has given up."""

from __future__ import annotations

from opsd_megatron.distributed.collectives import gather_objects
from opsd_megatron.errors import ConfigError, OpsdError


def agree(problem: OpsdError | None, fingerprint: str) -> None:
    """Raise on every rank if one has a problem, or if they hold different inputs.

    Ranks: every rank of the world, once each has checked its inputs for itself.

    Args:
        problem: What this rank found wrong.
        fingerprint: A digest of this rank's inputs; not read from ranks with a problem.

    Raises:
        OpsdError: This rank's own problem, or the first other rank's.
        ConfigError: The ranks' inputs differ; names the first rank whose inputs differ from rank 0's.
    """
    found = gather_objects((None if problem is None else str(problem), fingerprint))
    if problem is not None:
        raise problem
    for rank, (text, _) in enumerate(found):
        if text is not None:
            raise OpsdError(f"on rank {rank}: {text}")
    for rank, (_, other) in enumerate(found):
        if other != found[0][1]:
            raise ConfigError(
                f"rank {rank} was started with other settings, data or weights than rank 0: give every node the same "
                "command line and the same files"
            )
