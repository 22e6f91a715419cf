"""Interrupt one model wherever Python can be interrupted, and hold every later answer against the first ones.

A process of its own for one mode: `interrupt_sweep.py PACK MODE` prints a line of JSON. Reads are delayed by the preloaded
library of `tests/storage/faults.c` (FAULT=late) for the while in which an interrupt falls, so that data is on its way when
the answer is thrown away, and lands while the next one is computed. Kinds of interrupt:

* at an instruction: a trace function raises KeyboardInterrupt before the n-th bytecode that flashlm's own files execute;
  `double` raises another one while the first is cleaned up after, as does somebody who presses Ctrl-C twice;
* by a timer: a real signal, whose handler raises; `beside` while another thread asks the same model without a pause;
* while a model is loaded; then it is loaded anew.

The staging is as small as the floor of `dram` makes it. After each interrupt, whose traceback is kept as a notebook keeps
it, the next answer, of another prompt, must have the bits of an undisturbed one or be an error of flashlm's by name. Every
third one is asked for by another thread.
"""

from __future__ import annotations

import argparse
import dis
import faulthandler
import gc
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import flashlm
from flashlm.errors import BudgetError, FlashError
from flashlm.memory.budget import MIN_STAGING_BLOCKS

OWN = str(Path(flashlm.__file__).parent)
HANG_S = 240  # without progress; a busy machine may need a minute for what takes a second
NUM_PROMPTS = 4
DELAY_MS = "12"
DELAYED_EVENTS = 300  # reads begun so many bytecodes before an interrupt are delayed
SLACK_BYTES = 256 << 10
CALLS = {"CALL", "CALL_FUNCTION_EX", "BEFORE_WITH", "WITH_EXCEPT_START", "FOR_ITER", "SEND", "CALL_KW", "JUMP_BACKWARD"}
# Where state of a pass is kept or handed on: what `--sites` looks at.
CORE = ("stream.py", "sparse.py", "expert_store.py", "reader.py", "expert_cache.py", "neuron_cache.py")

Site = tuple[CodeType, int]


@dataclass
class Result:
    """What came of the interrupts of one kind."""

    num_tried: int = 0
    num_interrupted: int = 0
    num_places: int = 0
    num_wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    where: Counter[str] = field(default_factory=Counter)
    wrong_at: list[str] = field(default_factory=list)
    wall_s: float = 0.0


class Subject:
    """A model at its floor, and the answers that it must give."""

    def __init__(self, pack: Path, mode: str) -> None:
        torch.set_num_threads(1)  # which bits torch's own products have may depend on it
        self.model = load_at_floor(pack, mode)
        self.expected = [self.answer(prompt) for prompt in range(NUM_PROMPTS)]
        for prompt in range(NUM_PROMPTS):
            assert self.differs(prompt, self.answer(prompt)) is None, "an undisturbed model does not repeat itself"

    def answer(self, prompt: int) -> list[torch.Tensor]:
        """Return logits of a long prompt, of a short one, and of a token that follows it."""
        ids = (torch.arange(20) * (2 * prompt + 3) + 5 * prompt) % 90 + 3
        with torch.no_grad():
            long = self.model(ids[None], use_cache=False).logits
            short = self.model(ids[None, :3], use_cache=True)
            token = self.model(ids[None, 3:4], past_key_values=short.past_key_values, use_cache=True)
        return [long, short.logits, token.logits]

    def differs(self, prompt: int, got: list[torch.Tensor]) -> str | None:
        """Return which logits are not to the bit what they should be."""
        wrong = [not torch.equal(mine, right) for mine, right in zip(got, self.expected[prompt], strict=True)]
        return f"logits {wrong}" if any(wrong) else None


def load_at_floor(pack: Path, mode: str) -> Any:
    """Load with as little `dram` as is accepted: the floor moves with what the process weighs, up and down."""
    dram = 1 << 20
    for _ in range(60):
        try:
            model = flashlm.load(pack, dram=dram, mode=None if mode == "experts" else mode, context=160)
        except BudgetError as error:
            dram = error.needed_bytes + SLACK_BYTES
            continue
        placement = model.flash.placement
        spare_slots = placement.num_slots - MIN_STAGING_BLOCKS
        if spare_slots <= 0:
            return model
        dram -= spare_slots * placement.slot_bytes  # the process had become smaller
        model.flash.close()
    raise RuntimeError("no budget was the smallest")


class Tripwire:
    """Counts the bytecodes of flashlm's files, and raises at one of them (at=None: never); keeps their places if asked."""

    def __init__(self, at: int | None, *, again_after: int | None = None, keeps: bool = False) -> None:
        self.at, self.again_after = at, again_after
        self.count = 0
        self.places: list[Site] | None = [] if keeps else None
        self.where = ""

    def __enter__(self) -> Tripwire:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(None)
        sys.setprofile(None)
        set_delay("0")

    def _enter(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(OWN):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event != "opcode":
            return self._step
        self.count += 1
        if self.places is not None:
            self.places.append((frame.f_code, frame.f_lasti))
        if self.at is not None:
            if self.count == self.at - DELAYED_EVENTS or (self.count == 1 and self.at <= DELAYED_EVENTS):
                set_delay(DELAY_MS)
            if self.count == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}:{frame.f_lineno}"
                if self.again_after is not None:
                    sys.setprofile(self._again)
                raise KeyboardInterrupt  # the interpreter removes the trace function at this
        return self._step

    def _again(self, frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename.startswith(OWN):
            assert self.again_after is not None
            self.again_after -= 1
            if self.again_after < 0:
                raise KeyboardInterrupt


def set_delay(milliseconds: str) -> None:
    """Delay reads that begin from now on; the preloaded library looks there at every read."""
    os.environ["FAULT_MS"] = milliseconds


def places_of(subject: Subject) -> list[list[Site]]:
    """Return the bytecodes that each prompt's answer runs through."""
    found = []
    for prompt in range(NUM_PROMPTS):
        with Tripwire(None, keeps=True) as wire:
            subject.answer(prompt)
        assert wire.places is not None
        found.append(wire.places)
    return found


def at_calls(places: list[Site], generator: random.Random) -> list[int]:
    """Return one event before and one after every call in the files that keep a pass's state."""
    near: dict[CodeType, set[int]] = {}
    found: dict[Site, list[int]] = {}
    for index, (code, offset) in enumerate(places):
        if not code.co_filename.endswith(CORE):
            continue
        if code not in near:
            near[code] = set()
            instructions = list(dis.get_instructions(code))
            for one, following in zip(instructions, [*instructions[1:], None], strict=True):
                if one.opname in CALLS:
                    near[code] |= {one.offset} | ({following.offset} if following else set())
        if offset in near[code]:
            found.setdefault((code, offset), []).append(index + 1)
    chosen = [generator.choice(each) for each in found.values()]
    generator.shuffle(chosen)
    return chosen


class Sweep:
    """Interrupts a subject again and again."""

    def __init__(self, subject: Subject, generator: random.Random) -> None:
        self.subject = subject
        self.generator = generator
        self.kept: BaseException | None = None

    def instructions(self, points: Iterator[tuple[int, int]], *, is_double: bool = False, budget_s: float) -> Result:
        """Interrupt prompt p's answer before its n-th bytecode, for each (p, n)."""
        result, started_s = Result(), time.monotonic()
        for prompt, at in points:
            if time.monotonic() - started_s > budget_s:
                break
            again = self.generator.randrange(25) if is_double else None
            wire = Tripwire(at, again_after=again)

            def ask(prompt: int = prompt, wire: Tripwire = wire) -> None:
                with wire:
                    self.subject.answer(prompt)

            self._interrupt(result, ask, lambda wire=wire: wire.where)
            self._check(result, (prompt + 1) % NUM_PROMPTS, wire.where)
        result.wall_s = round(time.monotonic() - started_s, 1)
        result.num_places = len(result.where)
        return result

    def timer(self, num_tries: int, *, budget_s: float) -> Result:
        """Interrupt by a signal at a random time of the answer, reads a little late."""
        result, started_s = Result(), time.monotonic()
        self.subject.answer(0)
        usual_s = time.monotonic() - started_s
        is_armed = False

        def handle(number: int, frame: FrameType | None) -> None:
            if is_armed:
                raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, handle)
        for turn in range(num_tries):
            if time.monotonic() - started_s > budget_s:
                break
            prompt = turn % NUM_PROMPTS

            def ask(prompt: int = prompt) -> None:
                nonlocal is_armed
                try:
                    is_armed = True
                    signal.setitimer(signal.ITIMER_REAL, self.generator.uniform(1e-4, 2 * usual_s))
                    self.subject.answer(prompt)
                finally:
                    is_armed = False
                    signal.setitimer(signal.ITIMER_REAL, 0)

            set_delay(str(turn % 3))
            self._interrupt(result, ask, self._deepest)
            set_delay("0")
            self._check(result, (prompt + 1) % NUM_PROMPTS, "timer")
        result.wall_s = round(time.monotonic() - started_s, 1)
        result.num_places = len(result.where)
        return result

    def beside(self, num_tries: int, *, budget_s: float) -> Result:
        """As `timer`, while another thread asks on and on, and is never to get a wrong answer."""
        others, is_over = Result(), threading.Event()

        def ask_on() -> None:
            while not is_over.is_set():
                others.num_tried += 1
                self._hold(others, others.num_tried % NUM_PROMPTS, "beside")

        other = threading.Thread(target=ask_on, daemon=True)
        other.start()
        try:
            result = self.timer(num_tries, budget_s=budget_s)
        finally:
            is_over.set()
            other.join()
        assert others.num_tried > 1
        result.num_wrong += others.num_wrong
        result.errors += others.errors
        result.wrong_at += others.wrong_at
        return result

    def loads(self, pack: Path, num_tries: int, *, budget_s: float) -> Result:
        """Interrupt the loading of a model, before a bytecode drawn at random; load it anew, and ask that one."""
        result, started_s = Result(), time.monotonic()
        mode = None if self.subject.model.flash.mode == "experts" else self.subject.model.flash.mode
        ready, expected = self.subject.model, self.subject
        with Tripwire(None) as wire:
            flashlm.load(pack, mode=mode, context=160)
        num_events = wire.count
        for turn in range(num_tries):
            if time.monotonic() - started_s > budget_s:
                break
            wire = Tripwire(self.generator.randrange(num_events) + 1)

            def ask(wire: Tripwire = wire) -> None:
                with wire:
                    flashlm.load(pack, mode=mode, context=160)

            self._interrupt(result, ask, lambda wire=wire: wire.where)
            expected.model = flashlm.load(pack, mode=mode, context=160)
            self._check(result, turn % NUM_PROMPTS, wire.where)
        expected.model = ready
        result.wall_s = round(time.monotonic() - started_s, 1)
        result.num_places = len(result.where)
        return result

    def _deepest(self) -> str:
        """Return the last line of flashlm's in the interrupt's traceback."""
        trace, place = self.kept.__traceback__ if self.kept else None, "outside"
        while trace is not None:
            code = trace.tb_frame.f_code
            if code.co_filename.startswith(OWN):
                place = f"{Path(code.co_filename).name}:{code.co_qualname}:{trace.tb_lineno}"
            trace = trace.tb_next
        return place

    def _interrupt(self, result: Result, ask: Callable[[], None], where: Callable[[], str]) -> None:
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        result.num_tried += 1
        try:
            ask()
        except KeyboardInterrupt as interrupt:
            self.kept = interrupt  # with its frames, as a notebook's last traceback
            result.num_interrupted += 1
            result.where[where()] += 1
        except FlashError as error:
            result.errors[f"at once: {type(error).__name__}"] += 1

    def _check(self, result: Result, prompt: int, where: str) -> None:
        if result.num_tried % 3:
            self._hold(result, prompt, where)
            return
        other = threading.Thread(target=self._hold, args=(result, prompt, where), daemon=True)
        other.start()
        other.join()  # the watchdog ends a wait for ever

    def _hold(self, result: Result, prompt: int, where: str) -> None:
        torch.set_num_threads(1)
        try:
            wrong = self.subject.differs(prompt, self.subject.answer(prompt))
        except FlashError as error:
            result.errors[f"next answer: {type(error).__name__}"] += 1
            return
        if wrong is not None:
            result.num_wrong += 1
            result.wrong_at = [*result.wrong_at, f"{where}: {wrong}"][:20]


def weight() -> dict[str, int]:
    """Return what may grow: resident bytes, descriptors, Python objects."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "rss_bytes": resident,
        "num_fds": len(list(Path("/proc/self/fd").iterdir())),
        "num_objects": len(gc.get_objects()),
    }


def main() -> None:
    """Run the sweeps that are asked for and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("mode", choices=["hybrid", "naive", "sparse", "experts"])
    parser.add_argument("--sites", action="store_true", help="once before and after every call where a pass's state is")
    parser.add_argument("--points", type=int, default=0, help="so many bytecodes, drawn from all")
    parser.add_argument("--double", type=int, default=0, help="so many with a second interrupt in the cleanup")
    parser.add_argument("--timer", type=int, default=0, help="so many by a signal")
    parser.add_argument("--beside", type=int, default=0, help="so many by a signal, beside a busy thread")
    parser.add_argument("--load", type=int, default=0, help="so many while a model is loaded")
    parser.add_argument("--budget-s", type=float, default=1e9, help="time for each of these")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    sys.unraisablehook = lambda raised: None  # interrupts in finalisers, which Python drops
    set_delay("0")
    generator = random.Random(args.seed)
    subject = Subject(args.pack, args.mode)
    last = subject.model.flash.telemetry.records[-1]
    places = places_of(subject)
    num_events = sum(map(len, places))
    sweep = Sweep(subject, generator)
    evenly = [(prompt, at) for prompt, each in enumerate(places) for at in range(1, len(each) + 1)]
    results = {}
    if args.sites:
        points = [(0, at) for at in at_calls(places[0], generator)]
        results["sites"] = sweep.instructions(iter(points), budget_s=args.budget_s)
    if args.points:
        chosen = generator.sample(evenly, min(args.points, len(evenly)))
        results["points"] = sweep.instructions(iter(chosen), budget_s=args.budget_s)
    before = weight()
    if args.double:
        chosen = generator.sample(evenly, min(args.double, len(evenly)))
        results["double"] = sweep.instructions(iter(chosen), is_double=True, budget_s=args.budget_s)
    if args.timer:
        results["timer"] = sweep.timer(args.timer, budget_s=args.budget_s)
    if args.beside:
        results["beside"] = sweep.beside(args.beside, budget_s=args.budget_s)
    after = weight()
    if args.load:
        results["load"] = sweep.loads(args.pack, args.load, budget_s=args.budget_s)
    faulthandler.cancel_dump_traceback_later()
    flash = subject.model.flash
    document = {
        "mode": flash.mode,
        "reader": flash.reader.describe(),
        "num_slots": flash.placement.num_slots or flash.placement.num_spare,
        "num_pinned": sum(each.num_pinned for each in flash.placement.dense),
        "num_reads_of_a_token": last.num_reads,
        "num_missed": last.miss_rows + last.miss_experts,
        "num_bytecodes": num_events,
        "before": before,
        "after": after,
        "results": {name: vars(result) for name, result in results.items()},
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
