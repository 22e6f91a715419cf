"""A session: one sequence of a loaded model, continued prompt by prompt, its tokens given one `Step` at a time.

    session = Session(model, tokenizer)
    for step in session.stream("Once upon a time", max_new_tokens=32):
        print(step.text, end="", flush=True)

transformers' own `generate` does the work, so that all its options count. It runs in a thread beside the caller, in turns:
it computes a token when the caller asks for the next step, and waits between two passes until then. A step is given once it
is known whether it is the last. Closing the iterator, or an exception in its body (Ctrl-C), breaks a running pass off at
the next streamed layer; between two passes nothing is lost.

The session owns the KV cache. A later prompt that begins with what the cache holds is computed from there on, as it is in
any chat with a cache; the rest of the cache is cut away, or all of it dropped where it can't be cut. Mode `sparse` keeps the
prompts' part only: prompts are exact there and decoded tokens are not. Nothing of a session lives on the runtime, so
sessions of one model do not know of each other; they take turns layer by layer (`engine/turn.py`). Only the random numbers
of sampling are torch's, and so the process's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from flashlm.engine.counters import Counters
from flashlm.engine.forward_pass import Pass, PassCancelledError, PassWatch, Phase
from flashlm.engine.phases import num_cached_tokens
from flashlm.engine.prompts import Prompt, encode
from flashlm.engine.runtime import FlashRuntime
from flashlm.engine.telemetry import Telemetry
from flashlm.errors import ConfigError
from flashlm.transformers_seam import made_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Finish = Literal["length", "stop"]
# What a session says to `generate` itself: with others' the cache would not be of the tokens that it is taken for.
_OWNED = frozenset(
    {
        "inputs", "input_ids", "attention_mask", "position_ids", "cache_position", "inputs_embeds", "past_key_values",
        "token_type_ids", "return_dict_in_generate", "streamer",
    }
)  # fmt: skip
WAIT_S = 0.1  # of each wait for a step: so late Ctrl-C may be noticed


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One new token.

    Attributes:
        token: Its id.
        text: What of the text is final with it and was not before: words come whole, so often "". All steps' texts
            together are the text.
        position: Of the token in its sequence; the prompt's first one has 0.
        phase: Of the pass that gave it: "prompt", "decode" or "verify".
        logprob: Natural logarithm of its probability, before temperature and the cuts of sampling; None where it was not
            asked for, or with beams or drafts.
        finish: "length" where as many tokens came as were asked for, "stop" where an end token or a stop string ended the
            text; None while it goes on.
        counters: What the passes since the step before have read, found and waited for; a copy.
        wall_s: Time of these passes.
    """

    token: int
    text: str
    position: int
    phase: Phase
    logprob: float | None
    finish: Finish | None
    counters: Counters
    wall_s: float


class Session:
    """One sequence of a model, with its KV cache.

    Args:
        model: A loaded pack.
        tokenizer: The pack's; None takes and gives token ids only.

    Attributes:
        telemetry: A record per pass of this session.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.telemetry = Telemetry()
        self._thread: threading.Thread | None = None  # of the latest stream
        self.reset()

    @property
    def flash(self) -> FlashRuntime:
        """The model's runtime."""
        flash: FlashRuntime = self._model.flash
        return flash

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return len(self._ids)

    def reset(self) -> None:
        """Forget the sequence. Due whenever the model has changed, by an adapter that was turned on, say."""
        self._cache: Any = None
        self._ids: list[int] = []  # of the tokens that the cache holds
        self._num_exact = 0  # of these, from the start, those that went through in prompts

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        stop_strings: str | Sequence[str] = (),
        logprobs: bool = False,
        **options: Any,
    ) -> Iterator[Step]:
        """Continue a prompt; each step comes when it is asked for.

        Args:
            prompt: The whole text so far (earlier turns too), the messages so far, or token ids. What of it the session's
                cache holds is not computed again.
            max_new_tokens: Tokens to generate at most.
            stop_strings: Text, or several texts, that end the sequence.
            logprobs: Whether steps tell how probable their tokens are.
            **options: Further arguments of transformers' `generate`; a list of stopping criteria or logits processors is
                added to the session's own. What describes the prompt or the cache is the session's.

        Raises:
            ConfigError: At once: the prompt can't be encoded, or an option is the session's own. With the first step:
                another stream of this session is open.
            BudgetError, StorageError, PackError: From a step, as from `generate`. The session has forgotten its sequence
                then, and is ready for a new prompt.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if owned := sorted(_OWNED & options.keys()):
            raise ConfigError(
                f"{', '.join(owned)}: the session makes these itself, from the prompt; call generate for others"
            )
        if int(options.get("num_return_sequences") or 1) > 1:
            raise ConfigError(f"num_return_sequences={options['num_return_sequences']}: a session is one sequence")
        stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        if not all(stop_strings):
            raise ConfigError("an empty stop string would end every text at once")
        if stop_strings and self._tokenizer is None:
            raise ConfigError("stop_strings need a tokenizer: make the session with one")
        ids = encode(self._tokenizer, prompt)
        return self._steps(ids, max_new_tokens, stop_strings, logprobs, options)

    def score(self, ids: Sequence[int], *, piece_tokens: int, phase: Phase) -> Iterator[Step]:
        """Go through given tokens after what the cache holds, and tell how probable each was.

        Args:
            ids: They go on where the cache ends; the first has no step, since nothing is asked of it.
            piece_tokens: So many go through in a pass.
            phase: Of these passes: "prompt", or "decode" to measure what generation would do.
        """
        run = _Run(self.num_cached_tokens + 1, len(ids), None, self.telemetry)
        for start in range(0, len(ids) - 1, piece_tokens):
            piece = list(ids[start : min(start + piece_tokens, len(ids) - 1)])
            wanted = list(ids[start + 1 : start + 1 + len(piece)])
            with torch.inference_mode(), self.flash.phase(phase), self.flash.passes.watched(run):
                output = self._model(input_ids=torch.tensor([piece]), past_key_values=self._cache, use_cache=True)
                scores = output.logits[0, : len(piece)].float()
                losses = torch.nn.functional.cross_entropy(scores, torch.tensor(wanted), reduction="none").tolist()
            self._cache = made_cache(output)
            self._ids += piece
            del output, scores  # of all positions: large, and not to be held while the caller has the turn
            for token, loss in zip(wanted, losses, strict=True):
                yield run.step(_New(token=token, text="", logprob=-loss), None)

    def _steps(
        self,
        ids: list[int],
        max_new_tokens: int,
        stop_strings: tuple[str, ...],
        logprobs: bool,
        options: dict[str, Any],
    ) -> Iterator[Step]:
        if self._thread is not None and self._thread.is_alive():
            raise ConfigError("another stream of this session is open: close it, or make a session of its own")
        run = _Run(len(ids), max_new_tokens, self._tokenizer, self.telemetry)
        own = self._arguments(ids, run, stop_strings, logprobs, options)
        asked = own | options | {"max_new_tokens": max_new_tokens}
        for name in ("stopping_criteria", "logits_processor"):  # ours first: scores are taken before the caller's cuts
            if name in own and options.get(name) is not None:
                asked[name] = type(own[name])([*own[name], *options[name]])
        # A daemon: it waits wherever the caller stopped asking, and must not keep the program from ending.
        self._thread = thread = threading.Thread(
            target=copy_context().run,
            args=(run.work, lambda: self._generate(ids, run, asked)),
            name="flashlm session",
            daemon=True,
        )
        try:
            thread.start()
            yield from run.steps()
        finally:
            run.cancel()
            # An interrupt may come before it has begun; the garbage collector may close this within it.
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()

    def _arguments(
        self, ids: list[int], run: _Run, stop_strings: tuple[str, ...], logprobs: bool, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what `generate` is called with beside a caller's options."""
        input_ids = torch.tensor([ids])
        asked: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "return_dict_in_generate": True,
        }

        config = options.get("generation_config") or self._model.generation_config

        def chosen(name: str) -> Any:
            return options.get(name) or getattr(config, name, None)

        run.is_one_sequence = max(chosen("num_beams") or 1, chosen("num_return_sequences") or 1) == 1
        run.is_drafted = bool(chosen("prompt_lookup_num_tokens") or chosen("assistant_model"))
        if run.is_one_sequence:  # a beam may still be dropped
            asked["streamer"] = run.streamer
        if stop_strings and self._tokenizer is not None:
            criterion = _StopStrings(self._tokenizer, stop_strings, len(ids))
            asked["stopping_criteria"] = StoppingCriteriaList([criterion])
        if logprobs and not run.is_drafted:
            asked["logits_processor"] = LogitsProcessorList([run.scores])
        return asked

    def _generate(self, ids: list[int], run: _Run, asked: dict[str, Any]) -> None:
        """Run `generate`, in the thread of its own, and keep the cache that it leaves."""
        # transformers' assisted decoding begins with the whole prompt, whatever a cache holds of it.
        may_reuse = run.is_one_sequence and not run.is_drafted
        cache = self._cache if may_reuse and self._reused(ids) else None
        self.reset()  # whatever comes, no cache of an unknown state stays
        run.cache = cache
        if cache is not None:
            asked["past_key_values"] = cache
        sequence: list[int] | None = None
        try:
            with self.flash.passes.watched(run):
                output = self._model.generate(**asked)
            sequence = output.sequences[0].tolist()
            run.cache = made_cache(output)
            run.end(sequence)
        except PassCancelledError:
            if run.is_between_passes:  # what the cache holds is what was told
                sequence = ids + run.tokens
        finally:
            if sequence is not None and run.is_one_sequence:
                self._keep(run.cache, sequence, len(ids))

    def _reused(self, ids: list[int]) -> int:
        """Cut the cache to what it has in common with a prompt, and return how many tokens that is; 0: all is new."""
        limit = min(len(ids) - 1, len(self._ids))  # one token at least must go through, to say what follows
        if self.flash.mode == "sparse":
            limit = min(limit, self._num_exact)
        common = next((at for at in range(limit) if ids[at] != self._ids[at]), limit)
        surplus = len(self._ids) - common
        if not common or self._cache is None:
            return 0
        if surplus:
            try:
                self._cache.crop(-surplus)
            except (RuntimeError, ValueError, NotImplementedError):  # a window that has moved on, a recurrent state
                return 0
        return common if num_cached_tokens(self._cache) == common else 0

    def _keep(self, cache: Any, sequence: list[int], num_prompt_tokens: int) -> None:
        if type(cache) is not DynamicCache:  # others are of a fixed size, or of several sequences, or can't be cut
            return
        num_cached = num_cached_tokens(cache)
        if 0 < num_cached <= len(sequence):
            self._cache, self._ids = cache, sequence[:num_cached]
            self._num_exact = min(num_prompt_tokens, num_cached)


@dataclass(frozen=True, kw_only=True)
class _New:
    """A token that has come, of which it is not known yet whether it is the last."""

    token: int
    text: str
    logprob: float | None


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _Run(PassWatch):
    """One `generate` in a thread of its own, and the steps that it gives to the caller's thread.

    Args:
        num_prompt_tokens: Tokens of the prompt.
        max_new_tokens: Tokens to generate at most.
        tokenizer: The pack's, or None.
        telemetry: The session's.
    """

    def __init__(
        self,
        num_prompt_tokens: int,
        max_new_tokens: int,
        tokenizer: PreTrainedTokenizerBase | None,
        telemetry: Telemetry,
    ) -> None:
        self.is_one_sequence, self.is_drafted = True, False
        self.cache: Any = None
        self.tokens: list[int] = []  # all that have come
        self.is_between_passes = False
        self.scores = _Scores()
        self.streamer = _Streamer(self)
        self._text = None if tokenizer is None else _Text(tokenizer)
        self._telemetry = telemetry
        self._num_prompt_tokens, self._max_new_tokens = num_prompt_tokens, max_new_tokens
        self._pending: list[_New] = []
        self._num_given = 0
        self._phase: Phase = "prompt"
        self._counters, self._wall_s = Counters(), 0.0
        self._given: SimpleQueue[Step | _Failure | None] = SimpleQueue()
        self._is_wanted = threading.Semaphore(0)  # once for every step that the caller asks for
        self._cancelled = threading.Event()

    # In the caller's thread.

    def steps(self) -> Iterator[Step]:
        """Yield what `work` gives.

        Raises:
            Exception: Whatever `work` ended with.
        """
        while True:
            self._is_wanted.release()
            given = self._next_given()
            if isinstance(given, _Failure):
                raise given.error
            if given is None:
                return
            yield given

    def _next_given(self) -> Step | _Failure | None:
        """Wait for what `work` gives. A signal that comes just before a wait begins does not end it, so waits are short."""
        while True:
            with suppress(Empty):
                return self._given.get(timeout=WAIT_S)

    def cancel(self) -> None:
        """Break off what runs; no step is wanted any more."""
        self._cancelled.set()
        self._is_wanted.release()

    # In the thread of its own.

    def work(self, generate: Callable[[], None]) -> None:
        """Call `generate`, and hand its end or its error to the caller."""
        self._is_wanted.acquire()
        try:
            generate()
        except BaseException as error:
            self._given.put(_Failure(error))
        else:
            self._given.put(None)

    def next_pass(self, cache: Any) -> None:
        """Give what has come, which is not the last, and wait until more is wanted."""
        self.cache = self.cache if cache is None else cache
        self.is_between_passes = True
        for new in self._pending:
            self._give(new, None)
        self._pending = []
        if self._cancelled.is_set():
            raise PassCancelledError
        self.is_between_passes = False

    def pass_ended(self, ended: Pass) -> None:
        """Count a pass."""
        self._phase = ended.phase
        self._counters.add(ended.counters)
        self._wall_s += ended.wall_s
        self._telemetry.add(ended)

    def is_cancelled(self) -> bool:
        """Return whether nobody waits for a step any more."""
        return self._cancelled.is_set()

    def came(self, tokens: list[int]) -> None:
        """Take tokens that were chosen."""
        for token in tokens:
            text = "" if self._text is None else self._text.add(token)
            self._pending.append(_New(token=token, text=text, logprob=self.scores.logprob(token)))
            self.tokens.append(token)

    def end(self, sequence: list[int]) -> None:
        """Give the rest of `sequence`, of which nothing follows; with beams that is all of it."""
        self.came(sequence[self._num_prompt_tokens + len(self.tokens) :])
        rest = "" if self._text is None else self._text.end()
        for index, new in enumerate(self._pending):
            if index < len(self._pending) - 1:
                self._give(new, None)
            else:
                is_full = len(self.tokens) >= self._max_new_tokens
                last = _New(token=new.token, text=new.text + rest, logprob=new.logprob)
                self._give(last, "length" if is_full else "stop")
        self._pending = []

    def _give(self, new: _New, finish: Finish | None) -> None:
        """Give a step, and wait until the caller asks for the next one."""
        if not self._cancelled.is_set():
            self._given.put(self.step(new, finish))
            self._is_wanted.acquire()

    def step(self, new: _New, finish: Finish | None) -> Step:
        """Return a token's step, with what the passes since the step before have cost."""
        step = Step(
            token=new.token,
            text=new.text,
            position=self._num_prompt_tokens + self._num_given,
            phase=self._phase,
            logprob=new.logprob,
            finish=finish,
            counters=self._counters,
            wall_s=self._wall_s,
        )
        self._counters, self._wall_s = Counters(), 0.0
        self._num_given += 1
        return step


class _Streamer:
    """What `generate` tells tokens to: first the prompt, then one or several at a time."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take tokens."""
        if not self._is_prompt:
            self._run.came(value.flatten().tolist())
        self._is_prompt = False

    def end(self) -> None:
        """Nothing: what follows is in the sequence that `generate` returns."""


class _Text(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
    """Turns tokens into text that later tokens do not change: whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._final = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._final += text

    def add(self, token: int) -> str:
        """Return the text that is final with a token."""
        self.put(torch.tensor([token]))
        return self._take()

    def end(self) -> str:
        """Return the rest."""
        super().end()
        return self._take()

    def _take(self) -> str:
        final, self._final = self._final, ""
        return final


@dataclass(eq=False)
class _Scores(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """Remembers the last token's scores, so that the one that is chosen can be told how probable it was."""

    _last: torch.Tensor | None = field(default=None)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._last = scores if scores.shape[0] == 1 else None
        return scores

    def logprob(self, token: int) -> float | None:
        """Return the logarithm of a token's probability; None where no scores are known for it alone."""
        last, self._last = self._last, None
        return None if last is None else float(last[0].float().log_softmax(-1)[token])


@dataclass(eq=False)
class _StopStrings(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Ends a sequence once its new text holds a stop string.

    transformers' own criterion works from the vocabulary alone, and fails for tokenizers that can't spell its test words.
    """

    tokenizer: PreTrainedTokenizerBase
    strings: tuple[str, ...]
    num_prompt_tokens: int

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tail = 4 * max(map(len, self.strings)) + 8  # a character takes up to four tokens of a byte each
        new_ids = input_ids[:, max(self.num_prompt_tokens, input_ids.shape[1] - tail) :]
        texts = self.tokenizer.batch_decode(new_ids)
        return torch.tensor([any(stop in text for stop in self.strings) for text in texts])
