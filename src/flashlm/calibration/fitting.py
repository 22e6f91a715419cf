"""One layer's predictor: sketches and trained ones of several ranks are made and measured, the cheapest is kept.

At equal recall a predictor costs its own bytes, which every token goes through, and the rows that it predicts, whose bytes
must be held or read. That sum decides between kinds and between ranks; all figures are kept for the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from flashlm.calibration.operating import Operating, find_cutoffs, measure
from flashlm.calibration.sketch import Factors, InputMoments, TriggerSketch
from flashlm.calibration.training import TokenSet, TrainingSettings, initial_factors, train_predictor
from flashlm.sparsity.calibration_document import PredictorEntry

Kind = Literal["trained", "sketch"]
MAX_LOGIT = 25.0  # beyond it a threshold, a probability, can't be told from 0 or 1
NEARLY = 1.1  # training takes less than a tenth off a sketch's cost (measured at ranks from 16 on)
_HALF_MAX = 6e4


class Trial(BaseModel):
    """What one predictor would do at the lowest recall level, on held-out text.

    Attributes:
        kind, rank, recall, false_positive, predicted_share: As in `PredictorEntry`.
        predictor_bytes: Its size.
        cost_bytes: That and the bytes of the rows that it predicts for a token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    rank: int
    recall: float
    false_positive: float
    predicted_share: float
    predictor_bytes: int
    cost_bytes: float


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """What a layer's predictor is fitted on.

    Attributes:
        weight: The trigger's, fp32 (d_ff, d_model).
        bias: fp32 (d_ff,).
        activation: Of the layer.
        has_exact_zeros: Whether a neuron is active exactly where its trigger is positive.
        train, validation, held_out: Tokens to learn from, to set thresholds by, and to measure on.
        row_bytes: Bytes of one row in the layer file.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]
    has_exact_zeros: bool
    train: TokenSet
    validation: TokenSet
    held_out: TokenSet
    row_bytes: int


@dataclass(frozen=True, kw_only=True)
class FittedPredictor:
    """A layer's predictor with all its operating points; which one is used is decided later, for the whole model.

    Attributes:
        kind: "trained" or "sketch".
        factors: As stored: 16-bit values, held as fp16 (bf16 where fp16 is too narrow); the bias is fp32.
        operating: One point per recall level.
        is_shifted: The bias is moved so that the cutoff falls on `knee`, for sketches of activations with exact zeros.
        knee: The largest argument at which such an activation is zero: 0 for ReLU.
        trials: Everything that was tried, this one among it.
    """

    kind: Kind
    factors: Factors
    operating: tuple[Operating, ...]
    is_shifted: bool
    trials: tuple[Trial, ...]
    knee: float = 0.0

    @property
    def num_bytes(self) -> int:
        """DRAM that it takes."""
        return predictor_bytes(self.factors)

    def entry(self, level: int) -> PredictorEntry:
        """Return the document's entry at a recall level."""
        point = self.operating[level]
        threshold = max(point.cutoff, 0.0)
        if self.kind == "trained":
            threshold = 1.0 / (1.0 + math.exp(-min(max(point.cutoff, -MAX_LOGIT), MAX_LOGIT)))
        elif self.is_shifted:
            threshold = 0.0
        return PredictorEntry(
            kind=self.kind,
            rank=self.factors.rank,
            threshold=threshold,
            recall=point.recall,
            false_positive=point.false_positive,
            predicted_share=point.predicted_share,
        )

    def tensors(self, level: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `reduce`, `expand` and `bias` as a pack stores them, for a recall level."""
        shift = self.operating[level].cutoff - self.knee if self.is_shifted else 0.0
        return self.factors.reduce, self.factors.expand, self.factors.bias - shift


def find_knee(activation: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Return the largest argument up to 0.1 at which an activation with exact zeros is zero: 0.01 for FATReLU."""
    low, high = 0.0, 0.1
    for _ in range(60):
        middle = (low + high) / 2
        if activation(torch.tensor(middle)).item() == 0.0:
            low = middle
        else:
            high = middle
    return low


def predictor_bytes(factors: Factors) -> int:
    """Return the size of stored factors."""
    return sum(each.numel() * each.element_size() for each in (factors.reduce, factors.expand, factors.bias))


def rounded(factors: Factors) -> Factors:
    """Return the factors in the 16-bit type that they will have; the bias stays fp32."""
    largest = max(float(factors.reduce.abs().max()), float(factors.expand.abs().max()))
    dtype = torch.float16 if largest < _HALF_MAX else torch.bfloat16
    return Factors(reduce=factors.reduce.to(dtype), expand=factors.expand.to(dtype), bias=factors.bias)


def fit_layer(
    problem: LayerProblem,
    ranks: list[int],
    levels: list[float],
    settings: TrainingSettings,
    *,
    threshold: float | None = None,
    device: str = "cpu",
    seed: int,
    on_step: Callable[[int, str], None] = lambda rank, what: None,
) -> FittedPredictor:
    """Return the cheapest predictor of a layer.

    Every rank is sketched, which is quick; ranks whose sketch comes near the cheapest one are trained, too.

    Args:
        problem: Weights and tokens.
        ranks: To choose from.
        levels: Recall targets, the lowest first: there predictors are compared.
        settings: Of the training.
        threshold: Probability above which a row is predicted, in place of the recall targets; sketches have none, so
            only trained predictors are tried then.
        device: Where predictors are trained.
        seed: Of the training.
        on_step: Called with the rank and what is done now.
    """
    on_step(ranks[0], "sketch")
    moments = InputMoments.of(inputs for inputs, _ in problem.train.pieces())
    sketch = TriggerSketch(problem.weight, problem.bias, moments)
    found = []
    promising = ranks
    if threshold is None:
        found = [_try(problem, "sketch", rounded(sketch.factors(rank)), levels[:1]) for rank in ranks]
        least_bytes = min(trial.cost_bytes for trial, _ in found)
        promising = [trial.rank for trial, _ in found if trial.cost_bytes <= least_bytes * NEARLY]
    share = problem.train.active_share
    for rank in promising:
        trained = train_predictor(
            initial_factors(sketch, rank, share),
            problem.train,
            problem.validation,
            settings,
            seed=seed,
            device=device,
            on_epoch=lambda epoch, rank=rank: on_step(rank, f"epoch {epoch + 1}"),  # type: ignore[misc]
        )
        found.append(_try(problem, "trained", rounded(trained), levels[:1], threshold))
    cheapest = min(found, key=lambda each: each[0].cost_bytes)[1]
    _, chosen = _try(problem, cheapest.kind, cheapest.factors, levels, threshold)
    return replace(chosen, trials=tuple(trial for trial, _ in found))


def _try(
    problem: LayerProblem, kind: Kind, factors: Factors, levels: list[float], threshold: float | None = None
) -> tuple[Trial, FittedPredictor]:
    """Set a predictor's cutoffs on the validation text, or at `threshold`, and measure it on the held-out text."""
    wide = Factors(reduce=factors.reduce.float(), expand=factors.expand.float(), bias=factors.bias)
    is_magnitude = kind == "sketch" and not problem.has_exact_zeros

    def score(inputs: torch.Tensor) -> torch.Tensor:
        scores = wide(inputs)
        return problem.activation(scores).abs() if is_magnitude else scores

    if threshold is None:
        cutoffs = find_cutoffs(problem.validation.scored(score), levels)
    else:
        cutoffs = [math.log(threshold / (1.0 - threshold))]
    if is_magnitude:
        cutoffs = [max(cutoff, 0.0) for cutoff in cutoffs]
    operating = tuple(measure(problem.held_out.scored(score), cutoffs))
    point, size = operating[0], predictor_bytes(factors)
    trial = Trial(
        kind=kind,
        rank=factors.rank,
        recall=point.recall,
        false_positive=point.false_positive,
        predicted_share=point.predicted_share,
        predictor_bytes=size,
        cost_bytes=size + point.predicted_share * len(problem.weight) * problem.row_bytes,
    )
    is_shifted = kind == "sketch" and problem.has_exact_zeros
    knee = find_knee(problem.activation) if is_shifted else 0.0
    return trial, FittedPredictor(
        kind=kind, factors=factors, operating=operating, is_shifted=is_shifted, trials=(trial,), knee=knee
    )
