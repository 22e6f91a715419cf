"""The smallest budget with which a pack runs, for `flashlm info` and for whoever has been refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashlm.errors import ConfigError
from flashlm.memory.budget import floor_bytes
from flashlm.memory.limits import mapped_file_bytes
from flashlm.memory.needs import DEFAULT_CONTEXT, measure_needs
from flashlm.pack.manifest import read_manifest
from flashlm.structure.families import build_meta_model
from flashlm.structure.model_config import load_pack_config

# The process that will run has libraries that this one lacks (a tokenizer, the engine), and of those that both have the
# kernel maps more or less: around a page that is needed it maps what the page cache holds in one piece, and files that
# were just written lie there in larger pieces. The same imports were seen with 94 and with 160 MiB of mapped files.
PROCESS_MARGIN_BYTES = 16 << 20
MAPPED_MARGIN_SHARE = 0.25


def process_margin_bytes() -> int:
    """Return how much more than this process another one with the same work may weigh, in bytes."""
    return PROCESS_MARGIN_BYTES + int(MAPPED_MARGIN_SHARE * mapped_file_bytes())


def smallest_dram_bytes(pack: str | Path, context: int | None = None, *, is_checked: bool = True) -> int:
    """Return the smallest `dram` with which a process like this one runs `pack`.

    It includes a margin, `process_margin_bytes`.

    Builds the model without weights, as loading does, so that the libraries that it needs are counted.

    Args:
        pack: The folder.
        context: Tokens of the KV cache; None means `DEFAULT_CONTEXT`.
        is_checked: Whether config.json is held against its checksum.

    Raises:
        PackError: Not a finished pack.
        ConfigError: The context is out of range.
    """
    if context is not None and context < 1:
        raise ConfigError(f"context={context} must be a whole number of tokens, at least 1")
    manifest = read_manifest(Path(pack))
    config: Any = load_pack_config(Path(pack), manifest, is_checked=is_checked)
    del config.quantization_config
    build_meta_model(config)
    units = [entry.unit for entry in manifest.units]
    needs = measure_needs(
        config, units, manifest.dtype, resident_bytes=manifest.resident.num_bytes, context=context or DEFAULT_CONTEXT
    )
    return floor_bytes(units, needs) + process_margin_bytes()
