"""Dynamic evaluation against its rule written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flashlm.errors import ConfigError
from flashlm.pru import PRUConfig, PRUForCausalLM
from flashlm.pru.training.dynamic import DynamicSettings, best_settings, gradient_rms, score_dynamically
from flashlm.pru.training.evaluate import score

IDS = np.random.default_rng(0).integers(0, 12, 31)
REPETITIVE = np.tile(np.array([3, 1, 4, 1, 5, 9, 2, 6]), 40)


@pytest.fixture(params=["pru", "lstm"])
def model(request: pytest.FixtureRequest) -> PRUForCausalLM:
    torch.manual_seed(0)
    config = PRUConfig(
        vocab_size=12, embedding_size=8, hidden_size=16, groups=2, init="per_group", arch=request.param, dropout=0.4
    )
    return PRUForCausalLM(config).double().eval()


def segments(model: PRUForCausalLM, ids: np.ndarray, batch: int, length: int):  # type: ignore[type-arg,no-untyped-def]
    """Yield the mean loss of each segment, with gradients; plain transformers calls on text that is (batch, T)."""
    text = torch.from_numpy(ids[: len(ids) // batch * batch]).view(batch, -1)
    state = None
    for start in range(0, text.shape[1] - 1, length):
        inputs = text[:, start : start + length][:, : text.shape[1] - 1 - start]
        output = model(inputs, state=state)
        state = tuple((h.detach(), c.detach()) for h, c in output.state)
        targets = text[:, start + 1 : start + 1 + inputs.shape[1]]
        model.zero_grad()
        loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        loss.backward()
        yield loss.item(), targets.numel()


def test_statistics_are_root_mean_squares_over_segments(model: PRUForCausalLM) -> None:
    rms = gradient_rms(model, IDS, DynamicSettings(statistics_batch_size=3, segment=4))
    squares = [torch.zeros_like(parameter) for parameter in model.parameters()]
    count = 0
    for _ in segments(model, IDS, 3, 4):
        count += 1
        for square, parameter in zip(squares, model.parameters(), strict=True):
            square += parameter.grad**2
    assert count == 3
    for ours, square in zip(rms, squares, strict=True):
        torch.testing.assert_close(ours, (square / count).sqrt(), rtol=1e-6, atol=1e-9)  # the loss is in fp32


def test_segments_are_scored_before_the_step_and_the_step_is_the_published_one(model: PRUForCausalLM) -> None:
    settings = DynamicSettings(lr=3e-3, lamb=0.4, epsilon=1e-3)
    rms = gradient_rms(model, IDS, settings)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = score_dynamically(model, IDS, rms, settings)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))  # put back
    assert not model.training
    mean = torch.stack([values.mean() for values in rms]).mean()
    total = 0.0
    for loss, count in segments(model, IDS, 1, settings.segment):
        total += loss * count
        with torch.no_grad():
            for parameter, origin, values in zip(model.parameters(), before, rms, strict=True):
                decay = (values / mean).clamp(max=1 / settings.lamb)
                parameter += settings.lamb * decay * (origin - parameter) - settings.lr * parameter.grad / (
                    values + settings.epsilon
                )
    assert result.num_tokens == 30
    assert result.loss_sum == pytest.approx(total, rel=1e-6)


def test_a_repetitive_text_is_learnt_and_a_tiny_rate_changes_nothing(model: PRUForCausalLM) -> None:
    static = score(model, REPETITIVE).loss
    rms = gradient_rms(model, REPETITIVE, DynamicSettings())
    assert score_dynamically(model, REPETITIVE, rms, DynamicSettings(lr=3e-4)).loss < static - 0.05
    still = DynamicSettings(lr=1e-12)
    assert score_dynamically(model, REPETITIVE, rms, still).loss == pytest.approx(static, rel=1e-6)


def test_the_grid_returns_its_best_and_scales_with_the_segment(model: PRUForCausalLM) -> None:
    tried = []
    settings = DynamicSettings(segment=10)
    rms = gradient_rms(model, REPETITIVE, settings)
    best = best_settings(
        model, REPETITIVE, rms, settings, max_tokens=60, on_tried=lambda made, result: tried.append((result.loss, made))
    )
    assert len(tried) == 24
    assert best == min(tried, key=lambda pair: pair[0])[1]
    assert sorted({made.lamb for _, made in tried}) == pytest.approx([2e-3, 4e-3, 6e-3, 1e-2])


def test_a_setting_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr must be greater than 0"):
        DynamicSettings(lr=0.0)
