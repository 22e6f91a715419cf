"""What a plan remembers of the model that it is for: model type, dtype and streamed layers, in words.

Imports no transformers: the quantizer reads plans, and is imported in the midst of transformers' own import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from flashlm.pack.manifest import Manifest
from flashlm.rows.layout import LayerLayout


def outline(model_type: str, layers: Sequence[tuple[LayerLayout, int | None]]) -> str:
    """Return model type, dtype and streamed layers in words that differ where any of these do.

    Args:
        model_type: The transformers model type.
        layers: Of each its geometry, and how many of its blocks are active experts of a token; None where it has none.
    """
    groups = []
    for (layout, num_active), alike in groupby(layers, key=_geometry_of):
        rows = f"{layout.num_rows} rows"
        if num_active is not None:
            rows = f"{layout.num_blocks} experts ({num_active} active) of {layout.block_rows} rows"
        groups.append(f"{len(list(alike))} layers of {rows} of {layout.num_parts} x {layout.hidden_size}")
    return f"{model_type}, {layers[0][0].dtype}, " + ", ".join(groups)


def _geometry_of(layer: tuple[LayerLayout, int | None]) -> tuple[LayerLayout, int | None]:
    """Return a layer without how its rows are cut into blocks, which a conversion may choose; experts are blocks."""
    layout, num_active = layer
    return (layout if num_active is not None else replace(layout, block_rows=1)), num_active


def outline_of_pack(manifest: Manifest) -> str:
    """Return the outline that the shape of a pack has, without building its model."""
    layers: list[tuple[LayerLayout, int | None]] = [
        (manifest.layout(layer), None) for layer in range(len(manifest.layers))
    ]
    layers += [(manifest.experts_layout(index), entry.num_active) for index, entry in enumerate(manifest.experts)]
    return outline(manifest.model_type, layers)
