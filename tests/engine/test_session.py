"""A session: steps as they come, what of its cache a later prompt uses, ends of every kind, and two at once."""

from __future__ import annotations

import gc
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

import flashlm
from flashlm.engine.forward_pass import running_pass
from flashlm.engine.session import Session, Step
from flashlm.errors import BudgetError, ConfigError
from tests.engine.calibrations import write_calibration
from tests.engine.conftest import TinyPack, save_tokenizer

TinyPacks = Callable[..., TinyPack]
PROMPT = [3, 4, 5, 6]
GREEDY = {"do_sample": False}


def loaded(pack: Path, **settings: Any) -> PreTrainedModel:
    return flashlm.load(pack, **({"dram": "3GiB", "context": 160, "pin": 0} | settings))


@pytest.fixture(params=["llama", "qwen3_moe", "gpt2"])
def model(request: pytest.FixtureRequest, tiny_pack: TinyPacks) -> PreTrainedModel:
    return loaded(tiny_pack(request.param).pack)


@pytest.fixture
def llama(tiny_pack: TinyPacks) -> PreTrainedModel:
    return loaded(tiny_pack("llama").pack)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def greedy(model: PreTrainedModel, ids: list[int], num_tokens: int) -> list[int]:
    """What transformers' own `generate` makes of a prompt."""
    given = torch.tensor([ids])
    output = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=num_tokens, **GREEDY)
    return output[0, len(ids) :].tolist()


def tokens(steps: Iterator[Step]) -> list[int]:
    return [step.token for step in steps]


def prompt_tokens(session: Session) -> int:
    """Tokens that the latest prompt pass took."""
    return [record for record in session.telemetry.records if record.phase == "prompt"][-1].num_tokens


def test_steps_are_what_generate_gives(model: PreTrainedModel) -> None:
    expected = greedy(model, PROMPT, 8)
    session = Session(model)
    before = model.flash.passes.totals.bytes_read
    steps = list(session.stream(PROMPT, max_new_tokens=8, logprobs=True, **GREEDY))
    assert [step.token for step in steps] == expected
    assert [step.position for step in steps] == list(range(4, 12))
    assert [step.phase for step in steps] == ["prompt", *["decode"] * 7]
    assert [step.finish for step in steps] == [*[None] * 7, "length"]
    assert sum(step.counters.bytes_read for step in steps) == model.flash.passes.totals.bytes_read - before
    assert all(step.wall_s > 0 for step in steps)
    logits = model(torch.tensor([PROMPT])).logits[0, -1].float()
    assert steps[0].logprob == pytest.approx(float(logits.log_softmax(-1)[expected[0]]), abs=1e-5)
    with pytest.raises(AttributeError):
        steps[0].token = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"use_cache": False, "do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 1.5, "top_p": 0.9},
        {"guidance_scale": 1.5, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False},
    ],
    ids=str,
)
def test_the_options_of_generate_count(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    given = torch.tensor([PROMPT])
    torch.manual_seed(0)
    expected = llama.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=8, **options)[0, 4:].tolist()
    session = Session(llama)
    for _ in range(2):  # whatever cache it leaves, the next one is right
        torch.manual_seed(0)
        assert tokens(session.stream(PROMPT, max_new_tokens=8, **options)) == expected
    assert tokens(session.stream(PROMPT, max_new_tokens=3, **GREEDY)) == greedy(llama, PROMPT, 3)


def test_texts_of_the_steps_are_the_text(llama: PreTrainedModel, tokenizer: Any) -> None:
    session = Session(llama, tokenizer)
    steps = list(session.stream("w3 w4 w5", max_new_tokens=6, **GREEDY))
    assert "".join(step.text for step in steps) == tokenizer.decode([step.token for step in steps])
    stop = tokenizer.decode([steps[2].token])
    first = [step.token for step in steps].index(steps[2].token) + 1
    stopped = list(session.stream("w3 w4 w5", max_new_tokens=6, stop_strings=(stop,), **GREEDY))
    assert (len(stopped), stopped[-1].finish) == (first, "stop")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    chat = session.stream([{"role": "user", "content": "w3 w4 w5"}], max_new_tokens=6, **GREEDY)
    assert tokens(chat) == [step.token for step in steps]


def test_an_end_token_ends_the_text(llama: PreTrainedModel) -> None:
    expected = greedy(llama, PROMPT, 6)
    steps = list(Session(llama).stream(PROMPT, max_new_tokens=6, eos_token_id=expected[1], pad_token_id=0, **GREEDY))
    assert [step.token for step in steps] == expected[: expected.index(expected[1]) + 1]
    assert steps[-1].finish == "stop"


def test_a_second_prompt_goes_on_from_the_cache(model: PreTrainedModel) -> None:
    session = Session(model)
    first = PROMPT + tokens(session.stream(PROMPT, max_new_tokens=6, **GREEDY))
    assert session.num_cached_tokens == len(first) - 1  # the last token has not been through the model
    second = [*first, 7, 8]
    assert tokens(session.stream(second, max_new_tokens=6, **GREEDY)) == greedy(model, second, 6)
    assert prompt_tokens(session) == 3
    other = [*first[:7], 9, 10]  # as far as they agree
    assert tokens(session.stream(other, max_new_tokens=6, **GREEDY)) == greedy(model, other, 6)
    assert prompt_tokens(session) == 2
    assert tokens(session.stream(PROMPT, max_new_tokens=6, **GREEDY)) == first[4:]  # a part of what is known
    assert prompt_tokens(session) == 1
    assert tokens(session.stream([11, 12], max_new_tokens=6, **GREEDY)) == greedy(model, [11, 12], 6)
    assert prompt_tokens(session) == 2
    session.reset()
    assert session.num_cached_tokens == 0


def test_the_cache_gives_the_bits_that_the_model_gives_with_one(llama: PreTrainedModel) -> None:
    session = Session(llama)
    first = PROMPT + tokens(session.stream(PROMPT, max_new_tokens=6, **GREEDY))
    (step,) = session.stream([*first, 7], max_new_tokens=1, logprobs=True, **GREEDY)
    output = llama(torch.tensor([PROMPT]))
    for token in first[4:-1]:
        with llama.flash.phase("decode"):
            output = llama(torch.tensor([[token]]), past_key_values=output.past_key_values)
    with llama.flash.phase("prompt"):
        output = llama(torch.tensor([[first[-1], 7]]), past_key_values=output.past_key_values)
    assert step.logprob == float(output.logits[0, -1].float().log_softmax(-1)[step.token])


def test_what_a_window_has_left_behind_is_computed_again(tiny_pack: TinyPacks) -> None:
    """A cache with a sliding window can't be cut once tokens have left it."""
    model = loaded(tiny_pack("gemma2").pack)
    session = Session(model)
    long = [3 + index % 90 for index in range(60)]
    first = long + tokens(session.stream(long, max_new_tokens=4, **GREEDY))
    assert tokens(session.stream([*first, 5], max_new_tokens=4, **GREEDY)) == greedy(model, [*first, 5], 4)
    assert tokens(session.stream([*long[:50], 5], max_new_tokens=4, **GREEDY)) == greedy(model, [*long[:50], 5], 4)


def test_mode_sparse_keeps_of_its_cache_what_was_exact(tiny_pack: TinyPacks, tmp_path: Path) -> None:
    shutil.copytree(tiny_pack("opt").pack, tmp_path / "pack")
    write_calibration(tmp_path / "pack")
    model = loaded(tmp_path / "pack", mode="sparse", pin=None)
    session = Session(model)
    first = PROMPT + tokens(session.stream(PROMPT, max_new_tokens=6, **GREEDY))
    second = [*first, 7, 8]
    assert tokens(session.stream(second, max_new_tokens=4, **GREEDY)) == greedy(model, second, 4)
    assert prompt_tokens(session) == len(second) - len(PROMPT)


def test_closing_between_two_steps_keeps_what_is_there(model: PreTrainedModel) -> None:
    expected = greedy(model, PROMPT, 12)
    session = Session(model)
    stream = session.stream(PROMPT, max_new_tokens=100, **GREEDY)
    got = [next(stream).token for _ in range(4)]
    stream.close()  # type: ignore[attr-defined]
    assert got == expected[:4]
    assert session.num_cached_tokens == len(PROMPT) + 3
    assert len(session.telemetry.records) == 4  # no token was computed that nobody asked for
    assert tokens(session.stream(PROMPT + got, max_new_tokens=4, **GREEDY)) == expected[4:8]
    assert prompt_tokens(session) == 1
    assert [thread for thread in threading.enumerate() if thread.name == "flashlm session"] == []


def test_a_stream_that_is_let_go_of_ends(llama: PreTrainedModel) -> None:
    session = Session(llama)
    stream = session.stream(PROMPT, max_new_tokens=100, **GREEDY)
    next(stream)
    with pytest.raises(ConfigError, match="another stream of this session is open"):
        next(session.stream(PROMPT))
    del stream
    gc.collect()
    assert tokens(session.stream(PROMPT, max_new_tokens=4, **GREEDY)) == greedy(llama, PROMPT, 4)


def test_ctrl_c_breaks_a_running_pass_off_at_the_next_layer(model: PreTrainedModel) -> None:
    """It comes to the thread that waits for a step, while the pass runs in another."""
    expected = greedy(model, PROMPT, 6)
    session = Session(model)
    entries = (model.flash.manifest.ffns or model.flash.manifest.experts)[:2]
    first, second = (model.get_submodule(entry.module) for entry in entries)
    reached: list[int] = []

    def interrupt(*_: Any) -> None:
        running = running_pass()
        assert running is not None
        assert running.watch is not None
        if running.phase == "decode":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            until_s = time.monotonic() + 60
            while not running.watch.is_cancelled() and time.monotonic() < until_s:
                time.sleep(0.001)

    hooks = [
        nn.Module.register_forward_hook(first, interrupt),
        nn.Module.register_forward_hook(second, lambda *_: reached.append(1)),
    ]
    with pytest.raises(KeyboardInterrupt):
        list(session.stream(PROMPT, max_new_tokens=6, **GREEDY))
    for hook in hooks:
        hook.remove()
    assert reached == [1]  # in the prompt
    assert session.num_cached_tokens == 0  # half a pass would be in the cache
    assert tokens(session.stream(PROMPT, max_new_tokens=6, **GREEDY)) == expected
    assert greedy(model, PROMPT, 6) == expected


def test_errors_come_to_the_one_who_asks(llama: PreTrainedModel) -> None:
    session = Session(llama)
    with pytest.raises(BudgetError, match="context"):
        list(session.stream([3] * 200, max_new_tokens=4))
    with pytest.raises(ConfigError, match="empty"):
        session.stream([])
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        session.stream("w3")
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        session.stream(PROMPT, max_new_tokens=0)
    with pytest.raises(ValueError, match="model_kwargs"):
        list(session.stream(PROMPT, no_such_option=1))
    assert tokens(session.stream(PROMPT, max_new_tokens=4, **GREEDY)) == greedy(llama, PROMPT, 4)


def test_scores_are_those_of_one_pass(llama: PreTrainedModel) -> None:
    ids = [3 + index % 90 for index in range(20)]
    with torch.inference_mode():
        wanted = llama(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    session = Session(llama)
    steps = list(session.score(ids, piece_tokens=8, phase="prompt"))
    assert [step.token for step in steps] == ids[1:]
    found = torch.tensor([step.logprob for step in steps])
    assert torch.allclose(found, wanted.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-5)
    assert len(session.telemetry.records) == 3
    assert torch.is_inference_mode_enabled() is False


def test_two_sessions_take_turns_by_layers(model: PreTrainedModel) -> None:
    """While one stands between two layers of a pass, the other generates a whole text: no lock is held across layers."""
    expected = greedy(model, PROMPT, 6), greedy(model, [7, 8, 9], 6)
    manifest = model.flash.manifest
    first = model.get_submodule((manifest.ffns or manifest.experts)[0].module)
    held, slow = Session(model), Session(model)
    found: list[list[int]] = []
    other: list[list[int]] = []

    def run_the_other(*_: Any) -> None:
        if threading.current_thread().name == "flashlm session" and not other:
            other.append([])
            done = threading.Thread(
                target=lambda: other.append(tokens(slow.stream([7, 8, 9], max_new_tokens=6, **GREEDY)))
            )
            done.start()
            done.join(60)
            assert not done.is_alive(), "the other waits for more than a layer"

    hook = nn.Module.register_forward_hook(first, run_the_other)
    found.append(tokens(held.stream(PROMPT, max_new_tokens=6, **GREEDY)))
    hook.remove()
    assert (found[0], other[1]) == expected


def test_two_threads_both_get_on(model: PreTrainedModel) -> None:
    """By counting: of the passes that ended between one's first and last, some are the other's, and each counts its own."""
    expected = {start: greedy(model, [start, 4, 5], 40) for start in (3, 9)}
    order: list[int] = []
    sums: dict[int, int] = {}
    begin = threading.Barrier(2)

    def run(start: int) -> None:
        begin.wait()
        session = Session(model)
        steps = []
        for step in session.stream([start, 4, 5], max_new_tokens=40, **GREEDY):
            steps.append(step)
            order.append(start)
        assert [step.token for step in steps] == expected[start]
        sums[start] = sum(step.counters.bytes_read for step in steps)
        assert sums[start] == sum(record.bytes_read for record in session.telemetry.records)

    before = model.flash.passes.totals.bytes_read
    threads = [threading.Thread(target=run, args=(start,)) for start in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert {start: order.count(start) for start in expected} == {start: len(expected[start]) for start in expected}
    assert sum(sums.values()) == model.flash.passes.totals.bytes_read - before
    first_end = min(len(order) - order[::-1].index(start) for start in expected)  # where the earlier one was done
    assert min(order[:first_end].count(start) for start in expected) >= 5


@pytest.mark.parametrize(
    "option",
    ["input_ids", "attention_mask", "position_ids", "inputs_embeds", "past_key_values", "return_dict_in_generate"],
)
def test_what_describes_prompt_and_cache_is_the_sessions(option: str, llama: PreTrainedModel) -> None:
    """With another's the cache would be taken for that of the prompt, and the next answer be wrong."""
    session = Session(llama)
    with pytest.raises(ConfigError, match=option):
        session.stream(PROMPT, **{option: torch.ones(1, 4)})
    assert tokens(session.stream(PROMPT, max_new_tokens=3, **GREEDY)) == greedy(llama, PROMPT, 3)


def test_a_callers_criteria_and_processors_join_the_sessions(llama: PreTrainedModel, tokenizer: Any) -> None:
    class Never(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.zeros(len(input_ids), dtype=torch.bool)

    expected = greedy(llama, PROMPT, 8)
    word = tokenizer.decode(expected[1:2])
    both = {"stopping_criteria": StoppingCriteriaList([Never()]), "logits_processor": LogitsProcessorList([])}
    session = Session(llama, tokenizer)
    steps = list(session.stream(PROMPT, max_new_tokens=8, stop_strings=word, logprobs=True, **both, **GREEDY))
    assert [step.token for step in steps] == expected[: expected.index(expected[1]) + 1]
    assert steps[-1].finish == "stop"
    assert all(step.logprob is not None for step in steps)


@pytest.mark.parametrize("stop", ["", ("",), ("w3", "")])
def test_an_empty_stop_string_is_refused(stop: Any, llama: PreTrainedModel, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="empty stop string"):
        Session(llama, tokenizer).stream(PROMPT, stop_strings=stop)


def test_an_interrupt_while_the_thread_starts_leaves_none_behind(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(llama)
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.stream(PROMPT, max_new_tokens=3, **GREEDY))
    monkeypatch.undo()
    assert not [thread for thread in threading.enumerate() if thread.name == "flashlm session"]
    assert tokens(session.stream(PROMPT, max_new_tokens=3, **GREEDY)) == greedy(llama, PROMPT, 3)
