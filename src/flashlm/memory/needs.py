"""What a model needs in DRAM before anything can be pinned: KV cache and working memory, from its config alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from flashlm.memory.budget import Needs
from flashlm.memory.limits import process_bytes
from flashlm.memory.pass_memory import PassFacts, working_bytes
from flashlm.pack.units import Unit, of_kind
from flashlm.rows.encodings import bytes_per_element
from flashlm.rows.kernels import WIDEN_PIECE_BYTES, choose_plain_strategy, choose_strategy
from flashlm.rows.layout import ROWS_PER_STEP, LayerLayout
from flashlm.transformers_seam import attention_implementation

DEFAULT_CONTEXT = 2048
# Measured on the families' tests and a 6.7 B model under a cgroup cap: libraries that are imported late (generation,
# tokenizers), thread stacks, and what the C allocator keeps for itself.
SLACK_BYTES = 160 << 20
# Live hidden-size vectors per token at the peak of a prefill: residual, norm, q, k, v, attention output, their
# transposed copies, and the streamed layer's fp32 input and output.
LIVE_VECTORS_PER_TOKEN = 12
# Live fp32 vectors of a prompt's tokens in a layer of experts: input, sum, one expert's tokens, its output, and a copy.
LIVE_EXPERT_VECTORS = 5
MAX_RECENT_BYTES = 16 << 20  # of embeddings: some 2,000 rows of 8 KiB
LIVE_ROW_VECTORS = 5  # of one product's rows: gate, up, both joined, the activation, their product
# Settings with which a family makes a second copy of its logits.
_LOGIT_SCALINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
)


def kv_cache_bytes_per_token(config: Any, dtype_bytes: int) -> int:
    """Return the bytes that one token of one sequence adds to the KV cache of a transformers `config`."""
    text = config.get_text_config(decoder=True)
    layers = _layers(text)
    times = int(text.num_hidden_layers) if len(layers) == 1 else 1
    return times * sum(map(_kv_elements, layers)) * dtype_bytes


def _kv_elements(layer: Any) -> int:
    """Return the elements that a token adds to the cache of one layer, of its config."""
    num_heads = int(layer.num_attention_heads)
    num_kv_heads = int(getattr(layer, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(layer, "head_dim", None) or layer.hidden_size // num_heads)
    # Latent attention (DeepSeek) is cached unfolded: keys of two parts, values of a width of their own.
    nope_dim, rope_dim = getattr(layer, "qk_nope_head_dim", None), getattr(layer, "qk_rope_head_dim", None)
    key_dim = int(nope_dim + rope_dim) if nope_dim and rope_dim else head_dim
    value_dim = int(getattr(layer, "v_head_dim", None) or head_dim)
    return num_kv_heads * (key_dim + value_dim)


def rows_per_product(layout: LayerLayout) -> int:
    """Return the rows of an expert that one matrix product takes, so that their fp32 copy stays small."""
    row_bytes = layout.num_parts * layout.hidden_size * 4
    step = math.lcm(ROWS_PER_STEP, layout.down_group)
    return min(max(WIDEN_PIECE_BYTES // row_bytes // step, 1) * step, layout.block_rows)


def pass_facts(config: Any, units: Sequence[Unit], dtype: str) -> PassFacts:
    """Return what the memory of a model's passes depends on.

    A config that no model has been built from does not say how attention will be computed: sdpa is assumed.

    Args:
        config: The transformers config of the model.
        units: What is streamed.
        dtype: Of the resident weights, like "bfloat16": what the model computes in.
    """
    text = config.get_text_config(decoder=True)
    experts = of_kind(units, "experts")
    pieces = [replace(unit.layout, block_rows=rows_per_product(unit.layout)) for unit in experts]
    layouts = [*(unit.layout for unit in of_kind(units, "ffn")), *pieces]
    layout = max(layouts, key=lambda each: (each.block_rows * each.num_parts * each.hidden_size, each.block_rows))
    dtype_bytes = bytes_per_element(dtype)
    widened = [each for each in layouts if _widens(each, dtype)]
    widened_bytes = max((each.block_rows * each.num_parts * each.hidden_size * 4 for each in widened), default=0)
    widens_matrices = choose_plain_strategy(torch_dtype(dtype)) == "widen" or any(
        _widens(each.layout, dtype) for each in units
    )
    hidden_size = int(text.hidden_size)
    expert_bytes = max(map(_expert_token_bytes, experts, pieces), default=0)
    return PassFacts(
        hidden_size=hidden_size,
        vocab_size=int(text.vocab_size),
        num_layers=int(text.num_hidden_layers),
        num_heads=max(_values(text, "num_attention_heads")),
        dtype_bytes=dtype_bytes,
        kv_token_bytes=kv_cache_bytes_per_token(config, dtype_bytes),
        scratch_bytes=widened_bytes + (WIDEN_PIECE_BYTES if widens_matrices else 0),
        token_bytes=hidden_size * (LIVE_VECTORS_PER_TOKEN * dtype_bytes + 3 * 4)
        + 3 * layout.block_rows * 4
        + expert_bytes,
        writes_scores=writes_scores(config),
        masks=any(getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")),
        logit_copies=2 if any(getattr(text, name, None) for name in _LOGIT_SCALINGS) else 1,
    )


def _widens(layout: LayerLayout, dtype: str) -> bool:
    return choose_strategy(layout, torch_dtype(dtype)) == "widen"


def _expert_token_bytes(unit: Unit, piece: LayerLayout) -> int:
    """Return what a prompt's token has live in a layer of experts: vectors, scores, their copies, sorted indices."""
    vectors_bytes = (LIVE_EXPERT_VECTORS * piece.hidden_size + LIVE_ROW_VECTORS * piece.block_rows) * 4
    return vectors_bytes + 8 * 4 * unit.num_blocks + 64 * unit.num_active


def _values(text: Any, name: str) -> list[int]:
    """Return a number that may differ from layer to layer, once for each kind of layer."""
    return [int(getattr(layer, name)) for layer in _layers(text)]


def _layers(text: Any) -> list[Any]:
    """Return a config of each layer where layers differ (Gemma 4), else the one of all."""
    return list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]


def recent_bytes(table_bytes: int) -> int:
    """Return what is kept of a table of embeddings that is read by rows."""
    return min(MAX_RECENT_BYTES, table_bytes // 8)


def writes_scores(config: Any) -> bool:
    """Return whether attention holds all heads' scores: eager does, and sdpa where keys and values differ in width."""
    text = config.get_text_config(decoder=True)
    implementation = str(attention_implementation(text) or "sdpa").removeprefix("paged|")
    if implementation != "sdpa":
        return implementation.startswith("eager")
    return any(map(_has_wider_keys, _layers(text)))


def _has_wider_keys(layer: Any) -> bool:
    nope_dim, rope_dim = getattr(layer, "qk_nope_head_dim", None), getattr(layer, "qk_rope_head_dim", None)
    if not (nope_dim and rope_dim):
        return False
    return int(nope_dim) + int(rope_dim) != int(getattr(layer, "v_head_dim", None) or 0)


def measure_needs(
    config: Any, units: Sequence[Unit], dtype: str, *, resident_bytes: int, context: int, predictor_bytes: int = 0
) -> Needs:
    """Return what loading a pack into this process takes.

    Args:
        config: The transformers config of the model.
        units: What is streamed.
        dtype: Of the resident weights, like "bfloat16".
        resident_bytes: Size of the resident weights.
        context: Tokens of the KV cache, over all sequences.
        predictor_bytes: Size of the row predictors that will be used.
    """
    kv_bytes_per_token = kv_cache_bytes_per_token(config, bytes_per_element(dtype))
    # transformers' dynamic cache grows a layer by copying it: one layer exists twice for a moment.
    text = config.get_text_config(decoder=True)
    num_layers = text.num_hidden_layers
    table_bytes = int(text.vocab_size) * int(text.hidden_size) * bytes_per_element(dtype)
    kv_bytes = context * kv_bytes_per_token * (num_layers + 1) // num_layers
    return Needs(
        process_bytes=process_bytes(),
        resident_bytes=resident_bytes,
        kv_cache_bytes=kv_bytes,
        working_bytes=SLACK_BYTES
        + recent_bytes(table_bytes)
        + working_bytes(pass_facts(config, units, dtype), context),
        predictor_bytes=predictor_bytes,
        slack_bytes=SLACK_BYTES + recent_bytes(table_bytes),
    )


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for its name, like "bfloat16"."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
