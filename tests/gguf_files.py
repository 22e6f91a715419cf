"""Tiny models as GGUF files, written by the reference library as llama.cpp's converter writes them, of random bytes.

Names come from the library's own tables. What the converter changes is done here to rows as they are encoded: a row moves
whole, so the model that a file means is known without undoing anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flashlm.rows.encodings import ENCODINGS
from tests.encoded_packs import random_matrix

Types = Callable[[str], str]
"""The encoding of a matrix by the model's name for it; "fp32" and the others that are plain, or one of GGUF's."""
Extra = dict[str, Any]
"""Further tensors (arrays) and metadata (anything else) of a file, by name."""

_DENSE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_LONG = {"head_dim": 32, "sliding_window": 16, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Architecture:
    """How a family of models is called here and there.

    Attributes:
        model_type: Of transformers.
        settings: Of its config, beside those that all share.
        keys: Metadata by key, from the config.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    keys: Callable[[Any], dict[str, Any]] = lambda config: {}


def _rms(config: Any) -> dict[str, Any]:
    return {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}


def _moe(config: Any) -> dict[str, Any]:
    keys = {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return _rms(config) | keys | ({"expert_shared_feed_forward_length": shared} if shared else {})


def _gpt_oss(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return _rms(config) | {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.intermediate_size,
        "attention.key_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }


def _gemma(config: Any) -> dict[str, Any]:
    return (
        _rms(config)
        | {
            "attention.key_length": config.head_dim,
            "attention.sliding_window": config.sliding_window,
        }
        | {name: getattr(config, name) for name in SOFTCAPS if getattr(config, name)}
    )


def _qwen35(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    keys = {
        "attention.key_length": config.head_dim,
        "full_attention_interval": 2,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "rope.dimension_sections": [*rope["mrope_section"], 0],
        "rope.dimension_count": int(config.head_dim * rope["partial_rotary_factor"]),
    }
    return keys | (_moe(config) if config.model_type.endswith("moe_text") else _rms(config))


def _partial(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda config: {
        "attention.layer_norm_epsilon": getattr(config, name),
        "rope.dimension_count": int(
            config.rope_parameters["partial_rotary_factor"] * config.hidden_size // config.num_attention_heads
        ),
    }


_LINEAR = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
                        "partial_rotary_factor": 0.25},
}  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", {}, lambda config: _rms(config) | {"rope.dimension_count": config.head_dim}),
    "qwen2": Architecture("qwen2", {}, _rms),
    "qwen3": Architecture(
        "qwen3", {"head_dim": 32}, lambda config: _rms(config) | {"attention.key_length": config.head_dim}
    ),
    "qwen2moe": Architecture("qwen2_moe", _MOE | {"shared_expert_intermediate_size": 64}, _moe),
    "qwen3moe": Architecture(
        "qwen3_moe",
        _MOE | {"head_dim": 32, "norm_topk_prob": True},
        lambda config: _moe(config) | {"attention.key_length": config.head_dim},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 16,
            "max_position_embeddings": 131072,
        },
        _gpt_oss,
    ),
    "phi3": Architecture("phi3", {}, lambda config: _rms(config) | {"rope.dimension_count": 16}),
    "gemma2": Architecture("gemma2", _LONG | dict(zip(SOFTCAPS, (3.0, 2.0), strict=True)), _gemma),
    "gemma3": Architecture("gemma3_text", _LONG, _gemma),
    "nemotron": Architecture(
        "nemotron",
        {"head_dim": 16},
        lambda config: _partial("norm_eps")(config) | {"attention.layer_norm_rms_epsilon": config.norm_eps},
    ),
    "stablelm": Architecture("stablelm", {"use_parallel_residual": False}, _partial("layer_norm_eps")),
    "starcoder2": Architecture("starcoder2", {}, lambda config: {"attention.layer_norm_epsilon": config.norm_epsilon}),
    "falcon": Architecture(
        "falcon",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
        lambda config: {"attention.layer_norm_epsilon": 1e-5},
    ),
    "bloom": Architecture(
        "bloom",
        {"n_layer": 2, "n_head": 4, "tie_word_embeddings": True},
        lambda config: {"attention.layer_norm_epsilon": config.layer_norm_epsilon},
    ),
    "gpt2": Architecture(
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        lambda config: {"attention.layer_norm_epsilon": config.layer_norm_epsilon},
    ),
    "lfm2": Architecture(
        "lfm2",
        {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"], "tie_word_embeddings": True},
        lambda config: {"attention.layer_norm_rms_epsilon": config.norm_eps, "shortconv.l_cache": config.conv_L_cache},
    ),
    "qwen35": Architecture("qwen3_5_text", _LINEAR, _qwen35),
    "qwen35moe": Architecture("qwen3_5_moe_text", _LINEAR | _MOE | {"shared_expert_intermediate_size": 64}, _qwen35),
    "minimax-m2": Architecture(
        "minimax_m2",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8},
        lambda config: (
            _rms(config)
            | {
                "expert_count": config.num_local_experts,
                "expert_used_count": config.num_experts_per_tok,
                "expert_gating_func": 2,
                "attention.key_length": config.head_dim,
                "rope.dimension_count": 8,
            }
        ),
    ),
}

_MODEL_NAMES = {"transformer.": ""}  # of Bloom and Falcon the library's tables have the names without
_LEAVES = {
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "mlp.e_score_correction_bias": "exp_probs_b.bias",
    "self_attn.sinks": "attn_sinks.weight",
}


_OF_VALUES = ("attn_qkv.", "attn_gate.", "ssm_alpha.", "ssm_beta.", "ssm_conv1d.", "ssm_a.", "ssm_dt.")


def q4_0(name: str) -> str:
    """Everything in Q4_0."""
    return "q4_0"


def random_rows(
    encoding: str, num_rows: int, width: int, random: np.random.Generator
) -> tuple[np.ndarray, torch.Tensor]:
    """Return rows in an encoding, uint8 (num_rows, row bytes), and what they mean; also of types that only GGUF has."""
    if encoding in ENCODINGS:
        return random_matrix(encoding, num_rows, width, random)
    known = gguf.GGMLQuantizationType[encoding.upper()]
    group_elements, group_bytes = gguf.GGML_QUANT_SIZES[known]
    raw = random.integers(0, 256, (num_rows * width // group_elements, group_bytes), dtype=np.uint8)
    raw[:, -2:] = np.full((len(raw), 1), 0.001, dtype=np.float16).view(np.uint8)  # q3_k's scale is its end
    raw = raw.reshape(num_rows, -1)
    return raw, torch.from_numpy(gguf.quants.dequantize(raw, known))


def save_gguf(
    path: Path, architecture: str, types: Types = q4_0, *, seed: int = 0, extra: Extra | None = None, **settings: Any
) -> PreTrainedModel:
    """Write a tiny model of an architecture to `path`.

    Args:
        path: The file.
        architecture: As GGUF files call it.
        types: Encodings of matrices whose rows they fit; the others, and all vectors, are in fp32.
        seed: Of the weights.
        extra: What the file holds beside.
        settings: Of the config.

    Returns:
        The model in fp32 with the weights that the file means.
    """
    about = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(about.model_type, **_DENSE | about.settings | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, architecture, config, about)
    random, tied = np.random.default_rng(seed), set(model.all_tied_weights_keys)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name not in tied:
                _Weight(writer, architecture, config, types, random).write(name, weight)
    model.tie_weights()
    for name, value in (extra or {}).items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
        else:
            _add(writer, name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_metadata(writer: gguf.GGUFWriter, architecture: str, config: Any, about: Architecture) -> None:
    text = config.get_text_config()
    keys: dict[str, Any] = {
        "block_count": text.num_hidden_layers,
        "context_length": 64 if architecture == "bloom" else text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "vocab_size": text.vocab_size,
    }
    if architecture == "gpt2":
        keys["feed_forward_length"] = 4 * config.n_embd
    if architecture == "falcon":
        keys |= {"attention.head_count_kv": 1, "feed_forward_length": config.ffn_hidden_size}
    if architecture == "lfm2":
        heads = [text.num_key_value_heads * (kind == "full_attention") for kind in text.layer_types]
        keys["attention.head_count_kv"] = heads
    if architecture not in ("bloom", "gpt2"):
        rope = text.rope_parameters
        keys["rope.freq_base"] = float(rope.get("full_attention", rope)["rope_theta"])
    writer.add_name("tiny")
    for key, value in (keys | about.keys(config)).items():
        _add(writer, f"{architecture}.{key}", value)
    writer.add_token_list([f"t{number}" for number in range(text.vocab_size)])
    for key, value in (("bos", 1), ("eos", 2), ("padding", 0)):
        _add(writer, f"tokenizer.ggml.{key}_token_id", value)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


@dataclass
class _Weight:
    """Writes a weight under the library's name, random, and sets it in the model to what was written."""

    writer: gguf.GGUFWriter
    architecture: str
    config: Any
    types: Types
    random: np.random.Generator

    def write(self, name: str, weight: torch.Tensor) -> None:
        if name.endswith(("experts.gate_up_proj", "experts.gate_up_proj_bias")):
            self._write_halves(name, weight)
        elif name.endswith("experts.down_proj_bias"):
            self._write_vector(self.name(name, "ffn_down_exps.bias"), weight)
        elif weight.ndim == 3 and "experts" in name:
            rows = weight.transpose(1, 2) if self.config.model_type == "gpt_oss" else weight
            rows.copy_(self._write_rows(name, self.name(name, "ffn_down_exps.weight"), rows.shape))
        elif weight.ndim == 1 or name.endswith(("conv.weight", "conv1d.weight")) or "shared_expert_gate" in name:
            self._write_vector(self.gguf_name(name), weight)
        else:
            is_turned = self.architecture == "gpt2" and ".h." in name
            rows = weight.t() if is_turned else weight
            rows.copy_(self._write_rows(name, self.gguf_name(name), rows.shape))

    def _write_halves(self, name: str, weight: torch.Tensor) -> None:
        """gate and up are tensors of their own."""
        is_alternating = self.config.model_type == "gpt_oss"
        rows = weight.transpose(1, 2) if is_alternating and weight.ndim == 3 else weight
        half = rows.shape[1] // 2
        for index, part in enumerate(("gate", "up")):
            target = rows[:, index::2] if is_alternating else rows[:, index * half : (index + 1) * half]
            if name.endswith("bias"):
                self._write_vector(self.name(name, f"ffn_{part}_exps.bias"), target)
            else:
                stored = self.name(name, f"ffn_{part}_exps.weight")
                target.copy_(self._write_rows(name, stored, target.shape))

    def _write_vector(self, stored: str, weight: torch.Tensor) -> None:
        weight.copy_(torch.from_numpy(0.2 * self.random.standard_normal(weight.shape)))
        if stored.endswith("norm.weight"):
            weight.add_(0.0 if self._shifts_norms and "ssm_norm" not in stored else 1.0)
        content = weight.squeeze() if weight.ndim > 1 else weight
        if stored.endswith("ssm_a"):
            content = -torch.exp(content)
            weight.copy_(torch.log(-content))
        if stored.endswith("norm.weight") and self._shifts_norms and "ssm_norm" not in stored:
            content = content + 1
            weight.copy_(content - 1)  # as it comes back
        values = self._moved(stored, content.numpy().copy())
        self.writer.add_tensor(stored, np.ascontiguousarray(values))

    @property
    def _shifts_norms(self) -> bool:
        return self.architecture in ("gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe")

    def _write_rows(self, name: str, stored: str, shape: torch.Size) -> torch.Tensor:
        """Write random rows; return what they mean, in the model's order."""
        encoding = self.types(name)
        is_small = "ffn_gate_inp" in stored or "exp_probs" in stored
        known = gguf.GGMLQuantizationType[
            {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}.get(encoding, encoding.upper())
        ]
        if is_small or shape[-1] % gguf.GGML_QUANT_SIZES[known][0]:
            encoding, known = "fp32", gguf.GGMLQuantizationType.F32
        raw, values = random_rows(encoding, int(np.prod(shape[:-1])), shape[-1], self.random)
        moved = np.ascontiguousarray(self._moved(stored, raw).reshape(*shape[:-1], -1))
        if ".ssm_out." in stored:
            values = self._untiled(values.t()).t()
        plain = {"fp32": np.float32, "fp16": np.float16}.get(encoding)
        self.writer.add_tensor(stored, moved.view(plain) if plain else moved, raw_dtype=known)
        return values.reshape(shape)

    def _moved(self, stored: str, rows: np.ndarray) -> np.ndarray:
        """Rows as llama.cpp's converter puts them."""
        heads, keys = self.config.num_attention_heads, getattr(self.config, "num_key_value_heads", None)
        if self.architecture == "llama" and (".attn_q." in stored or ".attn_k." in stored):
            count = heads if ".attn_q." in stored else keys
            return rows.reshape(count, 2, len(rows) // count // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        if self.architecture == "bloom" and ".attn_qkv." in stored:
            split = rows.reshape(heads, 3, -1, *rows.shape[1:])
            return np.concatenate([split[:, index].reshape(-1, *rows.shape[1:]) for index in range(3)])
        if self.architecture.startswith("qwen35") and any(f".{leaf}" in f"{stored}." for leaf in _OF_VALUES):
            return self._tiled(rows)
        return rows

    def _tiled(self, rows: np.ndarray) -> np.ndarray:
        """Rows by value head: the first of every key head, then the second; queries and keys before them stay."""
        keys, values = self.config.linear_num_key_heads, self.config.linear_num_value_heads
        first = len(rows) - (values * self.config.linear_value_head_dim if len(rows) != values else values)
        heads = rows[first:].reshape(keys, values // keys, -1, *rows.shape[1:])
        return np.concatenate([rows[:first], heads.swapaxes(0, 1).reshape(-1, *rows.shape[1:])])

    def _untiled(self, rows: torch.Tensor) -> torch.Tensor:
        keys, values = self.config.linear_num_key_heads, self.config.linear_num_value_heads
        return rows.reshape(values // keys, keys, -1, rows.shape[1]).transpose(0, 1).reshape(rows.shape)

    def name(self, name: str, leaf: str) -> str:
        return f"blk.{name.split('.')[2]}.{leaf}"

    def gguf_name(self, name: str) -> str:
        for ending, leaf in _LEAVES.items():
            if name.endswith(ending):
                return self.name(name, leaf)
        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == self.architecture)
        names = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)
        stem, _, suffix = name.rpartition(".")
        found = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
        assert found is not None, name
        return f"{found}.{suffix}"
