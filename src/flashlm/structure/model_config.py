"""A model's transformers config: of a source, or of a pack, after whatever could do harm was looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from flashlm.documents import read_json
from flashlm.errors import PackError, UnsupportedModelError
from flashlm.pack.files import check_special_files, is_tokenizer
from flashlm.pack.manifest import CONFIG_NAME, Manifest
from flashlm.pack.pack_config import (
    MAX_CONFIG_BYTES,
    QUANT_METHOD,
    check_counts,
    local_config,
    num_hidden_layers,
    read_pack_config,
)
from flashlm.structure import activations

QUANTISED = ("mxfp4", "fp8")
"""Ways in which a source's weights may be quantised, as transformers calls them."""


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config of a source.

    Raises:
        PackError: No config.json, a damaged one, or one of a pack or of a model that is quantised in another way than
            `QUANTISED`; or a tokenizer file is none.
        UnsupportedModelError: A model type that this transformers does not know.
    """
    raw = read_config(folder)
    quantized = raw.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if quantized is not None and method not in QUANTISED:
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
