"""The source of a conversion: a local model folder or a hub id, its config, and what identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from flashlm.conversion.hub import download
from flashlm.conversion.small_files import is_tokenizer
from flashlm.errors import ConfigError, PackError, UnsupportedModelError
from flashlm.pack.checkpoint import Checkpoint
from flashlm.pack.files import check_special_files
from flashlm.pack.manifest import CONFIG_NAME, FORMAT_VERSION, Manifest
from flashlm.pack.pack_config import (
    MAX_CONFIG_BYTES,
    QUANT_METHOD,
    check_counts,
    local_config,
    num_hidden_layers,
    read_pack_config,
    without_code,
)
from flashlm.storage.outside import read_json
from flashlm.structure import activations

DTYPE_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
}


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
        PackError: No config.json, a damaged one, or one of a quantized model or of a pack; or a tokenizer file is none.
        UnsupportedModelError: A model type that this transformers does not know.
    """
    raw = read_config(folder)
    quantized = raw.get("quantization_config")
    if isinstance(quantized, dict):
        method = quantized.get("quant_method")
        what = "already a flashlm pack" if method == QUANT_METHOD else f"already quantized ({method})"
        raise PackError(f"{folder} is {what}: convert the model it was made from")
    check_counts(raw, folder / CONFIG_NAME)
    # Weights are looked at when they are opened; whatever else is no file is left out later, and told.
    check_special_files(folder, only=lambda name: is_tokenizer(name) or (trust_remote_code and name.endswith(".py")))
    config = local_config(_parse_config(folder, raw, trust_remote_code=trust_remote_code))
    activations.check_parameters(config)
    return config


def load_pack_config(
    pack: Path, manifest: Manifest, *, is_checked: bool = True, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Return the transformers config of a pack, after everything that transformers will open was looked at.

    Args:
        pack: The folder.
        manifest: Its manifest.
        is_checked: False does without config.json's checksum.
        trust_remote_code: Run code that the pack carries.

    Raises:
        PackError: config.json is damaged, changed or of another model; or a file is none.
        UnsupportedModelError: A model type that this transformers does not know.
    """
    raw = read_pack_config(pack, manifest, is_checked=is_checked)
    check_special_files(pack)
    activations.register()
    config = _parse_config(pack, raw, trust_remote_code=trust_remote_code)
    check_config(config, manifest, pack)
    return config


def check_config(config: PreTrainedConfig, manifest: Manifest, pack: Path) -> None:
    """Refuse a config of another number of layers than the pack, before they are built.

    Raises:
        PackError: It is one.
    """
    if (count := num_hidden_layers(config)) != manifest.num_hidden_layers:
        raise PackError(
            f"the config has {count} layers, {pack} was made from a model of {manifest.num_hidden_layers}:"
            " give the pack's own config, or convert the model again"
        )


def _parse_config(folder: Path, raw: dict[str, Any], *, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each model's class has checks of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModelError(
            f"{folder / CONFIG_NAME} can't be used, model type {raw.get('model_type')!r}: {reason}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` as it stands in a model folder.

    Raises:
        PackError: Missing or damaged.
    """
    path = folder / CONFIG_NAME
    try:
        content = read_json(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise PackError(f"{folder} is not a model folder: {CONFIG_NAME} is missing") from None
    if not isinstance(content, dict):
        raise PackError(f"{path} is damaged: an object expected")
    return content


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
