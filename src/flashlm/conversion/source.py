"""The source of a conversion: a local model folder or a hub id, what identifies it, and the config that its pack gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashlm.conversion.hub import download
from flashlm.errors import ConfigError
from flashlm.pack.checkpoint import Checkpoint
from flashlm.pack.manifest import CONFIG_NAME, FORMAT_VERSION
from flashlm.pack.pack_config import QUANT_METHOD, without_code
from flashlm.structure.model_config import read_config


def resolve_source(
    source: str | Path, *, trust_remote_code: bool = False, announce: Callable[[str], None] | None = None
) -> Path:
    """Return the folder of `source`: itself where it is one, else the hub's snapshot, downloaded if need be.

    Raises:
        ConfigError: Neither a folder nor a hub id that can be reached.
        PackError: A model of the hub that has no safetensors.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
        raise ConfigError(f"source {str(source)!r} is not a folder")
    return download(str(source), with_code=trust_remote_code, announce=announce or (lambda line: None))


def pack_config(folder: Path, dtype: str) -> str:
    """Return the text of the pack's `config.json`: the source's, with the pack's dtype and our quantization entry."""
    content = without_code(_with_dtype(read_config(folder), dtype))
    content["dtype"] = dtype
    content["quantization_config"] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _with_dtype(content: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config in which every dtype, that of nested configs too, is `dtype`."""
    changed: dict[str, Any] = {}
    for key, value in content.items():
        if key in ("dtype", "torch_dtype"):
            changed["dtype"] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed


def fingerprint(checkpoint: Checkpoint, copied: tuple[str, ...], settings: dict[str, object]) -> str:
    """Return what identifies a conversion: names, sizes and times of all source files, and its settings."""
    names = [*(path.name for path in checkpoint.files), CONFIG_NAME, *copied]
    found = {name: (checkpoint.folder / name).stat() for name in names}
    stats = {name: [each.st_size, each.st_mtime_ns] for name, each in found.items()}
    text = json.dumps({"files": stats, "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
