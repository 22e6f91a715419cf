"""A model's passes: begun whenever it is called, with the phase that the caller or transformers' `generate` names.

Where a phase comes from, in this order:

1. `with model.flash.phase("verify"):` around the call;
2. `generate`, which tells `prepare_inputs_for_generation` what the inputs are for that it then calls the model with: the
   first iteration (all pieces of a prompt, also after a cache that holds earlier turns) is a prompt; later ones are one
   token per sequence, or drafted tokens to be verified (assisted generation, prompt lookup);
3. packed inputs (`cu_seq_lens_q`, transformers' continuous batching): sequences of one token are decoded, others prompts;
4. any other call: one token per sequence is decoded, more are a prompt. That is the exact way wherever in doubt.

The model's own methods are wrapped rather than hooked: torch runs no forward hook after an interrupt, and none at all where
a wrapper such as an adapter's calls `forward` itself.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flashlm.engine.counters import Counters
from flashlm.engine.forward_pass import PHASES, Pass, PassWatch, Phase, running_pass
from flashlm.engine.telemetry import Telemetry
from flashlm.engine.turn import Turn
from flashlm.errors import ConfigError
from flashlm.transformers_seam import given_cache

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class _Chosen:
    """A phase that a program has named, for the model whose passes these are."""

    passes: Passes
    phase: Phase


@dataclass(frozen=True, eq=False)
class _Watched:
    """Who watches the passes of one model."""

    passes: Passes
    watch: PassWatch


_watched: ContextVar[_Watched | None] = ContextVar("flashlm_watch", default=None)
_chosen: ContextVar[tuple[_Chosen, ...]] = ContextVar("flashlm_phase", default=())


@dataclass(frozen=True, kw_only=True)
class CallSize:
    """What a call of the model asks for.

    Attributes:
        num_sequences, num_tokens: Of the input.
        is_small: So little that torch should keep to one thread meanwhile.
    """

    num_sequences: int
    num_tokens: int
    is_small: bool


class Passes:
    """Begins a pass for every call of a model, and collects what each has cost.

    Attributes:
        totals: Of all passes since loading, failed ones too, and of what was read outside of them.
        telemetry: A record per pass.
    """

    def __init__(self) -> None:
        self.totals = Counters()
        self.telemetry = Telemetry()
        self._adding = Turn()  # not a lock, which an interrupt at its end would leave shut
        self._prepared = threading.local()  # generate prepares inputs in the thread that it calls the model in

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Name the phase of this model's passes in the calling thread or task, within the context.

        Raises:
            ConfigError: There is no such phase.
        """
        if phase not in PHASES:
            raise ConfigError(f"phase={phase!r} is unknown: choose one of {', '.join(PHASES)}")
        mine = _Chosen(self, phase)
        _chosen.set((*_chosen.get(), mine))
        try:
            yield
        finally:
            # By identity, not by token: generators may leave in another order, or in another context, than they came.
            _chosen.set(tuple(each for each in _chosen.get() if each is not mine))

    @contextmanager
    def watched(self, watch: PassWatch) -> Iterator[None]:
        """Let `watch` see this model's passes in the calling thread or task."""
        token = _watched.set(_Watched(self, watch))
        try:
            yield
        finally:
            _watched.reset(token)

    def _watch(self) -> PassWatch | None:
        watched = _watched.get()
        return watched.watch if watched is not None and watched.passes is self else None

    def attach(
        self, model: nn.Module, streamed: Sequence[str], measure: Callable[[Any, Any, dict[str, Any]], CallSize]
    ) -> None:
        """Make every call of `model` a pass, and calls of models within it that come from outside of one.

        Args:
            model: What users call.
            streamed: Names of its streamed modules: a model that holds one can be called by itself, for no logits.
            measure: Looks at a call's model, positional and named arguments before it runs.
        """
        for name, module in list(model.named_modules()):
            is_holder = isinstance(module, PreTrainedModel) and any(each.startswith(f"{name}.") for each in streamed)
            if name and not is_holder:
                continue
            around = functools.partial(self._call, is_inner=bool(name), measure=measure, module=weakref.ref(module))
            _replace_method(module, "forward", around)
        if hasattr(model, "prepare_inputs_for_generation"):
            _replace_method(model, "prepare_inputs_for_generation", self._prepare)

    def _call(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_inner: bool,
        measure: Callable[[Any, Any, dict[str, Any]], CallSize],
        module: weakref.ref[nn.Module],
    ) -> Any:
        running = running_pass()
        if is_inner and running is not None and running.totals is self.totals:
            return forward(*args, **kwargs)
        size = measure(module(), args, kwargs)
        mine = self.new_pass(size, args, kwargs)
        try:
            output = mine.run(lambda: forward(*args, **kwargs), on_one_thread=size.is_small)
        finally:
            with self._adding.take(_nothing, _nothing):
                self.totals.add(mine.counters)
        self.telemetry.add(mine)
        if mine.watch is not None:
            mine.watch.pass_ended(mine)
        return output

    def new_pass(self, size: CallSize, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """Return the pass of a call with these arguments."""
        num_sequences, num_tokens, lengths = size.num_sequences, size.num_tokens, None
        phase = self._named(args, kwargs)
        if phase is None:
            packed = _packed_lengths(kwargs, num_sequences * num_tokens)
            if packed is not None and len(set(packed)) == 1:
                num_sequences, num_tokens = len(packed), packed[0]
            elif packed is not None:
                lengths = torch.tensor(packed).repeat_interleave(torch.tensor(packed))
            phase = "decode" if num_tokens == 1 else "prompt"
        return Pass(
            phase=phase,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            totals=self.totals,
            lengths=lengths,
            watch=self._watch(),
        )

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Phase | None:
        """Return the phase that the program or `generate` has named, None where neither has."""
        mine = [each.phase for each in _chosen.get() if each.passes is self]
        if mine:
            return mine[-1]
        # Only for the very inputs that were prepared: whatever else is called meanwhile is not what was meant.
        inputs_ref, phase = getattr(self._prepared, "noted", (lambda: None, None))
        inputs = inputs_ref()
        is_meant = inputs is not None and any(each is inputs for each in (*args, *kwargs.values()))
        return phase if is_meant else None

    def _prepare(self, prepare: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepare inputs, and note what `generate` wants them for."""
        if (watch := self._watch()) is not None:
            watch.next_pass(given_cache(kwargs))
        prepared = prepare(*args, **kwargs)
        inputs = prepared.get("input_ids")
        inputs = prepared.get("inputs_embeds") if inputs is None else inputs
        if isinstance(inputs, torch.Tensor) and inputs.ndim > 1:
            phase = _phase_of(kwargs, given_cache(prepared), inputs.shape[1])
            self._prepared.noted = (weakref.ref(inputs), phase)
        return prepared


def _phase_of(asked: dict[str, Any], cache: Any, num_tokens: int) -> Phase:
    """Return what inputs of `num_tokens` per sequence are for that were prepared with the arguments `asked`."""
    if asked.get("is_first_iteration"):
        return "prompt"
    if num_tokens == 1:
        return "decode"
    # Without a cache every step takes the whole text again, which is a prompt's work.
    is_drafted = asked.get("next_sequence_length") is not None and num_cached_tokens(cache) > 0
    return "verify" if is_drafted else "prompt"


def num_cached_tokens(cache: Any) -> int:
    """Return the tokens of a sequence that a transformers cache holds; 0 without one, or where it can't tell."""
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0


def _packed_lengths(kwargs: dict[str, Any], num_tokens: int) -> list[int] | None:
    """Return the lengths of sequences that lie packed in one row of `num_tokens` tokens, None where none do."""
    bounds = kwargs.get("cu_seq_lens_q")
    if not isinstance(bounds, torch.Tensor) or bounds.ndim != 1 or len(bounds) < 2:
        return None
    lengths = [int(length) for length in bounds.diff().tolist() if length > 0]
    return lengths if sum(lengths) == num_tokens else None


def _nothing(*_: object) -> None:
    """Do nothing when a turn begins or ends."""


def _replace_method(owner: Any, name: str, around: Around) -> None:
    """Give `owner` a method of its own that runs `around` the one that it has; holds no reference to `owner`."""
    own: Callable[..., Any] | None = owner.__dict__.get(name)  # another library's wrapper
    function = getattr(type(owner), name)
    owner_ref = weakref.ref(owner)

    def method(*args: Any, **kwargs: Any) -> Any:
        model = owner_ref()
        if model is None:
            raise ConfigError(f"the model of this {name} is gone: keep the model as long as its methods")
        # Not as a bound method: torch.compile takes one for the attribute of its name, which is this very wrapper.
        return around(own or functools.partial(getattr(type(model), name), model), args, kwargs)

    signature = inspect.signature(getattr(owner, name))  # transformers asks for it to check arguments
    functools.update_wrapper(method, function)
    del method.__wrapped__  # type: ignore[attr-defined]  # it has `self`, which the method has not
    method.__signature__ = signature  # type: ignore[attr-defined]
    setattr(owner, name, method)
