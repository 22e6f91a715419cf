"""`calibrate_experts`: a text through a pack of experts, and what its routing says of cache policies, written into the pack.

The text runs in windows, as prompts, so that each pass reads an expert once; which experts its tokens were sent to is then
replayed token by token, as generation asks for them. (Prompts are matrix products, single tokens row kernels: rounding may
send a token elsewhere here and there.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers.activations import ACT2FN

from flashlm.calibration.capture import CalibrationText, run_windows
from flashlm.calibration.dense import DEFAULT_MAX_TOKENS, read_text
from flashlm.calibration.routing_report import RoutingReport, judge_row_reads
from flashlm.calibration.routing_trace import MAX_REPLAYED_TOKENS, RoutingTrace, compare_policies
from flashlm.calibration.work import Progress, has_exact_zeros, loaded_model
from flashlm.engine.experts import observed
from flashlm.errors import ConfigError, UnsupportedModelError
from flashlm.pack.files import check_files
from flashlm.pack.manifest import CUSTOM_GATE, Manifest, read_manifest
from flashlm.sparsity.calibration_document import fingerprint
from flashlm.sparsity.routing import LayerRouting, Routing, write_routing


class RoutingRecorder:
    """Notes where tokens are sent, and counts zeros inside experts; an `ExpertObserver`.

    Args:
        num_layers: Layers of experts.
        counts_zeros: Whether to look at activations at all.
    """

    def __init__(self, num_layers: int, *, counts_zeros: bool) -> None:
        self._routed: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._counts_zeros = counts_zeros
        self._num_zeros = [0] * num_layers
        self._num_values = [0] * num_layers

    def routed(self, layer: int, index: torch.Tensor) -> None:
        """Keep the choices of a pass."""
        self._routed[layer].append(index.detach().to(torch.int32, copy=True))

    def activated(self, layer: int, activations: torch.Tensor) -> None:
        """Count exact zeros."""
        if self._counts_zeros:
            self._num_zeros[layer] += activations.numel() - int(activations.count_nonzero())
            self._num_values[layer] += activations.numel()

    def trace(self, manifest: Manifest) -> RoutingTrace:
        """Return what was noted.

        Raises:
            UnsupportedModelError: A layer did not see every token once.
        """
        experts = [torch.cat(parts).numpy() if parts else np.zeros((0, 1), np.int32) for parts in self._routed]
        if len({len(layer) for layer in experts}) > 1:
            raise UnsupportedModelError(
                f"model type {manifest.model_type!r} can't be calibrated: its layers of experts saw"
                f" {[len(layer) for layer in experts]} tokens, the same number expected"
            )
        return RoutingTrace(experts=experts, num_experts=[entry.num_experts for entry in manifest.experts])

    def zero_share(self, layer: int) -> float | None:
        """Return zeros over values of a layer, None where none were counted."""
        return self._num_zeros[layer] / self._num_values[layer] if self._num_values[layer] else None


def calibrate_experts(
    pack: str | Path,
    text_path: str | Path | None = None,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    dram: str | int | None = None,
    progress: Progress = lambda done, total, what: None,
    announce: Callable[[str], None] = lambda line: None,
    plots: str | Path | None = None,
) -> RoutingReport:
    """Run a text through a pack of experts, see how it is routed, and store which cache policy suits it.

    Args:
        pack: The pack's folder; it gets `flash/routing.json`.
        text_path: A UTF-8 text like what the model will see; None takes the short sample that comes with flashlm.
        max_tokens: Only so many tokens from the start of the text.
        dram: Bound on the process while the model is loaded.
        progress: Called with steps done, steps in all, and what is being done.
        announce: Called with a line at the start.
        plots: Folder for figures; None draws none.

    Raises:
        ConfigError: The pack has no experts, the text is too short or unreadable, or a setting is out of range.
        PackError, BudgetError, StorageError, UnsupportedModelError: As in `load`.
    """
    started_s = time.perf_counter()
    folder = Path(pack)
    manifest = read_manifest(folder)
    if not manifest.experts:
        raise ConfigError(f"{folder} has no experts: calibrate it with `calibrate`")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens} must be at least 1")
    check_files(folder, manifest)
    if plots is not None:
        from flashlm.calibration.plots import check_matplotlib

        check_matplotlib()
    text = read_text(folder, text_path, max_tokens)
    announce(f"{text.num_tokens} tokens of {text.name} in windows of {text.window_tokens}")
    recorder = _record(folder, manifest, text, dram, progress)
    trace = recorder.trace(manifest)
    known = trace.part(text.tokens_of(text.train))
    unseen = trace.part(range(known.num_tokens, min(trace.num_tokens, known.num_tokens + MAX_REPLAYED_TOKENS)))
    routing = Routing(
        fingerprint=fingerprint(manifest),
        text=text.name,
        num_tokens=trace.num_tokens,
        num_replayed_tokens=unseen.num_tokens,
        layers=tuple(
            LayerRouting(counts=counts, zero_share=recorder.zero_share(layer))
            for layer, counts in enumerate(trace.counts())
        ),
        replays=compare_policies(known, unseen, progress=progress),
    )
    write_routing(folder, routing)
    report = RoutingReport(
        pack=folder,
        window_tokens=text.window_tokens,
        num_active=tuple(trace.num_active),
        routing=routing,
        row_reads=judge_row_reads(folder, manifest, routing),
        wall_s=time.perf_counter() - started_s,
    )
    if plots is not None:
        from flashlm.calibration.expert_plots import write_routing_plots

        write_routing_plots(Path(plots), routing, title=f"{folder.name} on {routing.text}")
    return report


def _record(
    pack: Path, manifest: Manifest, text: CalibrationText, dram: str | int | None, progress: Progress
) -> RoutingRecorder:
    num_windows = len(text.windows)
    recorder = RoutingRecorder(len(manifest.experts), counts_zeros=may_have_zeros(manifest.activation))
    aside_bytes = 2 * text.num_tokens * sum(entry.num_active for entry in manifest.experts) * 4
    with (
        loaded_model(pack, text, dram=dram, mode="experts", aside_bytes=aside_bytes) as model,
        observed(model, recorder),
    ):
        run_windows(model, text, range(num_windows), lambda done: progress(done, num_windows, "recording the routing"))
    return recorder


def may_have_zeros(activation: str) -> bool:
    """Return whether inner activations may be exactly zero: by ReLU and its kind, or by a gate of the family's own."""
    return activation == CUSTOM_GATE or (activation in ACT2FN and has_exact_zeros(ACT2FN[activation]))
