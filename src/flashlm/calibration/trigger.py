"""A layer's trigger weights, out of its file in a pack: what decides which neurons fire.

The trigger is the first part of every row: the gate where the FFN has one, else the up-projection.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flashlm.errors import PackError
from flashlm.pack.checksums import check_bytes
from flashlm.pack.manifest import Manifest, resident_path, unit_path
from flashlm.rows import kernels
from flashlm.storage.reader import Reader, ReadRequest
from flashlm.storage.slab import SlabAllocator


def read_trigger(pack: Path, manifest: Manifest, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (d_ff, d_model) and bias (d_ff,) of a layer's trigger, fp32, in file order.

    Reads the layer file block by block; a bias that the checkpoint does not have is zeros.

    Raises:
        StorageError: The layer file can't be read.
        PackError: The resident file lacks the bias, or a block is damaged.
    """
    entry = manifest.ffns[layer]
    layout = entry.layout
    weight = torch.empty(layout.num_rows, layout.hidden_size, dtype=torch.float32)
    with Reader() as reader:
        file = reader.open(unit_path(pack, entry), expected_bytes=layout.file_bytes)
        place = SlabAllocator().slab(layout.block_stride_bytes, 1).slot(0)
        for block in range(layout.num_blocks):
            reader.read([ReadRequest(file, layout.offset_of(block), layout.read_bytes(block), place.buffer)])
            content = place.numpy(layout.read_bytes(block))
            check_bytes(content, entry.checksums[block], unit_path(pack, entry), f"block {block}")
            span = layout.rows_of(block)
            kernels.widen(kernels.rows_at(layout, place, len(span)), 0, weight[span.start : span.stop])
    trigger = layout.parts[0]
    if trigger not in entry.biases:
        return weight, torch.zeros(layout.num_rows, dtype=torch.float32)
    name = f"{entry.module}.{trigger}_bias"
    try:
        with safe_open(resident_path(pack), framework="pt") as resident:
            return weight, resident.get_tensor(name).float()
    except (OSError, SafetensorError) as error:
        raise PackError(f"{resident_path(pack)} has no {name} ({error}): convert the model again") from error
