"""AWD-LSTM's regularisers, each against what would be seen if it were done wrongly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flashlm.pru import PRUConfig, PRUForCausalLM
from flashlm.pru.module import PRU
from flashlm.pru.training.regularisers import Pass, drop, embed, keep_mask, run_window
from flashlm.pru.training.settings import TrainingSettings

PLAIN = {"dropout": 0.0, "dropouth": 0.0, "dropouti": 0.0, "alpha": 0.0, "beta": 0.0}
SMALL = {"vocab_size": 40, "embedding_size": 8, "hidden_size": 16, "groups": 2, "init": "per_group", "dropout": 0.0}


@pytest.fixture(params=["pru", "lstm"])
def model(request: pytest.FixtureRequest) -> PRUForCausalLM:
    torch.manual_seed(0)
    return PRUForCausalLM(PRUConfig(**SMALL, arch=request.param)).train()


def tokens() -> torch.Tensor:
    return torch.randint(0, 40, (9, 3), generator=torch.Generator().manual_seed(5))


def run(model: PRUForCausalLM, **settings: float | bool) -> Pass:
    rows = tokens()
    return run_window(model, TrainingSettings(**(PLAIN | settings)), rows[:-1], rows[1:], None)  # type: ignore[arg-type]


def context_weights(model: PRUForCausalLM) -> list[torch.nn.Parameter]:
    return [
        layer.cells[0].context_transform.weight if isinstance(layer, PRU) else layer.weight_hh_l0  # type: ignore[union-attr]
        for layer in model.layers
    ]


def test_without_regularisers_the_pass_is_the_models_own(model: PRUForCausalLM) -> None:
    result = run(model)
    expected = model(tokens().t(), labels=tokens().t())
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-6, atol=1e-6)


def test_eval_mode_turns_every_dropout_off(model: PRUForCausalLM) -> None:
    everything = {"dropout": 0.5, "dropouth": 0.5, "dropouti": 0.5, "dropoute": 0.5, "weight_dropout": 0.5}
    model.eval()
    with torch.no_grad():
        assert run(model, **everything).loss.item() == pytest.approx(run(model).loss.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["dropout", "dropouth", "dropouti", "dropoute", "weight_dropout"])
def test_each_dropout_does_something_and_is_drawn_afresh(model: PRUForCausalLM, name: str) -> None:
    model.config.dropout = 0.0  # the settings decide, not what the model was made with
    losses = {run(model, **{name: 0.5}).loss.item() for _ in range(3)}
    assert len(losses | {run(model).loss.item()}) == 4


def test_dropped_recurrent_weights_get_no_gradient_and_the_others_do(model: PRUForCausalLM) -> None:
    run(model).loss.backward()
    assert all((weight.grad != 0).all() for weight in context_weights(model))
    model.zero_grad()
    run(model, weight_dropout=0.5).loss.backward()
    for weight in context_weights(model):
        share = (weight.grad == 0).double().mean().item()
        assert share == pytest.approx(0.5, abs=5 * 0.5 / weight.numel() ** 0.5)


def test_weight_drop_is_one_mask_for_the_whole_window(model: PRUForCausalLM) -> None:
    torch.manual_seed(3)
    dropped = run(model, weight_dropout=0.5)
    torch.manual_seed(3)
    masked = [F.dropout(weight.detach(), 0.5) for weight in context_weights(model)]  # drawn in the layers' order
    with torch.no_grad():
        for weight, values in zip(context_weights(model), masked, strict=True):
            weight.copy_(values)
    torch.testing.assert_close(dropped.loss, run(model).loss, rtol=1e-6, atol=1e-6)


def test_locked_dropout_shares_its_mask_over_time_and_not_over_the_batch() -> None:
    torch.manual_seed(0)
    y = drop(torch.ones(7, 6, 50), 0.4, is_training=True, is_locked=True)
    assert torch.equal(y, y[:1].expand_as(y))
    assert not torch.equal(y[:, 0], y[:, 1])
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.6])


def test_plain_dropout_draws_every_element() -> None:
    torch.manual_seed(0)
    y = drop(torch.ones(7, 6, 50), 0.4, is_training=True, is_locked=False)
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("share", [0.1, 0.4, 0.65])
def test_a_mask_drops_its_share_and_keeps_the_mean(share: float) -> None:
    torch.manual_seed(0)
    mask = keep_mask(torch.empty(1001, 999), share)
    is_dropped = mask == 0
    error = 5 * (share * (1 - share) / mask.numel()) ** 0.5 + 2**-16
    assert is_dropped.double().mean().item() == pytest.approx(share, abs=error)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - share)], rel=1e-4)
    # neighbours share a 64-bit draw; they must not share their fate
    both = (is_dropped.flatten()[:-1] & is_dropped.flatten()[1:]).double().mean().item()
    assert both == pytest.approx(share**2, abs=2e-3)


def test_masks_come_from_torchs_generator_and_serve_any_shape_and_dtype() -> None:
    masks = []
    for _ in range(2):
        torch.manual_seed(4)
        masks.append([keep_mask(torch.empty(shape, dtype=torch.bfloat16), 0.4) for shape in [(), (1,), (3, 1, 3)]])
    for one, other in zip(*masks, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.bfloat16


def test_an_lstm_under_autocast_keeps_its_state_in_fp32_and_agrees(model: PRUForCausalLM) -> None:
    expected = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        result = run(model)
    assert {part.dtype for state in result.state for part in state} == {torch.float32}
    torch.testing.assert_close(result.loss, expected.loss, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("is_training", [True, False])
def test_weight_drop_serves_double_weights(model: PRUForCausalLM, is_training: bool) -> None:
    model.double().train(is_training)
    assert run(model, weight_dropout=0.5).state[0][0].dtype == torch.float64


def test_embedding_dropout_drops_whole_words_and_scales_the_others() -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(200, 4)
    y = embed(embedding, torch.arange(200).repeat(2, 1), 0.3)
    ratio = (y / embedding.weight).detach()
    assert torch.equal(ratio[0], ratio[1])  # the same words at every place
    assert (ratio[0] == ratio[0][:, :1]).all() or torch.allclose(ratio[0], ratio[0][:, :1].expand(-1, 4))
    kept = ratio[0][:, 0] > 0
    torch.testing.assert_close(ratio[0][kept], torch.full_like(ratio[0][kept], 1 / 0.7))
    assert 0.15 < 1 - kept.double().mean().item() < 0.45


def test_activation_terms_are_on_the_dropped_and_on_the_raw_output(
    model: PRUForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: dropped.append(inputs[0]))
    raw: list[torch.Tensor] = []
    model.layers[-1].register_forward_hook(lambda module, inputs, output: raw.append(output[0]))
    result = run(model, dropout=0.5, alpha=2.0, beta=1.0)
    assert not torch.equal(dropped[0], raw[0])
    expected = 2.0 * (dropped[0] ** 2).mean() + ((raw[0][1:] - raw[0][:-1]) ** 2).mean()
    torch.testing.assert_close(result.loss - result.cross_entropy, expected, rtol=0, atol=1e-6)


def test_a_window_of_one_token_has_a_finite_loss(model: PRUForCausalLM) -> None:
    rows = tokens()
    result = run_window(model, TrainingSettings(), rows[:1], rows[1:2], None)
    assert torch.isfinite(result.loss)


def test_state_is_carried_and_cut_from_the_graph(model: PRUForCausalLM) -> None:
    rows = tokens()
    settings = TrainingSettings(**PLAIN)  # type: ignore[arg-type]
    first = run_window(model, settings, rows[:4], rows[1:5], None)
    second = run_window(model, settings, rows[4:-1], rows[5:], first.state)
    assert not first.state[0][0].requires_grad
    both = (first.loss * 4 + second.loss * 4) / 8
    torch.testing.assert_close(both, run(model).loss, rtol=1e-6, atol=1e-6)
