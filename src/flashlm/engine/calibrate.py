"""`calibrate`: from a pack and a text to predictors, use curves and a measured error, written into the pack.

    text ──dense passes──▶ inputs and active rows ──layer by layer──▶ predictors ──masked passes──▶ recall levels ──▶ pack

The model is loaded for the passes only, under `dram`; while predictors are trained one layer's weights are in memory. What
has been done is kept in the pack (`CalibrationStore`), so that a calibration that was stopped goes on where it was.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from transformers import AutoConfig
from transformers.activations import ACT2FN

from flashlm.engine.calibration_report import CalibrationReport, LayerReport
from flashlm.engine.calibration_store import CalibrationStore
from flashlm.engine.capture import (
    CalibrationText,
    Recording,
    activation_quantiles,
    masked,
    record,
    streamed_layers,
    token_losses,
)
from flashlm.engine.error_budget import Levels, Losses, Rise, largest_passing, search_levels
from flashlm.engine.evaluate import read_token_ids
from flashlm.engine.model import load
from flashlm.errors import ConfigError, PackError
from flashlm.memory.limits import read_memory_limits
from flashlm.pack.files import check_files
from flashlm.pack.manifest import Manifest, read_manifest
from flashlm.sizes import parse_size_bytes
from flashlm.sparsity.document import (
    Evaluation,
    LayerSparsity,
    Sparsity,
    fingerprint,
    predictor_names,
    write_profile,
    write_sparsity,
)
from flashlm.sparsity.fitting import FittedPredictor, LayerProblem, fit_layer
from flashlm.sparsity.operating import LEVEL_RATIO, recall_levels
from flashlm.sparsity.predictor import Predictor
from flashlm.sparsity.profile import LayerProfile, UseCurve
from flashlm.sparsity.ranks import check_rank, parse_rank, ranks_of_layer
from flashlm.sparsity.training import TokenSet, TrainingSettings
from flashlm.sparsity.trigger import read_trigger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_MAX_TOKENS = 16384
SAMPLE_NAME = "sample.txt"
THRESHOLD_SHARES = tuple(step / 20 for step in range(1, 20))  # sparsity tried where zeros are not exact
THRESHOLD_BUDGET = 0.5  # of the error budget; the rest is for the predictors
MAX_TIGHTENINGS = 3
METHOD_VERSION = 1  # work of an older method is not continued

Progress = Callable[[int, int, str], None]


def calibrate(
    pack: str | Path,
    text_path: str | Path | None = None,
    *,
    rank: str | int = "auto",
    recall: float = 0.95,
    max_ppl_increase: float = 0.01,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    dram: str | int | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
    announce: Callable[[str], None] = lambda line: None,
    plots: str | Path | None = None,
) -> CalibrationReport:
    """Profile a pack's neurons on a text, fit its row predictors, and store them with what they cost in perplexity.

    Args:
        pack: The pack's folder; it gets `flash/sparsity.json`, `.safetensors` and `flash/profile.safetensors`.
        text_path: A UTF-8 text like what the model will see; None takes the short sample that comes with flashlm.
        rank: "auto" (whatever costs least), "paper" (its Appendix B), or one rank for all layers.
        recall: Least share of truly active rows that each layer's predictor aims at.
        max_ppl_increase: Allowed relative rise of held-out perplexity; recall is raised until it is met.
        max_tokens: Only so many tokens from the start of the text.
        dram: Bound on the process while the model is loaded.
        seed: Of training and sampling.
        progress: Called with steps done, steps in all, and what is being done.
        announce: Called with a line at the start and where earlier work is continued.
        plots: Folder for figures; None draws none.

    Returns:
        What was found. A budget that could not be met is in the report, not an error.

    Raises:
        ConfigError: The text is too short or unreadable, or a setting is out of range.
        PackError, BudgetError, StorageError: As in `load`; the device has no room for what is recorded.
    """
    started_s = time.perf_counter()
    rank = parse_rank(rank)
    _check_settings(recall, max_ppl_increase, max_tokens, seed)
    folder = Path(pack)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if manifest.activation not in ACT2FN:
        raise PackError(f"activation {manifest.activation!r} is unknown to this transformers: update it")
    for entry in manifest.layers:
        check_rank(rank, hidden_size=manifest.hidden_size, num_rows=entry.num_rows)
    if plots is not None:
        from flashlm.sparsity.plots import check_matplotlib

        check_matplotlib()
    text = read_text(folder, text_path, max_tokens)
    settings = {
        "method": METHOD_VERSION,
        "fingerprint": fingerprint(manifest),
        "text": xxhash.xxh3_64_hexdigest(text.windows.numpy().tobytes()),
        "window_tokens": text.window_tokens,
        "rank": rank,
        "recall": recall,
        "max_ppl_increase": max_ppl_increase,
        "seed": seed,
        "training": asdict(TrainingSettings(recall=recall)),
    }
    work = _Work(
        pack=folder,
        manifest=manifest,
        text=text,
        rank=rank,
        recall=recall,
        max_increase=max_ppl_increase,
        dram=dram,
        seed=seed,
        store=CalibrationStore(folder, settings),
        progress=progress,
    )
    if work.store.was_begun:
        announce(f"continuing the calibration in {work.store.folder}")
    report = work.run(started_s)
    if plots is not None:
        from flashlm.sparsity.plots import write_plots

        write_plots(Path(plots), report.layers, title=f"{folder.name} on {report.text}")
    return report


def read_text(pack: Path, text_path: str | Path | None, max_tokens: int) -> CalibrationText:
    """Return a text, tokenised and cut; None is flashlm's own sample.

    Raises:
        ConfigError: It can't be read, or is too short.
        PackError: The pack has no tokenizer.
    """
    positions = getattr(AutoConfig.from_pretrained(pack).get_text_config(decoder=True), "max_position_embeddings", None)
    if text_path is not None:
        ids = read_token_ids(pack, Path(text_path), max_tokens=max_tokens)
        return CalibrationText.cut(Path(text_path).name, ids, positions)
    with as_file(files("flashlm.sparsity") / SAMPLE_NAME) as sample:
        ids = read_token_ids(pack, sample, max_tokens=max_tokens)
    return CalibrationText.cut("flashlm's sample", ids, positions)


def _check_settings(recall: float, max_ppl_increase: float, max_tokens: int, seed: int) -> None:
    if not 0.5 <= recall <= 0.9999:
        raise ConfigError(f"recall={recall} must be between 0.5 and 0.9999")
    if not 0.0 < max_ppl_increase <= 1.0:
        raise ConfigError(f"max_ppl_increase={max_ppl_increase} must be above 0 and at most 1 (100 %)")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens} must be at least 1")
    if seed < 0:
        raise ConfigError(f"seed={seed} must not be negative")


def has_exact_zeros(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Return whether an activation is zero exactly where its argument is not positive: ReLU and its square."""
    positive = torch.linspace(1e-3, 8.0, 257)
    return bool((activation(-positive) == 0).all() and (activation(positive) > 0).all())


@dataclass(kw_only=True)
class _Work:
    """One calibration: its stages, each of which picks up what the store has of it."""

    pack: Path
    manifest: Manifest
    text: CalibrationText
    rank: str | int
    recall: float
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

    def run(self, started_s: float) -> CalibrationReport:
        """Do all stages and write the result."""
        thresholds = self.record()
        fitted = [self.fit(layer) for layer in range(self.num_layers)]
        chosen, final = self.choose(fitted, thresholds)
        report = self.write(fitted, thresholds, chosen, final, started_s)
        self.store.remove()
        return report

    @contextmanager
    def model(self, extra_bytes: int = 0) -> Iterator[PreTrainedModel]:
        """Load the pack for dense passes; `extra_bytes` of the bound are kept for what runs beside it."""
        dram_bytes = read_memory_limits().default_dram_bytes if self.dram is None else parse_size_bytes(self.dram)
        tokens = self.text.batch * self.text.window_tokens
        config = AutoConfig.from_pretrained(self.pack).get_text_config(decoder=True)
        logits_bytes = tokens * int(config.vocab_size) * 4 + tokens * max(e.num_rows for e in self.manifest.layers) * 8
        spare_bytes = max(dram_bytes - extra_bytes - logits_bytes, 1)
        model = load(self.pack, dram=spare_bytes, mode="hybrid", context=tokens)
        try:
            yield model
        finally:
            model.flash.close()
            del model
            gc.collect()

    def record(self) -> list[float]:
        """Return the activation thresholds, once inputs and active rows of all layers are in the store."""
        recorded = self.store.read("recorded.json")
        if recorded is not None:
            return [float(threshold) for threshold in recorded]
        num_tokens, hidden_size = self.text.num_tokens, self.manifest.hidden_size
        widths = [-(-entry.num_rows // 8) for entry in self.manifest.layers]
        self.store.check_space(num_tokens * (self.num_layers * 2 * hidden_size + sum(widths)))
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
            seed=self.seed + layer,
            on_step=lambda rank, what: self.progress(layer, self.num_layers, f"layer {layer}: rank {rank}, {what}"),
        )
        self.store.save_predictor(layer, fitted)
        return fitted

    def choose(self, fitted: Sequence[FittedPredictor], thresholds: list[float]) -> tuple[Levels, Rise]:
        """Return the recall levels of all layers and the rise that they cost on the held-out text."""
        with self.model(extra_bytes=2 * sum(each.num_bytes for each in fitted)) as model:
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
        key = f"rise-{part}-{'-'.join('d' if level is None else str(level) for level in levels)}.json"
        kept = self.store.read(key)
        if kept is not None:
            return Rise(**kept)
        dense = self.dense_losses(model, part)
        selections = [
            None if level is None else _predictor(each, level, self.activation).predict
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

    def write(
        self,
        fitted: Sequence[FittedPredictor],
        thresholds: list[float],
        chosen: Levels,
        final: Rise,
        started_s: float,
    ) -> CalibrationReport:
        """Profile the layers, write everything into the pack, and return the report."""
        entries: list[LayerSparsity] = []
        reports: list[LayerReport] = []
        tensors: dict[str, torch.Tensor] = {}
        profiles: dict[str, torch.Tensor] = {}
        for layer, (each, level) in enumerate(zip(fitted, chosen.levels, strict=True)):
            self.progress(layer, self.num_layers, "profiles")
            profile, curve, both_share = self.profile(layer, each, level)
            entry = each.entry(level)
            tensors |= dict(zip(predictor_names(layer), each.tensors(level), strict=True))
            profiles |= {
                f"layers.{layer}.firing_rate": torch.from_numpy(profile.firing_rate),
                f"layers.{layer}.use_curve": torch.tensor(profile.use_curve.shares),
                f"layers.{layer}.sampled_rows": torch.from_numpy(profile.sampled_rows),
                f"layers.{layer}.coactivation": torch.from_numpy(profile.coactivation),
            }
            entries.append(
                LayerSparsity(
                    activation_threshold=thresholds[layer],
                    active_share=profile.active_share,
                    use_curve=curve.shares,
                    predictor=entry,
                )
            )
            reports.append(
                LayerReport(
                    layer=layer,
                    active_share=profile.active_share,
                    both_share=both_share,
                    activation_threshold=thresholds[layer],
                    predictor=entry,
                    predictor_bytes=each.num_bytes,
                    use_curve=curve.shares,
                    active_use_curve=profile.use_curve.shares,
                    trials=each.trials,
                )
            )
        evaluation = Evaluation(
            num_tokens=final.num_tokens,
            dense_perplexity=math.exp(final.dense_nll),
            sparse_perplexity=math.exp(final.sparse_nll),
            max_increase=self.max_increase,
        )
        write_profile(self.pack, profiles)
        write_sparsity(
            self.pack,
            Sparsity(
                fingerprint=fingerprint(self.manifest),
                text=self.text.name,
                num_tokens=self.text.num_tokens,
                layers=tuple(entries),
                evaluation=evaluation,
                tensors_checksum="",
            ),
            tensors,
        )
        num_rows = [entry.num_rows for entry in self.manifest.layers]
        return CalibrationReport(
            pack=self.pack,
            text=self.text.name,
            num_tokens=self.text.num_tokens,
            window_tokens=self.text.window_tokens,
            layers=tuple(reports),
            evaluation=evaluation,
            increase_error=final.error,
            asked_recall=self.recall,
            asked_predicted_share=_weighted([each.operating[0].predicted_share for each in fitted], num_rows),
            predicted_share=_weighted([each.predictor.predicted_share for each in reports], num_rows),
            wall_s=time.perf_counter() - started_s,
            was_resumed=self.store.was_begun,
        )

    def profile(self, layer: int, fitted: FittedPredictor, level: int) -> tuple[LayerProfile, UseCurve, float]:
        """Return a layer's profile, the use curve of its predicted rows, and the share that is active and predicted."""
        tokens, text = self.tokens(layer), self.text
        profile = LayerProfile(tokens.num_rows, seed=self.seed)
        curve = UseCurve(tokens.num_rows)
        predictor = _predictor(fitted, level, self.activation)
        num_both = 0
        for window in range(len(text.windows)):
            span = text.tokens_of(range(window, window + 1))
            inputs, active = tokens.take(slice(span.start, span.stop))
            profile.add(active)
            if window in text.held_out:
                predicted = predictor.predict(inputs).numpy()
                curve.add(predicted)
                num_both += int((predicted & active).sum())
        num_held_out = len(text.held_out) * text.window_tokens
        return profile, curve, num_both / (num_held_out * tokens.num_rows)


def _predictor(fitted: FittedPredictor, level: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> Predictor:
    reduce, expand, bias = fitted.tensors(level)
    return Predictor(entry=fitted.entry(level), reduce=reduce, expand=expand, bias=bias, activation=activation)


def _weighted(shares: Sequence[float], weights: Sequence[int]) -> float:
    return sum(share * weight for share, weight in zip(shares, weights, strict=True)) / sum(weights)


def _inputs_name(layer: int) -> str:
    return f"inputs-{layer:05d}.npy"


def _active_name(layer: int) -> str:
    return f"active-{layer:05d}.npy"
