"""Turn a Hugging Face checkpoint into a pack: the feed-forward layers row by row into `flash/`, the rest as it is.

A conversion that is killed goes on with the next unfinished file when started again and ends with the same bytes; the
manifest, without which nothing takes the folder for a pack, is written last. Memory does not grow with the model: the
weights pass through a fixed set of buffers (about 0.6 GiB) in three overlapping steps, read, lay out, write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from flashlm import __version__
from flashlm.errors import ConfigError, PackError, StorageError
from flashlm.pack.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from flashlm.pack.direct_file import DirectReader, write_small_file
from flashlm.pack.families import FfnLayer, build_meta_model, find_ffn_layers
from flashlm.pack.layer_file import LayerPart, LayerPools, read_layer, write_layer
from flashlm.pack.layout import ROWS_PER_STEP, LayerLayout, choose_block_rows
from flashlm.pack.manifest import (
    FLASH_DIR,
    MAX_DIMENSION,
    RESIDENT_NAME,
    LayerEntry,
    Manifest,
    ResidentEntry,
    SourceEntry,
    manifest_path,
    read_manifest,
)
from flashlm.pack.names import map_names, tied_pairs
from flashlm.pack.pipeline import BufferPool, ReadAhead, WriteBehind
from flashlm.pack.progress_record import (
    ProgressRecord,
    only_one,
    open_record,
    prepare_folder,
    remove_record,
    save_record,
)
from flashlm.pack.resident_file import (
    CHECKSUM_CHUNK_BYTES,
    ResidentPlan,
    ResidentTensor,
    is_same,
    pack_dtype,
    read_resident,
    write_resident,
)
from flashlm.pack.source import canonical_dtype, files_to_copy, fingerprint, load_config, pack_config, resolve_source
from flashlm.sizes import format_size

ProgressCallback = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is being worked on."""
AnnounceCallback = Callable[[str], None]
"""Called with one line that says what will be, or was, done."""

_SPARE_BYTES = 16 << 20  # manifest, progress record, file system overhead


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A conversion in all its parts, before anything is written."""

    pack: Path
    source_name: str
    checkpoint: Checkpoint
    model_type: str
    dtype: str
    block_rows: int
    layers: tuple[FfnLayer, ...]
    layouts: tuple[LayerLayout, ...]
    parts: tuple[tuple[LayerPart, ...], ...]
    resident: ResidentPlan
    copied: tuple[Path, ...]
    fingerprint: str

    @property
    def file_bytes(self) -> dict[str, int]:
        """Sizes of the large files by name, in the order in which they are written."""
        layers = {layer_file_name(index): layout.file_bytes for index, layout in enumerate(self.layouts)}
        return {RESIDENT_NAME: self.resident.num_bytes, **layers}


def layer_file_name(index: int) -> str:
    """Return the name of a layer's file in `flash/`."""
    return f"layer-{index:05d}.rows"


def convert(
    source: str | Path,
    pack: str | Path,
    *,
    dtype: str = "bfloat16",
    block_rows: int | None = None,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
    announce: AnnounceCallback | None = None,
) -> Manifest:
    """Convert `source` into the folder `pack`, going on where an earlier attempt stopped.

    Args:
        source: A Hugging Face model folder with safetensors, or a hub id.
        pack: The folder to write; new, empty, or an unfinished conversion of the same source and settings. A finished
            one is left as it is.
        dtype: Element type of the pack: bf16, fp16 or fp32 (or the full names).
        block_rows: Rows per block, a multiple of 16; by default blocks of about 4 MiB.
        trust_remote_code: Run model code that comes with the source.
        progress: Called with (bytes done, bytes in all, what).
        announce: Called with one line about what will be written.

    Returns:
        The manifest of the finished pack.

    Raises:
        ConfigError: A wrong setting, or a target that holds something else.
        UnsupportedModelError: The model's feed-forward layers can't be placed.
        PackError: The source is damaged or incomplete.
        StorageError: The target can't be written, is full or too small; or the source can't be read.
    """
    announce = announce or (lambda line: None)
    folder = resolve_source(source, trust_remote_code=trust_remote_code)
    target = Path(pack).expanduser()
    _check_target(folder, target)
    job = _plan(str(source), folder, target, canonical_dtype(dtype), block_rows, trust_remote_code)
    prepare_folder(target)
    with only_one(target), _one_torch_thread():
        record = open_record(target, job.fingerprint)
        if record is None:
            announce(f"{target} is already finished: nothing to do")
            return read_manifest(target)
        _check_space(job, record)
        announce(_describe(job, record))
        _write_files(job, record, progress or (lambda done, total, what: None))
        return _finish(job, record)


def _check_target(folder: Path, target: Path) -> None:
    resolved = target.resolve()
    if resolved == folder or folder in resolved.parents:
        raise ConfigError(f"the pack can't be written into its own source: {target} lies in {folder}")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is not a folder")


def _plan(
    source_name: str, folder: Path, target: Path, dtype: str, block_rows: int | None, trust_remote_code: bool
) -> _Job:
    config = load_config(folder, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder)
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    layers = find_ffn_layers(model)
    entries = map_names(model, checkpoint)
    for duplicate, original in tied_pairs(model, entries):
        with DirectReader() as reader:
            if is_same(reader, entries[duplicate], entries[original]):
                del entries[duplicate]
    rows = _block_rows(layers, dtype, block_rows)
    copied = files_to_copy(folder, trust_remote_code=trust_remote_code)
    settings = {"dtype": dtype, "block_rows": rows, "flashlm": __version__}
    return _Job(
        pack=target,
        source_name=source_name,
        checkpoint=checkpoint,
        model_type=config.model_type,
        dtype=dtype,
        block_rows=rows,
        layers=layers,
        layouts=tuple(_layout(layer, dtype, rows) for layer in layers),
        parts=tuple(_layer_parts(layer, entries) for layer in layers),
        resident=ResidentPlan(_resident_tensors(layers, entries, dtype)),
        copied=tuple(copied),
        fingerprint=fingerprint(checkpoint, copied, settings),
    )


def _block_rows(layers: tuple[FfnLayer, ...], dtype: str, wanted: int | None) -> int:
    if wanted is not None:
        if wanted <= 0 or wanted % ROWS_PER_STEP or wanted > MAX_DIMENSION:
            raise ConfigError(f"block_rows is {wanted}: a multiple of {ROWS_PER_STEP} above zero expected")
        return wanted
    largest = max(layers, key=lambda layer: layer.num_rows)
    return choose_block_rows(
        hidden_size=largest.hidden_size, num_rows=largest.num_rows, has_gate=largest.has_gate, dtype=dtype
    )


def _layout(layer: FfnLayer, dtype: str, block_rows: int) -> LayerLayout:
    return LayerLayout(
        hidden_size=layer.hidden_size,
        num_rows=layer.num_rows,
        has_gate=layer.has_gate,
        dtype=dtype,
        block_rows=block_rows,
    )


def _layer_parts(layer: FfnLayer, entries: dict[str, TensorEntry]) -> tuple[LayerPart, ...]:
    parts = tuple(LayerPart(source, entries[source.name]) for source in layer.parts)
    for part in parts:
        if not part.entry.dtype.is_floating_point:
            raise PackError(f"{part.entry.path} holds {part.entry.name} as {part.entry.dtype}: floating point expected")
    return parts


def _resident_tensors(
    layers: tuple[FfnLayer, ...], entries: dict[str, TensorEntry], dtype: str
) -> list[ResidentTensor]:
    """Return every tensor that is not streamed, and the biases of the streamed layers under the pack's names."""
    wanted: torch.dtype = getattr(torch, dtype)
    streamed = {source.name for layer in layers for source in (*layer.parts, *layer.biases.values())}
    tensors = [
        ResidentTensor(name=name, source=entry, shape=entry.shape, dtype=pack_dtype(entry.dtype, wanted))
        for name, entry in sorted(entries.items())
        if name not in streamed
    ]
    for layer in layers:
        for name, source in layer.biases.items():
            size = layer.hidden_size if name.endswith(".down_bias") else layer.num_rows
            tensors.append(
                ResidentTensor(
                    name=name, source=entries[source.name], first=source.first_neuron, shape=(size,), dtype=wanted
                )
            )
    return tensors


def _check_space(job: _Job, record: ProgressRecord) -> None:
    needed = sum(size for name, size in job.file_bytes.items() if name not in record.finished) + _SPARE_BYTES
    stats = os.statvfs(job.pack)
    free = stats.f_bavail * stats.f_frsize
    if needed > free:
        raise StorageError(
            f"{job.pack} does not fit on its device: {format_size(needed)} ({needed} bytes) needed,"
            f" {format_size(free)} ({free} bytes) free",
            path=str(job.pack), wanted_bytes=needed, got_bytes=free,
        )  # fmt: skip


def _describe(job: _Job, record: ProgressRecord) -> str:
    sizes = job.file_bytes
    done = sum(sizes[name] for name in record.finished if name in sizes)
    going_on = f", going on after {format_size(done)}" if done else ""
    streamed = sum(sizes.values()) - sizes[RESIDENT_NAME]
    return (
        f"writing {format_size(sum(sizes.values()))} to {job.pack}: {format_size(streamed)} in {len(job.layers)}"
        f" streamed layers, {format_size(sizes[RESIDENT_NAME])} resident, {job.dtype}{going_on}"
    )


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Copy on one thread: the other cores read and write, and torch's own threads would only spin between copies."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_files(job: _Job, record: ProgressRecord, progress: ProgressCallback) -> None:
    sizes = job.file_bytes
    record.finished = {name: sums for name, sums in record.finished.items() if _is_there(job, name)}
    done = sum(sizes[name] for name in record.finished)
    total = sum(sizes.values())
    with WriteBehind() as writer, closing(_files(job, record, writer)) as files:
        for name, steps in files:
            with closing(steps):
                for step_bytes, checksums in steps:
                    progress(done + step_bytes, total, name)
                    if checksums:
                        record.finished[name] = checksums
                        save_record(job.pack, record)
            done += sizes[name]


def _is_there(job: _Job, name: str) -> bool:
    path = _path(job, name)
    return path is not None and path.is_file() and path.stat().st_size == job.file_bytes[name]


def _path(job: _Job, name: str) -> Path | None:
    if name not in job.file_bytes:
        return None
    return job.pack / name if name == RESIDENT_NAME else job.pack / FLASH_DIR / name


_Steps = Generator[tuple[int, tuple[str, ...]]]


def _files(job: _Job, record: ProgressRecord, writer: WriteBehind) -> Generator[tuple[str, _Steps]]:
    """Yield each unfinished file with the steps that write it."""
    if RESIDENT_NAME not in record.finished:
        reading, writing = BufferPool(4), BufferPool(3)
        with (
            DirectReader() as reader,
            ReadAhead(read_resident(reader, job.resident, reading), depth=2, pools=(reading,)) as pieces,
        ):
            path = job.pack / RESIDENT_NAME
            yield RESIDENT_NAME, write_resident(path, job.resident, pieces, (reading, writing), writer)
    todo = [index for index in range(len(job.layers)) if layer_file_name(index) not in record.finished]
    pools = LayerPools(num_column_parts=max(_num_column_parts(parts) for parts in job.parts))
    with DirectReader() as reader:
        chunks = (chunk for index in todo for chunk in read_layer(reader, job.layouts[index], job.parts[index], pools))
        with ReadAhead(chunks, depth=2, pools=pools.reading) as ahead:
            for index in todo:
                path = job.pack / FLASH_DIR / layer_file_name(index)
                yield path.name, write_layer(path, job.layouts[index], ahead, job.parts[index], pools, writer)


def _num_column_parts(parts: tuple[LayerPart, ...]) -> int:
    return sum(part.source.neuron_axis == 1 for part in parts)


def _finish(job: _Job, record: ProgressRecord) -> Manifest:
    """Write the small files, and last of all the manifest."""
    for path in job.copied:
        write_small_file(job.pack / path.name, path.read_bytes())
    write_small_file(job.pack / "config.json", pack_config(job.checkpoint.folder, job.dtype).encode())
    manifest = _manifest(job, record)
    write_small_file(manifest_path(job.pack), (manifest.model_dump_json(indent=1) + "\n").encode())
    remove_record(job.pack)
    return manifest


def _manifest(job: _Job, record: ProgressRecord) -> Manifest:
    layout = job.layouts[0]
    entries = tuple(
        LayerEntry(
            module=layer.module,
            identities=layer.identities,
            file=layer_file_name(index),
            num_rows=layer.num_rows,
            has_up_bias=layer.up_bias is not None,
            has_gate_bias=layer.gate_bias is not None,
            has_down_bias=layer.down_bias is not None,
            checksums=record.finished[layer_file_name(index)],
        )
        for index, layer in enumerate(job.layers)
    )
    return Manifest(
        flashlm_version=__version__,
        model_type=job.model_type,
        dtype=job.dtype,  # type: ignore[arg-type]  # canonical_dtype returned it
        hidden_size=layout.hidden_size,
        has_gate=layout.has_gate,
        activation=job.layers[0].activation,
        block_rows=job.block_rows,
        row_stride_bytes=layout.row_stride_bytes,
        block_stride_bytes=layout.block_stride_bytes,
        layers=entries,
        resident=ResidentEntry(
            num_bytes=job.resident.num_bytes,
            chunk_bytes=CHECKSUM_CHUNK_BYTES,
            checksums=record.finished[RESIDENT_NAME],
        ),
        source=SourceEntry(
            name=job.source_name,
            files={path.name: path.stat().st_size for path in job.checkpoint.files},
            fingerprint=job.fingerprint,
        ),
    )
