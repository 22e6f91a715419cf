"""Lay the rows of a finished pack down in another order, layer by layer; stopped at any moment, the pack stays whole.

A layer's rows are written to a new file, beside it their order; then the manifest is replaced, which makes the change; then
the old file goes. The order says which checkpoint neuron a row is, so that biases, which stay in the
resident file in the checkpoint's order, can be matched on loading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from flashlm.errors import PackError
from flashlm.pack.checksums import check_bytes
from flashlm.pack.manifest import FLASH_DIR, Manifest, UnitEntry, order_path, unit_path, write_manifest
from flashlm.rows.layout import LayerLayout
from flashlm.storage.outside import read_bounded
from flashlm.storage.ranges import FileRange, RangeReader
from flashlm.storage.reader import AlignedBuffer
from flashlm.storage.writer import AtomicFile, check_room, write_small_file

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
    total = sum(entry.layout.file_bytes for entry in manifest.ffns)
    done = 0
    for index, order in enumerate(orders):
        manifest = _reorder_layer(pack, manifest, index, order)
        entry = manifest.ffns[index]
        done += entry.layout.file_bytes
        progress(done, total, entry.file)
    return manifest


def read_order(pack: Path, entry: UnitEntry) -> Order | None:
    """Return which checkpoint neuron each row of a layer is, int64 (num_rows,); None where they lie as they came.

    Raises:
        PackError: The file is missing or damaged.
    """
    if entry.order_checksum is None:
        return None
    path = order_path(pack, entry)
    try:
        content = read_bounded(path, 4 * entry.num_rows, advice="convert the model again")
    except FileNotFoundError:
        raise PackError(f"{path} is missing. Convert the model again") from None
    if len(content) != 4 * entry.num_rows or xxhash.xxh3_64_hexdigest(content) != entry.order_checksum:
        raise PackError(f"{path} is damaged: convert the model again")
    return np.frombuffer(content, dtype="<i4").astype(np.int64)


def _check(pack: Path, manifest: Manifest, orders: Sequence[Order]) -> None:
    if len(orders) != len(manifest.ffns):
        raise PackError(f"{len(manifest.ffns)} layers need as many orders, got {len(orders)}")
    for entry, order in zip(manifest.ffns, orders, strict=True):
        if entry.layout.is_by_block:
            raise PackError(
                f"the rows of {entry.module} keep their order: in {entry.layout.encoding} none lies by itself"
            )
        if not np.array_equal(np.sort(order), np.arange(entry.num_rows)):
            raise PackError(f"the order of {entry.module} is no permutation of its {entry.num_rows} rows")
    needed = max(entry.layout.file_bytes for entry in manifest.ffns) + SPARE_BYTES
    check_room(pack, needed, what="the copy of a layer that ordering its rows takes")


def _reorder_layer(pack: Path, manifest: Manifest, index: int, order: Order) -> Manifest:
    entry = manifest.ffns[index]
    layout = entry.layout
    before = read_order(pack, entry)
    neurons = (order if before is None else before[order]).astype("<i4").tobytes()
    mark = xxhash.xxh3_64_hexdigest(neurons)
    target = entry.model_copy(update={"file": f"layer-{index:05d}.{mark[:8]}.rows", "order_checksum": mark})
    if target.file == entry.file:
        return manifest
    checksums = _write_rows(unit_path(pack, entry), unit_path(pack, target), layout, order, entry.checksums)
    write_small_file(order_path(pack, target), neurons)
    written = target.model_copy(update={"checksums": checksums})
    changed = manifest.with_units(tuple(written if each is entry else each for each in manifest.units))
    write_manifest(pack, changed)
    unit_path(pack, entry).unlink(missing_ok=True)
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
    blocks = (
        FileRange(source, layout.offset_of(block), layout.read_bytes(block)) for block in range(layout.num_blocks)
    )
    with RangeReader() as reader:
        for block, (_, read) in enumerate(reader.ahead(blocks)):
            span, raw = layout.rows_of(block), read.wait().numpy()
            check_bytes(raw, known[block], source, f"block {block}")
            rows[span.start : span.stop] = raw[: len(span) * stride].reshape(len(span), stride)
    checksums = []
    content = AlignedBuffer(layout.block_stride_bytes).numpy()
    with AtomicFile(target, layout.file_bytes) as file:
        for block in range(layout.num_blocks):
            span = layout.rows_of(block)
            num_bytes = layout.read_bytes(block)
            content[:num_bytes] = 0
            content[: len(span) * stride] = rows[order[span.start : span.stop]].reshape(-1)
            checksums.append(xxhash.xxh3_64_hexdigest(content[:num_bytes].data))
            file.write(content[:num_bytes], layout.offset_of(block))
    return tuple(checksums)


def remove_strays(pack: Path, manifest: Manifest) -> None:
    """Remove layer files that the manifest does not name: what an ordering that was stopped left behind."""
    known = {entry.file for entry in manifest.ffns}
    known |= {order_path(pack, entry).name for entry in manifest.ffns}
    for path in (pack / FLASH_DIR).glob("layer-*"):
        if path.name not in known and path.suffix in (".rows", ".order"):
            path.unlink(missing_ok=True)
