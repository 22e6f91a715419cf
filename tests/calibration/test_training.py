"""Sketches and trained predictors on synthetic layers whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flashlm.calibration import fitting
from flashlm.calibration.fitting import FittedPredictor, LayerProblem, fit_layer
from flashlm.calibration.neuron_profile import pack_rows
from flashlm.calibration.operating import Operating, find_cutoffs, measure, recall_levels
from flashlm.calibration.ranks import check_rank, parse_rank, ranks_of_layer
from flashlm.calibration.sketch import Factors, InputMoments, TriggerSketch
from flashlm.calibration.training import TokenSet, TrainingSettings, balanced_loss, initial_factors, train_predictor
from flashlm.errors import ConfigError
from flashlm.sparsity.predictor import Predictor
from flashlm.sparsity.presets import paper_preset

HIDDEN, ROWS, TOKENS = 24, 80, 1200
SETTINGS = TrainingSettings(recall=0.95, max_epochs=4, batch_tokens=64)


def _token_set(inputs: torch.Tensor, active: torch.Tensor) -> TokenSet:
    return TokenSet(inputs=inputs.numpy(), packed=pack_rows(active.numpy()), num_rows=active.shape[1])


def _problem(*, inner: int, noise: float = 0.0, activation=torch.relu, threshold: float = 0.0) -> LayerProblem:
    """A layer whose trigger has rank `inner`, nearly; inputs are correlated and not centred."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, inner, generator=generator) @ torch.randn(inner, HIDDEN, generator=generator)
    weight = weight / weight.norm(dim=1, keepdim=True) + noise * torch.randn(ROWS, HIDDEN, generator=generator)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    inputs = torch.randn(TOKENS, HIDDEN, generator=generator) @ mixing + 0.5
    bias = -0.8 + 0.2 * torch.randn(ROWS, generator=generator)
    tokens = _token_set(inputs, activation(inputs @ weight.T + bias).abs() > threshold)
    return LayerProblem(
        weight=weight,
        bias=bias,
        activation=activation,
        has_exact_zeros=activation is not torch.nn.functional.silu,
        train=tokens.part(range(600)),
        validation=tokens.part(range(600, 900)),
        held_out=tokens.part(range(900, TOKENS)),
        row_bytes=8 * HIDDEN,
    )


def _sketch(problem: LayerProblem) -> TriggerSketch:
    moments = InputMoments.of(inputs for inputs, _ in problem.train.pieces())
    return TriggerSketch(problem.weight, problem.bias, moments)


def test_a_sketch_of_full_rank_is_the_product() -> None:
    problem = _problem(inner=HIDDEN)
    sketch = _sketch(problem)
    inputs, active = problem.held_out.take(slice(None))
    exact = inputs @ problem.weight.T + problem.bias
    torch.testing.assert_close(sketch.factors(HIDDEN)(inputs), exact, rtol=1e-4, atol=1e-4)
    assert ((sketch.factors(HIDDEN)(inputs) > 0).numpy() == active).mean() > 0.999
    assert float(sketch.error_std(HIDDEN).max()) == 0.0


def test_a_sketch_states_its_own_error() -> None:
    problem = _problem(inner=HIDDEN)
    sketch = _sketch(problem)
    inputs, _ = problem.train.take(slice(None))
    exact = inputs @ problem.weight.T + problem.bias
    for rank in (4, 12):
        off = (sketch.factors(rank)(inputs) - exact).std(dim=0)
        torch.testing.assert_close(sketch.error_std(rank), off, rtol=0.02, atol=1e-3)
    plain = torch.linalg.svd(problem.weight, full_matrices=False)
    unaware = (plain.U[:, :4] * plain.S[:4]) @ plain.Vh[:4] - problem.weight
    assert sketch.error_std(4).square().sum() < ((inputs - inputs.mean(dim=0)) @ unaware.T).square().mean(dim=0).sum()


def test_a_weight_of_lower_rank_than_asked_for_is_sketched_exactly() -> None:
    problem = _problem(inner=6)
    inputs, _ = problem.held_out.take(slice(None))
    exact = inputs @ problem.weight.T + problem.bias
    for rank in (6, 10):
        factors = _sketch(problem).factors(rank)
        assert factors.rank == rank
        torch.testing.assert_close(factors(inputs), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_a_layer_of_low_rank_reaches_the_recall(kind: str) -> None:
    activation, threshold = (torch.relu, 0.0) if kind == "relu" else (torch.nn.functional.silu, 0.25)
    problem = _problem(inner=6, noise=0.02, activation=activation, threshold=threshold)
    levels = recall_levels(0.95)
    fitted = fit_layer(problem, [2, 4, 8, 16], levels, SETTINGS, seed=0)
    point = fitted.operating[0]
    assert point.recall > 0.93
    assert point.predicted_share < 1.5 * problem.held_out.active_share
    assert {trial.kind for trial in fitted.trials} == {"trained", "sketch"}
    assert min(trial.cost_bytes for trial in fitted.trials) == pytest.approx(
        fitted.num_bytes + point.predicted_share * ROWS * problem.row_bytes
    )
    recalls = [each.recall for each in fitted.operating]
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0.99


def _fatrelu(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0.05, values, 0.0)


@pytest.mark.parametrize("kind", ["trained", "sketch"])
@pytest.mark.parametrize(
    ("activation", "threshold"), [(torch.relu, 0.0), (_fatrelu, 0.0), (torch.nn.functional.silu, 0.1)]
)
def test_the_stored_predictor_does_what_was_measured(kind: str, activation: Any, threshold: float) -> None:
    problem = _problem(inner=HIDDEN, activation=activation, threshold=threshold)
    levels = [0.9, 0.97]

    sketch = _sketch(problem)
    factors = sketch.factors(8) if kind == "sketch" else initial_factors(sketch, 8, problem.train.active_share)
    _, fitted = fitting._try(problem, kind, fitting.rounded(factors), levels)
    inputs, active = problem.held_out.take(slice(None))
    for level in range(len(levels)):
        reduce, expand, bias = fitted.tensors(level)
        entry = fitted.entry(level)
        assert entry.threshold >= 0.0
        stored = Predictor(entry=entry, reduce=reduce, expand=expand, bias=bias, activation=activation)
        predicted = stored.predict(inputs).numpy()
        # The kernels sum in another order than the measurement: a score at the cutoff may fall either way.
        assert predicted.mean() == pytest.approx(fitted.operating[level].predicted_share, abs=2e-3)
        assert (predicted & active).sum() / active.sum() == pytest.approx(entry.recall, abs=2e-3)


def test_training_learns_from_nothing_and_alike_each_time() -> None:
    problem = _problem(inner=4)
    generator = torch.Generator().manual_seed(1)
    nothing = Factors(
        reduce=0.1 * torch.randn(4, HIDDEN, generator=generator),
        expand=0.1 * torch.randn(ROWS, 4, generator=generator),
        bias=torch.zeros(ROWS),
    )
    settings = TrainingSettings(recall=0.95, max_epochs=20, batch_tokens=32, learning_rate=2e-2)
    trained = train_predictor(nothing, problem.train, problem.validation, settings, seed=0)
    again = train_predictor(nothing, problem.train, problem.validation, settings, seed=0)
    assert torch.equal(trained.expand, again.expand)

    def rows(factors: Factors) -> float:
        (cutoff,) = find_cutoffs(problem.validation.scored(factors), [0.95])
        return measure(problem.held_out.scored(factors), [cutoff])[0].predicted_share

    assert rows(nothing) > 2.5 * problem.held_out.active_share
    assert rows(trained) < 1.3 * problem.held_out.active_share


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_in_the_balanced_loss_positives_and_negatives_weigh_alike(share: float) -> None:
    active = torch.zeros(1000, 1)
    active[: int(1000 * share)] = 1.0
    logits = torch.zeros_like(active, requires_grad=True)
    loss = balanced_loss(logits, active, share)
    loss.backward()
    gradient = logits.grad
    assert gradient[active > 0].sum().item() == pytest.approx(-gradient[active == 0].sum().item(), rel=1e-4)
    assert loss.item() == pytest.approx(float(torch.log(torch.tensor(2.0))), rel=1e-4)


def test_cutoffs_and_counts_agree_with_plain_counting() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(500, 40)).astype(np.float32).round(1)  # with ties
    active = generator.random((500, 40)) < 1 / (1 + np.exp(-2 * scores))
    levels = [0.8, 0.95, 0.999]
    halves = [(scores[:200], active[:200]), (scores[200:], active[200:])]
    cutoffs = find_cutoffs(halves, levels)
    for level, point in zip(levels, measure(halves, cutoffs), strict=True):
        predicted = scores > np.float32(point.cutoff)
        assert point.recall == pytest.approx((predicted & active).sum() / active.sum())
        assert point.false_positive == pytest.approx((predicted & ~active).sum() / (~active).sum())
        assert point.predicted_share == pytest.approx(predicted.mean())
        assert point.recall >= level


def test_the_knee_is_where_the_zeros_end() -> None:
    assert fitting.find_knee(torch.relu) == 0.0
    assert fitting.find_knee(_fatrelu) == pytest.approx(0.05)


def test_a_layer_where_nothing_fires_is_no_error() -> None:
    scores, active = np.zeros((4, 3), dtype=np.float32), np.zeros((4, 3), dtype=bool)
    (cutoff,) = find_cutoffs([(scores, active)], [0.95])
    assert measure([(scores, active)], [cutoff]) == [
        Operating(cutoff=cutoff, recall=1.0, false_positive=0.0, predicted_share=0.0)
    ]


def test_a_threshold_stays_a_probability_however_far_the_cutoff() -> None:
    problem = _problem(inner=4)
    factors = initial_factors(_sketch(problem), 4, 0.1)
    for cutoff in (-1e4, 1e4):
        point = Operating(cutoff=cutoff, recall=1.0, false_positive=0.0, predicted_share=0.5)
        fitted = FittedPredictor(kind="trained", factors=factors, operating=(point,), is_shifted=False, trials=())
        assert 0.0 < fitted.entry(0).threshold < 1.0


def test_ranks_follow_the_papers_table() -> None:
    assert [paper_preset("opt").rank(layer, 32) for layer in (0, 27, 28, 31)] == [128, 128, 1024, 1024]
    assert [paper_preset("llama").rank(layer, 32) for layer in (0, 13, 14, 17, 18)] == [256, 256, 1024, 1024, 256]
    assert [paper_preset("phi").rank(layer, 32) for layer in (0, 8, 12, 31)] == [160, 480, 800, 800]
    assert [paper_preset("opt").rank(layer, 6) for layer in range(6)] == [128] * 5 + [1024]
    shape = {"num_layers": 6, "model_type": "opt", "hidden_size": 256, "num_rows": 1536}
    assert ranks_of_layer("paper", 5, **shape) == [128]
    assert ranks_of_layer("auto", 0, **shape) == [16, 32, 64, 128]
    assert ranks_of_layer(200, 0, **shape) == [200]


@pytest.mark.parametrize("rank", ["-1", "0", "3", "many", "1.5"])
def test_a_rank_that_makes_no_sense_is_refused(rank: str) -> None:
    with pytest.raises(ConfigError, match="rank="):
        parse_rank(rank)


def test_a_rank_above_the_layers_sides_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank=65 is above 64"):
        check_rank(65, hidden_size=64, num_rows=256)
