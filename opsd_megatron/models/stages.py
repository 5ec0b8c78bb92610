"""Which layers a pipeline rank holds."""

from __future__ import annotations


def stage_layers(num_layers: int, *, pp: int, vpp: int = 1) -> list[list[range]]:
    """Share the layers out over pipeline ranks and their chunks.

    The model passes through ``pp * vpp`` chunks, round and round over the ranks: chunk ``c`` of rank ``r`` is number
    ``c * pp + r``. Where the layers do not divide evenly, the last chunks hold one layer fewer than the first, since
    the very last holds the output head as well.

    Args:
        num_layers: Layers of the model, at least ``pp * vpp``.
        pp: Pipeline ranks.
        vpp: Chunks of each rank.

    Returns:
        Layer numbers from 0, as ``[pipeline rank][chunk]``.
    """
    size, rest = divmod(num_layers, pp * vpp)
    starts = [size * chunk + min(chunk, rest) for chunk in range(pp * vpp + 1)]
    return [[range(starts[c * pp + r], starts[c * pp + r + 1]) for c in range(vpp)] for r in range(pp)]


def describe_stages(num_layers: int, *, pp: int, vpp: int = 1) -> str:
    """For people: ``layers of each pipeline rank: 8, 7``, or chunk by chunk ``4+4, 4+3``."""
    ranks = stage_layers(num_layers, pp=pp, vpp=vpp)
    return "layers of each pipeline rank: " + ", ".join("+".join(str(len(c)) for c in chunks) for chunks in ranks)
