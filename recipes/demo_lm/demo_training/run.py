"""One training run: the loop, and what of it outlives the process."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerFast

from demo_training.checkpoint import load_checkpoint, save_checkpoint
from demo_training.corpus import Windows, encode, encode_documents, read_split, train_tokenizer
from demo_training.gradients import Gradients, make_threads
from demo_training.model import make_model
from demo_training.optimisers import make_optimisers
from demo_training.perplexity import score_tokens
from demo_training.progress import Metrics, Progress
from demo_training.schedule import RunningClock, Schedule
from demo_training.settings import Settings

NUM_EVAL_TOKENS = 16384
"""Validation tokens scored while training; the export scores all of them."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """How this process runs; none of it changes what is learned, but precision and time limit."""

    data: Path
    """Folder with train.txt, valid.txt and test.txt."""
    out: Path
    """Folder for tokenizer, checkpoint, metrics and model."""
    threads: int
    """Threads; they divide the batch."""
    bf16: bool
    """Whether forward and backward run under bfloat16 autocast."""
    max_minutes: float | None
    """Training time, pauses left out, after which the decay has ended."""
    checkpoint_minutes: float
    """Time between checkpoints."""
    eval_steps: int
    """Steps between looks at the validation text."""


class StopRequest:
    """Remembers SIGINT or SIGTERM while entered, so that the step in progress can end and be saved."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked

    def __enter__(self) -> Self:
        self._previous = [signal.signal(number, self._remember) for number in self.SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self.SIGNALS, self._previous, strict=True):
            signal.signal(number, handler)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True


class Run:
    """Model, optimisers, schedule and position of one run; goes on from the checkpoint in `process.out` if there is one."""

    def __init__(self, settings: Settings, process: Process, progress: Progress) -> None:
        self.settings = settings
        self.step = 0
        self.clock = RunningClock()
        self._process = process
        self._progress = progress
        process.out.mkdir(parents=True, exist_ok=True)
        self._checkpoint = process.out / "checkpoint.pt"
        self.metrics = Metrics(process.out / "metrics.jsonl")
        self.tokenizer = _load_or_train_tokenizer(settings, process)
        self._train = Windows(
            encode_documents(self.tokenizer, read_split(process.data, "train")), settings.context_length, settings.seed
        )
        self._valid_ids = encode(self.tokenizer, read_split(process.data, "valid"))[:NUM_EVAL_TOKENS]
        self.model = make_model(settings, self.tokenizer.bos_token_id)
        threads = make_threads(process.threads)
        self._optimisers = make_optimisers(self.model, settings.muon_lr, settings.adam_lr, threads)
        self._gradients = Gradients(self.model, threads, process.threads, bf16=process.bf16)
        self.schedule = Schedule(
            steps=settings.steps,
            decay_steps=settings.decay_steps,
            warmup_steps=settings.warmup_steps,
            max_s=None if process.max_minutes is None else process.max_minutes * 60,
        )
        if self._checkpoint.exists():
            self._restore(load_checkpoint(self._checkpoint))
            progress.note(f"going on at step {self.step}")

    @property
    def num_tokens_seen(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.settings.batch_size * self.settings.context_length

    @property
    def num_epochs(self) -> float:
        """Passes over the training text so far."""
        return self.step * self.settings.batch_size / self._train.num_windows

    def train(self, should_stop: Callable[[], bool]) -> bool:
        """Train until the schedule ends; return False if `should_stop` ended it before.

        Either way the state has been saved when this returns.
        """
        saved_s = time.monotonic()
        while (factor := self.schedule.factor(self.step, self.clock)) > 0:
            if should_stop():
                self._save()
                return False
            begin_s = time.monotonic()
            loss = self._advance(factor)
            self.clock.add(time.monotonic() - begin_s)
            self._report(loss, factor)
            if time.monotonic() - saved_s > self._process.checkpoint_minutes * 60:
                self._save()
                saved_s = time.monotonic()
        self._save()
        return True

    def _advance(self, factor: float) -> float:
        batch_size = self.settings.batch_size
        loss = self._gradients.compute(*self._train.batch(self.step * batch_size, batch_size))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        for optimiser, peak_lr in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak_lr * factor
            optimiser.step()
        self.step += 1
        return loss

    def _report(self, loss: float, factor: float) -> None:
        record = {
            "step": self.step,
            "tokens": self.num_tokens_seen,
            "loss": round(loss, 4),
            "lr_factor": round(factor, 4),
            "seconds": round(self.clock.seconds, 1),
        }
        if self.step % self._process.eval_steps == 0:
            nll = score_tokens(self.model, self._valid_ids, self.tokenizer.bos_token_id, overlap=0)
            record["valid_loss"] = round(nll / self._valid_ids.numel(), 4)
            self._progress.note(f"step {self.step} validation loss {record['valid_loss']:.3f}")
        self.metrics.append(record)
        rate = self.settings.batch_size * self.settings.context_length / self.clock.step_s
        left_min = self._left_s() / 60
        self._progress.step(
            self.step, f"step {self.step} loss {loss:.3f} lr x{factor:.2f} {rate:.0f} tokens/s {left_min:.0f} min left"
        )

    def _left_s(self) -> float:
        left_s = (self.settings.steps - self.step) * self.clock.step_s
        if self._process.max_minutes is None:
            return left_s
        return min(left_s, self._process.max_minutes * 60 - self.clock.seconds)

    def _save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.clock.seconds,
            "schedule": self.schedule.state(),
            "num_windows": self._train.num_windows,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in self._optimisers],
            "rng": torch.get_rng_state(),
        }
        save_checkpoint(self._checkpoint, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.settings.check_resumable(state["settings"])
        if state["num_windows"] != self._train.num_windows:
            raise ValueError(
                f"{self._checkpoint} was trained on a text of {state['num_windows']} windows, this one has "
                f"{self._train.num_windows}; give the same --data, or another --out"
            )
        self.step = state["step"]
        self.clock = RunningClock(state["seconds"])
        self.schedule.restore(state["schedule"])
        self.model.load_state_dict(state["model"])
        for (optimiser, _), saved in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        torch.set_rng_state(state["rng"])


def _load_or_train_tokenizer(settings: Settings, process: Process) -> PreTrainedTokenizerFast:
    folder = process.out / "tokenizer"
    # tokenizer_config.json is written last.
    if not (folder / "tokenizer_config.json").exists():
        text = read_split(process.data, "train")
        train_tokenizer(text, settings.vocab_size, settings.context_length).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
