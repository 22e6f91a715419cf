"""The smallest budget with which a pack runs, for `flashlm info` and for whoever has been refused."""

from __future__ import annotations

from pathlib import Path

from flashlm.errors import ConfigError
from flashlm.memory.budget import floor_bytes
from flashlm.memory.expert_budget import expert_floor_bytes
from flashlm.memory.expert_needs import expert_uses, measure_expert_needs
from flashlm.memory.limits import mapped_file_bytes
from flashlm.memory.needs import DEFAULT_CONTEXT, measure_needs, read_config
from flashlm.pack.manifest import read_manifest
from flashlm.structure.families import build_meta_model

# The process that will run has libraries that this one lacks (a tokenizer, the engine), and of those that both have the
# kernel maps more or less: around a page that is needed it maps what the page cache holds in one piece, and files that
# were just written lie there in larger pieces. The same imports were seen with 94 and with 160 MiB of mapped files.
PROCESS_MARGIN_BYTES = 16 << 20
MAPPED_MARGIN_SHARE = 0.25


def process_margin_bytes() -> int:
    """Return how much more than this process another one with the same work may weigh, in bytes."""
    return PROCESS_MARGIN_BYTES + int(MAPPED_MARGIN_SHARE * mapped_file_bytes())


def smallest_dram_bytes(pack: str | Path, context: int | None = None) -> int:
    """Return the smallest `dram` with which a process like this one runs `pack`.

    It includes a margin, `process_margin_bytes`.

    Builds the model without weights, as loading does, so that the libraries that it needs are counted.

    Raises:
        PackError: Not a finished pack.
        ConfigError: The context is out of range.
    """
    if context is not None and context < 1:
        raise ConfigError(f"context={context} must be a whole number of tokens, at least 1")
    manifest = read_manifest(Path(pack))
    config = read_config(Path(pack))
    del config.quantization_config
    build_meta_model(config)
    if manifest.experts:
        uses = expert_uses(manifest)
        expert_needs = measure_expert_needs(config, uses, manifest.resident.num_bytes, context or DEFAULT_CONTEXT)
        return expert_floor_bytes(uses, expert_needs) + process_margin_bytes()
    layouts = [manifest.layout(layer) for layer in range(len(manifest.layers))]
    needs = measure_needs(
        config, layouts, resident_bytes=manifest.resident.num_bytes, context=context or DEFAULT_CONTEXT
    )
    return floor_bytes(layouts, needs) + process_margin_bytes()
