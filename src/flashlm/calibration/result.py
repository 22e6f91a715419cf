"""The end of a calibration: profiles of all layers, and everything written into the pack."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from flashlm.calibration.error_budget import Levels, Rise
from flashlm.calibration.fitting import FittedPredictor
from flashlm.calibration.neuron_profile import LayerProfile, UseCurve
from flashlm.calibration.report import CalibrationReport, LayerReport
from flashlm.calibration.work import CalibrationWork, stored_predictor
from flashlm.sparsity.calibration_document import (
    Evaluation,
    LayerSparsity,
    Sparsity,
    fingerprint,
    forget_sparsity,
    predictor_names,
    write_profile,
    write_sparsity,
)


def write_calibration(
    work: CalibrationWork,
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
        work.progress(layer, work.num_layers, "profiles")
        profile, curve, both_share = _profile(work, layer, each, level)
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
        max_increase=work.max_increase,
    )
    forget_sparsity(work.pack)
    write_profile(work.pack, profiles)
    write_sparsity(
        work.pack,
        Sparsity(
            fingerprint=fingerprint(work.manifest),
            text=work.text.name,
            num_tokens=work.text.num_tokens,
            layers=tuple(entries),
            window=work.window,
            evaluation=evaluation,
            tensors_checksum="",
        ),
        tensors,
    )
    num_rows = [entry.num_rows for entry in work.manifest.layers]
    return CalibrationReport(
        pack=work.pack,
        text=work.text.name,
        num_tokens=work.text.num_tokens,
        window_tokens=work.text.window_tokens,
        layers=tuple(reports),
        evaluation=evaluation,
        increase_error=final.error,
        asked_recall=work.recall,
        asked_predicted_share=_weighted([each.operating[0].predicted_share for each in fitted], num_rows),
        predicted_share=_weighted([each.predictor.predicted_share for each in reports], num_rows),
        wall_s=time.perf_counter() - started_s,
        was_resumed=work.store.was_begun,
    )


def _profile(
    work: CalibrationWork, layer: int, fitted: FittedPredictor, level: int
) -> tuple[LayerProfile, UseCurve, float]:
    """Return a layer's profile, the use curve of its predicted rows, and the share that is active and predicted."""
    tokens, text = work.tokens(layer), work.text
    profile = LayerProfile(tokens.num_rows, seed=work.seed)
    curve = UseCurve(tokens.num_rows)
    predictor = stored_predictor(fitted, level, work.activation)
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


def _weighted(shares: Sequence[float], weights: Sequence[int]) -> float:
    return sum(share * weight for share, weight in zip(shares, weights, strict=True)) / sum(weights)
