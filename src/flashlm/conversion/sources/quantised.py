"""Safetensors that are quantised already: MXFP4 as in gpt-oss, FP8 in tiles of 128 x 128 as in DeepSeek-V3 and Qwen3.

Both keep elements in one tensor and their scales in another. Here the two become one tensor under the name of the weight,
whose rows are put together while they are read: every group's scale, then its elements. No value changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashlm.conversion.sources.safetensors import Checkpoint
from flashlm.conversion.sources.tensors import EncodedTensor
from flashlm.errors import PackError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.rows.encodings import ENCODINGS
from flashlm.storage.ranges import FileRange, RangeReader

_TILE = 128
_MX_GROUP = 32
_MX_NAN = 255  # of a scale
_LOW, _HIGH = 0x0F0F0F0F0F0F0F0F, -0x0F0F0F0F0F0F0F10  # of eight bytes: the low, the high halves
_READ_BYTES = 8 << 20
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_E8M0 = getattr(torch, "float8_e8m0fnu", None)


def join_scales(checkpoint: Checkpoint, quantised: Mapping[str, Any]) -> Checkpoint:
    """Return a checkpoint whose quantised weights have their scales with them.

    Args:
        checkpoint: As its headers say.
        quantised: The config's `quantization_config`, of a method that is known.

    Raises:
        PackError: Scales are missing, of another shape, or not finite; or weights are quantised in another way.
    """
    tensors = dict(checkpoint.tensors)
    if quantised["quant_method"] == "mxfp4":
        _join_mxfp4(tensors)
    else:
        _check_fp8_config(checkpoint, quantised)
        _join_fp8(tensors)
    check_finite(each.scales for each in tensors.values() if isinstance(each, Mxfp4Tensor | Fp8Tensor))
    return replace(checkpoint, tensors=tensors)


def check_scaled(tensors: Iterable[TensorEntry]) -> None:
    """Refuse elements of 8 bits without scales.

    Raises:
        PackError: There are some.
    """
    for entry in tensors:
        if not isinstance(entry, EncodedTensor) and entry.dtype.is_floating_point and entry.dtype.itemsize == 1:
            raise PackError(
                f"{entry.path} holds {entry.name} in 8 bits without scales: {entry.name}_scale_inv is missing, or the"
                " model is quantised in a way that is not read"
            )


def check_finite(scales: Iterable[TensorEntry]) -> None:
    """Read scales, a seventeenth of the model's bytes at most, and refuse those that are not finite or below zero.

    Raises:
        PackError: There is one.
    """
    owners = {
        FileRange(each.path, each.offset + start, min(_READ_BYTES, each.num_bytes - start)): each
        for each in scales
        for start in range(0, each.num_bytes, _READ_BYTES)
    }
    with RangeReader() as reader:
        for piece, read in reader.ahead(owners):
            entry = owners[piece]
            raw = read.wait()
            bad = _bad_scale(raw if raw.storage_offset() % entry.dtype.itemsize == 0 else raw.clone(), entry.dtype)
            if bad is not None:
                raise PackError(f"{entry.path} is damaged: {entry.name} holds the scale {bad}")


def _bad_scale(raw: torch.Tensor, dtype: torch.dtype) -> float | None:
    """Return the first of some scales that is not finite or below zero; None where there is none."""
    if dtype not in _FLOATS:  # powers of two, of which there are many: one is no number
        return math.nan if int(raw.view(torch.uint8).max()) == _MX_NAN else None
    values = raw.view(dtype).float()
    is_good = (values >= 0) & torch.isfinite(values)
    return None if bool(is_good.all()) else float(values[~is_good][0])


def _as_floats(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return scales as fp32: floats as they are, or the exponents of powers of two."""
    if dtype in _FLOATS:
        return raw.view(dtype).float()
    exponents = raw.view(torch.uint8).float()
    return torch.where(exponents == _MX_NAN, torch.nan, (exponents - 127).exp2())


def _join_mxfp4(tensors: dict[str, TensorEntry]) -> None:
    for key in [name for name in tensors if name.endswith("_blocks")]:
        name = key.removesuffix("_blocks")
        blocks, scales = tensors.pop(key), tensors.pop(f"{name}_scales", None)
        if scales is None:
            raise PackError(f"{blocks.path} holds {key} without its scales: {name}_scales is missing")
        if name in tensors:
            raise PackError(f"{blocks.path} holds {name} in two ways, the second as {key}")
        shapes = blocks.shape[:-1] == scales.shape and len(blocks.shape) == 4 and blocks.shape[-1] == _MX_GROUP // 2
        if not shapes or (blocks.dtype, scales.dtype) != (torch.uint8, torch.uint8):
            raise PackError(
                f"{blocks.path} holds {key} with shape {list(blocks.shape)} and scales of shape {list(scales.shape)}: bytes"
                " of shape [experts, rows, groups, 16] and [experts, rows, groups] expected"
            )
        num_experts, num_rows, num_groups = scales.shape
        width = num_groups * _MX_GROUP
        tensors[name] = Mxfp4Tensor(
            name=name,
            path=blocks.path,
            dtype=torch.float32,
            shape=(num_experts, width, num_rows),
            offset=blocks.offset,
            encoding="mxfp4",
            num_rows=num_experts * num_rows,
            width=width,
            is_transposed=True,
            scales=scales,
        )


def _check_fp8_config(checkpoint: Checkpoint, quantised: Mapping[str, Any]) -> None:
    found = quantised.get("weight_block_size"), quantised.get("activation_scheme", "dynamic")
    if found != ([_TILE, _TILE], "dynamic"):
        raise PackError(
            f"{checkpoint.folder} is quantised to FP8 with weight_block_size {found[0]} and activation_scheme {found[1]!r}:"
            f" {[_TILE, _TILE]} and 'dynamic' are read; convert the model that it was made from"
        )


def _join_fp8(tensors: dict[str, TensorEntry]) -> None:
    for key in [name for name in tensors if name.endswith("_scale_inv")]:
        name = key.removesuffix("_scale_inv")
        scales, weight = tensors.pop(key), tensors.get(name)
        if weight is None:
            raise PackError(f"{scales.path} holds {key}, but {name} is missing")
        tensors[name] = _fp8(weight, scales)


def _fp8(weight: TensorEntry, scales: TensorEntry) -> Fp8Tensor:
    if weight.dtype != torch.float8_e4m3fn or len(weight.shape) < 2:
        raise PackError(
            f"{weight.path} holds {weight.name} as {weight.dtype} with scales: a matrix of F8_E4M3 expected"
        )
    *outer, rows, width = weight.shape
    if width % _TILE:
        raise PackError(
            f"{weight.path} holds {weight.name} with {width} inputs, no multiple of the {_TILE} of a tile: such FP8 weights"
            " are not read, convert the model that it was made from"
        )
    wanted = (*outer, -(-rows // _TILE), width // _TILE)
    if scales.shape != wanted or not (scales.dtype in (*_FLOATS, torch.uint8) or scales.dtype == _E8M0):
        raise PackError(
            f"{scales.path} holds {scales.name} as {scales.dtype} with shape {list(scales.shape)}, {list(wanted)} expected"
        )
    return Fp8Tensor(
        name=weight.name,
        path=weight.path,
        dtype=torch.float32,
        shape=weight.shape,
        offset=weight.offset,
        encoding="fp8_block",
        num_rows=math.prod(outer) * rows,
        width=width,
        scales=scales,
        matrix_rows=rows,
    )


def _lines(entry: TensorEntry, line_bytes: int, lines: range) -> FileRange:
    """Return the bytes from the first to the last of some lines of a tensor."""
    first, last = lines[0], lines[-1]
    return FileRange(entry.path, entry.offset + first * line_bytes, (last - first + 1) * line_bytes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mxfp4Tensor(EncodedTensor):
    """Experts in MXFP4, as rows in GGUF's order: a group's scale, then its elements, i and i + 16 in a byte.

    Attributes:
        scales: The powers of two of its groups; the tensor itself holds the elements, 2i and 2i + 1 in a byte.
    """

    scales: TensorEntry

    def ranges(self, rows: range) -> tuple[FileRange, ...]:
        """Return where elements and scales lie."""
        num_groups = self.width // _MX_GROUP
        return _lines(self, num_groups * _MX_GROUP // 2, rows), _lines(self.scales, num_groups, rows)

    def join(self, rows: range, raw: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the rows."""
        num_groups = self.width // _MX_GROUP
        blocks = raw[0].view(-1, num_groups, 2, 8)[:: rows.step]
        scales = raw[1].view(-1, num_groups)[:: rows.step]
        words = blocks.contiguous()
        words = (words if words.storage_offset() % 8 == 0 else words.clone()).view(torch.int64).squeeze(-1)
        first, second = words[..., 0], words[..., 1]  # elements 0 to 15, and 16 to 31
        even = (first & _LOW) | ((second & _LOW) << 4)
        odd = ((first >> 4) & _LOW) | (second & _HIGH)
        joined = torch.empty(len(rows), num_groups, 1 + _MX_GROUP // 2, dtype=torch.uint8)
        joined[..., 0] = scales
        joined[..., 1::2] = even.unsqueeze(-1).view(torch.uint8)
        joined[..., 2::2] = odd.unsqueeze(-1).view(torch.uint8)
        return joined.flatten(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fp8Tensor(EncodedTensor):
    """Matrices in FP8, as rows of groups of 128: the fp32 scale of the tile that they are in, then its elements.

    Attributes:
        scales: Of each tile.
        matrix_rows: Rows of a matrix, of which several may be stacked: tiles do not go from one to the next.
    """

    scales: TensorEntry
    matrix_rows: int

    def ranges(self, rows: range) -> tuple[FileRange, ...]:
        """Return where elements and scales lie."""
        tiles = self._tiles(rows)
        line = self.width // _TILE * self.scales.dtype.itemsize
        return _lines(self, self.width, rows), _lines(self.scales, line, range(int(tiles[0]), int(tiles[-1]) + 1))

    def _tiles(self, rows: range) -> torch.Tensor:
        """Return which line of scales each row has."""
        numbers = torch.arange(rows.start, rows.stop, rows.step)
        return numbers // self.matrix_rows * -(-self.matrix_rows // _TILE) + numbers % self.matrix_rows // _TILE

    def join(self, rows: range, raw: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the rows."""
        num_groups = self.width // _TILE
        tiles = self._tiles(rows)
        dtype = self.scales.dtype
        scales = _as_floats(raw[1] if raw[1].storage_offset() % dtype.itemsize == 0 else raw[1].clone(), dtype)
        scales = scales.view(-1, num_groups)[tiles - tiles[0]]
        group_bytes = ENCODINGS[self.encoding].group_bytes
        joined = torch.empty(len(rows), num_groups, group_bytes, dtype=torch.uint8)
        joined[..., : group_bytes - _TILE] = scales.contiguous().view(torch.uint8).view(len(rows), num_groups, -1)
        joined[..., group_bytes - _TILE :] = raw[0].view(-1, num_groups, _TILE)[:: rows.step]
        return joined.flatten(1)
