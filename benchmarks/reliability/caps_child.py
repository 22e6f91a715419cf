"""One scenario in one process, which somebody else has capped: load a pack with a budget, do what users do, say how it went.

    python caps_child.py make PACK FAMILY DTYPE          write a random pack of a family, tiny layers and a large vocabulary
    python caps_child.py floors PACK CONTEXT...          the smallest budget for each context, as JSON
    python caps_child.py run PACK DRAM SCENARIO...       load once, and the outcome of each scenario as a line of JSON

A scenario either works (and its answer is checked where that is cheap) or raises `BudgetError`; the third outcome, being
killed, is what the caller sees. `SCENARIOS` says what each does, and what must work rather than be refused.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Model = Any


@dataclass(frozen=True)
class Scenario:
    """What a user does: the context to load with, and whether refusing it would be a fault."""

    run: Callable[[Model], None]
    context: int
    must_work: bool = False
    load: tuple[tuple[str, Any], ...] = ()  # further arguments of flashlm.load


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, context: int, *, must_work: bool = False, **load: Any) -> Callable[[Any], Any]:
    def note(run: Callable[[Model], None]) -> Callable[[Model], None]:
        SCENARIOS[name] = Scenario(run, context, must_work, tuple(load.items()))
        return run

    return note


def ids(num_sequences: int, num_tokens: int) -> Any:
    import torch

    return torch.randint(3, 900, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(0))


def generate(model: Model, tokens: Any, num_new: int, **options: Any) -> Any:
    import torch

    asked: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": num_new}
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), **asked | options)
    sequences = output.sequences if hasattr(output, "sequences") else output
    assert sequences.shape[1] == tokens.shape[1] + num_new, sequences.shape
    return output


def forward(model: Model, tokens: Any, **options: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(tokens, **options)


@scenario("generate", 536, must_work=True)
def _(model: Model) -> None:
    generate(model, ids(1, 512), 24)


@scenario("generate-2048", 2072, must_work=True)
def _(model: Model) -> None:
    generate(model, ids(1, 2048), 24)


@scenario("all-logits-512", 536)
def _(model: Model) -> None:
    assert forward(model, ids(1, 512)).logits.shape[1] == 512


@scenario("all-logits-16", 536, must_work=True)
def _(model: Model) -> None:
    assert forward(model, ids(1, 16)).logits.shape[1] == 16


@scenario("all-logits-batch-8", 536)
def _(model: Model) -> None:
    forward(model, ids(8, 64))


@scenario("last-logits-512", 536, must_work=True)
def _(model: Model) -> None:
    forward(model, ids(1, 512), logits_to_keep=1)


@scenario("logits-to-keep-128", 536)
def _(model: Model) -> None:
    forward(model, ids(1, 512), logits_to_keep=128)


@scenario("logits-kept-in-a-list", 536)
def _(model: Model) -> None:
    kept = [forward(model, ids(1, 16)).logits for _ in range(200)]
    assert len(kept) == 200


def check_loss(model: Model, num_sequences: int, num_tokens: int, **options: Any) -> None:
    import torch

    tokens = ids(num_sequences, num_tokens)
    loss = float(forward(model, tokens, labels=tokens, **options).loss)
    total = 0.0
    for row in tokens:  # the same by hand, a few positions at a time
        cache = None
        for start in range(0, num_tokens, 32):
            output = forward(model, row[None, start : start + 32], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            targets = row[start + 1 : start + 33]
            logits = output.logits[0, : len(targets)].float()
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    expected = total / (num_sequences * (num_tokens - 1))
    assert abs(loss - expected) < 2e-2, (loss, expected)  # 16-bit products of other shapes


@scenario("loss-512", 536, must_work=True)
def _(model: Model) -> None:
    check_loss(model, 1, 512)


@scenario("loss-batch-8", 536, must_work=True)
def _(model: Model) -> None:
    check_loss(model, 8, 64)


@scenario("loss-2048", 2072, must_work=True)
def _(model: Model) -> None:
    check_loss(model, 1, 2048)


@scenario("loss-and-logits-512", 536)
def _(model: Model) -> None:
    tokens = ids(1, 512)
    forward(model, tokens, labels=tokens).logits.argmax(-1)


@scenario("loss-strided-perplexity", 536, must_work=True)
def _(model: Model) -> None:
    tokens = ids(1, 1024)
    for start in range(0, 1024, 256):  # the script of transformers' documentation
        window = tokens[:, max(start - 256, 0) : start + 256]
        labels = window.clone()
        labels[:, :-256] = -100
        assert float(forward(model, window, labels=labels).loss) > 0


@scenario("loss-hidden-states", 536)
def _(model: Model) -> None:
    tokens = ids(1, 512)
    forward(model, tokens, labels=tokens, output_hidden_states=True)


@scenario("eager-generate-2048", 2072)
def _(model: Model) -> None:
    model.set_attn_implementation("eager")
    generate(model, ids(1, 2048), 24)


@scenario("eager-loaded-2048", 2072, attn_implementation="eager")
def _(model: Model) -> None:
    generate(model, ids(1, 2048), 24)


@scenario("eager-forward-2048", 2072)
def _(model: Model) -> None:
    model.set_attn_implementation("eager")
    forward(model, ids(1, 2048), logits_to_keep=1)


@scenario("eager-decoder-2048", 2072)
def _(model: Model) -> None:
    model.set_attn_implementation("eager")
    forward(model.get_decoder(), ids(1, 2048))


@scenario("eager-batch-8", 2072)
def _(model: Model) -> None:
    model.set_attn_implementation("eager")
    generate(model, ids(8, 250), 8)


@scenario("attentions-512", 536)
def _(model: Model) -> None:
    model.set_attn_implementation("eager")
    forward(model, ids(1, 512), output_attentions=True, logits_to_keep=1)


@scenario("attentions-generate", 536)
def _(model: Model) -> None:
    model.set_attn_implementation("eager")
    generate(model, ids(1, 400), 100, output_attentions=True, return_dict_in_generate=True)


@scenario("hidden-states-512", 536)
def _(model: Model) -> None:
    forward(model, ids(1, 512), output_hidden_states=True, logits_to_keep=1)


@scenario("hidden-states-generate", 536)
def _(model: Model) -> None:
    generate(model, ids(1, 400), 100, output_hidden_states=True, return_dict_in_generate=True)


@scenario("scores-and-logits-batch-8", 648)
def _(model: Model) -> None:
    generate(model, ids(8, 17), 64, output_scores=True, output_logits=True, return_dict_in_generate=True)


@scenario("scores-512", 536)
def _(model: Model) -> None:
    generate(model, ids(1, 16), 512, output_scores=True, return_dict_in_generate=True)


@scenario("scores-8", 536, must_work=True)
def _(model: Model) -> None:
    generate(model, ids(1, 16), 8, output_scores=True, return_dict_in_generate=True)


@scenario("scores-beams", 536)
def _(model: Model) -> None:
    generate(model, ids(1, 16), 64, num_beams=4, output_scores=True, output_logits=True, return_dict_in_generate=True)


@scenario("scores-default-length", 536, must_work=True)
def _(model: Model) -> None:
    output = model.generate(ids(8, 16), output_scores=True, output_logits=True, return_dict_in_generate=True)
    assert output.sequences.shape[1] > 16


@scenario("static-cache-400000", 64)
def _(model: Model) -> None:
    from transformers import StaticCache

    generate(model, ids(1, 16), 8, past_key_values=StaticCache(config=model.config, max_cache_len=400000))


@scenario("static-cache-400000-forward", 64)
def _(model: Model) -> None:
    from transformers import StaticCache

    forward(model, ids(1, 16), past_key_values=StaticCache(config=model.config, max_cache_len=400000))


@scenario("static-cache-by-generate", 64)
def _(model: Model) -> None:
    generate(model, ids(1, 16), 8, cache_implementation="static", max_cache_len=400000)


@scenario("static-cache-512", 536, must_work=True)
def _(model: Model) -> None:
    generate(model, ids(1, 500), 24, cache_implementation="static")


@scenario("static-cache-pieces", 536)
def _(model: Model) -> None:
    generate(model, ids(4, 64), 8, cache_implementation="static", max_cache_len=20000, prefill_chunk_size=16)


@scenario("caches-of-16-conversations", 536)
def _(model: Model) -> None:
    kept = [forward(model, ids(1, 512), logits_to_keep=1, use_cache=True).past_key_values for _ in range(16)]
    assert len(kept) == 16


@scenario("beams-4", 544, must_work=True)
def _(model: Model) -> None:
    generate(model, ids(1, 9), 128, num_beams=4)


@scenario("batch-4-beams-4", 1152)
def _(model: Model) -> None:
    generate(model, ids(4, 9), 64, num_beams=4)


@scenario("return-4", 1056, must_work=True)
def _(model: Model) -> None:
    generate(model, ids(1, 9), 256, do_sample=True, num_return_sequences=4)


@scenario("batch-8", 648, must_work=True)
def _(model: Model) -> None:
    generate(model, ids(8, 17), 64)


@scenario("batch-8-top-p", 648)
def _(model: Model) -> None:
    generate(model, ids(8, 17), 64, do_sample=True, top_p=0.9, temperature=0.7, repetition_penalty=1.2)


@scenario("batch-64-top-p", 1100)
def _(model: Model) -> None:
    generate(model, ids(64, 9), 8, do_sample=True, top_p=0.9, top_k=0, min_p=0.01, typical_p=0.9)


@scenario("padded-batch-4", 536, must_work=True)
def _(model: Model) -> None:
    tokens = ids(4, 100)
    tokens[0, :40] = 0
    model.generate(tokens, attention_mask=(tokens != 0).long(), max_new_tokens=24, pad_token_id=0)


@scenario("padded-prompt-2048", 2072)
def _(model: Model) -> None:
    tokens = ids(1, 2048)
    tokens[0, :40] = 0
    model.generate(tokens, attention_mask=(tokens != 0).long(), max_new_tokens=24, pad_token_id=0)


@scenario("no-cache", 536, must_work=True)
def _(model: Model) -> None:
    generate(model, ids(1, 500), 4, use_cache=False)


@scenario("guidance", 536)
def _(model: Model) -> None:
    generate(model, ids(1, 256), 8, guidance_scale=1.5)


def assistant(model: Model) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    text = model.config.get_text_config(decoder=True)
    config = AutoConfig.for_model("llama", vocab_size=text.vocab_size, tie_word_embeddings=True, **shape)
    return AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()


@scenario("assistant", 536)
def _(model: Model) -> None:
    generate(model, ids(1, 400), 64, assistant_model=assistant(model))


@scenario("prompt-lookup", 536)
def _(model: Model) -> None:
    generate(model, ids(1, 400), 64, prompt_lookup_num_tokens=10)


@scenario("prompt-in-pieces", 2072, must_work=True)
def _(model: Model) -> None:
    generate(model, ids(1, 2048), 8, prefill_chunk_size=256)


@scenario("continuous-batching", 2048)
def _(model: Model) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=8, eos_token_id=-1, do_sample=False)
    outputs = model.generate_batch([list(range(3, 60 + 7 * step)) for step in range(8)], generation_config=config)
    assert [len(output.generated_tokens) for output in outputs.values()] == [8] * 8


@scenario("longer-than-context", 64)
def _(model: Model) -> None:
    generate(model, ids(1, 60), 50)


@scenario("default-length-at-context", 64, must_work=True)
def _(model: Model) -> None:
    output = model.generate(ids(1, 60), eos_token_id=None, pad_token_id=0, do_sample=False)
    assert output.shape[1] == 65, output.shape


@scenario("threads", 536)
def _(model: Model) -> None:
    from concurrent.futures import ThreadPoolExecutor

    tokens = ids(1, 256)
    with ThreadPoolExecutor(6) as pool:  # each as large as fits alone
        losses = list(pool.map(lambda _: float(forward(model, tokens, labels=tokens).loss), range(12)))
    assert max(losses) - min(losses) < 1e-3, losses


@scenario("embeddings-512", 536)
def _(model: Model) -> None:
    embeds = model.get_input_embeddings()(ids(1, 512))
    model.generate(inputs_embeds=embeds, max_new_tokens=16, do_sample=False, eos_token_id=None)


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 4096},
    "llama": {},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 128},
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 8, "n_positions": 4096, "n_inner": 512},
    "gemma2": {"head_dim": 16, "sliding_window": 1024},
    "gemma3_text": {"head_dim": 16, "sliding_window": 1024},
    "granite": {"logits_scaling": 2.0},
    "gptj": {"n_embd": 128, "n_layer": 4, "n_head": 8, "n_positions": 4096, "n_inner": 512, "rotary_dim": 8},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 128},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 1024},
    "deepseek_v3": {
        **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
        **{"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_routed_experts": 8},
        **{"num_experts_per_tok": 3, "moe_intermediate_size": 128, "num_key_value_heads": 8},
    },
}
VOCAB_SIZE = 151_936  # Qwen's


def make(pack: str, family: str, dtype: str) -> None:
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from flashlm.conversion.convert import convert

    common: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": True}
    if not any(name.startswith("n_embd") for name in FAMILIES[family]):
        common |= {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 512}
        common |= {"num_key_value_heads": 4, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **common | FAMILIES[family])
    source = Path(f"{pack}-source")
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    convert(source, Path(pack), dtype=dtype)
    shutil.rmtree(source)


def run(pack: str, dram_bytes: int, names: list[str]) -> None:
    import flashlm

    context = max(SCENARIOS[name].context for name in names)
    try:
        model = flashlm.load(pack, dram=dram_bytes, context=context, **dict(SCENARIOS[names[0]].load))
    except flashlm.BudgetError as error:
        tell(names[0], "BudgetError", str(error))
        return
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    for name in names:
        try:
            SCENARIOS[name].run(model)
            tell(name, "worked", "")
        except flashlm.BudgetError as error:
            tell(name, "BudgetError", str(error))
        model.set_attn_implementation(attention)


def tell(name: str, outcome: str, message: str) -> None:
    print(
        json.dumps({"scenario": name, "outcome": outcome, "message": message, "peak_bytes": own_peak_bytes()}),
        flush=True,
    )


def floors(pack: str, contexts: list[int]) -> dict[int, int]:
    from flashlm.memory.smallest import smallest_dram_bytes

    return {context: smallest_dram_bytes(pack, context) for context in contexts}


def main(arguments: list[str]) -> None:
    verb, pack, *rest = arguments
    warnings.simplefilter("ignore")
    if verb == "make":
        make(pack, *rest)
    elif verb == "floors":
        print(json.dumps(floors(pack, [int(each) for each in rest])))
    else:
        run(pack, int(rest[0]), rest[1:])


def own_peak_bytes() -> int | None:
    """Return the highest use of this process's own group where that is a scope of version 2; None elsewhere."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            peak = Path("/sys/fs/cgroup") / line.removeprefix("0::/") / "memory.peak"
            return int(peak.read_text()) if peak.exists() else None
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
