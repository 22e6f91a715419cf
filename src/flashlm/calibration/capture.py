"""A calibration text and what a model's layers do on it: windows, losses, activation thresholds, inputs and active rows.

All passes are dense and go through `FlashFFN`'s hooks; nothing here knows predictors' insides or files of the pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from flashlm.calibration.neuron_profile import pack_rows
from flashlm.engine.ffn import FlashFFN, Selection
from flashlm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_WINDOW_TOKENS = 512
MIN_WINDOW_TOKENS = 32  # above what takes the row kernels, so that passes read each block once for products
MIN_WINDOWS = 8
GOOD_WINDOWS = 16  # windows are halved until there are so many
PIECE_WINDOWS = 8  # of which each part gets its run
VALIDATION_SHARE = 0.25
HELD_OUT_SHARE = 0.25
LOSS_PIECE_TOKENS = 64
MAX_SAMPLED_VALUES = 1 << 20  # per layer, for quantiles

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """A text cut into windows and three parts.

    A text that wanders from topic to topic would make a last quarter that is unlike all before it. So each part takes a
    contiguous run out of every eight windows or so.

    Attributes:
        name: For people.
        windows: int64 (num_windows, tokens of a window), part after part.
        train, validation, held_out: Windows to learn from, to decide by, and to measure on.
    """

    name: str
    windows: torch.Tensor
    train: range
    validation: range
    held_out: range

    @property
    def window_tokens(self) -> int:
        """Tokens of a window."""
        return self.windows.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return self.windows.numel()

    @property
    def batch(self) -> int:
        """Windows that go through the model together."""
        return max(MAX_WINDOW_TOKENS // self.window_tokens, 1)

    @property
    def pass_tokens(self) -> int:
        """Tokens of a pass."""
        return self.batch * self.window_tokens

    def tokens_of(self, part: range) -> range:
        """Return the positions of a part's tokens in what is recorded, which is in the order of `windows`."""
        return range(part.start * self.window_tokens, part.stop * self.window_tokens)

    @classmethod
    def cut(cls, name: str, ids: torch.Tensor, num_positions: int | None) -> CalibrationText:
        """Cut token ids (num_tokens,) into windows that the model has positions for.

        Raises:
            ConfigError: The text is too short; it says how many tokens are needed.
        """
        needed = MIN_WINDOWS * MIN_WINDOW_TOKENS
        if len(ids) < needed:
            raise ConfigError(f"{name} has {len(ids)} tokens, calibration needs at least {needed}: give a longer text")
        size = min(MAX_WINDOW_TOKENS, num_positions or MAX_WINDOW_TOKENS)
        while len(ids) // size < GOOD_WINDOWS and size >= 2 * MIN_WINDOW_TOKENS:
            size //= 2
        count = len(ids) // size
        train, validation, held_out = _split(count)
        return cls(
            name=name,
            windows=ids[: count * size].view(count, size)[[*train, *validation, *held_out]],
            train=range(len(train)),
            validation=range(len(train), len(train) + len(validation)),
            held_out=range(len(train) + len(validation), count),
        )


def _split(count: int) -> tuple[list[int], list[int], list[int]]:
    """Return which of `count` windows are for training, validation and held-out measurement."""
    num_pieces = max(count // PIECE_WINDOWS, 1)  # windows of a model with few positions may be odd and few
    train: list[int] = []
    validation: list[int] = []
    held_out: list[int] = []
    for piece in range(num_pieces):
        start, stop = piece * count // num_pieces, (piece + 1) * count // num_pieces
        second = stop - round((stop - start) * HELD_OUT_SHARE)
        first = second - round((stop - start) * VALIDATION_SHARE)
        train += range(start, first)
        validation += range(first, second)
        held_out += range(second, stop)
    return train, validation, held_out


def streamed_layers(model: PreTrainedModel) -> list[FlashFFN]:
    """Return the streamed layers of a loaded pack, in order."""
    layers = [model.get_submodule(entry.module) for entry in model.flash.manifest.ffns]
    assert all(isinstance(layer, FlashFFN) for layer in layers)
    return layers


def _batches(text: CalibrationText, part: range) -> Iterator[range]:
    for start in range(part.start, part.stop, text.batch):
        yield range(start, min(start + text.batch, part.stop))


@contextmanager
def masked(
    layers: Sequence[FlashFFN], selections: Sequence[Selection | None], thresholds: Sequence[float]
) -> Iterator[None]:
    """Let dense passes use only selected rows and activations above the thresholds, within the context."""
    before = [(layer.selection, layer.activation_threshold) for layer in layers]
    try:
        for layer, selection, threshold in zip(layers, selections, thresholds, strict=True):
            layer.selection, layer.activation_threshold = selection, threshold
        yield
    finally:
        for layer, (selection, threshold) in zip(layers, before, strict=True):
            layer.selection, layer.activation_threshold = selection, threshold


def token_losses(
    model: PreTrainedModel, text: CalibrationText, part: range, on_window: Callable[[int], None] = lambda done: None
) -> npt.NDArray[np.float64]:
    """Return the negative log-likelihood of every token of a part but each window's first, in nats."""
    losses = []
    with torch.inference_mode(), model.flash.phase("prompt"):
        for batch in _batches(text, part):
            windows = text.windows[batch.start : batch.stop]
            logits = model(input_ids=windows, use_cache=False).logits
            for window, scores in zip(windows, logits, strict=True):
                for low in range(0, len(window) - 1, LOSS_PIECE_TOKENS):
                    high = min(low + LOSS_PIECE_TOKENS, len(window) - 1)
                    wanted = window[low + 1 : high + 1]
                    losses.append(F.cross_entropy(scores[low:high].float(), wanted, reduction="none").double().numpy())
            on_window(batch.stop - part.start)
    return np.concatenate(losses)


def activation_quantiles(
    model: PreTrainedModel, text: CalibrationText, shares: Sequence[float], progress: Progress
) -> list[list[float]]:
    """Return for each layer the thresholds below which these shares of |act(trigger)| lie, on a sample of the text."""
    layers = streamed_layers(model)
    part = range(text.train.start, min(text.train.stop, text.train.start + 8 * text.batch))
    num_tokens = len(part) * text.window_tokens
    values: list[list[torch.Tensor]] = [[] for _ in layers]

    def observe(layer: int, span: range, inputs: torch.Tensor, activated: torch.Tensor) -> None:
        stride = max(num_tokens * layers[layer].layout.num_rows // MAX_SAMPLED_VALUES, 1)
        values[layer].append(activated.abs().reshape(-1)[::stride].clone())

    _observe(model, text, part, observe, lambda done: progress(done, len(part), "activation sizes"))
    quantiles = []
    for found in values:
        sample = torch.cat(found).numpy()
        quantiles.append([float(value) for value in np.quantile(sample, shares)])
    return quantiles


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Where a layer's inputs, fp16 (num_tokens, d_model), and packed active rows, uint8, are written."""

    inputs: np.memmap[Any, Any]
    packed: np.memmap[Any, Any]


def record(
    model: PreTrainedModel,
    text: CalibrationText,
    recordings: Sequence[Recording],
    thresholds: Sequence[float],
    progress: Progress,
) -> None:
    """Write inputs and truly active rows of all tokens and layers; neurons below the thresholds count as zero meanwhile."""
    layers = streamed_layers(model)
    limit = float(np.finfo(np.float16).max)
    for batch in _batches(text, range(len(text.windows))):
        tokens = text.tokens_of(batch)
        where = slice(tokens.start, tokens.stop)

        def observe(
            layer: int, span: range, inputs: torch.Tensor, activated: torch.Tensor, where: slice = where
        ) -> None:
            recording = recordings[layer]
            if span.start == 0:
                recording.inputs[where] = inputs.clamp(-limit, limit).half().numpy()
            active = (activated.abs() > thresholds[layer]).numpy()
            columns = slice(span.start // 8, span.start // 8 + -(-len(span) // 8))  # blocks hold a multiple of 16 rows
            recording.packed[where, columns] = pack_rows(active)

        with masked(layers, [None] * len(layers), thresholds):
            _observe(model, text, batch, observe, lambda done: None)
        progress(batch.stop, len(text.windows), "recording activity")


def _observe(
    model: PreTrainedModel,
    text: CalibrationText,
    part: range,
    observe: Callable[[int, range, torch.Tensor, torch.Tensor], None],
    on_window: Callable[[int], None],
) -> None:
    """Run a part of the text with an observer in every layer."""
    layers = streamed_layers(model)
    for layer in layers:
        layer.observer = observe
    try:
        run_windows(model, text, part, on_window)
    finally:
        for layer in layers:
            layer.observer = None


def run_windows(model: PreTrainedModel, text: CalibrationText, part: range, on_window: Callable[[int], None]) -> None:
    """Run a part of the text through a model for its observers; logits are left out where the model can do without."""
    kept = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    with torch.inference_mode(), model.flash.phase("prompt"):
        for batch in _batches(text, part):
            model(input_ids=text.windows[batch.start : batch.stop], use_cache=False, **kept)
            on_window(batch.stop - part.start)
