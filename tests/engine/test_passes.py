"""Passes: counters, times and torch's threads of passes that run side by side, inside each other, or fail."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import flashlm
from flashlm.engine import forward_pass, phases
from flashlm.engine.counters import Counters
from flashlm.engine.ffn import FlashFFN
from flashlm.engine.forward_pass import running_pass
from flashlm.errors import BudgetError
from flashlm.pack.manifest import read_manifest
from flashlm.rows import kernels
from tests.engine.calibrations import write_calibration
from tests.engine.conftest import TinyPack

MODES = ("hybrid", "naive", "sparse", "experts")
NUM_THREADS = 3  # what torch is set to here, so that one thread is not what it was before
ROUNDS = 6
TOKENS = torch.arange(3, 8)[None]

TinyPacks = Callable[..., TinyPack]


@pytest.fixture(autouse=True)
def _several_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load(tiny_pack: TinyPacks, tmp_path: Path) -> Callable[[str], Any]:
    def make(mode: str) -> Any:
        pack = tiny_pack("olmoe" if mode == "experts" else "llama").pack
        bound = read_manifest(pack).streamed_bytes // 2 if mode in ("hybrid", "experts") else None
        if mode == "sparse":
            pack = Path(shutil.copytree(pack, tmp_path / "pack"))
            write_calibration(pack)
        return flashlm.load(pack, dram="3GiB", mode=mode, context=160, pin=bound)

    return make


def _run(model: Any) -> list[torch.Tensor]:
    """A prompt of five tokens and three decoded ones; the logits of each pass."""
    with torch.no_grad():
        output = model(TOKENS, use_cache=True)
        logits = [output.logits]
        for token in (9, 8, 7):
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    return logits


def _asked(record: Counters) -> tuple[int, int, int]:
    """What a pass asks for, whoever runs beside it: of pinned bytes, of rows, of experts."""
    return record.pinned_bytes, record.hit_rows + record.miss_rows, record.hit_experts + record.miss_experts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_workers", [2, 8])
def test_threads_on_one_model_keep_their_records_apart(num_workers: int, mode: str, load: Callable[[str], Any]) -> None:
    model = load(mode)
    telemetry, totals = model.flash.telemetry, model.flash.passes.totals
    expected = _run(model)
    alone = list(telemetry.records)
    telemetry.clear()
    before = {each.name: getattr(totals, each.name) for each in fields(Counters)}
    start = threading.Barrier(num_workers)

    def work(number: int) -> tuple[list[list[torch.Tensor]], int, int]:
        torch.get_num_threads()  # torch itself sets a new thread up on first use, over what was set before
        torch.set_num_threads(number + 1)
        start.wait()
        logits = [_run(model) for _ in range(ROUNDS)]
        return logits, number + 1, torch.get_num_threads()

    with ThreadPoolExecutor(num_workers) as pool:
        results = list(pool.map(work, range(num_workers)))
    torch.set_num_threads(NUM_THREADS)  # the workers' wishes have gone to the whole process, too
    for rounds, wished, left in results:
        assert left == wished
        for logits in rounds:
            assert all(torch.equal(mine, first) for mine, first in zip(logits, expected, strict=True))
    records = list(telemetry.records)
    assert len(records) == num_workers * ROUNDS * len(alone)
    assert sorted(map(_asked, records)) == sorted(map(_asked, alone * (num_workers * ROUNDS)))
    for record in records:
        assert 0 <= record.wait_s <= record.wall_s
        assert record.compute_s >= 0
        if mode in ("hybrid", "naive"):
            assert record.bytes_read == model.flash.placement.streamed_bytes
        if mode == "experts":
            assert record.bytes_read == record.miss_experts * model.flash.placement.expert_bytes
    for each in fields(Counters):
        counted = sum(getattr(record, each.name) for record in records)
        assert getattr(totals, each.name) - before[each.name] == pytest.approx(counted, rel=1e-6, abs=1e-6), each.name


def test_a_pass_inside_a_pass_has_a_record_of_its_own(load: Callable[[str], Any]) -> None:
    model = load("naive")
    expected = _run(model)[0]
    model.flash.telemetry.clear()
    last = [module for module in model.modules() if isinstance(module, FlashFFN)][-1]

    def enter(*_: Any) -> None:
        handle.remove()
        model(torch.tensor([[4]]))

    handle = last.register_forward_pre_hook(enter)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected)
    inner, outer = model.flash.telemetry.records
    assert (inner.num_tokens, outer.num_tokens) == (1, 5)
    assert inner.bytes_read == outer.bytes_read == model.flash.placement.streamed_bytes
    assert inner.wall_s > 0
    assert outer.compute_s >= 0
    assert torch.get_num_threads() == NUM_THREADS


def test_calls_past_the_model_itself_are_passes(tiny_pack: TinyPacks) -> None:
    """Adapters call `forward` and not the model; who wants no logits calls the model within."""
    model = flashlm.load(tiny_pack("opt").pack, dram="3GiB", context=8, pin=0)
    with torch.no_grad():
        model.forward(input_ids=TOKENS)
        model.model(TOKENS)
        model.get_decoder()(TOKENS)
        with pytest.raises(BudgetError, match="context=8"):
            model.forward(TOKENS.repeat(1, 3))
        with pytest.raises(BudgetError, match="context=8"):
            model.model(TOKENS.repeat(1, 3))
    assert [record.phase for record in model.flash.telemetry.records] == ["prompt"] * 3
    assert {record.bytes_read for record in model.flash.telemetry.records} == {model.flash.placement.streamed_bytes}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("place", ["before", "layer", "after"])
def test_whatever_ends_a_pass_torch_keeps_its_threads(
    place: str, failure: type[BaseException], load: Callable[[str], Any]
) -> None:
    model = load("hybrid")
    expected = _run(model)
    ffn = next(module for module in model.modules() if isinstance(module, FlashFFN))

    def fail(*_: Any) -> None:
        raise failure

    hooked = {"before": model.register_forward_pre_hook, "layer": ffn.register_forward_hook}
    handle = hooked.get(place, model.register_forward_hook)(fail)
    model.flash.telemetry.clear()
    with pytest.raises(failure), torch.no_grad():
        model(torch.tensor([[4]]))
    assert len(model.flash.telemetry.records) == (place == "after")
    assert torch.get_num_threads() == NUM_THREADS
    assert running_pass() is None
    handle.remove()
    assert all(torch.equal(mine, first) for mine, first in zip(_run(model), expected, strict=True))


def test_a_thread_that_is_born_in_a_pass_gets_the_processes_threads(load: Callable[[str], Any]) -> None:
    model = load("hybrid")
    ffn = next(module for module in model.modules() if isinstance(module, FlashFFN))
    seen = []

    def look(*_: Any) -> None:
        seen.append(torch.get_num_threads())
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()

    ffn.register_forward_hook(look)
    with torch.no_grad():
        model(torch.tensor([[4]]))
    assert seen == [1, NUM_THREADS]


def test_a_number_of_threads_that_is_set_within_a_pass_stays(load: Callable[[str], Any]) -> None:
    model = load("hybrid")
    ffn = next(module for module in model.modules() if isinstance(module, FlashFFN))
    ffn.register_forward_hook(lambda *_: torch.set_num_threads(2))
    with torch.no_grad():
        model(torch.tensor([[4]]))
    assert torch.get_num_threads() == 2


def test_an_interrupt_at_any_line_of_a_pass_leaves_nothing_behind(load: Callable[[str], Any]) -> None:
    """Python sees an interrupt between lines: one is raised at each line of ours that a pass goes through, in turn."""
    model = load("hybrid")
    expected = _run(model)
    ours = {forward_pass.__file__, phases.__file__}
    held = {each.__code__ for each in (kernels.one_torch_thread, kernels.on_one_torch_thread, kernels._hold)}
    num_lines = 0
    while True:
        left = num_lines

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in ours and frame.f_code not in held:
                return None if event == "call" and "torch" in frame.f_code.co_filename else trace
            if event == "line":
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with torch.no_grad():
                model(torch.tensor([[4]]))
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert torch.get_num_threads() == NUM_THREADS, num_lines
        assert running_pass() is None, num_lines
        if left >= 0:
            break
        num_lines += 1
    assert num_lines > 40
    assert all(torch.equal(mine, first) for mine, first in zip(_run(model), expected, strict=True))


def test_summaries_and_records_read_well(load: Callable[[str], Any]) -> None:
    model = load("naive")
    _run(model)
    shown = repr(model.flash.telemetry.decode())
    assert "3 tokens in 3 passes" in shown
    assert "tokens/s" in shown
    assert len(shown) < 120
    assert repr(model.flash.telemetry.verify()) == "<verify: no passes>"
    assert repr(model.flash.telemetry.records[0]).startswith("<prompt pass: 1 x 5 tokens in ")
    assert model.flash.telemetry.decode().to_dict()["tokens_per_s"] > 0


def test_a_compiled_model_is_the_model(load: Callable[[str], Any]) -> None:
    """torch.compile looks into wrapped methods, and takes a bound method for the attribute of its name."""
    model = load("hybrid")
    expected = _run(model)[0]
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(TOKENS).logits, expected)
    assert model.flash.telemetry.records[-1].bytes_read == model.flash.placement.streamed_bytes
    many = torch.arange(40)[None] % 90  # by products
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(many).logits, model(many).logits)
