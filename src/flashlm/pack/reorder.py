"""Lay the rows of a finished pack down in another order, layer by layer; stopped at any moment, the pack stays whole.

A layer's rows are written to a new file, beside it their order; then the manifest is replaced, which makes the change; then
the old file goes. The order says which checkpoint neuron a row is, so that biases, which stay in the
resident file in the checkpoint's order, can be matched on loading.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from flashlm.errors import PackError, StorageError
from flashlm.pack.checksums import check_bytes
from flashlm.pack.direct_file import AlignedBuffer, AtomicFile, DirectReader, room_bytes, write_small_file
from flashlm.pack.manifest import FLASH_DIR, LayerEntry, Manifest, layer_path, manifest_path, order_path
from flashlm.rows.layout import LayerLayout
from flashlm.sizes import format_size
from flashlm.storage.outside import read_document

Order = npt.NDArray[np.int64]
Progress = Callable[[int, int, str], None]
SPARE_BYTES = 64 << 20


def reorder(
    pack: Path, manifest: Manifest, orders: Sequence[Order], progress: Progress = lambda done, total, what: None
) -> Manifest:
    """Give every layer of `pack` a new order; return the new manifest.

    Args:
        pack: The folder.
        manifest: Its manifest.
        orders: For each layer: `order[position]` is the present position of the row that comes to lie there.
        progress: Called with bytes done, bytes in all, file name.

    Raises:
        PackError: An order is no permutation of its layer's rows, or a stored order is damaged.
        StorageError: No room for one layer more, or a file can't be read or written.
    """
    _check(pack, manifest, orders)
    total = manifest.streamed_bytes
    done = 0
    for index, order in enumerate(orders):
        layout = manifest.layout(index)
        manifest = _reorder_layer(pack, manifest, index, order)
        done += layout.file_bytes
        progress(done, total, manifest.layers[index].file)
    return manifest


def read_order(pack: Path, entry: LayerEntry) -> Order | None:
    """Return which checkpoint neuron each row of a layer is, int64 (num_rows,); None where they lie as they came.

    Raises:
        PackError: The file is missing or damaged.
    """
    if entry.order_checksum is None:
        return None
    path = order_path(pack, entry)
    try:
        content = read_document(path, 4 * entry.num_rows, advice="convert the model again")
    except FileNotFoundError:
        raise PackError(f"{path} is missing. Convert the model again") from None
    if len(content) != 4 * entry.num_rows or xxhash.xxh3_64_hexdigest(content) != entry.order_checksum:
        raise PackError(f"{path} is damaged: convert the model again")
    return np.frombuffer(content, dtype="<i4").astype(np.int64)


def _check(pack: Path, manifest: Manifest, orders: Sequence[Order]) -> None:
    if len(orders) != len(manifest.layers):
        raise PackError(f"{len(manifest.layers)} layers need as many orders, got {len(orders)}")
    for entry, order in zip(manifest.layers, orders, strict=True):
        if not np.array_equal(np.sort(order), np.arange(entry.num_rows)):
            raise PackError(f"the order of {entry.module} is no permutation of its {entry.num_rows} rows")
    needed = max(manifest.layout(index).file_bytes for index in range(len(orders))) + SPARE_BYTES
    stats = os.statvfs(pack)
    free = stats.f_bavail * stats.f_frsize
    if free < needed:
        raise StorageError(
            f"ordering the rows takes {format_size(needed)} for a while, {pack} has {format_size(free)} free",
            path=str(pack), wanted_bytes=needed, got_bytes=free,
        )  # fmt: skip


def _reorder_layer(pack: Path, manifest: Manifest, index: int, order: Order) -> Manifest:
    entry, layout = manifest.layers[index], manifest.layout(index)
    before = read_order(pack, entry)
    neurons = (order if before is None else before[order]).astype("<i4").tobytes()
    mark = xxhash.xxh3_64_hexdigest(neurons)
    target = entry.model_copy(update={"file": f"layer-{index:05d}.{mark[:8]}.rows", "order_checksum": mark})
    if target.file == entry.file:
        return manifest
    checksums = _write_rows(layer_path(pack, entry), layer_path(pack, target), layout, order, entry.checksums)
    write_small_file(order_path(pack, target), neurons)
    layers = list(manifest.layers)
    layers[index] = target.model_copy(update={"checksums": checksums})
    changed = manifest.model_copy(update={"layers": tuple(layers)})
    write_small_file(manifest_path(pack), changed.to_bytes())
    layer_path(pack, entry).unlink(missing_ok=True)
    if entry.order_checksum is not None:
        order_path(pack, entry).unlink(missing_ok=True)
    return changed


def _write_rows(
    source: Path, target: Path, layout: LayerLayout, order: Order, known: tuple[str, ...]
) -> tuple[str, ...]:
    """Write `target` with row i of `source` at the position of i in `order`; return the checksum of each block.

    Raises:
        PackError: A block of `source` is not as `known` says: written again it would pass for whole.
    """
    stride = layout.row_stride_bytes
    rows = np.empty((layout.num_rows, stride), dtype=np.uint8)
    with DirectReader() as reader:
        buffer = AlignedBuffer(room_bytes(layout.block_stride_bytes))
        for block in range(layout.num_blocks):
            span = layout.rows_of(block)
            raw = reader.read(source, layout.offset_of(block), layout.read_bytes(block), buffer)
            check_bytes(raw.numpy(), known[block], source, f"block {block}")
            rows[span.start : span.stop] = raw.numpy()[: len(span) * stride].reshape(len(span), stride)
    checksums = []
    block_buffer = AlignedBuffer(layout.block_stride_bytes)
    content = np.frombuffer(block_buffer.memory, dtype=np.uint8)
    with AtomicFile(target, layout.file_bytes) as file:
        for block in range(layout.num_blocks):
            span = layout.rows_of(block)
            num_bytes = layout.read_bytes(block)
            content[:num_bytes] = 0
            content[: len(span) * stride] = rows[order[span.start : span.stop]].reshape(-1)
            checksums.append(xxhash.xxh3_64_hexdigest(block_buffer.memory[:num_bytes]))
            file.write(block_buffer.memory[:num_bytes], layout.offset_of(block))
    return tuple(checksums)


def remove_strays(pack: Path, manifest: Manifest) -> None:
    """Remove layer files that the manifest does not name: what an ordering that was stopped left behind."""
    known = {entry.file for entry in manifest.layers}
    known |= {order_path(pack, entry).name for entry in manifest.layers}
    for path in (pack / FLASH_DIR).glob("layer-*"):
        if path.name not in known and path.suffix in (".rows", ".order"):
            path.unlink(missing_ok=True)
