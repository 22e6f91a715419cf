"""Turn a Hugging Face checkpoint into a pack: what can be streamed row by row into `flash/`, the rest as it is.

A conversion that is killed goes on with the next unfinished file when started again and ends with the same bytes; the
manifest, without which nothing takes the folder for a pack, is written last. One whose source turns out to be damaged while
its weights pass leaves nothing behind: no later run could go on with it. Memory does not grow with the model: the
weights pass through a fixed set of buffers (about 0.7 GiB) in three overlapping steps, read, lay out, write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path

import xxhash

from flashlm._version import __version__
from flashlm.conversion.casts import CastCounts, describe_zeroed
from flashlm.conversion.layer_file import LayerPools, num_chunks_ahead, write_layer
from flashlm.conversion.pipeline import BufferPool, ReadAhead, WriteBehind
from flashlm.conversion.plan import ConversionPlan, StreamedFile, plan_conversion
from flashlm.conversion.record import (
    ProgressRecord,
    discard,
    only_one,
    open_record,
    prepare_folder,
    remove_record,
    save_record,
)
from flashlm.conversion.resident_file import CHECKSUM_CHUNK_BYTES, read_resident, write_resident
from flashlm.conversion.source import open_source, resolve_source
from flashlm.errors import ConfigError, PackError, StorageError, UnsupportedModelError
from flashlm.pack.files import MAX_SMALL_FILE_BYTES
from flashlm.pack.manifest import (
    CONFIG_NAME,
    FLASH_DIR,
    RESIDENT_NAME,
    Manifest,
    ResidentEntry,
    SourceEntry,
    UnitEntry,
    read_manifest,
    resident_path,
    write_manifest,
)
from flashlm.pack.pack_config import NOTE, NOTE_NAME
from flashlm.pack.units import Kind
from flashlm.rows.kernels import one_torch_thread
from flashlm.rows.layout import MATRIX, Part
from flashlm.sizes import format_size
from flashlm.storage.outside import read_bounded
from flashlm.storage.ranges import RangeReader
from flashlm.storage.writer import check_room, sync_folder, write_error, write_small_file
from flashlm.structure.experts import ExpertLayer
from flashlm.structure.families import FfnLayer
from flashlm.structure.find_units import MIN_LINEAR_BYTES, LinearLayer

ProgressCallback = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is being worked on."""
AnnounceCallback = Callable[[str], None]
"""Called with one line that says what will be, or was, done."""

KIND_WORDS: dict[Kind, str] = {
    "ffn": "streamed layers",
    "experts": "layers of experts",
    "linear": "linear layers",
    "embedding": "embeddings",
}
RECORD_EVERY_BYTES = 128 << 20  # of files written between two records: syncing one costs as much as a few MiB
_SPARE_BYTES = 16 << 20  # manifest, progress record, file system overhead


def convert(
    source: str | Path,
    pack: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    block_rows: int | None = None,
    min_linear_bytes: int = MIN_LINEAR_BYTES,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
    announce: AnnounceCallback | None = None,
) -> Manifest:
    """Convert `source` into the folder `pack`, going on where an earlier attempt stopped.

    Args:
        source: A Hugging Face model folder with safetensors, plain or in MXFP4 or FP8; a GGUF file, or a folder with one;
            or a hub id, of several GGUF files there REPOSITORY:FILE.
        pack: The folder to write; new, empty, or an unfinished conversion of the same source and settings. A finished
            one is left as it is.
        dtype: Element type of the pack: bf16, fp16 or fp32 (or the full names). None: bf16; of a GGUF file fp32, its
            16-bit weights as they are.
        quantize: "q8_0": streamed weights are written so, in 8.5 bits each, where their rows are whole groups of 32;
            the others, and what is resident, in `dtype`. None: those that are quantised are kept as they are, all others
            are in `dtype`.
        block_rows: Rows per block, a multiple of 16; by default blocks of about 4 MiB.
        min_linear_bytes: Smaller matrices (attention, output layer, embeddings) stay in DRAM; larger ones can be streamed.
        trust_remote_code: Run model code that comes with the source, and keep it in the pack.
        progress: Called with (bytes done, bytes in all, what).
        announce: Called with one line about what will be written, one for each thing that is left out, and one where
            weights became zero; the pack's manifest keeps these (`source.notes`).

    Returns:
        The manifest of the finished pack.

    Raises:
        ConfigError: A wrong setting, or a target that holds something else.
        UnsupportedModelError: The model's feed-forward layers can't be placed.
        PackError: The source is damaged or incomplete.
        StorageError: The target can't be written, is full or too small; or the source can't be read.
    """
    announce = announce or (lambda line: None)
    path = resolve_source(source, trust_remote_code=trust_remote_code, announce=announce)
    target = Path(pack).expanduser()
    _check_target(path, target)
    with open_source(str(source), path, trust_remote_code=trust_remote_code) as opened:
        plan = plan_conversion(opened, target, dtype, block_rows, trust_remote_code, min_linear_bytes, quantize)
        return _convert(plan, progress or (lambda done, total, what: None), announce)


def _convert(plan: ConversionPlan, progress: ProgressCallback, announce: AnnounceCallback) -> Manifest:
    target = plan.pack
    is_new = prepare_folder(target)
    with only_one(target), one_torch_thread():  # the other cores read and write
        record = open_record(target, plan.fingerprint)
        if record is None:
            announce(f"{target} is already finished: nothing to do")
            return read_manifest(target)
        try:
            _check_space(plan, record)
        except StorageError:
            if not record.finished:
                discard(target, (), with_folder=is_new)
            raise
        announce(_describe(plan, record))
        for note in plan.notes:
            announce(note)
        try:
            _write_files(plan, record, progress)
        except (PackError, UnsupportedModelError):  # this source and these settings never become a pack
            discard(target, [_path(plan, name) for name in plan.file_bytes], with_folder=is_new)
            raise
        for note in _cast_notes(plan, record):
            announce(f"warning: {note}")
        return _finish(plan, record)


def _check_target(folder: Path, target: Path) -> None:
    resolved = target.resolve()
    if resolved == folder or folder in resolved.parents:
        raise ConfigError(f"the pack can't be written into its own source: {target} lies in {folder}")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is not a folder")


def _check_space(plan: ConversionPlan, record: ProgressRecord) -> None:
    needed = sum(size for name, size in plan.file_bytes.items() if name not in record.finished) + _SPARE_BYTES
    needed += sum((plan.source.folder / name).stat().st_size for name in plan.source.small.kept)
    check_room(plan.pack, needed, what="the pack")


def _describe(plan: ConversionPlan, record: ProgressRecord) -> str:
    sizes = plan.file_bytes
    done = sum(sizes[name] for name in record.finished if name in sizes)
    going_on = f", going on after {format_size(done)}" if done else ""
    streamed = sum(sizes.values()) - sizes[RESIDENT_NAME]
    counts = Counter(file.unit.kind for file in plan.streamed)
    what = " and ".join(f"{counts[kind]} {words}" for kind, words in KIND_WORDS.items() if counts[kind])
    return (
        f"writing {format_size(sum(sizes.values()))} to {plan.pack}: {format_size(streamed)} in {what},"
        f" {format_size(sizes[RESIDENT_NAME])} resident, {plan.dtype}{going_on}"
    )


def _write_files(plan: ConversionPlan, record: ProgressRecord, progress: ProgressCallback) -> None:
    sizes = plan.file_bytes
    for name in [name for name in record.finished if not _is_there(plan, name)]:
        del record.finished[name]
    done = sum(sizes[name] for name in record.finished)
    total = sum(sizes.values())
    casts = CastCounts()
    with WriteBehind() as writer, closing(_files(plan, record, writer, casts)) as files:
        try:
            unsaved_bytes = 0
            for name, steps in files:
                casts.zeroed.clear()
                with closing(steps):
                    for step_bytes, checksums in steps:
                        progress(done + step_bytes, total, name)
                        if checksums:
                            record.finished[name] = checksums
                            record.zeroed[name] = dict(casts.zeroed)
                            unsaved_bytes += sizes[name]
                done += sizes[name]
                if unsaved_bytes >= RECORD_EVERY_BYTES:
                    save_record(plan.pack, record)
                    unsaved_bytes = 0
        except BaseException:
            with suppress(StorageError):  # what went wrong is what is told
                save_record(plan.pack, record)
            raise


def _is_there(plan: ConversionPlan, name: str) -> bool:
    if name not in plan.file_bytes:
        return False
    path = _path(plan, name)
    return path.is_file() and path.stat().st_size == plan.file_bytes[name]


def _path(plan: ConversionPlan, name: str) -> Path:
    return resident_path(plan.pack) if name == RESIDENT_NAME else plan.pack / FLASH_DIR / name


_Steps = Generator[tuple[int, tuple[str, ...]]]


def _files(
    plan: ConversionPlan, record: ProgressRecord, writer: WriteBehind, casts: CastCounts
) -> Generator[tuple[str, _Steps]]:
    """Yield each unfinished file with the steps that write it."""
    if RESIDENT_NAME not in record.finished:
        reading, writing = BufferPool(4), BufferPool(3)
        with (
            RangeReader() as reader,
            ReadAhead(read_resident(reader, plan.resident, reading), depth=2, pools=(reading,)) as pieces,
        ):
            path = resident_path(plan.pack)
            yield RESIDENT_NAME, write_resident(path, plan.resident, pieces, (reading, writing), writer, casts)
    todo = [file for file in plan.streamed if file.name not in record.finished]
    num_chunks = num_chunks_ahead(file.layout for file in todo)
    pools = LayerPools(num_column_parts=plan.num_column_parts, num_chunks=num_chunks)
    with RangeReader() as reader:
        chunks = (chunk for file in todo for chunk in file.read(reader, pools))
        with ReadAhead(chunks, depth=num_chunks - 2, pools=pools.reading) as ahead:
            for file in todo:
                path = plan.pack / FLASH_DIR / file.name
                yield file.name, write_layer(path, file.layout, ahead, file.part_names, pools, writer, casts)


def _finish(plan: ConversionPlan, record: ProgressRecord) -> Manifest:
    """Write the small files, and last of all the manifest."""
    contents = {
        CONFIG_NAME: plan.source.pack_config(plan.dtype).encode(),
        NOTE_NAME: NOTE.encode(),
    }
    checksums = {}
    for name in sorted({*plan.source.small.kept, *contents}):
        content = contents.get(name) or read_bounded(plan.source.folder / name, MAX_SMALL_FILE_BYTES)
        _make_folders(plan.pack, name)
        write_small_file(plan.pack / name, content)
        checksums[name] = xxhash.xxh3_64_hexdigest(content)
    manifest = _manifest(plan, record).model_copy(update={"small_files": checksums})
    write_manifest(plan.pack, manifest)
    remove_record(plan.pack)
    return manifest


def _make_folders(pack: Path, name: str) -> None:
    folder = (pack / name).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while folder != pack:
            folder = folder.parent
            sync_folder(folder)
    except OSError as error:
        raise write_error(folder, error) from error


def _cast_notes(plan: ConversionPlan, record: ProgressRecord) -> tuple[str, ...]:
    zeroed: dict[str, int] = {}
    for by_tensor in record.zeroed.values():
        for name, count in by_tensor.items():
            zeroed[name] = zeroed.get(name, 0) + count
    line = describe_zeroed(zeroed, plan.dtype)
    return () if line is None else (line,)


def _unit_entry(file: StreamedFile, checksums: tuple[str, ...]) -> UnitEntry:
    found, layout = file.found, file.layout
    identities: tuple[str, ...] = ()
    biases: tuple[Part, ...] = ()
    activation = ""
    if isinstance(found, FfnLayer):
        identities, activation, biases = found.identities, found.activation, found.bias_parts
    elif isinstance(found, ExpertLayer):
        activation = found.activation
    elif isinstance(found, LinearLayer) and found.has_bias:
        biases = MATRIX
    return UnitEntry(
        kind=file.unit.kind,
        module=found.module,
        identities=identities,
        file=file.name,
        hidden_size=layout.hidden_size,
        num_rows=layout.num_rows,
        parts=layout.parts,
        encodings=layout.encodings,
        block_rows=layout.block_rows,
        arrangement=layout.arrangement,
        row_stride_bytes=None if layout.is_by_block else layout.row_stride_bytes,
        block_stride_bytes=layout.block_stride_bytes,
        num_active=file.unit.num_active,
        activation=activation,
        biases=biases,
        table=found.table if isinstance(found, LinearLayer) else "",
        checksums=checksums,
    )


def _manifest(plan: ConversionPlan, record: ProgressRecord) -> Manifest:
    return Manifest(
        flashlm_version=__version__,
        model_type=plan.model_type,
        num_hidden_layers=plan.num_hidden_layers,
        dtype=plan.dtype,  # type: ignore[arg-type]  # canonical_dtype returned it
        units=tuple(_unit_entry(file, record.finished[file.name]) for file in plan.streamed),
        resident=ResidentEntry(
            num_bytes=plan.resident.num_bytes,
            chunk_bytes=CHECKSUM_CHUNK_BYTES,
            checksums=record.finished[RESIDENT_NAME],
        ),
        source=SourceEntry(
            name=plan.source.name,
            files={path.name: path.stat().st_size for path in plan.source.checkpoint.files},
            fingerprint=plan.fingerprint,
            notes=(*plan.notes, *_cast_notes(plan, record)),
        ),
    )
