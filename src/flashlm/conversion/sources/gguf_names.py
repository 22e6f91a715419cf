"""What llama.cpp calls the tensors of each family of models, and what its converter does to them.

Only names and changes that were looked up in both programs are here: a tensor that a table lacks is refused by name, so that
nothing of a model is left out in silence. Most tensors keep their rows; where the converter puts rows in another order, that
is undone by reading them in the other order, whatever they are encoded in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flashlm.errors import UnsupportedModelError

Order = Callable[[Any, int], torch.Tensor]
Change = Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]

_BLOCK = re.compile(r"^blk\.(?P<number>\d+)\.(?P<leaf>.+)$")
_SUFFIX = re.compile(r"^(?P<stem>.+)\.(?P<suffix>weight|bias)$")
EXPERT_PARTS = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down", "ffn_gate_up_exps": "gate_up"}


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """One architecture of GGUF files.

    Attributes:
        layers: What the names of the model's layers begin with.
        whole: Names of what is not in a layer, without `.weight` and `.bias`.
        layer: Names within a layer, likewise, or with them.
        orders: By name within a layer, without `.weight`: which of the stored rows each of the model's is.
        changes: By a name, or the end of one: what the model has instead of the stored values.
        transposed: Names within a layer whose matrices the model has the other way round.
        ignored: What the model computes itself.
    """

    layers: str = "model.layers."
    whole: Mapping[str, str]
    layer: Mapping[str, str]
    orders: Mapping[str, Order] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    ignored: re.Pattern[str] = re.compile(r"^rope_(freqs|factors_(long|short))\.weight$|\.attn_rot_embd\.weight$")

    def name_of(self, stored: str) -> str | None:
        """Return the model's name of a tensor, None where there is none. Experts have no names of their own."""
        block = _BLOCK.match(stored)
        names, leaf, start = (self.layer, block["leaf"], f"{self.layers}{block['number']}.") if block else (
            self.whole, stored, "")  # fmt: skip
        if leaf in names:
            return start + names[leaf]
        found = _SUFFIX.match(leaf)
        if found is None or found["stem"] not in names:
            return None
        return f"{start}{names[found['stem']]}.{found['suffix']}"

    def experts_of(self, stored: str) -> tuple[str, str, str] | None:
        """Return layer, part and `weight` or `bias` of a tensor of stacked experts; None of any other."""
        block = _BLOCK.match(stored)
        found = _SUFFIX.match(block["leaf"]) if block else None
        if block is None or found is None or found["stem"] not in EXPERT_PARTS:
            return None
        return f"{self.layers}{block['number']}", EXPERT_PARTS[found["stem"]], found["suffix"]

    def order_of(self, stored: str, config: Any, num_rows: int) -> torch.Tensor | None:
        """Return which of its rows each of the model's is, int64 (num_rows,); None: the same.

        Raises:
            UnsupportedModelError: The config does not fit so many rows.
        """
        block = _BLOCK.match(stored)
        leaf = block["leaf"] if block else stored
        order = self.orders.get(leaf) or self.orders.get(leaf.rpartition(".")[0])
        if order is None:
            return None
        try:
            found = order(config, num_rows)
        except (RuntimeError, ValueError, ZeroDivisionError, TypeError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{stored} has {num_rows} rows, which do not fit the heads that the file states ({error})"
            ) from error
        return None if torch.equal(found, torch.arange(num_rows)) else found

    def change_of(self, stored: str, config: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return what makes the model's values of the stored ones; None: they are the same."""
        block = _BLOCK.match(stored)
        leaf = block["leaf"] if block else stored
        for end, change in self.changes.items():
            if leaf == end or (end.startswith("*") and leaf.endswith(end[1:])):
                return change(config)
        return None

    def is_transposed(self, stored: str) -> bool:
        """Return whether the model has a matrix the other way round."""
        block = _BLOCK.match(stored)
        return block is not None and block["leaf"] in self.transposed


def _rope_halves(num_heads: int, num_rows: int) -> torch.Tensor:
    """llama.cpp turns pairs of neighbouring rows of a head, transformers row i and row i + half."""
    return torch.arange(num_rows).view(num_heads, -1, 2).transpose(1, 2).flatten()


def _query_halves(config: Any, num_rows: int) -> torch.Tensor:
    return _rope_halves(config.num_attention_heads, num_rows)


def _key_halves(config: Any, num_rows: int) -> torch.Tensor:
    return _rope_halves(config.num_key_value_heads, num_rows)


def _by_head(config: Any, num_rows: int) -> torch.Tensor:
    """Of all queries, all keys, all values: a head's query, key and value one after the other."""
    return torch.arange(num_rows).view(3, config.num_attention_heads, -1).transpose(0, 1).flatten()


def _value_heads(config: Any, num_rows: int) -> torch.Tensor:
    """Value heads by their key head; llama.cpp has the first of every key head first, and queries and keys before them."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    head_rows = config.linear_value_head_dim if num_rows != values else 1
    first = num_rows - values * head_rows
    rows = torch.arange(values * head_rows).view(values // keys, keys, head_rows).transpose(0, 1).flatten()
    return torch.cat([torch.arange(first), first + rows])


def _minus_one(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda stored: stored - 1


def _log_of_negative(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda stored: torch.log(-stored)


def _value_columns(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda stored: stored[:, _value_heads(config, stored.shape[1])]


_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_LLAMA = _NORMS | _ATTENTION | _GATED
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GEMMA = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SHIFTED: dict[str, Change] = {"*norm.weight": _minus_one}
_OLD = {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"}
_OLD_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_QWEN35 = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
} | _ATTENTION | _HEAD_NORMS  # fmt: skip
_QWEN35_ORDERS: dict[str, Order] = dict.fromkeys(
    ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_conv1d", "ssm_a", "ssm_dt"), _value_heads
)
_QWEN35_CHANGES: dict[str, Change] = {
    "ssm_norm.weight": lambda config: lambda stored: stored,
    **_SHIFTED,
    "ssm_a": _log_of_negative,
    "ssm_out.weight": _value_columns,
}

FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(whole=_WHOLE, layer=_LLAMA, orders={"attn_q": _query_halves, "attn_k": _key_halves}),
    "qwen2": GgufFamily(whole=_WHOLE, layer=_LLAMA),
    "qwen3": GgufFamily(whole=_WHOLE, layer=_LLAMA | _HEAD_NORMS),
    "qwen2moe": GgufFamily(whole=_WHOLE, layer=_LLAMA | _SHARED | {"ffn_gate_inp": "mlp.gate"}),
    "qwen3moe": GgufFamily(whole=_WHOLE, layer=_LLAMA | _HEAD_NORMS | {"ffn_gate_inp": "mlp.gate"}),
    "minimax-m2": GgufFamily(
        whole=_WHOLE,
        layer=_LLAMA | _HEAD_NORMS | {"ffn_gate_inp": "mlp.gate", "exp_probs_b.bias": "mlp.e_score_correction_bias"},
    ),
    "gpt-oss": GgufFamily(
        whole=_WHOLE,
        layer=_ATTENTION
        | {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
        },
    ),
    "phi3": GgufFamily(
        whole=_WHOLE,
        layer=_NORMS
        | {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "gemma2": GgufFamily(whole=_WHOLE, layer=_ATTENTION | _GATED | _GEMMA, changes=_SHIFTED),
    "gemma3": GgufFamily(whole=_WHOLE, layer=_ATTENTION | _GATED | _GEMMA | _HEAD_NORMS, changes=_SHIFTED),
    "nemotron": GgufFamily(whole=_WHOLE, layer=_LLAMA, changes=_SHIFTED),
    "stablelm": GgufFamily(whole=_WHOLE, layer=_LLAMA),
    "starcoder2": GgufFamily(
        whole=_WHOLE, layer=_NORMS | _ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    ),
    "falcon": GgufFamily(layers="transformer.h.", whole=_OLD, layer=_OLD_LAYER),
    "bloom": GgufFamily(
        layers="transformer.h.",
        whole=_OLD | {"token_embd_norm": "transformer.word_embeddings_layernorm"},
        layer=_OLD_LAYER,
        orders={"attn_qkv": _by_head},
    ),
    "gpt2": GgufFamily(
        layers="transformer.h.",
        whole={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layer={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        transposed=frozenset({"attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"}),
    ),
    "lfm2": GgufFamily(
        whole={"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"},
        layer={
            "attn_norm": "operator_norm",
            "ffn_norm": "ffn_norm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.out_proj",
            "attn_q_norm": "self_attn.q_layernorm",
            "attn_k_norm": "self_attn.k_layernorm",
            "ffn_gate": "feed_forward.w1",
            "ffn_up": "feed_forward.w3",
            "ffn_down": "feed_forward.w2",
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.out_proj": "conv.out_proj",
            "shortconv.conv": "conv.conv",
        },
    ),
    "qwen35": GgufFamily(whole=_WHOLE, layer=_QWEN35 | _GATED, orders=_QWEN35_ORDERS, changes=_QWEN35_CHANGES),
    "qwen35moe": GgufFamily(
        whole=_WHOLE,
        layer=_QWEN35 | _SHARED | {"ffn_gate_inp": "mlp.gate"},
        orders=_QWEN35_ORDERS,
        changes=_QWEN35_CHANGES,
    ),
}
"""By what the file says in general.architecture. Files of Mistral models say llama, those of Phi-4 phi3."""
