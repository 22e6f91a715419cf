"""What a model needs in DRAM before anything can be pinned: KV cache and working memory, from its config alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashlm.memory.budget import Needs
from flashlm.memory.limits import process_bytes
from flashlm.memory.pass_memory import PassFacts, working_bytes
from flashlm.pack.manifest import read_manifest
from flashlm.rows.kernels import WIDEN_PIECE_BYTES, choose_strategy
from flashlm.rows.layout import DTYPE_BYTES, LayerLayout
from flashlm.structure.model_config import load_pack_config
from flashlm.transformers_seam import attention_implementation

DEFAULT_CONTEXT = 2048
# Measured on the families' tests and a 6.7 B model under a cgroup cap: libraries that are imported late (generation,
# tokenizers), thread stacks, and what the C allocator keeps for itself.
SLACK_BYTES = 160 << 20
# Live hidden-size vectors per token at the peak of a prefill: residual, norm, q, k, v, attention output, their
# transposed copies, and the streamed layer's fp32 input and output.
LIVE_VECTORS_PER_TOKEN = 12
# Settings with which a family makes a second copy of its logits.
_LOGIT_SCALINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
)


def read_config(pack: Path, *, is_checked: bool | None = None, **trust: Any) -> Any:
    """Return the transformers config of a pack.

    Args:
        pack: The folder.
        is_checked: Whether config.json is held against its checksum; None: unless `FLASHLM_CHECK` is "none".
        **trust: `trust_remote_code`, if at all.

    Raises:
        PackError: Not a finished pack, or its config.json is missing, damaged or (`is_checked`) changed.
        UnsupportedModelError: A config that this transformers can't use.
    """
    if is_checked is None:
        is_checked = os.environ.get("FLASHLM_CHECK") != "none"
    return load_pack_config(pack, read_manifest(pack), is_checked=is_checked, **trust)


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


def pass_facts(config: Any, layouts: Sequence[LayerLayout]) -> PassFacts:
    """Return what the memory of a model's passes depends on, of its transformers `config` and its streamed layers.

    A config that no model has been built from does not say how attention will be computed: sdpa is assumed.
    """
    text = config.get_text_config(decoder=True)
    layout = max(layouts, key=lambda each: each.block_stride_bytes)
    dtype_bytes = DTYPE_BYTES[layout.dtype]
    widened = layout.num_parts if choose_strategy(layout.dtype) == "widen" else 0
    hidden_size = int(text.hidden_size)
    return PassFacts(
        hidden_size=hidden_size,
        vocab_size=int(text.vocab_size),
        num_layers=int(text.num_hidden_layers),
        num_heads=max(_values(text, "num_attention_heads")),
        dtype_bytes=dtype_bytes,
        kv_token_bytes=kv_cache_bytes_per_token(config, DTYPE_BYTES[layouts[0].dtype]),
        scratch_bytes=layout.block_rows * widened * layout.hidden_size * 4 + (WIDEN_PIECE_BYTES if widened else 0),
        token_bytes=hidden_size * (LIVE_VECTORS_PER_TOKEN * dtype_bytes + 3 * 4) + 3 * layout.block_rows * 4,
        writes_scores=writes_scores(config),
        masks=any(getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")),
        logit_copies=2 if any(getattr(text, name, None) for name in _LOGIT_SCALINGS) else 1,
    )


def _values(text: Any, name: str) -> list[int]:
    """Return a number that may differ from layer to layer, once for each kind of layer."""
    return [int(getattr(layer, name)) for layer in _layers(text)]


def _layers(text: Any) -> list[Any]:
    """Return a config of each layer where layers differ (Gemma 4), else the one of all."""
    return list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]


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
    config: Any, layouts: Sequence[LayerLayout], *, resident_bytes: int, context: int, predictor_bytes: int = 0
) -> Needs:
    """Return what loading a pack into this process takes.

    Args:
        config: The transformers config of the model.
        layouts: The streamed layers.
        resident_bytes: Size of the resident weights.
        context: Tokens of the KV cache, over all sequences.
        predictor_bytes: Size of the row predictors that will be used.
    """
    dtype_bytes = DTYPE_BYTES[layouts[0].dtype]
    kv_bytes_per_token = kv_cache_bytes_per_token(config, dtype_bytes)
    # transformers' dynamic cache grows a layer by copying it: one layer exists twice for a moment.
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    kv_bytes = context * kv_bytes_per_token * (num_layers + 1) // num_layers
    return Needs(
        process_bytes=process_bytes(),
        resident_bytes=resident_bytes,
        kv_cache_bytes=kv_bytes,
        working_bytes=SLACK_BYTES + working_bytes(pass_facts(config, layouts), context),
        predictor_bytes=predictor_bytes,
        slack_bytes=SLACK_BYTES,
    )


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a key of `DTYPE_BYTES`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
