"""A GGUF file with the matrices of a transformers config, in 16 bits or quantised, for llama.cpp.

llama.cpp knows Llama; it does not know OPT. GPT-2 stands in for it: learned positions, LayerNorm, biases everywhere, an
ungated FFN of two matrices, the output tied to the embedding, so that every matrix is there once with the same size.
Only the activation differs (GELU for ReLU), which is no work to speak of. Weights are random, written tensor by tensor;
quantised ones are cut from one pool of blocks that `gguf` has quantised from normals.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from random_weights import EMBEDDINGS, STD, RandomPool, as_bytes, embedding_scale

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STAND_INS = {"opt": "gpt2", "llama": "llama", "olmoe": "olmoe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
GGUF_TYPES = {
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "mxfp4": gguf.GGMLQuantizationType.MXFP4,
}
PLAIN_TYPES = ("float16", "bfloat16")
# As in gpt-oss's own files: only experts are in 4 bits.
BESIDE_EXPERTS = {"mxfp4": "q8_0"}
FILE_TYPES = {
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "mxfp4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
}
POOL_BLOCKS = (
    1 << 19
)  # of 32 values; odd once one is left out, so that a wrapped tensor's rows do not repeat each other

Shapes = dict[str, tuple[int, ...]]


def _gpt2_shapes(config: PretrainedConfig) -> Shapes:
    d, d_ffn = config.hidden_size, config.ffn_dim
    shapes: Shapes = {
        "token_embd.weight": (config.vocab_size, d),
        "position_embd.weight": (config.max_position_embeddings, d),
        "output_norm.weight": (d,),
        "output_norm.bias": (d,),
    }
    layer = {"attn_norm": (d,), "attn_qkv": (3 * d, d), "attn_output": (d, d)}
    layer |= {"ffn_norm": (d,), "ffn_up": (d_ffn, d), "ffn_down": (d, d_ffn)}
    for number in range(config.num_hidden_layers):
        for name, shape in layer.items():
            shapes[f"blk.{number}.{name}.weight"] = shape
            shapes[f"blk.{number}.{name}.bias"] = shape[:1]
    return shapes


def _llama_shapes(config: PretrainedConfig) -> Shapes:
    d, d_ffn = config.hidden_size, config.intermediate_size
    d_kv = d // config.num_attention_heads * config.num_key_value_heads
    shapes: Shapes = {"token_embd.weight": (config.vocab_size, d), "output_norm.weight": (d,)}
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (config.vocab_size, d)
    layer = {"attn_norm": (d,), "attn_q": (d, d), "attn_k": (d_kv, d), "attn_v": (d_kv, d), "attn_output": (d, d)}
    layer |= {"ffn_norm": (d,), "ffn_gate": (d_ffn, d), "ffn_up": (d_ffn, d), "ffn_down": (d, d_ffn)}
    for number in range(config.num_hidden_layers):
        shapes |= {f"blk.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _olmoe_shapes(config: PretrainedConfig) -> Shapes:
    d, d_ffn, experts = config.hidden_size, config.intermediate_size, config.num_experts
    shapes: Shapes = {
        "token_embd.weight": (config.vocab_size, d),
        "output_norm.weight": (d,),
        "output.weight": (config.vocab_size, d),
    }
    layer: Shapes = {"attn_norm": (d,), "attn_q_norm": (d,), "attn_k_norm": (d,), "ffn_norm": (d,)}
    layer |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (d, d))
    layer |= {"ffn_gate_inp": (experts, d), "ffn_down_exps": (experts, d, d_ffn)}
    layer |= {"ffn_gate_exps": (experts, d_ffn, d), "ffn_up_exps": (experts, d_ffn, d)}
    for number in range(config.num_hidden_layers):
        shapes |= {f"blk.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _grouped_attention(config: PretrainedConfig) -> Shapes:
    d, d_head = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d_head, config.num_key_value_heads * d_head
    return {"attn_q.weight": (q, d), "attn_k.weight": (kv, d), "attn_v.weight": (kv, d), "attn_output.weight": (d, q)}


def _with_embeddings(config: PretrainedConfig, layer: Shapes) -> Shapes:
    table = (config.vocab_size, config.hidden_size)
    shapes: Shapes = {"token_embd.weight": table, "output_norm.weight": table[1:], "output.weight": table}
    for number in range(config.num_hidden_layers):
        shapes |= {f"blk.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def _qwen3_moe_shapes(config: PretrainedConfig) -> Shapes:
    d, d_ffn, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    layer = _grouped_attention(config) | {"attn_norm.weight": (d,), "ffn_norm.weight": (d,)}
    layer |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (config.head_dim,))
    layer |= {"ffn_gate_inp.weight": (experts, d), "ffn_down_exps.weight": (experts, d, d_ffn)}
    layer |= {"ffn_gate_exps.weight": (experts, d_ffn, d), "ffn_up_exps.weight": (experts, d_ffn, d)}
    return _with_embeddings(config, layer)


def _gpt_oss_shapes(config: PretrainedConfig) -> Shapes:
    d, d_ffn, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    layer = _grouped_attention(config)
    layer |= {name.replace("weight", "bias"): shape[:1] for name, shape in layer.items()}
    layer |= {"attn_norm.weight": (d,), "post_attention_norm.weight": (d,)}
    layer |= {"attn_sinks.weight": (config.num_attention_heads,)}
    layer |= {"ffn_gate_inp.weight": (experts, d), "ffn_gate_inp.bias": (experts,)}
    layer |= {"ffn_down_exps.weight": (experts, d, d_ffn), "ffn_down_exps.bias": (experts, d)}
    for name in ("ffn_gate_exps", "ffn_up_exps"):
        layer |= {f"{name}.weight": (experts, d_ffn, d), f"{name}.bias": (experts, d_ffn)}
    return _with_embeddings(config, layer)


SHAPES_OF = {
    "gpt2": _gpt2_shapes,
    "llama": _llama_shapes,
    "olmoe": _olmoe_shapes,
    "qwen3moe": _qwen3_moe_shapes,
    "gpt-oss": _gpt_oss_shapes,
}


def _add_settings(writer: gguf.GGUFWriter, config: PretrainedConfig, dtype: str) -> None:
    writer.add_name("random weights")
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "olmoe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type in ("qwen3_moe", "gpt_oss"):
        inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
        writer.add_expert_count(getattr(config, "num_local_experts", getattr(config, "num_experts", 0)))
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(inner)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        if config.model_type == "gpt_oss":
            writer.add_sliding_window(config.sliding_window)
    elif config.model_type in ("llama", "olmoe"):
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    else:
        writer.add_feed_forward_length(config.ffn_dim)
        writer.add_layer_norm_eps(1e-5)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Add a vocabulary that is valid and says nothing: the runs feed token ids."""
    kinds = gguf.TokenType
    special = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    special += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    tokens = special + [(f"t{number}", kinds.NORMAL) for number in range(vocab_size - len(special))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types([int(kind) for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def type_of(name: str, shape: tuple[int, ...], dtype: str) -> str | None:
    """Return the type (a key of `GGUF_TYPES`) of a tensor in a file of `dtype`, None for float32.

    Vectors are in float32, biases of experts too, which are vectors side by side, and a router is never quantised.
    """
    if not name.endswith(".weight") or len(shape) == 1:
        return None
    if dtype not in PLAIN_TYPES and "ffn_gate_inp" in name:
        return None
    return dtype if "_exps." in name else BESIDE_EXPERTS.get(dtype, dtype)


class EncodedPool:
    """Random blocks of an encoding, from which matrices of any size are cut."""

    def __init__(self, kind: gguf.GGMLQuantizationType, *, embedding_scale: int = 1) -> None:
        values = np.random.default_rng(0).standard_normal((POOL_BLOCKS - 1, 32), dtype=np.float32) * np.float32(STD)
        self._blocks = {scale: gguf.quants.quantize(values * np.float32(scale), kind) for scale in {1, embedding_scale}}
        self._embedding_scale = embedding_scale

    def write(self, writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...]) -> None:
        """Write the matrix `name` piece by piece."""
        blocks = self._blocks[self._embedding_scale if name in EMBEDDINGS else 1]
        start = zlib.crc32(name.encode()) % len(blocks)
        indices = np.arange(start, start + math.prod(shape) // 32) % len(blocks)
        writer.write_tensor_data(blocks[indices].reshape(-1))


def tensor_bytes(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes of a tensor in a file of `dtype`."""
    of_type = type_of(name, shape, dtype)
    if of_type is None:
        return math.prod(shape) * 4
    elements, size = gguf.GGML_QUANT_SIZES[GGUF_TYPES[of_type]]
    return math.prod(shape) // elements * size


def stored_bytes(config: PretrainedConfig, dtype: str) -> dict[str, int]:
    """Return name and bytes of every tensor that the twin of `config` stores."""
    shapes = SHAPES_OF[STAND_INS[config.model_type]](config)
    return {name: tensor_bytes(name, shape, dtype) for name, shape in shapes.items()}


def write_gguf(
    path: Path, config: PretrainedConfig, *, dtype: str = "float16", embeddings_larger: int | None = None
) -> int:
    """Write the twin of `config` and return its bytes; a file that is there is complete and stays.

    Matrices are in `dtype` (a key of `GGUF_TYPES`), vectors in float32, as llama.cpp wants them (see `type_of`). Embeddings
    are `embeddings_larger` times as large as other weights; None: as in a checkpoint.
    """
    if path.exists():
        return path.stat().st_size
    architecture = STAND_INS[config.model_type]
    shapes = SHAPES_OF[architecture](config)
    scale = embeddings_larger or embedding_scale(config)
    is_plain = dtype in PLAIN_TYPES
    pool = RandomPool(getattr(torch, dtype) if is_plain else torch.float32, embedding_scale=scale)
    encoded = {
        each: EncodedPool(GGUF_TYPES[each], embedding_scale=scale)
        for each in {type_of(name, shape, dtype) for name, shape in shapes.items()} - {None, *PLAIN_TYPES}
    }
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    _add_settings(writer, config, dtype)
    _add_tokenizer(writer, config.vocab_size)
    for name, shape in shapes.items():
        of_type = type_of(name, shape, dtype)
        kind = GGUF_TYPES[of_type] if of_type else gguf.GGMLQuantizationType.F32
        stored = gguf.quant_shape_to_byte_shape(shape, kind) if of_type in encoded else shape
        element = np.float32 if of_type is None else np.uint8 if of_type in encoded else np.float16
        size = tensor_bytes(name, shape, dtype)
        writer.add_tensor_info(name, stored, np.dtype(element), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        of_type = type_of(name, shape, dtype)
        if of_type in encoded:
            encoded[of_type].write(writer, name, shape)
            continue
        tensor = pool.tensor(name, shape)
        writer.write_tensor_data(as_bytes(tensor if of_type else tensor.float()))
    writer.close()
    partial.rename(path)
    return path.stat().st_size
