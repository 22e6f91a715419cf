"""Read a whole pack and check it against its manifest: sizes, every checksum, missing and foreign files.

The manifest itself is held against its own checksum and against the model that config.json describes; a calibration's
files against theirs.

All problems are found, not only the first, and each names its file and block, so that it is clear whether a file was
cut short, a disk flipped a bit, or a copy left something out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from flashlm.errors import PackError, StorageError, UnsupportedModelError
from flashlm.pack.calibration_files import calibration_problems
from flashlm.pack.direct_file import AlignedBuffer, DirectReader, room_bytes, write_small_file
from flashlm.pack.files import MAX_SMALL_FILE_BYTES, small_file_problems, special_file_problems
from flashlm.pack.manifest import (
    CALIBRATION_NAMES,
    CONFIG_NAME,
    FLASH_DIR,
    MANIFEST_NAME,
    ExpertsEntry,
    LayerEntry,
    Manifest,
    layer_path,
    manifest_path,
    order_path,
    read_manifest,
    resident_path,
)
from flashlm.pack.pack_config import read_pack_config
from flashlm.pack.reorder import read_order
from flashlm.rows.layout import LayerLayout
from flashlm.storage.outside import check_regular, read_document

_MAX_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The outcome of a check.

    Attributes:
        pack: The folder.
        num_files: Files checked.
        num_bytes: Bytes read and checked.
        problems: One line for each thing that is wrong, empty where all is well.
    """

    pack: Path
    num_files: int
    num_bytes: int
    problems: tuple[str, ...]

    def raise_for_problems(self) -> None:
        """Raise what was found.

        Raises:
            PackError: With all problems (the first twenty of many).
        """
        if not self.problems:
            return
        shown = [*self.problems[:_MAX_SHOWN]]
        if len(self.problems) > _MAX_SHOWN:
            shown.append(f"and {len(self.problems) - _MAX_SHOWN} more")
        advice = "" if all("flashlm calibrate" in problem for problem in self.problems) else "\nConvert it again."
        raise PackError(f"{self.pack} is damaged ({len(self.problems)} problems):\n  " + "\n  ".join(shown) + advice)


@dataclass(frozen=True)
class _Range:
    """A piece of a file with its checksum."""

    path: Path
    what: str
    offset: int
    num_bytes: int
    checksum: str


def verify(
    pack: str | Path,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> VerifyReport:
    """Check every byte of a pack; holds one block at a time.

    Args:
        pack: The folder.
        trust_remote_code: Run model code that the pack carries, to hold the manifest against its model.
        progress: Called with (bytes done, bytes in all, file name).

    Returns:
        The report; `raise_for_problems` turns it into an error.

    Raises:
        PackError: The folder is no finished pack, or its manifest is damaged.
    """
    folder = Path(pack)
    manifest = read_manifest(folder)
    files = {path: (size, list(ranges)) for path, size, ranges in _files(folder, manifest)}
    total = sum(size for size, _ in files.values())
    problems = _foreign(folder, manifest)
    done = read = 0
    buffer = AlignedBuffer(0)
    with DirectReader() as reader:
        for path, (size, ranges) in files.items():
            found = _size_problem(path, size)
            if found:
                problems.append(found)
            for piece in ranges if path.is_file() else []:
                if len(buffer) < room_bytes(piece.num_bytes):
                    buffer = AlignedBuffer(room_bytes(piece.num_bytes))
                problems += _check(reader, piece, buffer)
                read += piece.num_bytes
                if progress is not None:
                    progress(done + piece.offset + piece.num_bytes, total, path.name)
            done += size
    small = small_file_problems(folder, manifest)
    problems += small + special_file_problems(folder)
    problems += _order_problems(folder, manifest)
    problems += calibration_problems(folder, manifest)
    if not any(str(folder / CONFIG_NAME) in problem for problem in small):
        problems += _model_problems(folder, manifest, trust_remote_code=trust_remote_code)
    num_files = len(files) + len(manifest.small_files)
    return VerifyReport(pack=folder, num_files=num_files, num_bytes=read, problems=tuple(problems))


def _files(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, int, Iterator[_Range]]]:
    yield resident_path(folder), manifest.resident.num_bytes, _resident_ranges(folder, manifest)
    for entry, layout in manifest.files:
        yield layer_path(folder, entry), layout.file_bytes, _layer_ranges(folder, entry, layout)


def _resident_ranges(folder: Path, manifest: Manifest) -> Iterator[_Range]:
    resident = manifest.resident
    for chunk, checksum in enumerate(resident.checksums):
        offset = chunk * resident.chunk_bytes
        num_bytes = min(resident.chunk_bytes, resident.num_bytes - offset)
        yield _Range(resident_path(folder), f"chunk {chunk}", offset, num_bytes, checksum)


def _layer_ranges(folder: Path, entry: LayerEntry | ExpertsEntry, layout: LayerLayout) -> Iterator[_Range]:
    for block, checksum in enumerate(entry.checksums):
        rows = layout.rows_of(block)
        is_expert = isinstance(entry, ExpertsEntry)
        what = f"expert {block}" if is_expert else f"block {block} (rows {rows.start} to {rows.stop - 1})"
        yield _Range(layer_path(folder, entry), what, layout.offset_of(block), layout.read_bytes(block), checksum)


def _size_problem(path: Path, size: int) -> str | None:
    try:
        actual = check_regular(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except PackError as error:
        return str(error)
    return None if actual == size else f"{path} has {actual} bytes, {size} expected"


def _check(reader: DirectReader, piece: _Range, buffer: AlignedBuffer) -> list[str]:
    hasher = xxhash.xxh3_64()
    try:
        raw = reader.read(piece.path, piece.offset, piece.num_bytes, buffer)
    except StorageError as error:
        return [f"{piece.path}: {piece.what} can't be read: {error}"]
    first = raw.storage_offset()
    hasher.update(buffer.memory[first : first + piece.num_bytes])
    if hasher.hexdigest() == piece.checksum:
        return []
    where = f"{piece.what}, {piece.num_bytes} bytes at {piece.offset}"
    return [f"{piece.path}: {where}: checksum {hasher.hexdigest()}, {piece.checksum} expected"]


def _foreign(folder: Path, manifest: Manifest) -> list[str]:
    """Return files in `flash/` that the manifest does not know: a mixed-up copy, most likely."""
    known = {
        MANIFEST_NAME,
        resident_path(folder).name,
        *CALIBRATION_NAMES,
        *(entry.file for entry, _ in manifest.files),
    }
    known |= {order_path(folder, entry).name for entry in manifest.layers if entry.order_checksum is not None}
    flash = folder / FLASH_DIR
    try:
        found = sorted(flash.iterdir())
    except OSError as error:
        return [f"{flash} can't be read: {error.strerror}"]
    return [f"{path} is not part of this pack" for path in found if path.name not in known]


def _model_problems(folder: Path, manifest: Manifest, *, trust_remote_code: bool) -> list[str]:
    """Return in what the manifest differs from the model that config.json describes."""
    from flashlm.pack.checkpoint import read_header
    from flashlm.structure.agreement import shape_problems, structure_problems
    from flashlm.structure.families import build_meta_model
    from flashlm.structure.model_config import load_pack_config

    try:
        config = load_pack_config(folder, manifest, trust_remote_code=trust_remote_code)
        model = build_meta_model(config, trust_remote_code=trust_remote_code)
    except (PackError, UnsupportedModelError) as error:
        return [str(error)]
    problems = list(structure_problems(model, manifest))
    with suppress(PackError, FileNotFoundError):  # told already
        problems += shape_problems(model, read_header(resident_path(folder)))
    return [f"{manifest_path(folder)}: {problem}" for problem in problems]


def accept_small_files(pack: str | Path) -> list[str]:
    """Take config.json and the files beside it as they are now: for people who changed them on purpose.

    Returns:
        The names of the files that differed; those that are gone are forgotten.

    Raises:
        PackError: The folder is no finished pack, or config.json can't be used.
    """
    folder = Path(pack)
    manifest = read_manifest(folder)
    read_pack_config(folder, manifest, is_checked=False)
    kept = {name: folder / name for name in manifest.small_files if (folder / name).exists()}
    sums = {name: xxhash.xxh3_64_hexdigest(read_document(path, MAX_SMALL_FILE_BYTES)) for name, path in kept.items()}
    changed = [name for name, checksum in manifest.small_files.items() if sums.get(name) != checksum]
    if changed:
        accepted = manifest.model_copy(update={"small_files": sums})
        write_small_file(manifest_path(folder), accepted.to_bytes())
    return changed


def _order_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Return what is wrong with the files that say which neuron a row is."""
    problems = []
    for entry in manifest.layers:
        try:
            read_order(folder, entry)
        except PackError as error:
            problems.append(str(error))
    return problems
