"""What a plan remembers of the model that it is for: model type, dtype and streamed layers, in words.

Imports no transformers: the quantizer reads plans, and is imported in the midst of transformers' own import.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from flashlm.pack.manifest import Manifest
from flashlm.pack.units import Unit


def outline(model_type: str, units: Iterable[Unit]) -> str:
    """Return model type, dtype and streamed units in words that differ where any of these do.

    Args:
        model_type: The transformers model type.
        units: What is streamed, in forward order.
    """
    units = list(units)
    main = [_words(unit) for unit in units if unit.kind in ("ffn", "experts")]
    linears = sorted(_words(unit) for unit in units if unit.kind in ("linear", "embedding"))
    groups = [f"{len(list(alike))} {words}" for named in (main, linears) for words, alike in groupby(named)]
    encodings = dict.fromkeys(_encoding(unit) for unit in units)
    return f"{model_type}, {' and '.join(encodings)}, " + ", ".join(groups)


def _encoding(unit: Unit) -> str:
    plain = unit.layout.plain
    return unit.layout.encoding if plain is None else str(plain.dtype).removeprefix("torch.")


def _words(unit: Unit) -> str:
    layout = unit.layout
    written = "" if layout.plain else f" in {layout.encoding}"
    if unit.kind in ("linear", "embedding"):
        what = "linear layers" if unit.kind == "linear" else "embeddings"
        return f"{what} of {layout.num_rows} x {layout.hidden_size}{written}"
    rows = f"{layout.num_rows} rows"
    if unit.kind == "experts":
        rows = f"{unit.num_blocks} experts ({unit.num_active} active) of {layout.block_rows} rows"
    return f"layers of {rows} of {layout.num_parts} x {layout.hidden_size}{written}"


def outline_of_pack(manifest: Manifest) -> str:
    """Return the outline that the shape of a pack has, without building its model."""
    return outline(manifest.model_type, (entry.unit for entry in manifest.units))
