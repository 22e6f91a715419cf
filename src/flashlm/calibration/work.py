"""The stages of a calibration: record what the layers do, fit their predictors, choose how many rows each predicts.

Each stage takes what the store has of it and adds the rest, so that a calibration that was stopped goes on. The model is
loaded for passes only.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from transformers import AutoConfig
from transformers.activations import ACT2FN

from flashlm.calibration.capture import (
    CalibrationText,
    Recording,
    activation_quantiles,
    masked,
    record,
    streamed_layers,
    token_losses,
)
from flashlm.calibration.error_budget import Levels, Losses, Rise, largest_passing, search_levels
from flashlm.calibration.fitting import FittedPredictor, LayerProblem, fit_layer
from flashlm.calibration.operating import LEVEL_RATIO, recall_levels
from flashlm.calibration.ranks import ranks_of_layer
from flashlm.calibration.store import CalibrationStore
from flashlm.calibration.training import TokenSet, TrainingSettings
from flashlm.calibration.trigger import read_trigger
from flashlm.engine.model import load
from flashlm.errors import BudgetError
from flashlm.memory.limits import read_memory_limits
from flashlm.pack.manifest import Manifest
from flashlm.sizes import format_size, parse_budget_bytes
from flashlm.sparsity.predictor import Predictor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

THRESHOLD_SHARES = tuple(step / 20 for step in range(1, 20))  # sparsity tried where zeros are not exact
THRESHOLD_BUDGET = 0.5  # of the error budget; the rest is for the predictors
MAX_TIGHTENINGS = 3

Progress = Callable[[int, int, str], None]


@contextmanager
def loaded_model(
    pack: Path, text: CalibrationText, *, dram: str | int | None, mode: str, aside_bytes: int = 0
) -> Iterator[PreTrainedModel]:
    """Load a pack for passes over a text, and close it; logits and `aside_bytes` of the bound are kept free."""
    dram_bytes = read_memory_limits().default_dram_bytes if dram is None else parse_budget_bytes(dram)
    config = AutoConfig.from_pretrained(pack).get_text_config(decoder=True)
    aside_bytes += text.pass_tokens * int(config.vocab_size) * 4
    try:
        model = load(pack, dram=max(dram_bytes - aside_bytes, 1), mode=mode, context=text.pass_tokens)
    except BudgetError as error:
        raise BudgetError(
            f"{error} (calibrating keeps {format_size(aside_bytes)} of dram={format_size(dram_bytes)} for logits and"
            " what is recorded)",
            needed_bytes=error.needed_bytes + aside_bytes,
            available_bytes=error.available_bytes + aside_bytes,
        ) from error
    try:
        yield model
    finally:
        model.flash.close()
        del model
        gc.collect()


def has_exact_zeros(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Return whether an activation is exactly zero wherever it is not positive: ReLU, its square, FATReLU."""
    positive = torch.linspace(0.1, 8.0, 257)
    return bool((activation(-positive) == 0).all() and (activation(positive) > 0).all())


@dataclass(kw_only=True)
class CalibrationWork:
    """One calibration: its stages, each of which picks up what the store has of it.

    Attributes are those of `calibrate`, and the store; `levels` are the recall targets that layers choose from.
    """

    pack: Path
    manifest: Manifest
    text: CalibrationText
    rank: str | int
    recall: float
    threshold: float | None
    window: int | None
    device: str
    max_increase: float
    dram: str | int | None
    seed: int
    store: CalibrationStore
    progress: Progress

    def __post_init__(self) -> None:
        self.num_layers = len(self.manifest.layers)
        self.activation = ACT2FN[self.manifest.activation]
        self.has_exact_zeros = has_exact_zeros(self.activation)
        self.levels = recall_levels(self.recall)

    @contextmanager
    def model(self, extra_bytes: int = 0) -> Iterator[PreTrainedModel]:
        """Load the pack for dense passes; `extra_bytes` of the bound are kept for what runs beside it."""
        rows_bytes = self.text.pass_tokens * max(entry.num_rows for entry in self.manifest.layers) * 8
        with loaded_model(
            self.pack, self.text, dram=self.dram, mode="hybrid", aside_bytes=extra_bytes + rows_bytes
        ) as model:
            yield model

    @property
    def recorded_bytes(self) -> int:
        """Space that inputs and active rows take beside the pack, for a while."""
        per_token_bytes = sum(2 * self.manifest.hidden_size + -(-entry.num_rows // 8) for entry in self.manifest.layers)
        return self.text.num_tokens * per_token_bytes

    def record(self) -> list[float]:
        """Return the activation thresholds, once inputs and active rows of all layers are in the store."""
        recorded = self.store.read("recorded.json")
        if recorded is not None:
            return [float(threshold) for threshold in recorded]
        num_tokens, hidden_size = self.text.num_tokens, self.manifest.hidden_size
        widths = [-(-entry.num_rows // 8) for entry in self.manifest.layers]
        self.store.check_space(self.recorded_bytes)
        with self.model() as model:
            thresholds = [0.0] * self.num_layers if self.has_exact_zeros else self.find_thresholds(model)
            recordings = [
                Recording(
                    inputs=self.store.create(_inputs_name(layer), (num_tokens, hidden_size), np.float16),
                    packed=self.store.create(_active_name(layer), (num_tokens, width), np.uint8),
                )
                for layer, width in enumerate(widths)
            ]
            record(model, self.text, recordings, thresholds, self.progress)
        for recording in recordings:
            recording.inputs.flush()
            recording.packed.flush()
        self.store.write("recorded.json", thresholds)
        return thresholds

    def find_thresholds(self, model: PreTrainedModel) -> list[float]:
        """Return a threshold per layer: the highest common sparsity that takes no more than its part of the budget."""
        found = self.store.read("thresholds.json")
        if found is not None:
            return [float(threshold) for threshold in found]
        quantiles = activation_quantiles(model, self.text, THRESHOLD_SHARES, self.progress)
        layers = streamed_layers(model)
        dense = self.dense_losses(model, "validation")

        def passes(index: int) -> bool:
            self.progress(index, len(THRESHOLD_SHARES), f"threshold at {THRESHOLD_SHARES[index]:.0%} of neurons")
            with masked(layers, [None] * len(layers), [each[index] for each in quantiles]):
                rise = Rise.of(dense, token_losses(model, self.text, self.text.validation))
            return rise.increase <= self.max_increase * THRESHOLD_BUDGET

        best = largest_passing(len(THRESHOLD_SHARES), passes)
        thresholds = [0.0] * self.num_layers if best is None else [each[best] for each in quantiles]
        self.store.write("thresholds.json", thresholds)
        return thresholds

    def dense_losses(self, model: PreTrainedModel, part: str) -> Losses:
        """Return the dense model's losses on "validation" or "held_out"."""
        kept = self.store.read(f"dense-{part}.json")
        if kept is not None:
            return np.array(kept, dtype=np.float64)
        windows: range = getattr(self.text, part)
        losses = token_losses(
            model, self.text, windows, lambda done: self.progress(done, len(windows), "dense perplexity")
        )
        self.store.write(f"dense-{part}.json", losses.tolist())
        return losses

    def tokens(self, layer: int) -> TokenSet:
        """Return what was recorded of a layer."""
        return TokenSet(
            inputs=self.store.open(_inputs_name(layer)),
            packed=self.store.open(_active_name(layer)),
            num_rows=self.manifest.layers[layer].num_rows,
        )

    def fit(self, layer: int) -> FittedPredictor:
        """Return a layer's predictor."""
        kept = self.store.load_predictor(layer)
        if kept is not None:
            return kept
        layout, text, tokens = self.manifest.layout(layer), self.text, self.tokens(layer)
        weight, bias = read_trigger(self.pack, self.manifest, layer)
        problem = LayerProblem(
            weight=weight,
            bias=bias,
            activation=self.activation,
            has_exact_zeros=self.has_exact_zeros,
            train=tokens.part(text.tokens_of(text.train)),
            validation=tokens.part(text.tokens_of(text.validation)),
            held_out=tokens.part(text.tokens_of(text.held_out)),
            row_bytes=layout.row_stride_bytes,
        )
        ranks = ranks_of_layer(
            self.rank,
            layer,
            num_layers=self.num_layers,
            model_type=self.manifest.model_type,
            hidden_size=layout.hidden_size,
            num_rows=layout.num_rows,
        )
        fitted = fit_layer(
            problem,
            ranks,
            self.levels,
            TrainingSettings(recall=self.recall),
            threshold=self.threshold,
            device=self.device,
            seed=self.seed + layer,
            on_step=lambda rank, what: self.progress(layer, self.num_layers, f"layer {layer}: rank {rank}, {what}"),
        )
        self.store.save_predictor(layer, fitted)
        return fitted

    def choose(self, fitted: Sequence[FittedPredictor], thresholds: list[float]) -> tuple[Levels, Rise]:
        """Return the recall levels of all layers and the rise that they cost on the held-out text.

        With a threshold given there is but one level.
        """
        with self.model(extra_bytes=2 * sum(each.num_bytes for each in fitted)) as model:
            if self.threshold is not None:
                only = (0,) * self.num_layers
                final = self.rise(model, fitted, thresholds, only, "held_out")
                return Levels(levels=only, rise=final, has_passed=final.increase <= self.max_increase), final
            budget = self.max_increase
            for _ in range(MAX_TIGHTENINGS):
                levels = search_levels(
                    lambda levels: self.rise(model, fitted, thresholds, levels, "validation"),
                    [
                        [point.predicted_share * entry.num_rows for point in each.operating]
                        for each, entry in zip(fitted, self.manifest.layers, strict=True)
                    ],
                    LEVEL_RATIO,
                    budget,
                    lambda layer: self.isolated(model, fitted, thresholds, layer),
                )
                final = self.rise(model, fitted, thresholds, levels.levels, "held_out")
                if final.increase <= self.max_increase or not levels.has_passed:
                    break
                budget = min(budget, levels.rise.increase) * self.max_increase / final.increase * 0.9
        return levels, final

    def rise(
        self,
        model: PreTrainedModel,
        fitted: Sequence[FittedPredictor],
        thresholds: list[float],
        levels: tuple[int | None, ...],
        part: str,
    ) -> Rise:
        """Return the rise with each layer at its level, dense where that is None."""
        key = f"rise-{part}-{xxhash.xxh3_64_hexdigest(repr(levels).encode())}.json"
        kept = self.store.read(key)
        if kept is not None:
            return Rise(**kept)
        dense = self.dense_losses(model, part)
        selections = [
            None if level is None else stored_predictor(each, level, self.activation).predict
            for each, level in zip(fitted, levels, strict=True)
        ]
        windows: range = getattr(self.text, part)
        with masked(streamed_layers(model), selections, thresholds):
            sparse = token_losses(
                model, self.text, windows, lambda done: self.progress(done, len(windows), f"sparse perplexity, {part}")
            )
        rise = Rise.of(dense, sparse)
        self.store.write(key, asdict(rise))
        return rise

    def isolated(
        self, model: PreTrainedModel, fitted: Sequence[FittedPredictor], thresholds: list[float], layer: int
    ) -> float:
        """Return the rise, in nats, with only `layer` at the lowest level and the others unpredicted."""
        levels = tuple(0 if index == layer else None for index in range(self.num_layers))
        rise = self.rise(model, fitted, thresholds, levels, "validation")
        none = self.rise(model, fitted, thresholds, (None,) * self.num_layers, "validation")
        return rise.sparse_nll - none.sparse_nll


def stored_predictor(
    fitted: FittedPredictor, level: int, activation: Callable[[torch.Tensor], torch.Tensor]
) -> Predictor:
    """Return a layer's predictor at a recall level, as a pack would give it."""
    reduce, expand, bias = fitted.tensors(level)
    return Predictor(entry=fitted.entry(level), reduce=reduce, expand=expand, bias=bias, activation=activation)


def _inputs_name(layer: int) -> str:
    return f"inputs-{layer:05d}.npy"


def _active_name(layer: int) -> str:
    return f"active-{layer:05d}.npy"
