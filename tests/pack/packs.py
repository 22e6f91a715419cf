"""Reading packs the slow, plain way, to compare with."""

from __future__ import annotations

from pathlib import Path

import torch

from flashlm.pack.manifest import Manifest, layer_path


def read_rows(pack: Path, manifest: Manifest, index: int) -> torch.Tensor:
    """All rows of a layer as (rows, parts, hidden), found by the layout's offsets alone."""
    layout = manifest.layout(index)
    raw = layer_path(pack, manifest.layers[index]).read_bytes()
    assert len(raw) == layout.file_bytes
    rows = []
    for block in range(layout.num_blocks):
        for number, _ in enumerate(layout.rows_of(block)):
            start = layout.offset_of(block) + number * layout.row_stride_bytes
            rows.append(raw[start : start + layout.row_bytes])
    elements = torch.frombuffer(bytearray(b"".join(rows)), dtype=getattr(torch, layout.dtype))
    return elements.view(layout.num_rows, layout.num_parts, layout.hidden_size)


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
