"""What passes allocate is counted first, never less than torch allocates, and refused by name where it is too much."""

from __future__ import annotations

import copy
import functools
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache, pipeline

import flashlm
from flashlm.conversion.convert import convert
from flashlm.engine.pass_guard import ROOM_LASTS_S, PassGuard
from flashlm.engine.withheld import WithheldLogits
from flashlm.errors import BudgetError
from flashlm.memory.limits import process_bytes
from flashlm.memory.pass_memory import pass_items
from flashlm.memory.smallest import smallest_dram_bytes
from tests.engine.conftest import TinyPack
from tests.engine.test_transformers_ways import _tokenizer
from tests.models import EXPERT_FAMILIES, FAMILIES, save_checkpoint

MAX_LOSS_ERROR = 1e-5
WIDE_VOCAB = 100_000  # its logits are what does not fit
LOGITS_FAMILIES = {
    "llama": {},
    "opt": {},
    "gpt2": {},
    "granite": {"logits_scaling": 2.0},
    "gemma2": {},  # caps its logits and its attention, which it writes out
    "gptj": {},
    "gemma3_text": {},  # sliding windows
    "deepseek_v3": {"v_head_dim": 16},  # keys and values of different widths: sdpa writes scores out
    "gpt_oss": {},
    "qwen2_moe": {},
}


def _ids(num_sequences: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(3, 96, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(1))


def _plain_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The family's own forward, beneath the guard's."""
    return functools.partial(type(model).forward.__wrapped__, model)


def _peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most that torch's allocator gave out at once during `run`, scratch inside its operators included."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _counted_bytes(model: PreTrainedModel, call: dict[str, Any]) -> int:
    guard: PassGuard = model._flash_guard
    shape = guard.shape_of(call, makes_logits=True)
    assert shape is not None
    return sum(pass_items(guard.facts, shape).values())


@pytest.fixture(scope="module")
def wide_packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], TinyPack]:
    made: dict[tuple[str, str], TinyPack] = {}

    def make(family: str, dtype: str) -> TinyPack:
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"wide-{family}-{dtype}")
            positions = "n_positions" if family in ("gpt2", "gptj") else "max_position_embeddings"
            save_checkpoint(folder / "source", family, vocab_size=4096, **{positions: 512}, **LOGITS_FAMILIES[family])
            convert(folder / "source", folder / "pack", dtype=dtype)
            made[family, dtype] = TinyPack(folder / "source", folder / "pack")
        return made[family, dtype]

    return make


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("llama", "float16"), *((family, "bfloat16") for family in LOGITS_FAMILIES)],
)
def test_no_pass_allocates_more_than_is_counted(family: str, dtype: str, wide_packs: Callable[..., TinyPack]) -> None:
    model = flashlm.load(wide_packs(family, dtype).pack, dram="3GiB", context=2048)
    tokens = _ids(2, 200)
    calls: dict[str, dict[str, Any]] = {
        "all logits": {},
        "one logit": {"logits_to_keep": 1},
        "padded": {"attention_mask": (tokens > 9).long(), "logits_to_keep": 1},
        "loss": {"labels": tokens},
        "states": {"output_hidden_states": True, "logits_to_keep": 1},
        "static": {"logits_to_keep": 1, "past_key_values": StaticCache(config=model.config, max_cache_len=600)},
    }
    for name, options in calls.items():
        call = {"input_ids": tokens, **options}
        counted = _counted_bytes(model, call)
        peak = _peak_bytes(lambda call=call: model(**call))  # type: ignore[misc]
        assert peak <= counted, (name, peak, counted)
    model.set_attn_implementation("eager")
    for options in ({}, {"output_attentions": True}):
        call = {"input_ids": tokens, "logits_to_keep": 1, **options}
        counted = _counted_bytes(model, call)
        peak = _peak_bytes(lambda call=call: model(**call))  # type: ignore[misc]
        assert peak <= counted, ("eager", options, peak, counted)


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERT_FAMILIES])
def test_the_loss_in_pieces_equals_transformers(family: str, tiny_pack: Callable[..., TinyPack]) -> None:
    tiny = tiny_pack(family, "float32")
    model, reference = flashlm.load(tiny.pack, dram="3GiB", context=160), tiny.reference("float32")
    tokens = _ids(3, 30)
    labels = tokens.masked_fill(tokens % 5 == 0, -100)
    extra = {"output_router_logits": True} if family in ("mixtral", "qwen2_moe") else {}
    for options in ({}, {"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(40)}, {"return_dict": False}):
        call = {"input_ids": tokens, "labels": labels, **extra, **options}
        with torch.no_grad():
            expected = reference(**call)[0]
            plain = _plain_forward(model)
            guard: PassGuard = model._flash_guard
            with guard.inside():
                output = guard.chunked.run(plain, call, 7, available_bytes=0)
        assert float(output[0]) == pytest.approx(float(expected), rel=MAX_LOSS_ERROR)
        withheld = [
            value
            for value in (output if isinstance(output, tuple) else output.values())
            if type(value) is WithheldLogits
        ]
        assert [value.shape for value in withheld] == [(3, 30, model.config.get_text_config(decoder=True).vocab_size)]


def test_all_labels_ignored_is_nan_as_in_transformers(tiny_pack: Callable[..., TinyPack]) -> None:
    model = flashlm.load(tiny_pack("llama", "float32").pack, dram="3GiB", context=160)
    tokens = _ids(1, 20)
    guard: PassGuard = model._flash_guard
    call = {"input_ids": tokens, "labels": torch.full_like(tokens, -100)}
    with guard.inside():
        output = guard.chunked.run(_plain_forward(model), call, 7, available_bytes=0)
    assert output.loss.isnan()


@pytest.fixture(scope="module")
def narrow_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreTrainedModel]:
    """A model with a vocabulary so large that no more than a few positions' logits fit its smallest budget."""
    folder = tmp_path_factory.mktemp("narrow")
    save_checkpoint(
        folder / "source", "llama", vocab_size=WIDE_VOCAB, max_position_embeddings=4096, tie_word_embeddings=True
    )
    convert(folder / "source", folder / "pack", dtype="float32")

    def load(context: int = 600, **options: Any) -> PreTrainedModel:
        dram = smallest_dram_bytes(folder / "pack", context)
        return flashlm.load(folder / "pack", dram=dram, context=context, **options)

    load.tiny = TinyPack(folder / "source", folder / "pack")  # type: ignore[attr-defined]
    return load


def test_labels_work_where_the_logits_do_not_fit(narrow_model: Callable[..., PreTrainedModel]) -> None:
    model = narrow_model()
    reference = narrow_model.tiny.reference("float32")  # type: ignore[attr-defined]
    tokens = _ids(1, 600)
    labels = tokens.masked_fill(tokens % 7 == 0, -100)
    with torch.no_grad():
        output = model(tokens, labels=labels, output_hidden_states=True)
        expected = reference(tokens, labels=labels, output_hidden_states=True)
    assert float(output.loss) == pytest.approx(float(expected.loss), rel=MAX_LOSS_ERROR)
    assert torch.allclose(output.hidden_states[-1], expected.hidden_states[-1], atol=1e-4)
    assert output.past_key_values.get_seq_length() == 600
    assert len(model.flash.telemetry.records) == 1  # the weights were read once
    assert output.logits.shape == (1, 600, WIDE_VOCAB)
    assert "not computed" in repr(output)
    for use in (lambda: output.logits.argmax(-1), lambda: output.logits[:, -1], lambda: copy.deepcopy(output.logits)):
        with pytest.raises(BudgetError, match=r"\.loss.*logits_to_keep=N"):
            use()
    with pytest.raises(BudgetError, match=r"logits of 600 positions.*logits_to_keep=N.*labels="):
        model(tokens)
    fewer = tokens[:, :8]
    with torch.no_grad():  # where they fit, they are there
        assert model(fewer, labels=fewer).logits.argmax(-1).shape == (1, 8)


@pytest.mark.parametrize("place", ["lm_head", "model.layers.0", "model.norm"])
def test_calls_within_a_loss_in_pieces_are_their_own(place: str, tiny_pack: Callable[..., TinyPack]) -> None:
    """A hook that runs the model, or its decoder, inside the pass gets what it asked for, not what the pass is about."""
    model = flashlm.load(tiny_pack("llama", "float32").pack, dram="3GiB", context=160)
    tokens, others = _ids(1, 30), [_ids(1, 30).flip(1), _ids(1, 12)]
    with torch.no_grad():
        wanted = [(model(each).logits, model.model(each).last_hidden_state) for each in others]
        wanted_loss = float(model(tokens, labels=tokens).loss)
    found, guard = [], model._flash_guard

    def look(*_: Any) -> None:
        if len(found) < 3 and not is_inside:
            is_inside.append(True)
            found.append([(model(each).logits, model.model(each).last_hidden_state) for each in others])
            is_inside.clear()

    is_inside: list[bool] = []
    hook = model.get_submodule(place).register_forward_hook(look)
    with torch.no_grad(), guard.inside():
        call = {"input_ids": tokens, "labels": tokens}
        output = guard.chunked.run(_plain_forward(model), call, 7, available_bytes=0)
    hook.remove()
    assert float(output.loss) == pytest.approx(wanted_loss, rel=MAX_LOSS_ERROR)
    assert found
    for results in found:
        for (logits, hidden), (right_logits, right_hidden) in zip(results, wanted, strict=True):
            assert torch.equal(logits, right_logits)
            assert torch.allclose(hidden, right_hidden, atol=1e-5)  # as part of the pass: rows or products as there


def test_the_output_layer_by_itself_is_counted(narrow_model: Callable[..., PreTrainedModel]) -> None:
    model = narrow_model()
    with torch.no_grad():
        hidden = model.get_decoder()(_ids(1, 600)).last_hidden_state
        assert model.get_output_embeddings()(hidden[:, :2]).shape == (1, 2, WIDE_VOCAB)
        with pytest.raises(BudgetError, match="the output layer on 600 positions"):
            model.get_output_embeddings()(hidden)
        with pytest.raises(BudgetError, match="logits of 599 positions"):
            model(_ids(1, 600), logits_to_keep=-1)


def test_caches_of_several_threads_are_counted_side_by_side() -> None:
    from flashlm.engine.cache_room import LiveCaches

    caches, failures = LiveCaches(), []
    kept: list[Any] = []

    def note() -> None:
        try:
            for _ in range(3000):
                kept.append(DynamicCache())
                caches.note(kept[-1], 1)
        except RuntimeError as error:
            failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=note) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            caches.others_bytes(None)
    finally:
        sys.setswitchinterval(before)
    assert not failures
    assert caches.others_bytes(kept[0]) == len(kept) - 1


def test_two_threads_with_labels_do_not_mix(narrow_model: Callable[..., PreTrainedModel]) -> None:
    model = narrow_model(context=1300)
    texts = [_ids(1, 600), _ids(1, 600).flip(1)]
    alone = [float(model(tokens, labels=tokens).loss) for tokens in texts]
    found: dict[int, list[float]] = {0: [], 1: []}

    def run(number: int) -> None:
        found[number] += [float(model(texts[number], labels=texts[number]).loss) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert not model._flash_guard._in_flight
    assert found == {0: [alone[0]] * 3, 1: [alone[1]] * 3}


REFUSED: dict[str, Callable[[PreTrainedModel], Any]] = {
    "all logits": lambda model: model(_ids(1, 600)),
    "all logits, forward called": lambda model: model.forward(_ids(1, 600)),
    "all logits of a batch": lambda model: model(_ids(30, 20)),
    "many kept logits": lambda model: model(_ids(1, 600), logits_to_keep=500),
    "chosen logits": lambda model: model(_ids(1, 600), logits_to_keep=torch.arange(500)),
    "a huge fixed cache": lambda model: model(
        _ids(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=4_000_000)
    ),
    "a huge fixed cache in generate": lambda model: model.generate(
        _ids(1, 4), max_new_tokens=4, past_key_values=StaticCache(config=model.config, max_cache_len=4_000_000)
    ),
    "a huge fixed cache made by generate": lambda model: model.generate(
        _ids(1, 4), max_new_tokens=4, cache_implementation="static", max_cache_len=4_000_000
    ),
    "a huge fixed cache, decoder alone": lambda model: model.model(
        _ids(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=4_000_000)
    ),
    "kept scores": lambda model: model.generate(
        _ids(1, 4), max_new_tokens=590, output_scores=True, return_dict_in_generate=True
    ),
    "kept logits by config": lambda model: model.generate(
        _ids(8, 4),
        generation_config=GenerationConfig(max_new_tokens=70, output_logits=True, return_dict_in_generate=True),
    ),
    "many sampled rows": lambda model: model.generate(_ids(100, 2), max_new_tokens=4, do_sample=True, top_p=0.9),
    "requests of continuous batching": lambda model: model.init_continuous_batching(
        continuous_batching_config=_batching(max_requests_per_batch=1024)
    ),
    "blocks of continuous batching": lambda model: model.init_continuous_batching(
        continuous_batching_config=_batching(num_blocks=100)
    ),
}


def _batching(**options: int) -> Any:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return ContinuousBatchingConfig(**options)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    name: str, narrow_model: Callable[..., PreTrainedModel]
) -> None:
    model = narrow_model()
    with torch.no_grad(), pytest.raises(BudgetError) as refused:
        REFUSED[name](model)
    assert refused.value.needed_bytes > refused.value.available_bytes > 0
    assert not model.flash.telemetry.records
    assert model.generate(_ids(1, 8), max_new_tokens=4).shape == (1, 12)  # and the model goes on


def test_eager_attention_is_refused_as_a_whole_and_generated_in_pieces(
    narrow_model: Callable[..., PreTrainedModel],
) -> None:
    model = narrow_model(context=3100)
    tokens = _ids(1, 3000)
    expected = model.generate(tokens, max_new_tokens=3, do_sample=False)
    model.set_attn_implementation("eager")
    with torch.no_grad(), pytest.raises(BudgetError, match=r"attention scores.*prefill_chunk_size.*sdpa"):
        model(tokens, logits_to_keep=1)
    with torch.no_grad(), pytest.raises(BudgetError, match="attention scores"):
        model.model(tokens)
    before = len(model.flash.telemetry.records)
    assert torch.equal(model.generate(tokens, max_new_tokens=3, do_sample=False), expected)
    assert len(model.flash.telemetry.records) > before + 3


def test_caches_that_are_kept_count(narrow_model: Callable[..., PreTrainedModel]) -> None:
    model = narrow_model()
    kept: list[StaticCache] = []

    @torch.no_grad()
    def converse() -> None:
        for _ in range(40):
            kept.append(StaticCache(config=model.config, max_cache_len=30_000))
            model(_ids(1, 4), logits_to_keep=1, past_key_values=kept[-1])

    with pytest.raises(BudgetError, match="drop the caches"):
        converse()
    assert len(kept) > 1
    kept.clear()
    assert model(_ids(1, 600), logits_to_keep=1).logits.shape[1] == 1


@pytest.fixture
def short_model(tiny_pack: Callable[..., TinyPack]) -> PreTrainedModel:
    return flashlm.load(tiny_pack("llama", "float32").pack, dram="3GiB", context=64)


WISHES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "new tokens": (1, 60, {"max_new_tokens": 6}),
    "length": (1, 60, {"max_length": 66}),
    "config": (1, 60, {"generation_config": GenerationConfig(max_new_tokens=6)}),
    "batch": (4, 10, {"max_new_tokens": 8}),
    "beams": (1, 10, {"max_new_tokens": 8, "num_beams": 4}),
    "returned": (2, 10, {"max_new_tokens": 8, "num_return_sequences": 2, "do_sample": True}),
    "no cache": (1, 60, {"max_new_tokens": 6, "use_cache": False}),
    "static": (1, 60, {"max_new_tokens": 6, "cache_implementation": "static"}),
    "prompt alone": (1, 65, {"max_new_tokens": 1}),
    "lookup": (1, 60, {"max_new_tokens": 6, "prompt_lookup_num_tokens": 3}),
}


@pytest.mark.parametrize("name", WISHES)
def test_a_wish_beyond_context_is_refused_before_the_first_token(name: str, short_model: PreTrainedModel) -> None:
    num_sequences, num_tokens, options = WISHES[name]
    with pytest.raises(BudgetError, match=r"context=64, which counts the tokens of all sequences together"):
        short_model.generate(_ids(num_sequences, num_tokens), eos_token_id=None, pad_token_id=0, **options)
    assert not short_model.flash.telemetry.records


def test_a_wish_that_just_fits_is_granted(short_model: PreTrainedModel) -> None:
    greedy = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    assert short_model.generate(_ids(1, 60), max_new_tokens=5, **greedy).shape == (1, 65)
    assert short_model.generate(_ids(4, 10), max_new_tokens=7, **greedy).shape == (4, 17)
    assert short_model.generate(_ids(2, 10), max_new_tokens=7, num_beams=2, **greedy).shape == (2, 17)
    cache = DynamicCache()
    first = short_model.generate(_ids(1, 30), max_new_tokens=5, past_key_values=cache, **greedy)
    assert short_model.generate(first, max_new_tokens=30, past_key_values=cache, **greedy).shape == (1, 65)
    embeds = short_model.get_input_embeddings()(_ids(1, 60))
    assert short_model.generate(inputs_embeds=embeds, max_new_tokens=5, **greedy).shape[1] == 5


@pytest.mark.parametrize("num_sequences", [1, 2])
def test_a_default_length_stops_at_context_with_one_warning(
    num_sequences: int, short_model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = _ids(num_sequences, 60 // num_sequences)
    with caplog.at_level(logging.WARNING, logger="flashlm"), pytest.warns(UserWarning, match="model-agnostic default"):
        output = short_model.generate(tokens, eos_token_id=None, pad_token_id=0, do_sample=False)
    assert output.shape == (num_sequences, 64 // num_sequences + 1)
    assert [record.message for record in caplog.records if "context=64" in record.message] == [
        caplog.records[-1].message
    ]
    assert "counts the tokens of all sequences" in caplog.text
    short_model.generation_config.max_new_tokens = 500  # as a release's generation_config.json may say
    assert torch.equal(short_model.generate(tokens, eos_token_id=None, pad_token_id=0, do_sample=False), output)


def test_a_pipelines_own_default_stops_at_context(short_model: PreTrainedModel, tmp_path: Any) -> None:
    short_model.generation_config.eos_token_id = None
    run = pipeline("text-generation", model=short_model, tokenizer=_tokenizer(tmp_path))
    prompt = "w9 " * 30
    words = run(prompt, do_sample=False)[0]["generated_text"].split()
    assert 30 < len(words) <= 65
    with pytest.raises(BudgetError, match="context=64"):
        run(prompt, do_sample=False, max_new_tokens=100)


def test_continuous_batching_stays_within_context(short_model: PreTrainedModel) -> None:
    manager = short_model.init_continuous_batching()
    config = manager.continuous_batching_config
    assert config.num_blocks * config.page_size <= 64
    assert config.max_batch_tokens <= 64


_looks: list[str] = []


def _note_looks(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and args[0] == "/proc/meminfo":
        _looks.append(event)


@pytest.mark.parametrize(("spare_bytes", "is_ample"), [(5 << 30, True), (400 << 20, False)])
def test_the_kernel_is_asked_for_room_before_every_pass_only_where_it_may_be_short(
    spare_bytes: int, is_ample: bool, tiny_pack: Callable[..., TinyPack]
) -> None:
    dram = process_bytes() + spare_bytes  # other tests have made this process larger or smaller
    model = flashlm.load(tiny_pack("llama").pack, dram=dram, context=64)
    own = bytearray(b"x") * (300 << 20)  # more than loading leaves for what nobody planned
    ids = _ids(1, 1)
    sys.addaudithook(_note_looks)  # stays for good: it only notes
    _looks.clear()
    started_s = time.monotonic()
    for _ in range(30):
        model(ids)
    most = 2 + (time.monotonic() - started_s) / ROOM_LASTS_S
    assert (1 <= len(_looks) <= most) if is_ample else len(_looks) >= 30
    del own  # held until here


@pytest.mark.parametrize(("kept", "counted"), [(0, 10), (3, 3), (-1, 9), (-4, 6), (-20, 0), (25, 10)])
def test_kept_positions_are_counted_as_models_slice_them(kept: int, counted: int) -> None:
    from flashlm.engine.pass_guard import _num_kept

    assert _num_kept({"logits_to_keep": kept}, 10) == counted
    assert len(range(10)[slice(-kept, None) if kept else slice(None)]) == counted
