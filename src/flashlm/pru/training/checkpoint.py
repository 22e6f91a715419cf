"""Checkpoints of a run: written whole or not at all, read back to the bit. safetensors and JSON, no pickle.

    OUT/run.json                     recipe and corpus; what a resumed run must match
    OUT/checkpoints/step-00001234/   progress.json, weights.safetensors, rank-0.safetensors (state and RNG), rank-1 ...
    OUT/best/                        the best model so far as a transformers folder
    OUT/metrics.jsonl                one line per event

A checkpoint is written beside its place, synced and renamed; the one before it is removed after that. So whenever the
process dies there is a good one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flashlm.errors import ConfigError, PackError, StorageError
from flashlm.pru.training.processes import Processes

VERSION = 1
RUN_FILE = "run.json"
_PROGRESS, _WEIGHTS = "progress.json", "weights.safetensors"


class Progress(BaseModel):
    """Where a run is, but for its tensors.

    Attributes:
        version: Of the format.
        step: Optimiser steps taken.
        epoch: The current one, from 1.
        row: Next row of the training columns in this epoch.
        valid_losses: Nats per token after each finished epoch.
        best_loss: Lowest of them, None before the first.
        num_averaged: Steps in the mean of the weights; None: not averaging.
        lr_before: See `AveragingSGD`.
        loss_sum: Of the training tokens of this epoch, in nats.
        num_tokens: Training tokens of this epoch.
        step_s: Wall time of each step of this epoch.
        cpu_s: Processor time of this epoch's training, over all threads.
        is_done: The rule for the end was met.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    step: int = 0
    epoch: int = 1
    row: int = 0
    valid_losses: list[float] = []
    best_loss: float | None = None
    num_averaged: int | None = None
    lr_before: float | None = None
    loss_sum: float = 0.0
    num_tokens: int = 0
    step_s: list[float] = []
    cpu_s: float = 0.0
    is_done: bool = False


class CheckpointFolder:
    """The checkpoints of a run.

    Args:
        out: The run's folder.
        processes: Each writes its own state; the first writes the rest.
    """

    def __init__(self, out: Path, processes: Processes) -> None:
        self.folder = out / "checkpoints"
        self._processes = processes

    def latest(self) -> Path | None:
        """Return the newest whole checkpoint."""
        found = sorted(path for path in self.folder.glob("step-*") if path.suffix != ".tmp")
        return found[-1] if found else None

    def save(self, progress: Progress, weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> Path:
        """Write a checkpoint and remove the older ones.

        Args:
            progress: Goes into JSON.
            weights: The same in all processes.
            own: This process's state and RNG.

        Raises:
            StorageError: It can't be written.
        """
        # Two checkpoints of one step differ where the epoch has ended in between.
        place = self.folder / f"step-{progress.step:09d}-{progress.epoch:05d}-{progress.row:09d}"
        try:
            self._write(place, progress, weights, own)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"checkpoint {place} can't be written: {error}; the one before it is whole", path=str(place)
            ) from error
        self._processes.wait()
        return place

    def _write(
        self, place: Path, progress: Progress, weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
    ) -> None:
        draft = place.with_name(place.name + ".tmp")
        is_main = self._processes.is_main
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.tmp"):
                shutil.rmtree(left)
            draft.mkdir()
        self._processes.wait()
        _save_tensors(own, draft / f"rank-{self._processes.rank}.safetensors")
        self._processes.wait()
        if is_main and place.exists():  # the same point of the run, saved before
            shutil.rmtree(draft)
        elif is_main:
            _save_tensors(weights, draft / _WEIGHTS)
            _write_synced(draft / _PROGRESS, progress.model_dump_json().encode())
            _sync(draft)
            draft.rename(place)
            _sync(self.folder)
        if is_main:
            for older in self.folder.glob("step-*"):
                if older != place:
                    shutil.rmtree(older)

    def load(self, place: Path) -> tuple[Progress, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Read a checkpoint: progress, weights, this process's state.

        Raises:
            PackError: It is damaged, or of another version.
            ConfigError: It was written by another number of processes.
        """
        ranks = sorted(place.glob("rank-*.safetensors"))
        if len(ranks) != self._processes.count:
            raise ConfigError(
                f"{place} was written by {len(ranks)} processes and can't be resumed by {self._processes.count}:"
                " state and RNG are those of each process"
            )
        try:
            progress = Progress.model_validate_json((place / _PROGRESS).read_bytes())
            weights = load_file(place / _WEIGHTS)
            own = load_file(place / f"rank-{self._processes.rank}.safetensors")
        except (OSError, ValidationError, SafetensorError) as error:
            raise PackError(f"checkpoint {place} is damaged: {error}; remove it to start anew") from error
        if progress.version != VERSION:
            raise PackError(f"checkpoint {place} has version {progress.version}, this flashlm reads {VERSION}")
        return progress, weights, own


def match_run(out: Path, run: dict[str, Any], may_differ: set[str]) -> None:
    """Write the run's description, or check that the folder's run is the same.

    Args:
        out: The run's folder.
        run: Tables of JSON values by name.
        may_differ: Keys `table.name` that a resumed run may change.

    Raises:
        ConfigError: The folder holds another run; the message names what differs.
        PackError: Its description can't be read.
    """
    path = out / RUN_FILE
    if path.exists():
        try:
            before: dict[str, Any] = json.loads(path.read_bytes())
            differences = [line for name, table in run.items() for line in _differences(name, before[name], table)]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise PackError(f"{path} can't be read: {error!r}") from error
        wrong = [line for name, line in differences if name not in may_differ]
        if wrong:
            raise ConfigError(
                f"{out} holds another run: {'; '.join(wrong)}; give the same settings and data, or another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(run, indent=2).encode() + b"\n")


def check_same(what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError, naming what differs, unless two tables are equal."""
    wrong = [line for _, line in _differences("setting", before, now)]
    if wrong:
        raise ConfigError(f"{what} is another one: {'; '.join(wrong)}")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by a whole one."""
    draft = path.with_name(path.name + ".tmp")
    _write_synced(draft, content)
    draft.replace(path)


def _differences(table: str, before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    names = [*before, *(name for name in now if name not in before)]
    return [
        (f"{table}.{name}", f"{table} {name} is {before.get(name)!r} there and {now.get(name)!r} here")
        for name in names
        if before.get(name) != now.get(name)
    ]


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    _sync(path)


def _write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
