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
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12}
_GROUPS = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
EXPERT_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**_GQA, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_GQA,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
    },
    "qwen3_moe": {**_GQA, "head_dim": 12, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    "olmoe": {**_GQA, "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40},
    "gpt_oss": {**_GQA, "head_dim": 12, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16},
    "deepseek_v3": {
        **_MLA,
        **_GROUPS,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
    },
    "glm4_moe": {
        **_GQA,
        **_GROUPS,
        "head_dim": 12,
        "num_hidden_layers": 3,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
    },
    "granitemoe": {**_GQA, "num_local_experts": 8, "num_experts_per_tok": 3},
    "nemotron_h": {
        **_GQA,
        "head_dim": 12,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 56,
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen3_next": {
        **_GQA,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
_OWN_NAMES = {"gpt2", "gptj", "codegen", "gpt_bigcode"}
_BAD_KEYS = {"xglm": {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}}
_BAD_KEYS["gpt_neo"] = {"num_hidden_layers", "num_attention_heads"}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The config of a tiny model of `family` (a transformers model type), with settings overridden."""
    common = {} if family in _OWN_NAMES else {k: v for k, v in _COMMON.items() if k not in _BAD_KEYS.get(family, ())}
    return AutoConfig.for_model(family, **{**common, **(FAMILIES | EXPERT_FAMILIES).get(family, {}), **overrides})


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
