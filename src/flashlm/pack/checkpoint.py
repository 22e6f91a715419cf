"""A source checkpoint in safetensors: which file holds which tensor, where, in what shape and type.

Headers are parsed here and not by mapping the file, so that a checkpoint of any size costs no memory, and because they
are outside data: every limit is checked before anything is allocated. Pickles (`pytorch_model.bin`) are refused.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashlm.documents import read_json
from flashlm.errors import PackError
from flashlm.storage.outside import check_regular, open_regular

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_INDEX_BYTES = 64 << 20
MAX_RANK = 8

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes:
        name: Its name in the checkpoint.
        path: The file that holds it.
        dtype: Its element type.
        shape: Its shape.
        offset: First byte in the file.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All tensors of a checkpoint folder by name, and the weight files they lie in."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the index and the headers of the safetensors files in `folder`; no weights are read.

    Raises:
        PackError: No safetensors, a missing shard, a damaged header or index, or an element type that can't be read.
    """
    if os.path.lexists(folder / SINGLE_NAME):  # something else than a file is refused when it is opened
        return _checkpoint(folder, {SINGLE_NAME: None})
    if os.path.lexists(folder / INDEX_NAME):
        return _checkpoint(folder, _read_index(folder / INDEX_NAME))
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise PackError(
            f"{folder} holds its weights as pickles (.bin), which can run code when opened and are not read:"
            " save the model again as safetensors, with model.save_pretrained(FOLDER)"
        )
    raise PackError(f"{folder} has no weights: {SINGLE_NAME} or {INDEX_NAME} expected")


def _checkpoint(folder: Path, wanted: dict[str, set[str] | None]) -> Checkpoint:
    tensors: dict[str, TensorEntry] = {}
    for file, names in wanted.items():
        found = read_header(folder / file)
        missing = sorted((names or set()) - set(found))
        if missing:
            raise PackError(f"{folder / file} lacks {len(missing)} tensors that {INDEX_NAME} lists, first {missing[0]}")
        for name, entry in found.items():
            if names is None or name in names:
                tensors[name] = entry
    return Checkpoint(folder=folder, files=tuple(folder / file for file in sorted(wanted)), tensors=tensors)


def _read_index(path: Path) -> dict[str, set[str] | None]:
    content = read_json(path, MAX_INDEX_BYTES)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise PackError(f"{path} has no weight_map")
    names: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise PackError(f"{path} names {file!r} for {name}, which is not a safetensors file in this folder")
        found = names.setdefault(file, set())
        assert found is not None
        found.add(name)
    return names


def shards_of(index: Path) -> list[str]:
    """Return the names of the weight files that an index names.

    Raises:
        PackError: It is damaged, or names a file that could not lie beside it.
    """
    return sorted(_read_index(index))


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file.

    Raises:
        PackError: The file is missing or shorter than its header says, or the header is damaged.
    """
    try:
        file_bytes = check_regular(path)
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise PackError(f"{path} is not safetensors: a header of {length} bytes in a file of {file_bytes}")
            text = file.read(length)
    except OSError as error:
        raise PackError(f"{path} can't be read: {error.strerror}") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise PackError(f"{path} has a damaged header: an object expected")
    header.pop("__metadata__", None)
    data_bytes = file_bytes - 8 - length
    return {name: _entry(path, name, raw, 8 + length, data_bytes) for name, raw in header.items()}


def _entry(path: Path, name: str, raw: Any, data_start: int, data_bytes: int) -> TensorEntry:
    match raw:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise PackError(f"{path} has a damaged header at {name}")
    if dtype not in TORCH_DTYPES:
        raise PackError(f"{path} holds {name} as {dtype}, which is not supported: {', '.join(TORCH_DTYPES)} are")
    if len(shape) > MAX_RANK or not all(type(size) is int and size >= 0 for size in shape):
        raise PackError(f"{path} has a damaged header: shape {shape[:MAX_RANK]} at {name}")
    if not 0 <= begin <= end <= data_bytes:
        raise PackError(
            f"{path} is too short or damaged: {name} lies at {begin} to {end}, the file has {data_bytes} bytes of data"
        )
    entry = TensorEntry(name=name, path=path, dtype=TORCH_DTYPES[dtype], shape=tuple(shape), offset=data_start + begin)
    if entry.num_bytes != end - begin:
        raise PackError(f"{path} has a damaged header: {name} needs {entry.num_bytes} bytes, has {end - begin}")
    return entry
