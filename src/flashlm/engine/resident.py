"""Resident weights: `flash/resident.safetensors` read once, sequentially, into anonymous memory.

transformers maps the file and hands out views of the mapping, whose pages the kernel may drop under pressure and read back
one by one. So after it has built the model (without touching those pages) every weight is pointed at our own copy of the
file, read directly at the device's full rate.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from flashlm.engine.block_check import landed
from flashlm.pack.checkpoint import MAX_HEADER_BYTES, TensorEntry, read_header
from flashlm.pack.checksums import check_bytes
from flashlm.pack.manifest import ResidentEntry
from flashlm.rows.layout import BLOCK_ALIGN_BYTES, round_up
from flashlm.storage.outside import open_regular
from flashlm.storage.reader import AlignedBuffer, File, Reader, ReadRequest
from flashlm.structure.asked import misfit

if TYPE_CHECKING:  # this module is imported within transformers' own import
    from transformers import PreTrainedModel

_READ_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class ResidentLoad:
    """What loading the resident part took: bytes read and seconds."""

    num_bytes: int
    elapsed_s: float


def load_resident(
    model: PreTrainedModel, path: Path, entry: ResidentEntry, reader: Reader, *, is_checked: bool = True
) -> ResidentLoad:
    """Point every weight of `model` that lies in `path` at a copy of that file in anonymous memory.

    Weights that transformers has changed on loading (another name or dtype) are copied one by one.

    Args:
        model: The model.
        path: The resident file.
        entry: What the manifest says of it.
        reader: Reads.
        is_checked: Hold every byte against the manifest's checksums while the next ones are read.

    Raises:
        PackError: The file is damaged, or a weight of the model is not in it.
        ConfigError: One is not, since another class of model was asked for.
        StorageError: The file is not of the size that the manifest states, or can't be read.
    """
    started_s = time.perf_counter()
    tensors = read_header(path)
    _check_complete(model, path, tensors)
    with reader.open(path, expected_bytes=entry.num_bytes) as file:
        memory = _read_whole(reader, file, entry, is_checked=is_checked)
    elapsed_s = time.perf_counter() - started_s
    with torch.no_grad():
        for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
            stored = tensors.get(name)
            if stored is not None and stored.dtype == weight.dtype and stored.shape == tuple(weight.shape):
                weight.data = _view(memory, stored)
            elif not weight.is_meta:
                weight.data = weight.data.clone()
    return ResidentLoad(num_bytes=entry.num_bytes, elapsed_s=elapsed_s)


def _check_complete(model: PreTrainedModel, path: Path, tensors: dict[str, TensorEntry]) -> None:
    """Refuse where transformers has filled a weight with random numbers for want of one in the file.

    A pack's names are the model's own; a weight that several modules share is there under one of its names.
    """
    names_of: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(weight), []).append(name)
    missing = [names[0] for names in names_of.values() if not any(name in tensors for name in names)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise misfit(f"{path} lacks {missing[0]}{more}", model, path.parents[1])


def _read_whole(reader: Reader, file: File, entry: ResidentEntry, *, is_checked: bool) -> torch.Tensor:
    """Return the file's bytes as uint8 (num_bytes,); the last, unaligned piece is read apart."""
    num_bytes = entry.num_bytes
    buffer = AlignedBuffer(round_up(num_bytes, BLOCK_ALIGN_BYTES), huge_pages=False)  # docs/experiments.md: first touch
    aligned_bytes = num_bytes // BLOCK_ALIGN_BYTES * BLOCK_ALIGN_BYTES
    requests = [
        ReadRequest(file, offset, min(_READ_BYTES, aligned_bytes - offset), buffer, offset)
        for offset in range(0, aligned_bytes, _READ_BYTES)
    ]
    content = buffer.numpy()
    check = _ChunkCheck(file.path, entry, content) if is_checked else None
    for request in landed(reader, requests):
        if check is not None:
            check.advance(request.offset + request.num_bytes)
    if aligned_bytes < num_bytes:
        tail = reader.read_range(file, aligned_bytes, num_bytes - aligned_bytes)
        content[aligned_bytes:num_bytes] = np.frombuffer(tail, dtype=np.uint8)
    if check is not None:
        check.advance(num_bytes)
    return torch.from_numpy(content)[:num_bytes]


class _ChunkCheck:
    """Holds the file's chunks against their checksums as the bytes come in, from the first on."""

    def __init__(self, path: Path, entry: ResidentEntry, content: npt.NDArray[np.uint8]) -> None:
        self._path = path
        self._entry = entry
        self._content = content
        self._num_checked = 0

    def advance(self, num_bytes: int) -> None:
        """Check every chunk that lies within the first `num_bytes` of the file.

        Raises:
            PackError: One is damaged.
        """
        entry = self._entry
        while self._num_checked < len(entry.checksums):
            begin = self._num_checked * entry.chunk_bytes
            end = min(begin + entry.chunk_bytes, entry.num_bytes)
            if end > num_bytes:
                return
            what = f"chunk {self._num_checked} (bytes {begin} to {end - 1})"
            check_bytes(self._content[begin:end], entry.checksums[self._num_checked], self._path, what)
            self._num_checked += 1


def check_header(path: Path, entry: ResidentEntry) -> None:
    """Check the chunks that hold the file's header, before transformers parses it; reads a few MiB.

    Raises:
        PackError: They are damaged.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        num_chunks = min(-(-(8 + min(length, MAX_HEADER_BYTES)) // entry.chunk_bytes), len(entry.checksums))
        file.seek(0)
        content = np.frombuffer(file.read(num_chunks * entry.chunk_bytes), dtype=np.uint8)
    _ChunkCheck(path, entry, content).advance(len(content))
    read_header(path)


def _view(memory: torch.Tensor, stored: TensorEntry) -> torch.Tensor:
    raw = memory[stored.offset : stored.offset + stored.num_bytes]
    if stored.offset % stored.dtype.itemsize:
        raw = raw.clone()
    return raw.view(stored.dtype).view(stored.shape)
