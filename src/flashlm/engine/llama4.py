"""Llama 4's experts, which stand beside transformers' experts interface: led to the same function as all others.

Llama 4 weights the inputs of its experts, and not their outputs, and its own module runs every expert on every token, those
that were not chosen on zeros (whose output is zero). Here each chosen expert gets its weighted token, and no other runs: the
same sum, in the memory of the chosen ones.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from flashlm.engine.experts import flash_experts_forward
from flashlm.structure.experts import led_flags


def lead_experts(model: nn.Module, path: str) -> bool:
    """Lead the experts module at `path` to flashlm; return False where it is none of Llama 4's, and is left as it is."""
    experts: Any = model.get_submodule(path)
    flags = led_flags(experts)
    if flags is None:
        return False
    for flag, value in flags.items():
        setattr(experts, flag, value)
    experts._apply_gate = types.MethodType(_apply_gate, experts)
    owner: Any = model.get_submodule(path.rpartition(".")[0])
    owner.forward = types.MethodType(_forward, owner)
    return True


def _apply_gate(experts: Any, joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.chunk(2, dim=-1)
    activated: torch.Tensor = up * experts.act_fn(gate)
    return activated


def _forward(layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the layer's output, (num_tokens, hidden_size), and the router's logits: as `Llama4TextMoe.forward`."""
    tokens = hidden_states.reshape(-1, layer.hidden_dim)
    scores, logits = layer.router(tokens)
    chosen = logits.topk(layer.top_k, dim=1).indices
    weights = scores.gather(1, chosen)
    # One row for each token and chosen expert, weighted; the sum over a token's experts has weights of one.
    weighted = (tokens.unsqueeze(1) * weights.unsqueeze(2)).flatten(0, 1)
    ones = torch.ones_like(weights).reshape(-1, 1)
    routed = flash_experts_forward(layer.experts, weighted, chosen.reshape(-1, 1), ones)
    out = layer.shared_expert(tokens)
    return out + routed.view(len(tokens), layer.top_k, -1).sum(dim=1), logits
