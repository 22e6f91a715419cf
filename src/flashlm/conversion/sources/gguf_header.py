"""The header of a GGUF file: its metadata, and which tensor lies where in which type. No tensor is read.

The file is outside data: counts, lengths and offsets are held against the file's size before anything is allocated or
believed, and what does not add up is refused by name. A model may be split over several files, named
`NAME-00001-of-00003.gguf`; any of them stands for all.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from flashlm.errors import PackError
from flashlm.storage.outside import check_regular, open_regular

SUFFIX = ".gguf"
MAX_SPLITS = 1000
_MAX_TENSORS = 1 << 17
_MAX_KEYS = 1 << 16
_MAX_NAME_BYTES = 1 << 10
_MAX_TEXT_BYTES = 64 << 20
_MAX_ELEMENTS = 1 << 48
_MAX_RANK = 4
_MAX_ALIGNMENT = 1 << 20
_MAX_KEPT = 4096  # elements of an array of numbers; longer ones, and those of texts, are counted only
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SPLIT = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

# Parts of a model that are no language model: what sees or hears, importance matrices.
_BESIDE = re.compile(r"^mmproj|mmproj[-.]|imatrix", re.IGNORECASE)

# Types of metadata by number: what struct calls them. 8 is text, 9 an array.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgmlType:
    """A way in which GGUF files hold elements: groups of so many of them, in so many bytes."""

    name: str
    group_elements: int
    group_bytes: int


TYPES: dict[int, GgmlType] = {
    number: GgmlType(name, group_elements, group_bytes)
    for number, name, group_elements, group_bytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
    )
}
"""Types of weights by their number; ggml's others are of activations, or of integers."""


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        name: Its name.
        path: The file.
        type: How its elements are written.
        shape: Its shape, the last axis contiguous: the file has it the other way round.
        offset: First byte in the file.
    """

    name: str
    path: Path
    type: GgmlType
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) // self.type.group_elements * self.type.group_bytes


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What one file, or all of a split one, say before their weights.

    Attributes:
        files: The files, in order.
        metadata: Values by key: numbers, texts, and lists of numbers. Of long lists, and those of texts, how many they hold.
        raw: The same as it stands in the first file, key and value, by key.
        tensors: By name, in the order of the files.
    """

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    raw: dict[str, bytes]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model's family."""
        return str(self.metadata["general.architecture"])

    def of_model(self, key: str) -> Any:
        """Return a value of the family's own: `of_model("block_count")`; None where the file does not say."""
        return self.metadata.get(f"{self.architecture}.{key}")


def read_gguf_header(path: Path) -> GgufHeader:
    """Return the header of a file, or of all files that it is one of.

    Raises:
        PackError: No GGUF, a damaged, truncated or big-endian file, or a part of a split model is missing.
    """
    first = _read_file(path)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or count <= 1:
        return _checked(first)
    parts = [_read_file(each) if each != path else first for each in _parts(path, count)]
    return _checked(_joined(parts, path))


def models_among(names: Iterable[str]) -> list[str]:
    """Return the GGUF files among `names`, of split models the first one; parts for other programs aside."""
    files = sorted(name for name in names if name.endswith(SUFFIX) and not _BESIDE.search(name.rpartition("/")[2]))
    return [name for name in files if (found := _SPLIT.match(name)) is None or int(found["number"]) == 1]


def files_of(name: str) -> list[str]:
    """Return the names of all files of the model that `name` stands for: itself, or those that it is one of."""
    found = _SPLIT.match(name)
    if found is None:
        return [name]
    count = min(int(found["count"]), MAX_SPLITS)
    return [f"{found['stem']}-{number:05d}-of-{found['count']}{SUFFIX}" for number in range(1, count + 1)]


def _parts(path: Path, count: int) -> list[Path]:
    found = _SPLIT.match(path.name)
    if found is None or int(found["count"]) != count or count > MAX_SPLITS:
        raise PackError(
            f"{path} is one of {count} files of a model: give them the names that llama-gguf-split gave them,"
            f" NAME-00001-of-{min(count, 99999):05d}{SUFFIX} and so on"
        )
    paths = [path.parent / name for name in files_of(path.name)]
    missing = [each.name for each in paths if not each.exists()]
    if missing:
        raise PackError(
            f"{path} is one of {count} files of a model, {len(missing)} are missing, first {missing[0]}: put all into"
            f" {path.parent}"
        )
    return paths


def _joined(parts: list[GgufHeader], path: Path) -> GgufHeader:
    first = parts[0]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        found = part.metadata.get("split.no"), part.metadata.get("split.count")
        if found != (number, len(parts)):
            raise PackError(
                f"{part.files[0]} says that it is part {found[0]} of {found[1]}, by its name it is {number} of {len(parts)}"
                " (from 0 on): parts of different models?"
            )
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise PackError(f"{part.files[0]} holds {twice}, which {tensors[twice].path} holds too")
        tensors |= part.tensors
    stated = first.metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise PackError(f"{path} and the files beside it hold {len(tensors)} tensors, they say that they hold {stated}")
    return GgufHeader(
        files=tuple(part.files[0] for part in parts),
        metadata=first.metadata,
        raw=first.raw,
        tensors=tensors,
    )


def _checked(header: GgufHeader) -> GgufHeader:
    if not isinstance(header.metadata.get("general.architecture"), str):
        raise PackError(f"{header.files[0]} does not say which architecture it is of: general.architecture is missing")
    if not header.tensors:
        raise PackError(f"{header.files[0]} holds no tensors: a file of a vocabulary alone?")
    return header


def _read_file(path: Path) -> GgufHeader:
    try:
        num_bytes = check_regular(path)
        with open_regular(path) as file:
            return _Reader(path, file, num_bytes).header()
    except OSError as error:
        raise PackError(f"{path} can't be read: {error.strerror or 'no such file'}") from error


class _Reader:
    """Reads a file from its beginning on, never beyond its end."""

    def __init__(self, path: Path, file: BinaryIO, num_bytes: int) -> None:
        self._path, self._file, self._num_bytes = path, file, num_bytes
        self._at = 0

    def header(self) -> GgufHeader:
        """Return the header."""
        magic = self._take(4, "its first four bytes")
        if magic != _MAGIC:
            raise PackError(f"{self._path} is no GGUF file: it begins with {magic!r}, {_MAGIC!r} expected")
        version = self._number("<I", "its version")
        if version not in _VERSIONS:
            raise self._wrong_version(version)
        num_tensors = self._count(_MAX_TENSORS, "tensors", 24)
        num_keys = self._count(_MAX_KEYS, "metadata keys", 13)
        metadata: dict[str, Any] = {}
        starts: dict[str, int] = {}
        for _ in range(num_keys):
            start = self._at
            key = self._text("a metadata key", _MAX_NAME_BYTES)
            if key in metadata:
                raise self._damaged(f"metadata {key} stands there twice")
            metadata[key], starts[key] = self._value(key), start
        ends = [*starts.values(), self._at][1:]
        infos = [self._info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment > _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}: a power of two from 8 on expected")
        data_start = -(-self._at // alignment) * alignment
        return GgufHeader(
            files=(self._path,),
            metadata=metadata,
            raw={key: self._again(start, end) for (key, start), end in zip(starts.items(), ends, strict=True)},
            tensors=self._placed(infos, data_start, alignment),
        )

    def _wrong_version(self, version: int) -> PackError:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
            return PackError(
                f"{self._path} is a big-endian GGUF file: convert it to little-endian, with gguf-convert-endian"
            )
        versions = " and ".join(map(str, _VERSIONS))
        return PackError(
            f"{self._path} is of GGUF version {version}, {versions} are read: make it again with llama.cpp"
        )

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text("the name of a tensor", _MAX_NAME_BYTES)
        rank = self._number("<I", f"the shape of {name}")
        if not 1 <= rank <= _MAX_RANK:
            raise self._damaged(f"{name} has {rank} axes, 1 to {_MAX_RANK} expected")
        axes = [self._number("<Q", f"the shape of {name}") for _ in range(rank)]
        if min(axes) == 0 or math.prod(axes) > _MAX_ELEMENTS:
            raise self._damaged(f"{name} has the shape {axes[::-1]}")
        number, offset = self._number("<I", f"the type of {name}"), self._number("<Q", f"the place of {name}")
        return name, tuple(reversed(axes)), number, offset

    def _placed(
        self, infos: Sequence[tuple[str, tuple[int, ...], int, int]], data_start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """Return the tensors, after holding types, sizes and places against each other and against the file."""
        tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in infos:
            if name in tensors:
                raise self._damaged(f"{name} stands there twice")
            found = TYPES.get(number)
            if found is None:
                known = ", ".join(each.name for each in TYPES.values())
                raise PackError(
                    f"{self._path} holds {name} in ggml's type {number}, which is not known here: make the file again in"
                    f" one of {known}"
                )
            if shape[-1] % found.group_elements:
                raise self._damaged(
                    f"{name} has rows of {shape[-1]} elements, no multiple of the {found.group_elements} of a group of"
                    f" {found.name}"
                )
            if offset % alignment:
                raise self._damaged(f"{name} lies at {offset}, no multiple of {alignment}")
            tensors[name] = GgufTensor(name=name, path=self._path, type=found, shape=shape, offset=data_start + offset)
        ordered = sorted(tensors.values(), key=lambda each: each.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.num_bytes > after.offset:
                raise self._damaged(f"{before.name} and {after.name} overlap")
        last = ordered[-1] if ordered else None
        if last is not None and last.offset + last.num_bytes > self._num_bytes:
            raise PackError(
                f"{self._path} is too short or damaged: {last.name} ends at {last.offset + last.num_bytes}, the file at"
                f" {self._num_bytes}"
            )
        return tensors

    def _value(self, key: str) -> Any:
        kind = self._number("<I", f"the type of metadata {key}")
        if kind == _TEXT:
            return self._text(f"metadata {key}", _MAX_TEXT_BYTES)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            raise self._damaged(f"metadata {key} is of type {kind}")
        return self._number(_NUMBERS[kind], f"metadata {key}")

    def _array(self, key: str) -> Any:
        kind = self._number("<I", f"the type of metadata {key}")
        count = self._number("<Q", f"the length of metadata {key}")
        if kind == _TEXT:
            if count > (self._num_bytes - self._at) // 8:
                raise self._damaged(f"metadata {key} has {count} texts")
            for _ in range(count):
                self._skip(self._number("<Q", f"metadata {key}"), f"metadata {key}")
            return count
        if kind not in _NUMBERS:
            raise self._damaged(f"metadata {key} is a list of type {kind}")
        size = struct.calcsize(_NUMBERS[kind])
        if count > _MAX_KEPT:
            self._skip(count * size, f"metadata {key}")
            return count
        return list(struct.unpack(f"<{count}{_NUMBERS[kind][1]}", self._take(count * size, f"metadata {key}")))

    def _count(self, most: int, what: str, smallest: int) -> int:
        count: int = self._number("<Q", f"the number of {what}")
        if count > most or count * smallest > self._num_bytes:
            raise self._damaged(f"it says that it holds {count} {what}")
        return count

    def _text(self, what: str, most: int) -> str:
        length = self._number("<Q", what)
        if length > most:
            raise self._damaged(f"{what} has {length} bytes, at most {most} expected")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is no UTF-8") from error

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def _take(self, count: int, what: str) -> bytes:
        self._advance(count, what)
        content = self._file.read(count)
        if len(content) != count:
            raise self._cut_short(what)
        return content

    def _skip(self, count: int, what: str) -> None:
        self._advance(count, what)
        self._file.seek(self._at)

    def _again(self, start: int, end: int) -> bytes:
        """Return bytes that were looked at before."""
        self._file.seek(start)
        return self._file.read(end - start)

    def _advance(self, count: int, what: str) -> None:
        self._at += count
        if self._at > self._num_bytes:
            raise self._cut_short(what)

    def _cut_short(self, what: str) -> PackError:
        return PackError(f"{self._path} is cut short: it ends after {self._num_bytes} bytes, within {what}")

    def _damaged(self, why: str) -> PackError:
        return PackError(f"{self._path} has a damaged header: {why}")
