"""How many FFN neurons fire: the share of ReLU outputs above zero, layer by layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers import OPTForCausalLM


@torch.inference_mode()
def active_fractions(model: OPTForCausalLM, ids: torch.Tensor) -> list[float]:
    """Return each layer's mean share of neurons above zero over `ids` (int64 [tokens]), in windows of full length."""
    length = model.config.max_position_embeddings
    num_active = [0] * model.config.num_hidden_layers
    num_all = [0] * model.config.num_hidden_layers

    def count(layer: int, _module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        num_active[layer] += int((output > 0).sum())
        num_all[layer] += output.numel()

    hooks = [
        layer.fc1.register_forward_hook(partial(count, index)) for index, layer in enumerate(model.model.decoder.layers)
    ]
    for window in ids.split(length):
        model(window[None], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return [active / total for active, total in zip(num_active, num_all, strict=True)]
