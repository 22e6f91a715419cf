"""What a model's config.json may say: how many layers, and whose code. Looked at before transformers builds anything.

A count decides how long building takes, and some settings name code that transformers would fetch from the hub and run;
neither is left to a file that came from somewhere. The note that a pack carries for people is here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from flashlm.documents import parse_json
from flashlm.errors import PackError
from flashlm.pack.manifest import CONFIG_NAME, MAX_LAYERS, Manifest
from flashlm.storage.outside import read_bounded

QUANT_METHOD = "flashlm"
MAX_CONFIG_BYTES = 16 << 20
NOTE_NAME = "OPEN-WITH-FLASHLM.txt"
NOTE = """\
This folder is a flashlm pack: its feed-forward weights lie in flash/*.rows, what stays in memory in
flash/resident.safetensors. There is no model.safetensors on purpose, so that a program without flashlm finds no weights
instead of half of them. Where flashlm is installed, transformers opens this folder like any other model; in Python:

    import flashlm
    model = flashlm.load("this-folder", dram="6GiB")
"""

# Keys whose value names an implementation. One that is not local ("kernels-community/flash-attn", "flash_attention_2"
# where its package is missing) makes transformers fetch a kernel and run it.
_IMPLEMENTATION_KEYS = re.compile(r"^_?(attn|experts)_implementation(_internal)?$")
LOCAL_IMPLEMENTATIONS = frozenset(
    {"eager", "sdpa", "flex_attention", "paged|eager", "paged|sdpa", "batched_mm", "grouped_mm", "flashlm"}
)
_LAYER_KEYS = re.compile(r"(^|_)(n|num)_\w*(layer|block)s?$|layers?$|depths?$")
_EXPERT_KEYS = re.compile(r"(^|_)(n|num)_\w*experts?$")
MAX_EXPERTS = 1 << 16


def num_hidden_layers(config: Any) -> int:
    """Return the decoder layers of a transformers `config`; 0 where it does not say."""
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    return count if type(count) is int else 0


def _items(content: Any, where: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of every field of nested objects."""
    if isinstance(content, dict):
        for key, value in content.items():
            path = f"{where}{key}"
            yield path, key, value
            yield from _items(value, f"{path}.")
    elif isinstance(content, list):
        for value in content:
            yield from _items(value, where)


def _named(value: Any) -> list[Any]:
    """Return the implementations that a setting names: one, or one for each part of the model."""
    return list(value.values()) if isinstance(value, dict) else [value]


def without_code(content: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the settings that would fetch code: on a CPU none of them would be of use."""
    changed = {}
    for key, value in content.items():
        if _IMPLEMENTATION_KEYS.search(key) and not {*map(str, _named(value))} <= LOCAL_IMPLEMENTATIONS:
            continue
        changed[key] = without_code(value) if isinstance(value, dict) else value
    return changed


def local_config(config: Any) -> Any:
    """Return a transformers config, and those of its parts, without implementations that would be fetched; in place."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        for key in ("_attn_implementation_internal", "_experts_implementation_internal"):
            value = getattr(part, key, None)
            if isinstance(value, str) and value not in LOCAL_IMPLEMENTATIONS:
                setattr(part, key, None)
    return config


def check_counts(content: Any, path: Path) -> None:
    """Refuse numbers of layers (or experts) that no model has: building them would never end.

    Raises:
        PackError: More than `MAX_LAYERS` layers, or `MAX_EXPERTS` experts.
    """
    for where, key, value in _items(content):
        for keys, most in ((_LAYER_KEYS, MAX_LAYERS), (_EXPERT_KEYS, MAX_EXPERTS)):
            if keys.search(key) and isinstance(value, int | float) and not -most <= value <= most:
                raise PackError(f"{path} is damaged: {where} is {value}, at most {most} expected")


def check_code(content: Any, path: Path) -> None:
    """Refuse settings that would fetch code; a converted pack has none.

    Raises:
        PackError: There is one.
    """
    for where, key, value in _items(content):
        if not _IMPLEMENTATION_KEYS.search(key):
            continue
        foreign = [each for each in _named(value) if each is not None and each not in LOCAL_IMPLEMENTATIONS]
        if foreign:
            raise PackError(
                f"{path} asks for {where}={foreign[0]!r}, which may fetch code and run it: take the setting out, or"
                " convert the model again"
            )


def read_pack_config(pack: Path, manifest: Manifest, *, is_checked: bool = True) -> dict[str, Any]:
    """Return the config.json of a pack, as it stands there, after holding it against the manifest.

    Args:
        pack: The folder.
        manifest: Its manifest.
        is_checked: False does without the checksum.

    Raises:
        PackError: It is missing, damaged, changed, or of another model than the manifest.
    """
    path = pack / CONFIG_NAME
    try:
        text = read_bounded(path, MAX_CONFIG_BYTES, advice="convert the model again")
    except FileNotFoundError:
        raise PackError(f"{path} is missing: convert the model again") from None
    checksum, expected = xxhash.xxh3_64_hexdigest(text), manifest.small_files.get(CONFIG_NAME)
    if is_checked and checksum != expected:
        raise PackError(
            f"{path} is not as it was converted: checksum {checksum}, {expected} expected. Convert the model again; if you"
            f" changed it on purpose: flashlm verify {pack} --accept"
        )
    content = parse_json(text, path, advice="convert the model again")
    if not isinstance(content, dict):
        raise PackError(f"{path} is damaged: an object expected")
    check_counts(content, path)
    check_code(content, path)
    entry = content.get("quantization_config")
    wanted = {"quant_method": QUANT_METHOD, "format_version": manifest.format_version}
    found = {"model_type": content.get("model_type"), "dtype": content.get("dtype"), "quantization_config": entry}
    expected_fields = {"model_type": manifest.model_type, "dtype": manifest.dtype, "quantization_config": wanted}
    for key, value in expected_fields.items():
        if found[key] != value:
            raise PackError(
                f"{path} says {key} is {found[key]!r}, the pack's manifest {value!r}: convert the model again"
            )
    return content
