"""`calibrate`: from a pack and a text to predictors, use curves and a measured error, written into the pack.

    text ──dense passes──▶ inputs and active rows ──layer by layer──▶ predictors ──masked passes──▶ recall levels ──▶ pack

The model is loaded for the passes only, under `dram`; while predictors are trained one layer's weights are in memory. What
has been done is kept in the pack (`CalibrationStore`), so that a calibration that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path

import torch
import xxhash
from transformers.activations import ACT2FN

from flashlm.calibration.capture import CalibrationText
from flashlm.calibration.evaluate import read_token_ids
from flashlm.calibration.neuron_profile import unpack_rows
from flashlm.calibration.order import neuron_order
from flashlm.calibration.ordering import order_pack
from flashlm.calibration.ranks import check_rank, parse_rank
from flashlm.calibration.report import CalibrationReport
from flashlm.calibration.result import write_calibration
from flashlm.calibration.store import CalibrationStore
from flashlm.calibration.training import TrainingSettings
from flashlm.calibration.work import CalibrationWork, Progress
from flashlm.engine.opened import open_pack
from flashlm.errors import ConfigError, PackError
from flashlm.pack.files import check_files
from flashlm.pack.manifest import read_manifest
from flashlm.pack.units import check_rows
from flashlm.planner.settings import make_settings
from flashlm.sizes import format_size
from flashlm.sparsity.calibration_document import MAX_WINDOW, fingerprint
from flashlm.sparsity.presets import paper_preset
from flashlm.structure.ffn_probe import has_weights

DEFAULT_MAX_TOKENS = 16384
SAMPLE_NAME = "sample.txt"
METHOD_VERSION = 2  # work of an older method is not continued


def calibrate(
    pack: str | Path,
    text_path: str | Path | None = None,
    *,
    rank: str | int = "auto",
    recall: float = 0.95,
    threshold: float | None = None,
    window: int | None = None,
    preset: str | None = None,
    device: str = "auto",
    max_ppl_increase: float = 0.01,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    dram: str | int | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
    announce: Callable[[str], None] = lambda line: None,
    plots: str | Path | None = None,
    reorder: bool = True,
) -> CalibrationReport:
    """Profile a pack's neurons on a text, fit its row predictors, and store them with what they cost in perplexity.

    Args:
        pack: The pack's folder; it gets `flash/sparsity.json`, `.safetensors` and `flash/profile.safetensors`.
        text_path: A UTF-8 text like what the model will see; None takes the short sample that comes with flashlm.
        rank: "auto" (whatever costs least), "paper" (its Appendix B), or one rank for all layers.
        recall: Least share of truly active rows that each layer's predictor aims at.
        threshold: Probability above which every layer predicts a row, in place of `recall`; the error budget is then
            measured, not searched.
        window: The neuron cache holds the rows of the last so many tokens (the paper's policy); None is LRU.
        preset: "paper" takes its rank, threshold and window for this family, where they are not given.
        device: Where predictors are trained: "cpu", "cuda", or "auto", a GPU if there is one. The model itself runs on the
            CPU.
        max_ppl_increase: Allowed relative rise of held-out perplexity; recall is raised until it is met.
        max_tokens: Only so many tokens from the start of the text.
        dram: Bound on the process while the model is loaded.
        seed: Of training and sampling.
        progress: Called with steps done, steps in all, and what is being done.
        announce: Called with a line at the start and where earlier work is continued.
        plots: Folder for figures; None draws none.
        reorder: Lay the rows down hot ones first, then those that fire together side by side.

    Returns:
        What was found. A budget that could not be met is in the report, not an error.

    Raises:
        ConfigError: The text is too short or unreadable, or a setting is out of range.
        PackError, BudgetError, StorageError: As in `load`; the device has no room for what is recorded.
    """
    started_s = time.perf_counter()
    rank = parse_rank(rank)
    _check_settings(recall, max_ppl_increase, max_tokens, seed)
    _check_policy(threshold, window, preset)
    device = _training_device(device)
    folder = Path(pack)
    manifest = read_manifest(folder)
    if manifest.experts:
        raise ConfigError(
            f"{folder} streams experts, which the model's own routers choose: `calibrate_experts` is for such packs"
        )
    check_rows([entry.unit for entry in manifest.ffns], str(folder), "a calibration")
    if preset is not None:
        paper = paper_preset(manifest.model_type)
        rank = "paper" if rank == "auto" else rank
        threshold = paper.threshold if threshold is None else threshold
        window = paper.window if window is None else window
    check_files(folder, manifest)
    activation = manifest.main.activation
    if activation not in ACT2FN:
        raise PackError(f"activation {activation!r} is unknown to this transformers: update it")
    if has_weights(ACT2FN[activation]):
        raise ConfigError(
            f"the activation of {folder}, {activation}, has weights of its own in every layer, which predictors do not know:"
            " this pack runs in mode hybrid"
        )
    for entry in manifest.ffns:
        check_rank(rank, hidden_size=manifest.main.hidden_size, num_rows=entry.num_rows)
    if plots is not None:
        from flashlm.calibration.plots import check_matplotlib

        check_matplotlib()
    text = read_text(folder, text_path, max_tokens)
    settings = {
        "method": METHOD_VERSION,
        "fingerprint": fingerprint(manifest),
        "text": xxhash.xxh3_64_hexdigest(text.windows.numpy().tobytes()),
        "window_tokens": text.window_tokens,
        "rank": rank,
        "recall": recall,
        "threshold": threshold,
        "max_ppl_increase": max_ppl_increase,
        "seed": seed,
        "training": asdict(TrainingSettings(recall=recall)),
    }
    work = CalibrationWork(
        pack=folder,
        manifest=manifest,
        text=text,
        rank=rank,
        recall=recall,
        threshold=threshold,
        window=window,
        device=device,
        max_increase=max_ppl_increase,
        dram=dram,
        seed=seed,
        store=CalibrationStore(folder, settings),
        progress=progress,
    )
    if work.store.was_begun:
        announce(f"continuing the calibration in {work.store.folder}")
    announce(
        f"{text.num_tokens} tokens of {text.name} in windows of {text.window_tokens}; what {work.num_layers} layers do on"
        f" them takes {format_size(work.recorded_bytes)} in {work.store.folder} until it is done"
    )
    thresholds = work.record()
    fitted = [work.fit(layer) for layer in range(work.num_layers)]
    levels, final = work.choose(fitted, thresholds)
    report = write_calibration(work, fitted, thresholds, levels, final, started_s)
    if reorder:
        orders = []
        for layer in range(work.num_layers):
            progress(layer, work.num_layers, f"order of layer {layer}")
            tokens = work.tokens(layer).part(text.tokens_of(text.train))
            orders.append(neuron_order(unpack_rows(tokens.packed, tokens.num_rows)))
        order_pack(folder, orders, progress)
    work.store.remove()
    if plots is not None:
        from flashlm.calibration.plots import write_plots

        write_plots(Path(plots), report.layers, title=f"{folder.name} on {report.text}")
    return report


def read_text(pack: Path, text_path: str | Path | None, max_tokens: int) -> CalibrationText:
    """Return a text, tokenised and cut; None is flashlm's own sample.

    Raises:
        ConfigError: It can't be read, or is too short.
        PackError: The pack has no tokenizer.
    """
    opened = open_pack(pack, is_checked=make_settings().is_checked)
    positions = getattr(opened.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if text_path is not None:
        ids = read_token_ids(opened, Path(text_path), max_tokens=max_tokens)
        return CalibrationText.cut(Path(text_path).name, ids, positions)
    with as_file(files("flashlm.calibration") / SAMPLE_NAME) as sample:
        ids = read_token_ids(opened, sample, max_tokens=max_tokens)
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


def _check_policy(threshold: float | None, window: int | None, preset: str | None) -> None:
    if threshold is not None and not 0.0 < threshold < 1.0:
        raise ConfigError(f"threshold={threshold} is a probability: it must be above 0 and below 1, 0.5 in the paper")
    if window is not None and not 1 <= window <= MAX_WINDOW:
        raise ConfigError(f"window={window} must be between 1 and {MAX_WINDOW} tokens, 4 in the paper")
    if preset not in (None, "paper"):
        raise ConfigError(f"preset={preset!r} is unknown: there is paper")


def _training_device(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device!r} is unknown: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda was asked for, and torch sees no GPU: leave --device out")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
