"""Reading packs the slow, plain way, to compare with; and changing them as somebody would who can sign them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from flashlm.documents import seal, unseal
from flashlm.pack.manifest import Manifest, manifest_path, unit_path


def read_rows(pack: Path, manifest: Manifest, index: int) -> torch.Tensor:
    """All rows of a layer as (rows, parts, hidden), found by the layout's offsets alone."""
    layout = manifest.ffns[index].layout
    raw = unit_path(pack, manifest.ffns[index]).read_bytes()
    assert len(raw) == layout.file_bytes
    rows = []
    for block in range(layout.num_blocks):
        for number, _ in enumerate(layout.rows_of(block)):
            start = layout.offset_of(block) + number * layout.row_stride_bytes
            rows.append(raw[start : start + layout.row_bytes])
    elements = torch.frombuffer(bytearray(b"".join(rows)), dtype=layout.plain.dtype)
    return elements.view(layout.num_rows, layout.num_parts, layout.hidden_size)


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sealed(content: dict[str, Any]) -> bytes:
    """A document with a checksum that fits, whatever it says."""
    return seal(json.dumps({key: value for key, value in content.items() if key != "checksum"}, indent=1))


def change_manifest(pack: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a pack's manifest, and sign it again."""
    path = manifest_path(pack)
    content = json.loads(path.read_text())
    change(content)
    path.write_bytes(sealed(content))


def change_config(pack: Path, **settings: object) -> None:
    """Change a pack's config.json and sign that in its manifest."""
    path = pack / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    checksum = xxhash.xxh3_64_hexdigest(path.read_bytes())
    change_manifest(pack, lambda content: content["small_files"].update({"config.json": checksum}))


def replace_sealed(path: Path, old: str, new: str) -> None:
    """Change the text of a sealed document, and seal it again."""
    body = unseal(path.read_bytes(), path, advice="").decode()
    assert old in body
    path.write_bytes(seal(body.replace(old, new, 1)))
