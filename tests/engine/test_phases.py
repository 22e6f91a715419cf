"""Phases: what generate's ways and direct calls count as, and that a phase, not a batch's size, decides the arithmetic."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

import flashlm
from flashlm.engine.experts import flash_experts_forward
from flashlm.engine.ffn import FlashFFN
from flashlm.errors import ConfigError
from tests.engine.calibrations import write_calibration
from tests.engine.conftest import TinyPack
from tests.models import EXPERT_FAMILIES

TinyPacks = Callable[..., TinyPack]

PROMPT = torch.tensor([[4, 5, 6, 7, 8, 9, 4, 5, 6]])
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SIZES = (2, 16, 17, 33, 64)


@pytest.fixture
def sparse(tiny_pack: TinyPacks, tmp_path: Path) -> Callable[..., Any]:
    def make(family: str = "llama", dtype: str = "float32", **settings: Any) -> Any:
        pack = Path(shutil.copytree(tiny_pack(family, dtype).pack, tmp_path / f"{family}-{dtype}"))
        write_calibration(pack)
        return flashlm.load(pack, dram="3GiB", **{"mode": "sparse", "context": 4096, **settings})

    return make


def _phases(model: Any) -> list[tuple[str, int, int]]:
    """Phase, sequences and tokens of each pass since the last look."""
    found = [(each.phase, each.num_sequences, each.num_tokens) for each in model.flash.telemetry.records]
    model.flash.telemetry.clear()
    return found


def test_plain_generation_is_a_prompt_and_decoded_tokens(sparse: Callable[..., Any]) -> None:
    model = sparse()
    model.generate(PROMPT, **GREEDY)
    prompt, *others = list(model.flash.telemetry.records)
    assert prompt.phase == "prompt"
    assert prompt.hit_rows + prompt.miss_rows == 0  # exact, however short
    assert all(each.hit_rows + each.miss_rows > 0 for each in others)
    assert _phases(model) == [("prompt", 1, 9)] + [("decode", 1, 1)] * 11
    model.generate(PROMPT[:, :1].repeat(3, 1), **GREEDY)
    assert _phases(model) == [("prompt", 3, 1)] + [("decode", 3, 1)] * 11
    model.generate(PROMPT, num_beams=3, **GREEDY)
    assert _phases(model) == [("prompt", 3, 9)] + [("decode", 3, 1)] * 11
    model.generate(inputs_embeds=model.get_input_embeddings()(PROMPT), **GREEDY)
    assert _phases(model) == [("prompt", 1, 9)] + [("decode", 1, 1)] * 11
    model.generate(PROMPT, use_cache=False, **GREEDY)
    assert _phases(model) == [("prompt", 1, 9 + step) for step in range(12)]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_pieces_of_a_prompt_are_prompts(size: int, sparse: Callable[..., Any]) -> None:
    model = sparse()
    wanted = model.generate(PROMPT, **GREEDY)
    _phases(model)
    assert torch.equal(model.generate(PROMPT, prefill_chunk_size=size, **GREEDY), wanted)
    pieces = [("prompt", 1, min(size, 9 - start)) for start in range(0, 9, size)]
    assert _phases(model) == pieces + [("decode", 1, 1)] * 11  # also the last piece, of one token


def test_a_turn_after_a_cache_is_a_prompt(sparse: Callable[..., Any]) -> None:
    model = sparse()
    cache = DynamicCache(config=model.config)
    first = model.generate(PROMPT, past_key_values=cache, **GREEDY)
    _phases(model)
    both = torch.cat([first, PROMPT[:, :3]], dim=1)
    model.generate(both, past_key_values=cache, **GREEDY)
    assert _phases(model) == [("prompt", 1, 4)] + [("decode", 1, 1)] * 11  # the last token of the turn before as well


@pytest.mark.parametrize("mode", ["sparse", "hybrid"])
def test_drafted_tokens_are_verified(mode: str, sparse: Callable[..., Any]) -> None:
    model = sparse(mode=mode)
    assistant = flashlm.load(model.flash.pack, dram="3GiB", mode="sparse", context=4096)
    drafting = assistant.generation_config
    drafting.num_assistant_tokens, drafting.num_assistant_tokens_schedule = 4, "constant"
    drafting.assistant_confidence_threshold = 0.0
    prompt = torch.arange(3, 96)[None]  # every token is there, so that whatever follows can be looked up
    wanted = model.generate(prompt, **GREEDY)
    _phases(model)
    for drafted in ({"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}, {"assistant_model": assistant}):
        records = model.flash.telemetry.records
        assert torch.equal(model.generate(prompt, **drafted, **GREEDY), wanted), drafted
        for each in records:
            assert (each.hit_rows + each.miss_rows > 0) == (mode == "sparse" and each.phase != "prompt")
        telemetry = model.flash.telemetry
        assert telemetry.prefill().num_passes == 1
        assert telemetry.verify().num_passes + telemetry.decode().num_passes == len(records) - 1
        (phase, *_), *others = _phases(model)
        assert phase == "prompt"
        assert others
        assert all(phase == ("verify" if tokens > 1 else "decode") for phase, _, tokens in others)
        assert any(tokens > 1 for _, _, tokens in others), drafted
    (phase, *_), *others = _phases(assistant)
    assert phase == "prompt"
    assert all(phase == ("verify" if tokens > 1 else "decode") for phase, _, tokens in others)
    assert ("decode", 1, 1) in others  # while it drafts; more at once when it catches up with what was accepted


def test_direct_calls_follow_the_stated_rule(sparse: Callable[..., Any]) -> None:
    model = sparse()
    other = sparse("opt")
    with torch.no_grad():
        output = model(PROMPT, use_cache=True)
        model(PROMPT[:, :1], past_key_values=output.past_key_values)
        model(PROMPT[:, :3], past_key_values=output.past_key_values)  # in doubt, exact
        model(PROMPT[:, :1].repeat(20, 1))
        assert [phase for phase, *_ in _phases(model)] == ["prompt", "decode", "prompt", "decode"]
        with model.flash.phase("verify"):
            model(PROMPT[:, :3])
            other(PROMPT[:, :3])  # named for the first model only
            with model.flash.phase("prompt"):
                model(PROMPT[:, :1])
            model(PROMPT[:, :3])
        model(PROMPT[:, :3])
        assert [phase for phase, *_ in _phases(model)] == ["verify", "prompt", "verify", "prompt"]
        assert [phase for phase, *_ in _phases(other)] == ["prompt"]
        # Inputs that generate's machinery prepared, and something else called in between.
        cache = model(PROMPT, use_cache=True).past_key_values
        whole = torch.cat([PROMPT, PROMPT[:, :3]], dim=1)
        prepared = model.prepare_inputs_for_generation(whole, next_sequence_length=3, past_key_values=cache)
        model(whole)
        model(**prepared)
        assert _phases(model) == [("prompt", 1, 9), ("prompt", 1, 12), ("verify", 1, 3)]
    with (
        pytest.raises(ConfigError, match=r"phase='prefill' is unknown.*prompt, decode, verify"),
        model.flash.phase("prefill"),
    ):
        pass


def test_a_phase_of_an_abandoned_generator_does_not_stay(sparse: Callable[..., Any]) -> None:
    model = sparse()

    def steps() -> Any:
        with model.flash.phase("verify"):
            yield

    first, second = steps(), steps()
    next(first)
    next(second)
    first.close()  # not in the order in which they came
    second.close()
    with torch.no_grad():
        model(PROMPT)
    assert _phases(model) == [("prompt", 1, 9)]


@pytest.mark.parametrize("mode", ["sparse", "hybrid"])
def test_continuous_batching_changes_no_sequence(mode: str, sparse: Callable[..., Any]) -> None:
    """transformers packs sequences into one row, long prompts beside decoded tokens; each is what it is alone."""
    model = sparse(mode=mode)
    prompts = [PROMPT[0, : 2 + index % 5].tolist() for index in range(19)] + [list(range(3, 33))]
    wanted = [model.generate(torch.tensor([each]), **GREEDY)[0, len(each) :].tolist() for each in prompts]
    _phases(model)
    asked = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=48, max_requests_per_batch=20)
    done = model.generate_batch(prompts, generation_config=asked, continuous_batching_config=small, progress_bar=False)
    assert [done[key].generated_tokens for key in sorted(done, key=lambda key: int(key.split("_")[1]))] == wanted
    phases = _phases(model)
    assert ("decode", 20, 1) in phases
    assert any(phase == "prompt" for phase, *_ in phases)


@pytest.mark.parametrize(("family", "dtype"), [("opt", "float32"), ("llama", "bfloat16"), ("gpt2", "float16")])
@pytest.mark.parametrize("mode", ["sparse", "hybrid"])
def test_a_layer_gives_a_token_the_same_bits_in_any_batch(
    mode: str, family: str, dtype: str, sparse: Callable[..., Any]
) -> None:
    model = sparse(family, dtype, mode=mode)
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # they cut tensors in other places for every size
    try:
        for layer in (module for module in model.modules() if isinstance(module, FlashFFN)):
            tokens = torch.randn(max(SIZES), layer.layout.hidden_size, generator=torch.Generator().manual_seed(0))
            tokens = tokens.to(getattr(torch, dtype))
            alone = torch.cat([layer(token[None]) for token in tokens])
            for size in SIZES:
                assert torch.equal(layer(tokens[:size]), alone[:size]), size
                assert torch.equal(layer(tokens[:size, None]), alone[:size, None]), size
            if mode == "sparse":
                exact = layer(tokens[None, :16])[0]  # as a prompt of sixteen tokens
                assert not torch.allclose(exact, alone[:16], rtol=1e-3, atol=1e-3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", sorted(EXPERT_FAMILIES))
def test_experts_give_a_token_the_same_bits_in_any_batch(family: str, tiny_pack: TinyPacks) -> None:
    model = flashlm.load(tiny_pack(family).pack, pin=0)
    module = next(each for each in model.modules() if hasattr(each, "flash_experts"))
    bound = module.flash_experts
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(max(SIZES), bound.layout.hidden_size, generator=generator)
    num_experts, num_active = bound.layout.num_blocks, 2
    scores = torch.rand(max(SIZES), num_experts, generator=generator)
    scores[:, 0] += 0.5  # one expert gets nearly all of them
    weights, index = scores.topk(num_active)
    alone = torch.cat(
        [
            flash_experts_forward(module, tokens[at, None], index[at, None], weights[at, None])
            for at in range(len(tokens))
        ]
    )
    assert (index == 0).sum() > 33
    for size in SIZES:
        assert torch.equal(flash_experts_forward(module, tokens[:size], index[:size], weights[:size]), alone[:size]), (
            size
        )


@pytest.mark.parametrize(
    ("family", "mode"), [("opt", "sparse"), ("llama", "sparse"), ("llama", "hybrid"), ("olmoe", "experts")]
)
def test_a_batch_of_sequences_is_the_sequences(
    family: str, mode: str, sparse: Callable[..., Any], tiny_pack: TinyPacks
) -> None:
    model = flashlm.load(tiny_pack(family).pack, context=4096) if mode == "experts" else sparse(family, mode=mode)
    prompts = torch.randint(3, 96, (33, 6), generator=torch.Generator().manual_seed(2))
    asked = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    alone = [model.generate(prompt[None], **asked) for prompt in prompts]
    logits = torch.stack([torch.cat(each.logits) for each in alone], dim=1)
    # The rest of the model is torch's, whose sums of a batch are ordered otherwise: two layers, sums of this many products.
    size = 2 * (model.config.hidden_size + 88 + prompts.shape[1] + 12)
    bound = size * torch.finfo(torch.float32).eps * logits.abs().max()
    for count in (17, 33):
        together = model.generate(prompts[:count], **asked)
        assert torch.equal(together.sequences, torch.cat([each.sequences for each in alone[:count]]))
        assert (torch.stack(together.logits) - logits[:, :count]).abs().max() <= bound
