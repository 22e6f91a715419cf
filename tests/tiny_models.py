"""A tiny random model of every causal model type that transformers has, made from the type's own default config.

Every size that a config has is made small, whatever the config calls it; what then does not fit together is set by hand
(`OVERRIDES`). Nested configs (text beside vision) are made small one by one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "moe_intermediate_size": 40,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "shared_expert_intermediate_size": 56,
    "moe_shared_expert_intermediate_size": 56,
    "shared_intermediate_size": 56,
    "max_position_embeddings": 160,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "mamba_d_head": 12,
    "mamba_n_heads": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_expand": 2,
    "n_groups": 2,
    "mamba_n_groups": 1,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "sliding_window": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    "hidden_size_per_layer_input": 0,
    "moe_layer_start_index": 1,
    "num_shared_experts": 1,
    "num_dense_layers": 1,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    # names of families with ways of their own
    "n_embd": 48,
    "n_layer": 4,
    "n_layers": 4,
    "n_head": 4,
    "n_heads": 4,
    "n_inner": 88,
    "n_positions": 160,
    "d_model": 48,
    "d_inner": 88,
    "d_head": 12,
    "emb_dim": 48,
    "embedding_size": 48,
    "max_seq_len": 160,
    "max_sequence_length": 160,
    "rotary_dim": 4,
    "ffn_dim": 88,
    "ffn_hidden_size": 88,
    "word_embed_proj_dim": 48,
    "num_layers": 4,
    "attention_heads": 4,
    "decoder_layers": 4,
    "encoder_layers": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 88,
    "encoder_ffn_dim": 88,
    "max_target_positions": 160,
    "num_decoder_layers": 4,
    "num_encoder_layers": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
}
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "compress_ratios")
_MLA = {"num_key_value_heads": 4}
_MLA_OF_V3 = {**_MLA, "head_dim": 8}  # there it is the rotary part's
_INDEXED = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
            "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64}  # fmt: skip
_GEMMA = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 40}
_GEMMA3N = {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 4, "head_dim": 12,
            "activation_sparsity_pattern": [0.5] * 4, "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8, "laurel_rank": 8}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _MLA_OF_V3,
    "axk2": _MLA,
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA_OF_V3,
    "deepseek_v32": _MLA,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma4": _GEMMA,
    "gemma4_text": _GEMMA,
    "granitemoehybrid": dict.fromkeys(("layer_types", "layers_block_type"), ["linear_attention", "full_attention"] * 2),
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
    "zaya": {"num_experts_per_tok": 1},
    # where a size has no default, or several must agree
    **{key: {"head_dim": 12} for key in ("hunyuan_v1_dense", "ministral")},
    "helium": {"head_dim": 12},
    "stablelm": {"hidden_size": 64},  # its rotary share must come out even
    "nemotron": {"head_dim": 12, "num_key_value_heads": 4},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cpmant": {"dim_head": 12, "dim_ff": 88, "prompt_length": 4, "prompt_types": 4, "segment_types": 4},
    "ctrl": {"dff": 88},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4, "rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 48, "ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 96},
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "longcat_flash": {"expert_ffn_hidden_size": 40, "zero_expert_num": 2, "num_layers": 2, **_MLA_OF_V3},
    "youtu": _MLA_OF_V3,
    "mamba2": {"num_heads": 8, "head_dim": 12},
    "mpt": {"expansion_ratio": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 32], "axial_pos_shape": [8, 20]},
    "roc_bert": {
        "pronunciation_vocab_size": 32,
        "shape_vocab_size": 32,
        "pronunciation_embed_dim": 12,
        "shape_embed_dim": 12,
        "is_decoder": True,
    },
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 24,
        "attention_hidden_size": 96,
        "mamba_dt_rank": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
    # a cache of linear attention alone can't be asked for its length
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_expert_group": 2,
        "topk_group": 1,
    },
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 12,
        "linear_num_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_token": 2,
    },
    # encoders that a flag turns into decoders
    **{
        key: {"is_decoder": True}
        for key in (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        )
    },
}


# Of these only the text model is built: the whole needs libraries that are not installed here, or is a text model too.
TEXT_ONLY = ("gemma4", "gemma3n", "dots3_note")


def causal_types() -> list[str]:
    """Every model type of the installed transformers that `AutoModelForCausalLM` builds; `pru` is ours."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"pru"})


def small_config(model_type: str, **changes: Any) -> Any:
    """A config of `model_type` with every size that it has made small, and with `changes`."""
    overrides = OVERRIDES.get(model_type, {}) | changes
    default = AutoConfig.for_model(model_type)
    text = default.get_text_config(decoder=True)
    nested = [name for name in getattr(default, "sub_configs", {}) if value_of(default, name) is not None]
    if text is not default and (not nested or model_type in TEXT_ONLY):
        return _small(text, overrides)
    parts: dict[str, Any] = {}
    for name in nested:
        part = getattr(default, name)
        parts[name] = _small(part, OVERRIDES.get(getattr(part, "model_type", ""), {})).to_dict()
    return _small(default, parts | overrides, is_whole=text is default)


def _small(default: Any, overrides: dict[str, Any], *, is_whole: bool = True) -> Any:
    """A config like `default`, its own sizes small where `is_whole`; `overrides` win."""
    settings: dict[str, Any] = {}
    if is_whole:
        settings = {key: value for key, value in SMALL.items() if _is_setting(default, key)}
        settings |= dict.fromkeys((key for key in PER_LAYER if _is_setting(default, key)), None)
        settings |= SPECIAL_TOKENS
    settings |= overrides
    try:
        return type(default)(**settings)
    except (TypeError, ValueError, AttributeError, StrictDataclassError):  # some lists are made anew where left out
        return type(default)(**{key: value for key, value in settings.items() if value is not None})


def _is_setting(config: Any, key: str) -> bool:
    """Whether a config takes `key` and has a value for it; what it computes from others it does not take."""
    known = getattr(config, "attribute_map", {}).get(key, key)
    computed = isinstance(getattr(type(config), known, None), property)
    return known == key and not computed and value_of(config, key) is not None


def value_of(config: Any, key: str) -> Any:
    """A setting, or None where there is none, also where it differs from layer to layer."""
    try:
        return getattr(config, key, None)
    except (RuntimeError, NotImplementedError):
        return None


def save_tiny(model_type: str, folder: Path, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write a tiny random checkpoint; biases and norms are random too, so that none hides a mistake."""
    torch.manual_seed(seed)
    config = small_config(model_type, **changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for module in model.modules():
            # As training leaves it; transformers zeroes it on loading in some families, whatever the checkpoint holds.
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0
    model.save_pretrained(folder)
    if type(model.config) is not type(config):  # the text model of a whole: a release has the whole's config
        config.save_pretrained(folder)
    return model
