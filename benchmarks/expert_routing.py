"""SIMULATED routing: which experts a token is sent to is drawn with a stated skew instead of decided by random weights.

Expert popularity of a layer follows Zipf's law, weight 1 / rank^skew in an order of the layer's own; a token's experts are
drawn without replacement; skew 0 is uniform. The router still gives the shares in which they count. Draws depend on the
layer and on how often it has run, so every budget sees the same routing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class SkewedRouting:
    """Leads a loaded pack's experts to drawn choices."""

    def __init__(self, model: Any, skew: float) -> None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        from flashlm.engine import experts

        self._skew = skew
        self._random: dict[int, np.random.Generator] = {}
        self._weights: dict[int, np.ndarray] = {}
        self._forward = experts.flash_experts_forward
        ALL_EXPERTS_FUNCTIONS.register(experts.IMPLEMENTATION, self._routed)

    def _routed(
        self, module: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        bound = module.flash_experts
        drawn = self._draw(bound.layer, bound.layout.num_blocks, *index.reshape(-1, index.shape[-1]).shape)
        return self._forward(module, hidden_states, drawn.reshape(index.shape), weights)

    def _draw(self, layer: int, num_experts: int, num_tokens: int, num_active: int) -> torch.Tensor:
        if layer not in self._random:
            self._random[layer] = np.random.default_rng((7, layer))
            ranks = self._random[layer].permutation(num_experts) + 1
            self._weights[layer] = -self._skew * np.log(ranks)
        # The largest of log weight + Gumbel noise: a draw without replacement.
        noise = self._random[layer].gumbel(size=(num_tokens, num_experts))
        best = np.argpartition(self._weights[layer] + noise, num_experts - num_active, axis=1)[:, -num_active:]
        return torch.from_numpy(best)
