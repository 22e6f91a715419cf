"""Tiny random models of every supported family, made by transformers itself: configs, checkpoints on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 88,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT: dict[str, Any] = {
    "vocab_size": 96,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {"num_key_value_heads": 2}
_GEMMA = {**_GQA, "head_dim": 12, "sliding_window": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 88, "word_embed_proj_dim": 48},
    "llama": _GQA,
    "mistral": _GQA,
    "qwen2": _GQA,
    "qwen3": {**_GQA, "head_dim": 12},
    "gemma": {**_GQA, "head_dim": 12},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi": {},
    "phi3": _GQA,
    "falcon": {"ffn_hidden_size": 88, "bias": True},
    "persimmon": {},
    "gpt_neox": {},
    "gpt2": {**_GPT, "n_inner": 88},
    "nemotron": {**_GQA, "head_dim": 12},
    "olmo": _GQA,
    "olmo2": _GQA,
    "stablelm": _GQA,
    "granite": _GQA,
    "cohere": {**_GQA, "tie_word_embeddings": True},
    "smollm3": {**_GQA, "tie_word_embeddings": False},
    "starcoder2": {**_GQA, "use_bias": True},
    "gptj": {**_GPT, "n_inner": 88, "rotary_dim": 4},
    "codegen": {**_GPT, "n_inner": 88, "rotary_dim": 4},
    "glm": {**_GQA, "head_dim": 12},
    "xglm": {"d_model": 48, "ffn_dim": 88, "num_layers": 2, "attention_heads": 4},
    "biogpt": {},
    "gpt_bigcode": {**_GPT, "n_inner": 88},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
}
_OWN_NAMES = {"gpt2", "gptj", "codegen", "gpt_bigcode"}
_BAD_KEYS = {"xglm": {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}}
_BAD_KEYS["gpt_neo"] = {"num_hidden_layers", "num_attention_heads"}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The config of a tiny model of `family` (a transformers model type), with settings overridden."""
    common = {} if family in _OWN_NAMES else {k: v for k, v in _COMMON.items() if k not in _BAD_KEYS.get(family, ())}
    return AutoConfig.for_model(family, **{**common, **FAMILIES.get(family, {}), **overrides})


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny seeded random model; biases and norms are random too, so that none hides a mistake."""
    config = tiny_config(family, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def save_checkpoint(
    folder: Path,
    family: str,
    *,
    max_shard_size: str = "1GB",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """Write a tiny checkpoint of `family` into `folder` (sharded where `max_shard_size` is small); return its model."""
    model = tiny_model(family, seed=seed, dtype=dtype, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
