"""The entry point: ``torchrun --nproc-per-node N -m opsd_megatron.train [experiment=NAME] key=value ...``.

Hydra composes the configuration from ``opsd_megatron/configs`` and the overrides (``config/compose.py``). Also
``--cfg job`` to print it and exit, ``--config-dir DIR`` to add a directory of own configuration groups, and
``--check WORLD_SIZE`` to validate for a launch of that size without starting anything.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from opsd_megatron.config import Config, ParallelConfig
from opsd_megatron.config.compose import compose_config, to_yaml
from opsd_megatron.errors import (
    EXIT_BAD_INPUT,
    EXIT_DEFECT,
    EXIT_INTERRUPTED,
    Interrupted,
    OpsdError,
)

if TYPE_CHECKING:
    from opsd_megatron.trainer.setup import Inputs

T = TypeVar("T")


def parse(arguments: list[str], *, program: str, description: str) -> argparse.Namespace:
    """The command line of ``train`` and ``evaluate``."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, such as model.path=DIR")
    parser.add_argument("--config-dir", help="directory of own configuration groups")
    parser.add_argument("--cfg", choices=["job"], help="print the composed configuration and exit")
    parser.add_argument("--check", type=_positive, metavar="WORLD_SIZE", help="validate for so many processes and exit")
    return parser.parse_intermixed_args(arguments)


def show_config(options: argparse.Namespace) -> None:
    """Print the composed configuration."""
    config = compose_config(options.overrides, options.config_dir)
    print(to_yaml(config), end="")


def run(arguments: list[str]) -> None:
    """Train as the command line says.

    Ranks: every rank of the world, with equal arguments.

    Raises:
        OpsdError: Something the user can mend.
    """
    options = parse(arguments, program="opsd_megatron.train", description="Train with on-policy self-distillation.")
    if options.cfg == "job":
        show_config(options)
    elif options.check is not None:
        config, inputs = _prepare(options, options.check)
        from opsd_megatron.models.memory import estimate_memory
        from opsd_megatron.models.stages import describe_stages

        print(f"valid for {options.check} processes")
        if config.parallel.pipeline > 1:
            stages = config.parallel.pipeline, config.parallel.virtual_stages
            print(describe_stages(inputs.spec.num_layers, pp=stages[0], vpp=stages[1]))
        print(estimate_memory(inputs.spec, config, options.check, separate=inputs.separate_teacher))
    else:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        config, inputs = together(
            lambda: _prepare(options, world_size),
            lambda prepared: json.dumps([asdict(prepared[0]), prepared[1].identity]),
            lambda prepared: prepared[0].parallel.timeout_minutes,
            world_size,
        )
        from opsd_megatron.trainer.setup import build_trainer

        build_trainer(config, inputs).run()


def _prepare(options: argparse.Namespace, world_size: int) -> tuple[Config, Inputs]:
    """Compose the configuration and check it and all it names."""
    config = compose_config(options.overrides, options.config_dir)
    config.validate(world_size)
    quieten()
    # Imported late: a bad configuration is reported without waiting for Megatron-Core.
    from opsd_megatron.trainer.setup import check_inputs

    return config, check_inputs(config)


def quieten() -> None:
    """Silence what libraries say of themselves, before they are imported."""
    # Megatron-Core names every optional GPU library that is absent, on every rank, and torch what it deprecates.
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Megatron-Core asks tensors for gradients they do not keep, by way of the CPU stand-ins; nothing reads them.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)


def together(
    prepare: Callable[[], T], fingerprint: Callable[[T], str], timeout_minutes: Callable[[T], int], world_size: int
) -> T:
    """What ``prepare`` returns, on every rank of the job: what is wrong on one node ends the job on all of them.

    Ranks: every rank of the world.

    Args:
        prepare: Reads and checks a rank's inputs; not collective.
        fingerprint: A digest of these, which must be the same everywhere.
        timeout_minutes: How long ranks wait for one another (``ParallelConfig.timeout_minutes``).
        world_size: Ranks of the job.

    Raises:
        OpsdError: What ``prepare`` raised on any rank, or the ranks' inputs differ.
    """
    problem: OpsdError | None = None
    prepared: T | None = None
    try:
        prepared = prepare()
    except OpsdError as error:
        problem = error
    if world_size > 1:
        from opsd_megatron.distributed.agreement import agree
        from opsd_megatron.distributed.parallel import join_world

        # A rank that could not read its own settings reports that under the default limit.
        join_world(ParallelConfig().timeout_minutes if prepared is None else timeout_minutes(prepared))
        agree(problem, "" if prepared is None else fingerprint(prepared))
    if problem is not None:
        raise problem
    assert prepared is not None
    return prepared


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of processes")
    return value


def exit_status(program: Callable[[list[str]], None]) -> int:
    """Run a program on the command line's arguments.

    Returns:
        0; ``EXIT_INTERRUPTED`` for a run that was told to stop; with one line on stderr ``EXIT_BAD_INPUT`` for any
        other :class:`OpsdError`, and ``EXIT_DEFECT`` where the device's memory ran out; with a traceback
        ``EXIT_DEFECT`` for any other exception.
    """
    rank = int(os.environ.get("RANK", "0"))
    # Read by torch when it first allocates: large tensors on the host get huge pages, where the kernel has them. It
    # would hand out small ones and zero them one by one, which takes longer than some of the arithmetic.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        program(sys.argv[1:])
    except Interrupted:
        return EXIT_INTERRUPTED  # it has been said, while no rank had ended yet
    except OpsdError as error:
        if rank != 0:
            # Most errors are the same on every rank. Rank 0 reports; torchrun then ends the others within this time,
            # so that a rank speaks only where rank 0 had nothing to say.
            time.sleep(10)
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    except Exception as error:
        # Said here and not by the interpreter, whose own ending may never come: see leave().
        if _is_out_of_memory(error):
            print(f"error on rank {rank}: {_out_of_memory(error)}", file=sys.stderr, flush=True)
        else:
            print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, end="", flush=True)
        return EXIT_DEFECT
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # where it was never imported, it ran out of nothing
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _out_of_memory(error: Exception) -> str:
    """What is missing, in one line, and the keys that help, those first that change least (docs/multinode.md)."""
    what = " ".join(str(error).split()).partition(" See documentation")[0]
    return (
        f"{what} Lower train.tokens_per_micro_batch, then rollout.memory_fraction; train.offload=true, "
        "model.recompute=selective or full, a larger parallel.tensor or parallel.context, and teacher.policy=live save "
        "more (docs/multinode.md)"
    )


def leave(status: int) -> None:
    """End the process where ``status`` is an error."""
    if status:
        # At once: the engine's and the process groups' own endings wait for ranks that may have given up as well.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> int:
    """Train, and return the exit status."""
    return exit_status(run)


if __name__ == "__main__":
    leave(main())
