"""Columns and windows: how a text becomes batches for truncated back-propagation (Merity et al. 2018, §5)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flashlm.errors import ConfigError
from flashlm.pru.training.encoding import Ids
from flashlm.pru.training.settings import TrainingSettings

SHORTEST = 5  # tokens in a drawn window
_SPREAD = 5.0
_HALF_SHARE = 0.05  # of windows drawn around half the length


def columns(ids: Ids, batch_size: int) -> torch.Tensor:
    """Cut a text into `batch_size` consecutive pieces: int64 (rows, batch_size). The tail that fills no row is dropped.

    Raises:
        ConfigError: A column would be shorter than two tokens, so that nothing could be predicted.
    """
    rows = len(ids) // batch_size
    if rows < 2:
        raise ConfigError(f"{len(ids)} tokens are too few for batch_size={batch_size}: each column needs at least 2")
    return torch.from_numpy(ids[: rows * batch_size]).view(batch_size, rows).t().contiguous()


def draw_length(settings: TrainingSettings, generator: torch.Generator) -> int:
    """Draw a window's length in tokens."""
    if not settings.has_variable_bptt:
        return settings.bptt
    is_half = torch.rand((), generator=generator).item() < _HALF_SHARE
    mean = settings.bptt / 2 if is_half else settings.bptt
    length = int(torch.randn((), generator=generator).item() * _SPREAD + mean)
    if settings.max_extra_bptt is not None:
        length = min(length, settings.bptt + settings.max_extra_bptt)
    return max(SHORTEST, length)


def window(rows: torch.Tensor, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets, each (T, B) with T = length or what is left: row t + 1 is the target of row t."""
    length = min(length, rows.shape[0] - 1 - start)
    return rows[start : start + length], rows[start + 1 : start + 1 + length]


def windows(rows: torch.Tensor, length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Walk over all predictable rows in windows of a fixed length."""
    for start in range(0, rows.shape[0] - 1, length):
        yield window(rows, start, length)
