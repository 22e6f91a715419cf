"""Cross-entropy in pieces against torch's, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flashlm.pru.training import cross_entropy as module
from flashlm.pru.training.cross_entropy import cross_entropy


@pytest.mark.parametrize("piece_elements", [1, 100, 1 << 19])  # a row each, some rows and a rest, all at once
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_and_gradient_equal_torchs(
    dtype: torch.dtype, piece_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE_ELEMENTS", piece_elements)
    generator = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(11, 37, generator=generator)).to(dtype).requires_grad_()
    logits.data[0, 3] = 300.0  # far beyond what fp32 can exponentiate
    logits.data[1] = -200.0
    targets = torch.randint(0, 37, (11,), generator=generator)
    wide = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, targets)
    loss = cross_entropy(logits, targets)
    before = logits.detach().clone()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for scale in (1.0, 1 / 3):
        got = torch.autograd.grad(loss * scale, logits, retain_graph=True)[0]
        assert got.dtype == dtype
        exact = torch.autograd.grad(expected * scale, wide, retain_graph=True)[0]
        rounding = (1 if scale == 1 else 2) * 2.0**-8 if dtype == torch.bfloat16 else 1e-5  # once, or twice
        torch.testing.assert_close(got.double(), exact, rtol=rounding, atol=1e-8)
    assert torch.equal(logits, before)


def test_without_gradients_it_is_torchs_own() -> None:
    logits, targets = torch.randn(5, 9), torch.tensor([0, 1, 2, 3, 8])
    assert torch.equal(cross_entropy(logits, targets), F.cross_entropy(logits, targets))


def test_a_nan_logit_gives_a_nan_loss() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    assert cross_entropy(logits.requires_grad_(), torch.tensor([0, 1, 2])).isnan()


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises((RuntimeError, IndexError)):
        cross_entropy(torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 4]))
