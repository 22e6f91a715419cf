"""Small random models with a tokenizer, and packs of them: what the reliability scripts damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from flashlm.conversion.convert import convert

VOCAB = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 88,
    "max_position_embeddings": 160,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 88, "word_embed_proj_dim": 48},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
    },
}


def make_source(folder: Path, family: str) -> Path:
    """Write a seeded random model and a tokenizer of the words w3, w4, ... into `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON, **FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    return folder


def make_text(path: Path, num_tokens: int = 1200) -> Path:
    """Write words with some order."""
    steps = torch.randint(1, 7, (num_tokens,), generator=torch.Generator().manual_seed(0)).cumsum(0) % (VOCAB - 3) + 3
    path.write_text(" ".join(f"w{int(token)}" for token in steps))
    return path


def make_pack(folder: Path, family: str, *, is_calibrated: bool = False) -> Path:
    """Convert a small model of `family` into `folder`/pack; calibrate it where that is asked."""
    source = make_source(folder / "source", family)
    block_rows = None if family == "qwen3_moe" else 16
    convert(source, folder / "pack", dtype="fp32", block_rows=block_rows)
    if is_calibrated and family == "qwen3_moe":
        from flashlm.calibration.experts import calibrate_experts

        calibrate_experts(folder / "pack", make_text(folder / "text.txt"))
    elif is_calibrated:
        from flashlm.calibration.dense import calibrate

        calibrate(folder / "pack", make_text(folder / "text.txt"), rank=8)
    return folder / "pack"
