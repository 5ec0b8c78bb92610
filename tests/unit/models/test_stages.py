from __future__ import annotations

import pytest

from opsd_megatron.models.stages import describe_stages, stage_layers


def test_chunks_go_round_the_ranks() -> None:
    """By hand: 10 layers over 2 ranks of 2 chunks; the model passes through rank 0, 1, 0, 1."""
    assert stage_layers(10, pp=2, vpp=2) == [[range(0, 3), range(6, 8)], [range(3, 6), range(8, 10)]]
    assert stage_layers(7, pp=3) == [[range(0, 3)], [range(3, 5)], [range(5, 7)]]
    assert describe_stages(10, pp=2, vpp=2) == "layers of each pipeline rank: 3+2, 3+2"
    assert describe_stages(7, pp=3) == "layers of each pipeline rank: 3, 2, 2"


@pytest.mark.parametrize("num_layers", [4, 28, 36, 94])
@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2)])
def test_every_layer_once_and_the_last_chunk_is_never_the_longest(num_layers: int, pp: int, vpp: int) -> None:
    ranks = stage_layers(num_layers, pp=pp, vpp=vpp)
    chunks = [ranks[rank][chunk] for chunk in range(vpp) for rank in range(pp)]
    assert [layer for chunk in chunks for layer in chunk] == list(range(num_layers))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1 and sizes[-1] == min(sizes) >= 1
