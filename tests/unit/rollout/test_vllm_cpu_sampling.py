"""The drawing of tokens on CPU; within vLLM's sampler in tests/functional/test_engine.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opsd_megatron.rollout.vllm_cpu_sampling import draw


def seeded(count: int, first: int = 0) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(first + row) for row in range(count)}


def draws(logits: Tensor, count: int) -> Tensor:
    return draw(logits.expand(count, -1).clone(), {})


@pytest.mark.parametrize("entries", [7, 12, 128, 384])  # one entry a block, some, one block, several
def test_tokens_come_with_the_softmax_of_their_logits(entries: int) -> None:
    torch.manual_seed(entries)
    logits = 2 * torch.randn(entries)
    count = 200_000
    observed = torch.bincount(draws(logits, count), minlength=entries).double()
    expected = count * logits.double().softmax(-1)
    # Entries expected less than ten times are one cell, as the chi-squared approximation wants.
    rare = expected < 10
    cells = [torch.cat([x[~rare], x[rare].sum(0, keepdim=True)]) for x in (observed, expected)]
    chi_squared = ((cells[0] - cells[1]).square() / cells[1].clamp_min(1e-9)).sum().item()
    freedom = len(cells[0]) - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_an_excluded_entry_is_never_drawn() -> None:
    logits = torch.full((256,), -torch.inf)
    logits[[3, 200, 201]] = torch.tensor([0.0, -1.0, -60.0])
    assert set(draws(logits, 50_000).tolist()) == {3, 200}


def test_a_clock_that_rings_at_once_draws_nothing_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "exponential_", lambda clocks, **_: clocks.zero_())
    logits = torch.full((1, 256), -torch.inf)
    logits[0, 130] = 0.0
    assert draw(logits, {}).tolist() == [130]


def test_a_row_depends_on_its_generator_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 256)
    together = draw(logits.clone(), seeded(6))
    alone = [draw(logits[[row]].clone(), {0: torch.Generator().manual_seed(row)}).item() for row in range(6)]
    torch.manual_seed(1)  # some rows without a generator, which read the global one
    mixed = draw(logits.clone(), {row: one for row, one in seeded(6).items() if row % 2})
    assert together.tolist() == alone
    assert mixed[1::2].tolist() == alone[1::2]


def test_a_rounding_of_the_logits_changes_few_tokens() -> None:
    """One in 2,000 or so here; inverting the cumulative distribution would change 3 in 100."""
    torch.manual_seed(0)
    logits = torch.randn(2_000, 4_096)
    rounded = logits + 1e-3 * torch.randn_like(logits)
    first, second = (draw(x.clone(), seeded(2_000)) for x in (logits, rounded))
    assert (first != second).float().mean() < 0.005
