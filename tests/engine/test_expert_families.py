"""Every family of the installed transformers that uses the experts interface: which convert, and whether they match.

`docs/models.md` has the table. A family that begins or ceases to work, and a new one, fails here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import flashlm
from flashlm.errors import FlashError
from flashlm.pack.convert import convert

SMALL: dict[str, Any] = {
    "vocab_size": 96,
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
}
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "compress_ratios")
_MLA = {"num_key_value_heads": 4}
_MLA_OF_V3 = {**_MLA, "head_dim": 8}  # there it is the rotary part's
_INDEXED = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
            "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64}  # fmt: skip
_GEMMA = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 40}
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
}
# Families that are refused, and why.
REFUSED: dict[str, str] = {
    "bailing_hybrid": "more than a new name",
    "kimi_linear": "more than a new name",
}
MAX_ERROR = 2e-5  # of the largest logit: fp32 sums in another order, through four layers


def families() -> list[str]:
    """Model types with a causal language model whose code uses the experts interface."""
    root = Path(transformers.__file__).parent / "models"
    using = {
        path.parent.name
        for path in root.glob("*/modeling_*.py")
        if re.search(r"^@use_experts_implementation", path.read_text(), re.MULTILINE)
    }
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if model_type_to_module_name(name) in using)


def small_config(family: str) -> Any:
    """A config of `family` with every size that it has made small."""
    default = AutoConfig.for_model(family).get_text_config(decoder=True)
    settings = {key: value for key, value in SMALL.items() if value_of(default, key) is not None}
    for key in PER_LAYER:
        is_computed = isinstance(getattr(type(default), key, None), property)
        if isinstance(value_of(default, key), list) and not is_computed:
            settings[key] = None
    settings |= SPECIAL_TOKENS | OVERRIDES.get(family, {})
    try:
        return type(default)(**settings)
    except (TypeError, ValueError, StrictDataclassError):  # some lists are made anew only where they are left out
        return type(default)(**{key: value for key, value in settings.items() if value is not None})


def value_of(config: Any, key: str) -> Any:
    """A setting, or None where there is none, also where it differs from layer to layer."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


def save(family: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if family == "deepseek_v4":  # transformers saves one weight under a name that it does not read
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["norm.weight"] = tensors.pop("model.norm.weight")
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
@pytest.mark.filterwarnings("ignore")
def test_families_of_the_interface_convert_and_match(family, tmp_path):
    save(family, tmp_path / "source")
    if family in REFUSED:
        with pytest.raises(FlashError, match=REFUSED[family]):
            convert(tmp_path / "source", tmp_path / "pack", dtype="float32")
        return
    manifest = convert(tmp_path / "source", tmp_path / "pack", dtype="float32")
    assert manifest.experts
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="float32").eval()
    streamed = flashlm.load(tmp_path / "pack", pin=0)
    for num_tokens in (1, 40):
        ids = torch.randint(3, 96, (2, num_tokens), generator=torch.Generator().manual_seed(num_tokens))
        with torch.no_grad():
            wanted, found = reference(ids).logits, streamed(ids).logits
        assert (wanted - found).abs().max() <= MAX_ERROR * wanted.abs().max(), num_tokens
    assert streamed.flash.telemetry.records[-1].miss_experts
