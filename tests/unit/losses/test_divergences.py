"""The elementwise terms: their sums and slopes from the definitions, and what must hold to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opsd_megatron.config import rules
from opsd_megatron.losses import ClipMode
from opsd_megatron.losses.divergences import LEAST_BETA, LOG_ZERO, DivergenceSpec, divergence_entries
from tests.unit.losses.reference import BETAS, Case, entries


def _log_probs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 50, generator=generator, dtype=torch.float64) * 3
    s, t = torch.log_softmax(logits, dim=-1).to(dtype)
    return s, t


@pytest.mark.parametrize("bregman", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_terms_and_slopes_are_those_of_the_definition(beta: float, bregman: bool) -> None:
    s, t = _log_probs()
    mode: ClipMode = "bregman" if bregman else "entry"
    actual = divergence_entries(s, t, DivergenceSpec(beta, clip=0.01, clip_mode=mode))
    leaf = s.clone().requires_grad_()
    d = entries(leaf, t, Case(beta, clip_mode=mode))
    (g,) = torch.autograd.grad(torch.clamp(d, max=0.01).sum(), leaf)
    torch.testing.assert_close(actual.value, d.detach(), rtol=1e-10, atol=1e-14)
    assert actual.clipped is not None
    assert torch.equal(actual.clipped.bool(), d >= 0.01)
    assert 0 < actual.clipped.sum() < actual.clipped.numel()
    # The slope is the derivative up to a multiple of e^s, which no logit's gradient sees.
    multiple = (actual.slope - g) / s.exp()
    torch.testing.assert_close(multiple, multiple.round(), rtol=0, atol=1e-9)
    assert torch.equal(multiple.round(), multiple.round()[0, 0].expand_as(multiple))


@pytest.mark.parametrize("beta", BETAS)
def test_bregman_terms_are_not_negative_and_have_the_same_sum(beta: float) -> None:
    s, t = _log_probs()
    plain = divergence_entries(s, t, DivergenceSpec(beta)).value
    bregman = divergence_entries(s, t, DivergenceSpec(beta, clip_mode="bregman")).value
    assert bregman.min() > -1e-16
    assert (plain.min() < -1e-3) == (beta in (0, 1))
    torch.testing.assert_close(bregman.sum(1), plain.sum(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["entry", "bregman", "none"])
@pytest.mark.parametrize("beta", [*BETAS, LEAST_BETA, 1 - LEAST_BETA])
def test_equal_sides_give_exact_zeros(beta: float, mode: str) -> None:
    s, _ = _log_probs(torch.float32)
    actual = divergence_entries(s, s.clone(), DivergenceSpec(beta, clip=1e-6, clip_mode=mode))  # type: ignore[arg-type]
    assert not actual.value.any()
    assert not actual.slope.any()


@pytest.mark.parametrize("beta", [1e-9, 1 - 1e-9, -0.1, 1.1, math.nan])
def test_a_beta_that_means_nothing_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta={beta}"):
        DivergenceSpec(beta)


@pytest.mark.parametrize("beta", BETAS)
def test_entries_of_probability_zero(beta: float) -> None:
    """0 log 0 is 0; an entry only one side can take is finite, and in the mixture it has its true value."""
    zero = LOG_ZERO
    s, t = torch.tensor([[0.0, zero, zero]]), torch.tensor([[zero, 0.0, zero]])
    actual = divergence_entries(s, t, DivergenceSpec(beta))
    assert actual.value.isfinite().all()
    assert actual.slope.isfinite().all()
    assert actual.value[0, 2] == 0
    if 0 < beta < 1:
        assert actual.value[0, 0].item() == pytest.approx(-(1 - beta) * math.log(1 - beta))
        assert actual.value[0, 1].item() == pytest.approx(-beta * math.log(beta))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_nearly_equal_sides_keep_their_digits(beta: float) -> None:
    """Sides 1e-3 apart: as good as float32 gets, where the logarithm of the mixture alone would leave 1e-3."""
    s, t = _log_probs()
    t = s + torch.where(t > t.median(), 1e-3, -1e-3)
    s, t = s.float(), t.float()
    actual = divergence_entries(s, t, DivergenceSpec(beta, clip_mode="none")).slope
    expected = (1 - beta) * s.double().exp() * (s.double() - _log_mixture(s.double(), t.double(), beta))
    assert float(((actual.double() - expected) / expected).abs().max()) < 1e-6


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_bregman_terms_of_nearly_equal_sides_keep_their_digits(beta: float) -> None:
    """They are of the order of the difference squared, and never negative."""
    s, t = _log_probs()
    t = s + torch.where(t > t.median(), 1e-4, -1e-4)
    s, t = s.float(), t.float()
    spec = DivergenceSpec(beta, clip_mode="bregman")
    actual = divergence_entries(s, t, spec).value
    expected = divergence_entries(s.double(), t.double(), spec).value
    assert actual.min() >= 0
    assert float(((actual.double() - expected) / expected.clamp(min=1e-30)).abs().max()) < 1e-6


def test_a_clip_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="clip=inf must be a finite number above 0"):
        DivergenceSpec(0.5, clip=math.inf, clip_mode="rescale")


def test_the_configuration_knows_the_least_beta() -> None:
    assert rules._LEAST_BETA == LEAST_BETA


def _log_mixture(s: Tensor, t: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
