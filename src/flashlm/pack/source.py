"""The source of a conversion: a local model folder or a hub id, its config, and what identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from flashlm.errors import ConfigError, PackError, UnsupportedModelError
from flashlm.pack import activations
from flashlm.pack.checkpoint import Checkpoint
from flashlm.pack.hub import download

QUANT_METHOD = "flashlm"
DTYPE_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
}
_CONFIG_NAME = "config.json"


def canonical_dtype(dtype: str) -> str:
    """Return the full name of an element type: `bf16` and `bfloat16` are both accepted.

    Raises:
        ConfigError: Another one.
    """
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"dtype is {dtype!r}: one of {', '.join(DTYPE_NAMES)} expected")
    return DTYPE_NAMES[dtype]


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


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the model's config.

    Raises:
        PackError: No config.json, a damaged one, or one of a quantized model or of a pack.
        UnsupportedModelError: A model type that this transformers does not know.
    """
    raw = read_config(folder)
    quantized = raw.get("quantization_config")
    if isinstance(quantized, dict):
        method = quantized.get("quant_method")
        what = "already a flashlm pack" if method == QUANT_METHOD else f"already quantized ({method})"
        raise PackError(f"{folder} is {what}: convert the model it was made from")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(
            f"model type {raw.get('model_type')!r} in {folder} is not supported: {error}"
        ) from error
    activations.check_parameters(config)
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` as it stands in a model folder.

    Raises:
        PackError: Missing or damaged.
    """
    path = folder / _CONFIG_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PackError(f"{folder} is not a model folder: {_CONFIG_NAME} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PackError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise PackError(f"{path} is damaged: an object expected")
    return content


def pack_config(folder: Path, dtype: str, format_version: int) -> str:
    """Return the text of the pack's `config.json`: the source's, with the pack's dtype and our quantization entry."""
    content = _with_dtype(read_config(folder), dtype)
    content["dtype"] = dtype
    content["quantization_config"] = {"quant_method": QUANT_METHOD, "format_version": format_version}
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
    names = [*(path.name for path in checkpoint.files), _CONFIG_NAME, *copied]
    found = {name: (checkpoint.folder / name).stat() for name in names}
    stats = {name: [each.st_size, each.st_mtime_ns] for name, each in found.items()}
    text = json.dumps({"files": stats, "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
