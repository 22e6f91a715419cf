"""Training a row predictor d → R → d_ff for one layer: which rows will fire, from the layer's own input (paper §3.1).

What the paper leaves open is filled in from Deja Vu: no bias and no non-linearity in between, binary cross-entropy with
positives and negatives of a layer weighing alike, AdamW. Training starts from the weights' own sketch (`TriggerSketch`),
with each row's estimate divided by how uncertain it is, which is the logit of firing under a normal error; so a few passes
over the text are enough. The epoch that predicts the fewest rows at the target recall, on text not trained on, is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from flashlm.calibration.neuron_profile import unpack_rows
from flashlm.calibration.operating import find_cutoffs, measure, pieces
from flashlm.calibration.sketch import Factors, TriggerSketch

PROBIT_TO_LOGIT = 1.702  # Φ(z) is about sigmoid(1.702 z)
LEAST_SPREAD = 1e-3  # of the median: no row is certain
_NUM_BITS = np.array([value.bit_count() for value in range(256)], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How predictors are trained.

    Attributes:
        learning_rate: Of AdamW at the start; falls to zero along a cosine.
        weight_decay: Of AdamW, as in Deja Vu.
        batch_tokens: Tokens of a step.
        max_epochs: Passes over the training text.
        patience: Epochs without progress before it stops.
        recall: At which epochs are compared.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    batch_tokens: int = 256
    max_epochs: int = 8
    patience: int = 2
    recall: float = 0.95


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Inputs and truly active rows of successive tokens of one layer.

    Attributes:
        inputs: fp16 or fp32 (num_tokens, d_model), possibly in a mapped file.
        packed: uint8 (num_tokens, ceil(num_rows / 8)): `pack_rows` of the truly active rows.
        num_rows: d_ff.
    """

    inputs: npt.NDArray[np.float16] | npt.NDArray[np.float32]
    packed: npt.NDArray[np.uint8]
    num_rows: int

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, span: range) -> TokenSet:
        """Return some of the tokens."""
        chosen = slice(span.start, span.stop)
        return TokenSet(inputs=self.inputs[chosen], packed=self.packed[chosen], num_rows=self.num_rows)

    def take(self, where: slice | npt.NDArray[np.int64]) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """Return inputs, fp32, and truly active rows of some tokens."""
        inputs = torch.from_numpy(np.array(self.inputs[where], dtype=np.float32))
        return inputs, unpack_rows(self.packed[where], self.num_rows)

    def pieces(self) -> Iterator[tuple[torch.Tensor, npt.NDArray[np.bool_]]]:
        """Yield all tokens, piece by piece."""
        for piece in pieces(len(self)):
            yield self.take(piece)

    def scored(
        self, score: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
        """Yield the scores of all rows with whether they are active, piece by piece."""
        for inputs, active in self.pieces():
            yield score(inputs).numpy(), active

    @property
    def active_share(self) -> float:
        """Truly active rows over all rows."""
        bits = sum(int(_NUM_BITS[self.packed[piece]].sum()) for piece in pieces(len(self)))
        return bits / max(len(self) * self.num_rows, 1)


def balanced_loss(logits: torch.Tensor, active: torch.Tensor, active_share: float) -> torch.Tensor:
    """Return the mean cross-entropy in which a layer's positives and negatives weigh alike.

    Args:
        logits: (num_tokens, num_rows).
        active: 0 or 1, same shape and dtype.
        active_share: Of the layer over the whole training text; 1/(2·share) and 1/(2·(1 - share)) are the weights.
    """
    share = min(max(active_share, 1e-6), 1.0 - 1e-6)
    positive = torch.tensor((1.0 - share) / share, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, active, pos_weight=positive)
    return loss / (2.0 * (1.0 - share))


def initial_factors(sketch: TriggerSketch, rank: int, active_share: float) -> Factors:
    """Return the sketch as logits of a balanced predictor: estimate over uncertainty, row by row."""
    factors = sketch.factors(rank)
    spread = sketch.error_std(rank)
    spread = spread.clamp(min=max(LEAST_SPREAD * float(spread.median()), 1e-6))
    scale = (PROBIT_TO_LOGIT / spread).clamp(max=1e3)
    share = min(max(active_share, 1e-6), 1.0 - 1e-6)
    shift = math.log((1.0 - share) / share)  # what balancing adds to an honest logit
    return Factors(reduce=factors.reduce, expand=factors.expand * scale[:, None], bias=factors.bias * scale + shift)


def rows_at_recall(score: Callable[[torch.Tensor], torch.Tensor], tokens: TokenSet, recall: float) -> float:
    """Return the predicted share at `recall`, on the same tokens."""
    (cutoff,) = find_cutoffs(tokens.scored(score), [recall])
    return measure(tokens.scored(score), [cutoff])[0].predicted_share


def train_predictor(
    initial: Factors,
    train: TokenSet,
    validation: TokenSet,
    settings: TrainingSettings,
    *,
    seed: int,
    device: str = "cpu",
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> Factors:
    """Return the trained factors, on the CPU; their product with an input is the logit of firing.

    Args:
        initial: Where to start.
        train: Tokens to learn from.
        validation: Tokens that choose the epoch.
        settings: How.
        seed: Order of the tokens.
        device: Where it computes: "cpu", "cuda".
        on_epoch: Called after each epoch with its number.
    """
    generator = np.random.default_rng(seed)
    mean, spread = (each.to(device) for each in _standardise(train))
    best, best_rows, num_worse = initial, rows_at_recall(initial, validation, settings.recall), 0
    initial = initial.to(device)
    # Learned on standardised inputs, so that outlier dimensions do not decide the step size.
    reduce = (initial.reduce * spread).clone().requires_grad_(True)
    expand = initial.expand.clone().requires_grad_(True)
    bias = (initial.bias + initial.expand @ (initial.reduce @ mean)).clone().requires_grad_(True)
    steps = max(settings.max_epochs * math.ceil(len(train) / settings.batch_tokens), 1)
    groups: list[dict[str, Any]] = [{"params": [reduce, expand]}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    share = train.active_share
    for epoch in range(settings.max_epochs):
        order = generator.permutation(len(train))
        for start in range(0, len(order), settings.batch_tokens):
            inputs, active = train.take(np.sort(order[start : start + settings.batch_tokens]))
            hidden = (inputs.to(device) - mean) / spread @ reduce.T
            logits = torch.addmm(bias, hidden, expand.T)
            loss = balanced_loss(logits, torch.from_numpy(active).to(device).float(), share)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        on_epoch(epoch)
        plain = (reduce / spread).detach()
        current = Factors(
            reduce=plain, expand=expand.detach().clone(), bias=(bias - expand @ (plain @ mean)).detach().clone()
        ).to("cpu")
        rows = rows_at_recall(current, validation, settings.recall)
        num_worse = 0 if rows < best_rows else num_worse + 1
        if rows < best_rows:
            best, best_rows = current, rows
        if num_worse >= settings.patience:
            break
    return best


def _standardise(tokens: TokenSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each input dimension, fp32 (d_model,), the latter never tiny."""
    total = squares = None
    for inputs, _ in tokens.pieces():
        wide = inputs.double()
        total = wide.sum(dim=0) if total is None else total + wide.sum(dim=0)
        squares = wide.square().sum(dim=0) if squares is None else squares + wide.square().sum(dim=0)
    assert total is not None
    assert squares is not None
    mean = total / len(tokens)
    spread = (squares / len(tokens) - mean.square()).clamp(min=0.0).sqrt()
    return mean.float(), spread.clamp(min=1e-3 * float(spread.mean()) + 1e-8).float()
