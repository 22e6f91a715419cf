"""Model shapes that a benchmark can build without downloading anything: a transformers config each, no weights.

transformers is imported only where a config is made, so that `--help` stays fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _opt(*, layers: int, d_model: int, heads: int, vocab: int = 50272, positions: int = 2048) -> PretrainedConfig:
    from transformers import OPTConfig

    return OPTConfig(
        num_hidden_layers=layers,
        hidden_size=d_model,
        word_embed_proj_dim=d_model,
        ffn_dim=4 * d_model,
        num_attention_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=positions,
        do_layer_norm_before=True,
        activation_function="relu",
        dtype="bfloat16",
        architectures=["OPTForCausalLM"],
    )


def _llama(*, layers: int, d_model: int, heads: int, d_ffn: int, vocab: int = 32000) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=d_model,
        intermediate_size=d_ffn,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def _falcon_7b() -> PretrainedConfig:
    from transformers import FalconConfig

    return FalconConfig(
        num_hidden_layers=32,
        hidden_size=4544,
        num_attention_heads=71,
        vocab_size=65024,
        activation="relu",
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        bias=False,
        alibi=False,
        dtype="bfloat16",
        architectures=["FalconForCausalLM"],
    )


def _persimmon_8b() -> PretrainedConfig:
    """With tied embeddings: the paper's 16.0 GB leave no room for 262,144 of them twice."""
    from transformers import PersimmonConfig

    return PersimmonConfig(
        num_hidden_layers=36,
        hidden_size=4096,
        intermediate_size=16384,
        num_attention_heads=64,
        vocab_size=262144,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["PersimmonForCausalLM"],
    )


def _phi_2() -> PretrainedConfig:
    from transformers import PhiConfig

    return PhiConfig(
        num_hidden_layers=32,
        hidden_size=2560,
        intermediate_size=10240,
        num_attention_heads=32,
        vocab_size=51200,
        max_position_embeddings=2048,
        partial_rotary_factor=0.4,
        hidden_act="relu",
        dtype="bfloat16",
        architectures=["PhiForCausalLM"],
    )


def _relu_llama() -> PretrainedConfig:
    config = _llama(layers=32, d_model=4096, heads=32, d_ffn=11008)
    config.hidden_act = "relu"
    return config


def _olmoe(
    *, layers: int, d_model: int, heads: int, d_ffn: int, experts: int, active: int, vocab: int = 50304
) -> PretrainedConfig:
    from transformers import OlmoeConfig

    return OlmoeConfig(
        num_hidden_layers=layers,
        hidden_size=d_model,
        intermediate_size=d_ffn,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_experts=experts,
        num_experts_per_tok=active,
        vocab_size=vocab,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["OlmoeForCausalLM"],
    )


def _qwen3_moe(*, layers: int) -> PretrainedConfig:
    """Qwen3-30B-A3B, which has 48 layers."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        num_hidden_layers=layers,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )


def _gpt_oss(*, layers: int) -> PretrainedConfig:
    """gpt-oss-20b, which has 24 layers."""
    from transformers import GptOssConfig

    return GptOssConfig(
        num_hidden_layers=layers,
        num_local_experts=32,
        num_experts_per_tok=4,
        hidden_size=2880,
        intermediate_size=2880,
        head_dim=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=201088,
        dtype="bfloat16",
        architectures=["GptOssForCausalLM"],
    )


def _deepseek_v3(*, layers: int) -> PretrainedConfig:
    """DeepSeek-V3, which has 61 layers: three dense ones, then mixtures."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        num_hidden_layers=layers,
        first_k_dense_replace=3,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        vocab_size=129280,
        dtype="bfloat16",
        architectures=["DeepseekV3ForCausalLM"],
    )


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "opt-6.7b": lambda: _opt(layers=32, d_model=4096, heads=32),
    "llama-2-7b": lambda: _llama(layers=32, d_model=4096, heads=32, d_ffn=11008),
    "llama-2-7b-relu": _relu_llama,
    "falcon-7b": _falcon_7b,
    "persimmon-8b": _persimmon_8b,
    "phi-2": _phi_2,
    "olmoe-1b-7b": lambda: _olmoe(layers=16, d_model=2048, heads=16, d_ffn=1024, experts=64, active=8),
    "qwen3-30b-a3b": lambda: _qwen3_moe(layers=48),
    "gpt-oss-20b": lambda: _gpt_oss(layers=24),
    # as many layers as a disk holds twice
    "qwen3-30b-a3b-8-layers": lambda: _qwen3_moe(layers=8),
    "gpt-oss-20b-6-layers": lambda: _gpt_oss(layers=6),
    "deepseek-v3-4-layers": lambda: _deepseek_v3(layers=4),
    # the rest try the harness, not the machine
    "opt-1.3b": lambda: _opt(layers=24, d_model=2048, heads=32),
    "opt-tiny": lambda: _opt(layers=4, d_model=256, heads=4, vocab=1024, positions=512),
    "olmoe-small": lambda: _olmoe(layers=8, d_model=1024, heads=8, d_ffn=512, experts=64, active=8, vocab=8192),
    "olmoe-tiny": lambda: _olmoe(layers=4, d_model=256, heads=4, d_ffn=128, experts=16, active=2, vocab=1024),
    "qwen3-30b-a3b-2-layers": lambda: _qwen3_moe(layers=2),
    "gpt-oss-20b-2-layers": lambda: _gpt_oss(layers=2),
    "llama-tiny": lambda: _llama(layers=4, d_model=256, heads=4, d_ffn=704, vocab=1024),
}


def config_of(shape: str, *, num_layers: int | None = None) -> PretrainedConfig:
    """Return the config of the preset `shape`, with another number of layers where `num_layers` is given."""
    config = SHAPES[shape]()
    if num_layers is not None:
        config.num_hidden_layers = num_layers
    return config


def stored_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a checkpoint of `config` stores (tied ones once), allocating none."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
