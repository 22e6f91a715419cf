"""Resident weights: `model.safetensors` read once, sequentially, into anonymous memory.

transformers maps the file and hands out views of the mapping, whose pages the kernel may drop under pressure and read back
one by one. So after it has built the model (without touching those pages) every weight is pointed at our own copy of the
file, read directly at the device's full rate.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flashlm.errors import PackError
from flashlm.pack.checkpoint import TensorEntry, read_header
from flashlm.pack.layout import BLOCK_ALIGN_BYTES, round_up
from flashlm.pack.manifest import ResidentEntry
from flashlm.storage.reader import AlignedBuffer, File, Reader, ReadRequest

_READ_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class ResidentLoad:
    """What loading the resident part took: bytes read and seconds."""

    num_bytes: int
    elapsed_s: float


def load_resident(model: nn.Module, path: Path, entry: ResidentEntry, reader: Reader) -> ResidentLoad:
    """Point every weight of `model` that lies in `path` at a copy of that file in anonymous memory.

    Weights that transformers has changed on loading (another name or dtype) are copied one by one.

    Raises:
        PackError: The file's header is damaged, or a weight of the model is not in the file.
        StorageError: The file is not of the size that the manifest states, or can't be read.
    """
    started_s = time.perf_counter()
    tensors = read_header(path)
    _check_complete(model, path, tensors)
    with reader.open(path, expected_bytes=entry.num_bytes) as file:
        memory = _read_whole(reader, file, entry.num_bytes)
    elapsed_s = time.perf_counter() - started_s
    with torch.no_grad():
        for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
            stored = tensors.get(name)
            if stored is not None and stored.dtype == weight.dtype and stored.shape == tuple(weight.shape):
                weight.data = _view(memory, stored)
            elif not weight.is_meta:
                weight.data = weight.data.clone()
    return ResidentLoad(num_bytes=entry.num_bytes, elapsed_s=elapsed_s)


def _check_complete(model: nn.Module, path: Path, tensors: dict[str, TensorEntry]) -> None:
    """Refuse where transformers has filled a weight with random numbers for want of one in the file.

    A pack's names are the model's own; a weight that several modules share is there under one of its names.
    """
    names_of: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(weight), []).append(name)
    missing = [names[0] for names in names_of.values() if not any(name in tensors for name in names)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PackError(f"{path} lacks {missing[0]}{more}: convert the model again with this version of transformers")


def _read_whole(reader: Reader, file: File, num_bytes: int) -> torch.Tensor:
    """Return the file's bytes as uint8 (num_bytes,); the last, unaligned piece is read apart."""
    buffer = AlignedBuffer(round_up(num_bytes, BLOCK_ALIGN_BYTES), huge_pages=False)  # docs/experiments.md: first touch
    aligned_bytes = num_bytes // BLOCK_ALIGN_BYTES * BLOCK_ALIGN_BYTES
    reader.read(
        [
            ReadRequest(file, offset, min(_READ_BYTES, aligned_bytes - offset), buffer, offset)
            for offset in range(0, aligned_bytes, _READ_BYTES)
        ]
    )
    memory = torch.from_numpy(buffer.numpy())
    if aligned_bytes < num_bytes:
        tail = reader.read_range(file, aligned_bytes, num_bytes - aligned_bytes)
        memory[aligned_bytes:num_bytes] = torch.frombuffer(bytearray(tail), dtype=torch.uint8)
    return memory[:num_bytes]


def _view(memory: torch.Tensor, stored: TensorEntry) -> torch.Tensor:
    raw = memory[stored.offset : stored.offset + stored.num_bytes]
    if stored.offset % stored.dtype.itemsize:
        raw = raw.clone()
    return raw.view(stored.dtype).view(stored.shape)
