"""The header of a file of safetensors: which tensor lies where, in what shape and type.

It is parsed here and not by mapping the file, so that a file of any size costs no memory, and because it is outside data:
every limit is checked before anything is allocated.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from flashlm.documents import without_twins
from flashlm.errors import PackError
from flashlm.storage.outside import check_regular, open_regular

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
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
        header = json.loads(text, object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        raise PackError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise PackError(f"{path} has a damaged header: an object expected")
    header.pop("__metadata__", None)
    data_bytes = file_bytes - 8 - length
    tensors = {name: _entry(path, name, raw, 8 + length, data_bytes) for name, raw in header.items()}
    for before, after in pairwise(sorted(tensors.values(), key=lambda each: (each.offset, each.num_bytes))):
        if before.offset + before.num_bytes > after.offset:
            raise PackError(f"{path} has a damaged header: {before.name} and {after.name} overlap")
    return tensors


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
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= data_bytes:
        raise PackError(
            f"{path} is too short or damaged: {name} lies at {begin} to {end}, the file has {data_bytes} bytes of data"
        )
    entry = TensorEntry(name=name, path=path, dtype=TORCH_DTYPES[dtype], shape=tuple(shape), offset=data_start + begin)
    if entry.num_bytes != end - begin:
        raise PackError(f"{path} has a damaged header: {name} needs {entry.num_bytes} bytes, has {end - begin}")
    return entry
