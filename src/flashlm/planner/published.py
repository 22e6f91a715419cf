"""Sparsity that a model is assumed to have before it is calibrated: the paper's published curves, labelled as such."""

from __future__ import annotations

from dataclasses import replace

from flashlm.memory.cache_plan import LayerUse
from flashlm.pack.units import has_rows
from flashlm.planner.shape import RELU_NAMES, ModelShape, SparseShape
from flashlm.sparsity.presets import paper_preset

# Paper, Fig 4a: s_agg(k) for k = 1 .. 12, Falcon-7B with ReLU, layer 10, shares of the FFN's neurons. Said there to be alike
# in other layers. Predicted, and of these truly active: Fig 9a, means over OPT's layers.
USE_CURVE = (0.1226, 0.162, 0.1922, 0.2175, 0.2396, 0.2593, 0.2771, 0.2934, 0.3085, 0.3226, 0.3358, 0.3483)
ACTIVE_OF_PREDICTED = 0.29


def assume_sparsity(shape: ModelShape) -> ModelShape:
    """Return the shape with the published sparsity.

    Where its activation has exact zeros, its rows can be read one by one, and nothing better is known; else as it is.
    """
    if shape.experts or shape.sparse is not None or shape.activation not in RELU_NAMES or not has_rows(shape.units):
        return shape
    preset = paper_preset(shape.model_type)
    num_layers = len(shape.layouts)
    predictor_bytes = sum(
        2 * preset.rank(layer, num_layers) * (layout.hidden_size + layout.num_rows) + 4 * layout.num_rows
        for layer, layout in enumerate(shape.layouts)
    )
    sparse = SparseShape(
        uses=tuple(LayerUse(num_rows=layout.num_rows, use_curve=USE_CURVE) for layout in shape.layouts),
        active_shares=(USE_CURVE[0] * ACTIVE_OF_PREDICTED,) * num_layers,
        predictor_bytes=predictor_bytes,
        increase=None,
        has_passed=False,
        origin="ASSUMED as sparse as the paper's models, not measured",
    )
    return replace(shape, sparse=sparse)
