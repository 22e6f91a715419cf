"""Checkpoints that survive a kill at any moment: written beside the old one, synced, then renamed over it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` by `state`; a crash leaves either the old or the new one."""
    sibling = path.with_suffix(".tmp")
    with sibling.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    sibling.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are accepted, never code."""
    return torch.load(path, map_location="cpu", weights_only=True)
