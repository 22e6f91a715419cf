"""What people do with a transformers model, done with a pack: pipelines, padded batches, assistants, chat templates."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import flashlm
from tests.engine.conftest import TinyPack

GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILY_NAMES = ("opt", "llama", "gemma3_text", "gpt2")


def _streamed(tiny: TinyPack) -> torch.nn.Module:
    return flashlm.load(tiny.pack, dram="3GiB", context=160, pin=0)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_left_padded_batches(family: str, tiny_pack: Callable[..., TinyPack]) -> None:
    tiny = tiny_pack(family, "float32")
    tokens = torch.tensor([[0, 0, 0, 7, 8, 9], [4, 5, 6, 7, 8, 9], [0, 3, 9, 4, 8, 5]])
    asked = {"input_ids": tokens, "attention_mask": (tokens != 0).long(), **GREEDY}
    assert torch.equal(_streamed(tiny).generate(**asked), tiny.reference("float32").generate(**asked))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["opt", "llama", "mixtral"])
def test_another_default_dtype_changes_nothing(
    family: str,
    dtype: str,
    default: torch.dtype,
    tiny_pack: Callable[..., TinyPack],
    default_dtype: Callable[[torch.dtype], AbstractContextManager[None]],
) -> None:
    tiny, tokens = tiny_pack(family, dtype), torch.tensor([[4, 5, 6, 7]])
    streamed = _streamed(tiny)
    expected = streamed.generate(tokens, **GREEDY)
    with default_dtype(default):
        assert torch.equal(streamed.generate(tokens, **GREEDY), expected)
        assert torch.equal(_streamed(tiny).generate(tokens, **GREEDY), expected)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_assisted_generation_both_ways(family: str, tiny_pack: Callable[..., TinyPack]) -> None:
    tiny = tiny_pack(family, "float32")
    plain, streamed = tiny.reference("float32"), _streamed(tiny)
    tokens = torch.tensor([[4, 5, 6, 7]])
    wanted = plain.generate(tokens, **GREEDY)
    assert torch.equal(streamed.generate(tokens, assistant_model=plain, **GREEDY), wanted)
    assert torch.equal(plain.generate(tokens, assistant_model=streamed, **GREEDY), wanted)


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{index}": index for index in range(4, 96)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    fast.chat_template = "{% for message in messages %}w4 {{ message['content'] }} w5 {% endfor %}"
    fast.save_pretrained(folder)
    return fast


def test_pipeline_and_chat_template(tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> None:
    tiny = tiny_pack("llama", "float32")
    tokenizer = _tokenizer(tmp_path)
    asked = {"max_new_tokens": 8, "do_sample": False}
    prompts = ["w9 w10 w11", "w12"]
    results = []
    for model in (_streamed(tiny), tiny.reference("float32")):
        run = pipeline("text-generation", model=model, tokenizer=tokenizer)
        chat = [[{"role": "user", "content": prompt}] for prompt in prompts]
        results.append((run(prompts, batch_size=2, **asked), run(chat, **asked)))
    assert results[0] == results[1]
    assert results[0][1][0][0]["generated_text"][-1]["role"] == "assistant"


def test_from_pretrained_alone(tiny_pack: Callable[..., TinyPack], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_pack("opt", "float32")
    monkeypatch.setenv("FLASHLM_DRAM", "3GiB")
    monkeypatch.setenv("FLASHLM_MODE", "naive")
    model = AutoModelForCausalLM.from_pretrained(tiny.pack)
    assert model.flash.mode == "naive"
    tokens = torch.tensor([[4, 5, 6, 7]])
    assert torch.equal(model.generate(tokens, **GREEDY), tiny.reference("float32").generate(tokens, **GREEDY))
