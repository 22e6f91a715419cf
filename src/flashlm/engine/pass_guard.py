"""Count what a forward pass will allocate before it does, and refuse what the budget can't hold.

`guard_passes` gives a loaded model (and its decoder, which people call for hidden states) a subclass of its own class, whose
`forward` asks the guard first. A subclass, and no hooks: it also sees `model.forward(...)`, and can run the output layer in
pieces where `labels` are given (`chunked_loss`). How much there is:

    pool = dram - process before loading - weights - pinned blocks, staging and caches - what the process holds beyond plan

but never less than what loading reserved for passes of `context` tokens.
"""

from __future__ import annotations

import functools
import gc
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from flashlm.engine.cache_room import LiveCaches, cache_room, past_tokens
from flashlm.engine.chunked_loss import ChunkedLoss, can_chunk
from flashlm.engine.generation_guard import Wishes, generation_members
from flashlm.engine.kv_pass import begin_pass, end_pass
from flashlm.engine.turn import Turn
from flashlm.errors import BudgetError
from flashlm.memory.limits import process_bytes, room_bytes
from flashlm.memory.needs import SLACK_BYTES, pass_facts, writes_scores
from flashlm.memory.pass_memory import (
    CACHE,
    LOGITS,
    OTHER_CACHES,
    PASS_SLACK_BYTES,
    STATIC_CACHE,
    PassFacts,
    PassShape,
    check_pass,
    logits_bytes,
    pass_items,
)
from flashlm.pack.manifest import Manifest
from flashlm.planner.decide import Decision
from flashlm.sizes import format_size
from flashlm.storage.platform import release_free_memory
from flashlm.transformers_seam import attention_implementation, given_cache, made_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOM_MARGIN_BYTES = 16 << 20  # what the allocator may round up or keep in a pass
ROOM_LASTS_S = 0.2  # for which what the kernel had left is taken to be there still, less what this process has taken
AMPLE_BYTES = 512 << 20  # so much beyond a pass's needs: others on the machine may take some meanwhile
ROOM_WAIT_S = 0.01  # between looks, where another thread's pass is waited for
MAX_LOSS_PIECE_BYTES = 24 << 20  # the heaps of threads hold 64 MiB each, and larger buffers leave holes in them


class PassGuard:
    """What one model's passes may allocate, and what they are doing now.

    Args:
        manifest: The pack's.
        decision: How it runs: placement and context.
        config: Its transformers config.
    """

    def __init__(self, manifest: Manifest, decision: Decision, config: Any) -> None:
        facts = pass_facts(config, [entry.unit for entry in manifest.units], manifest.dtype)
        placement, needs = decision.placement, decision.placement.needs
        self.context = decision.context
        self.caches = LiveCaches()
        self.chunked = ChunkedLoss()
        self.wishes = Wishes()
        self._facts = facts
        self._text = config.get_text_config(decoder=True)
        self._attention = attention_implementation(self._text)
        self._config = config
        self._threads = threading.local()
        self._turn = Turn()
        self._in_flight: dict[int, int] = {}  # bytes of running passes, by thread
        self._reserved_bytes = needs.kv_cache_bytes + needs.working_bytes
        self._fixed_bytes = needs.process_bytes + needs.resident_bytes + needs.predictor_bytes
        self._fixed_bytes += placement.pinned_bytes + placement.staging_bytes + placement.cache_bytes
        self._dram_bytes = placement.dram_bytes
        self._room_seen = (float("-inf"), 0, 0)  # when, what the process held, and what the kernel had left

    def __deepcopy__(self, memo: Any) -> PassGuard:
        """Return itself: peft copies an output layer that an adapter replaces, and the copy is of the same model."""
        return self

    @property
    def facts(self) -> PassFacts:
        """What passes depend on now: the attention implementation may change after loading."""
        holds_scores = writes_scores(self._config)
        return (
            self._facts
            if holds_scores == self._facts.writes_scores
            else replace(self._facts, writes_scores=holds_scores)
        )

    def available_bytes(self, unplanned_bytes: int | None = None) -> int:
        """Return what the budget has for caches and working memory: at least what loading reserved for them."""
        unplanned_bytes = self._unplanned_bytes() if unplanned_bytes is None else unplanned_bytes
        return max(self._reserved_bytes, self._dram_bytes - self._fixed_bytes - unplanned_bytes)

    def _unplanned_bytes(self) -> int:
        """Return what the process holds beside what was planned: a caller's own data, outputs kept of earlier passes."""
        return max(process_bytes() - self._planned_bytes(), 0)

    def _planned_bytes(self) -> int:
        return self._fixed_bytes + self.caches.others_bytes(None) + SLACK_BYTES

    def check_context(self, num_sequences: int, num_tokens: int, hint: str = "") -> None:
        """Refuse sequences whose tokens are more than the KV cache was planned for, over all of them.

        Raises:
            BudgetError: It says which context would do.
        """
        wanted = num_sequences * num_tokens
        if wanted <= self.context:
            return
        per_token = self._facts.kv_token_bytes
        each = f"{num_sequences} sequences of {num_tokens} tokens need"
        raise BudgetError(
            f"{each} a KV cache of {wanted} tokens, but this model was loaded for context={self.context}, which counts"
            f" the tokens of all sequences together: load it with context={wanted} or more{hint}",
            needed_bytes=wanted * per_token,
            available_bytes=self.context * per_token,
        )

    def items(self, shape: PassShape, cache: Any) -> dict[str, int]:
        """Return what a pass of `shape` takes, by item, and what caches other than `cache` hold meanwhile."""
        items = pass_items(self.facts, shape)
        items[OTHER_CACHES] = self.caches.others_bytes(cache)
        if items[OTHER_CACHES] and sum(items.values()) + PASS_SLACK_BYTES > self.available_bytes():
            self.caches.forget_dead()
            items[OTHER_CACHES] = self.caches.others_bytes(cache)
        return items

    def check(self, shape: PassShape, cache: Any, what: str) -> None:
        """Refuse a pass of `shape` with `cache` where it does not fit.

        Raises:
            BudgetError: It lists what needs how much, and what to do.
        """
        items = self.items(shape, cache)
        unplanned_bytes = self._unplanned_bytes()
        is_ample = not unplanned_bytes or self._has_ample_room(items, unplanned_bytes)
        if not is_ample:  # much of it may be what the allocator keeps
            release_free_memory()
            unplanned_bytes = self._unplanned_bytes()
        check_pass(items, self.available_bytes(unplanned_bytes), what)
        is_tight = not is_ample and unplanned_bytes > 0
        if is_tight:  # and so nothing is read of the control groups in normal use
            self._check_room(shape, items, what, unplanned_bytes)
        self.note(cache, items)
        self._threads.items, self._threads.is_tight = items, is_tight

    def _has_ample_room(self, items: dict[str, int], unplanned_bytes: int) -> bool:
        """Return whether a pass fits so easily, by what was seen a moment ago, that no closer look is needed.

        A closer look takes milliseconds, as long as a token of a small model does.
        """
        needed_bytes = sum(items.values()) + PASS_SLACK_BYTES
        held_bytes = self._planned_bytes() + unplanned_bytes
        seen_s, seen_held_bytes, seen_room_bytes = self._room_seen
        if time.monotonic() - seen_s > ROOM_LASTS_S or needed_bytes > self.available_bytes(unplanned_bytes):
            return False
        left_bytes = min(self._dram_bytes - held_bytes, seen_room_bytes - max(held_bytes - seen_held_bytes, 0))
        return needed_bytes + AMPLE_BYTES <= left_bytes

    def _check_room(self, shape: PassShape, items: dict[str, int], what: str, unplanned_bytes: int) -> None:
        """Refuse a pass within the plan too, where a process that has outgrown it would be killed by the kernel."""
        held = (OTHER_CACHES, CACHE, STATIC_CACHE) if shape.width > shape.num_tokens else (OTHER_CACHES,)
        needed_bytes = sum(size for name, size in items.items() if name not in held) + ROOM_MARGIN_BYTES
        available_bytes = room_bytes()
        self._room_seen = time.monotonic(), self._planned_bytes() + unplanned_bytes, available_bytes
        if needed_bytes <= available_bytes:
            return
        gc.collect()
        available_bytes = room_bytes()
        if needed_bytes > available_bytes:
            raise BudgetError(
                f"{what} needs {format_size(needed_bytes)} more, but the kernel has {format_size(max(available_bytes, 0))}"
                f" left for this process, which holds {format_size(unplanned_bytes)} that were not planned for in"
                f" dram={format_size(self._dram_bytes)} (outputs of earlier passes, data of your own): drop some of it",
                needed_bytes=needed_bytes,
                available_bytes=max(available_bytes, 0),
            )

    def note(self, cache: Any, items: dict[str, int]) -> None:
        """Remember what `cache` takes from now on."""
        if cache is not None:
            self.caches.note(cache, items[CACHE] + items[STATIC_CACHE])

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # asks the operating system: nothing to trace
    def check_call(self, call: dict[str, Any], *, makes_logits: bool) -> PassShape | None:
        """Refuse a call that does not fit, but for logits with labels; return its shape, None where it has no tokens.

        Args:
            call: A forward's arguments by name.
            makes_logits: Whether it ends with the output layer.
        """
        shape, cache = self.shape_of(call, makes_logits=makes_logits), given_cache(call)
        if shape is None:
            return None
        self.check_context(shape.num_sequences, past_tokens(cache) + shape.num_tokens)
        if not shape.has_loss:
            self.check(shape, cache, _describe(shape))
        return shape

    def check_head(self, num_positions: int) -> None:
        """Refuse logits of so many positions where they do not fit, for who calls the output layer by itself.

        Raises:
            BudgetError: It says how much they take.
        """
        items = {LOGITS: logits_bytes(self.facts, num_positions), OTHER_CACHES: self.caches.others_bytes(None)}
        check_pass(items, self.available_bytes(), f"the output layer on {num_positions} positions")

    def shape_of(self, call: dict[str, Any], *, makes_logits: bool) -> PassShape | None:
        """Return the shape of a forward call."""
        tokens = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        if tokens is None or tokens.dim() < 2:
            return None
        num_sequences, num_tokens = int(tokens.shape[0]), int(tokens.shape[1])
        cache = given_cache(call)
        room = cache_room(cache, past_tokens(cache) + num_tokens)
        has_cache = cache is not None or self._flag(call, "use_cache")
        return PassShape(
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            width=room.width,
            num_cached=room.num_cached if has_cache else 0,
            capacity=room.capacity,
            num_kept=_num_kept(call, num_tokens) if makes_logits else 0,
            is_masked=_is_masked(call.get("attention_mask")),
            has_hidden_states=self._flag(call, "output_hidden_states"),
            has_attentions=self._flag(call, "output_attentions"),
            has_loss=makes_logits and call.get("labels") is not None,
        )

    def _flag(self, call: dict[str, Any], name: str) -> bool:
        value = call.get(name)
        return bool(getattr(self._config, name, name == "use_cache") if value is None else value)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While a checked pass runs in this thread, its decoder asks nobody; passes of other threads count beside it."""
        before = self.is_inside
        if not before:
            self._await_room()
        self._threads.is_inside = True
        try:
            yield
        finally:
            self._threads.is_inside = before
            if not before:
                self._in_flight.pop(threading.get_ident(), None)

    def _await_room(self) -> None:
        """Wait until the passes of other threads leave room for the one that this thread has checked last."""
        items: dict[str, int] = self._threads.__dict__.get("items", {})
        needed_bytes = sum(items.values()) + PASS_SLACK_BYTES
        held = (OTHER_CACHES, CACHE, STATIC_CACHE)  # they outlive the pass, and are counted as live caches
        mine_bytes = sum(size for name, size in items.items() if name not in held)
        has_room = False
        while not has_room:
            # A native turn, and no lock of Python's, which an interrupt between two instructions could leave locked.
            with self._turn.take(self._enter, lambda *_: None, needed_bytes, mine_bytes) as has_room:
                if has_room and (len(self._in_flight) > 1 or self._threads.__dict__.get("is_tight", True)):
                    release_free_memory()  # a thread's own heap keeps what is freed
            if not has_room:
                time.sleep(ROOM_WAIT_S)

    def _enter(self, needed_bytes: int, mine_bytes: int) -> bool:
        """Let this thread's pass in where the running ones of others leave room for it; return whether they do."""
        others = list(self._in_flight.values())
        if others and sum(others) + needed_bytes > self.available_bytes():
            return False
        self._in_flight[threading.get_ident()] = mine_bytes
        return True

    @property
    def is_inside(self) -> bool:
        """Whether this thread is in a pass that was checked."""
        return getattr(self._threads, "is_inside", False)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def loss_positions(self, shape: PassShape, call: dict[str, Any], model: Any) -> tuple[int, int] | None:
        """Return how many positions' losses fit at once, and the bytes that they may take; None: all of them fit.

        Raises:
            BudgetError: Not one position fits, or the loss can't be made in pieces.
        """
        cache = given_cache(call)
        try:
            self.check(shape, cache, _describe(shape))
            return None
        except BudgetError:
            if not can_chunk(model, call):
                raise
        one = replace(shape, num_kept=1)
        self.check(one, cache, _describe(one))
        rest_bytes = sum(self.items(replace(shape, num_kept=0), cache).values()) + PASS_SLACK_BYTES
        unplanned_bytes = self._unplanned_bytes()
        left_bytes = self.available_bytes(unplanned_bytes) - rest_bytes
        if unplanned_bytes:
            left_bytes = min(left_bytes, room_bytes() // 2)
        each_bytes = logits_bytes(self.facts, shape.num_sequences, has_loss=True)
        num_positions = max(min(left_bytes, MAX_LOSS_PIECE_BYTES) // each_bytes, 1)
        self._threads.items[LOGITS] += num_positions * each_bytes
        return num_positions, left_bytes


def guard_passes(model: PreTrainedModel, manifest: Manifest, decision: Decision) -> PassGuard:
    """Make every pass of `model` and of its decoder ask a guard before it allocates; return the guard."""
    guard = PassGuard(manifest, decision, model.config)
    decoder = model.get_decoder()
    if decoder is not model:
        _guard_module(decoder, guard, _guarded_decoder)
    _guard_module(model, guard, _guarded_model)
    head = model.get_output_embeddings()
    if head is not None:  # some call it themselves, on what the decoder gave
        _guard_module(head, guard, _guarded_head)
    return guard


def _guard_module(module: Any, guard: PassGuard, subclass: Callable[[Any], type]) -> None:
    module._flash_guard = guard
    module.__class__ = subclass(type(module))


@functools.cache
def _guarded_decoder(plain: Any) -> type:
    names = list(inspect.signature(plain.forward).parameters)[1:]

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        guard: PassGuard = self._flash_guard
        if guard.is_inside:
            return guard.chunked.decode(lambda: plain.forward(self, *args, **kwargs), (*args, *kwargs.values()))
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        guard.check_call(call, makes_logits=False)
        begin_pass(given_cache(call))  # not before: a refused pass has written nothing
        output = plain.forward(self, *args, **kwargs)
        end_pass(given_cache(call))
        return output

    return _subclass(plain, {"forward": forward})


@functools.cache
def _guarded_head(plain: Any) -> type:
    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        guard: PassGuard = self._flash_guard
        if not guard.is_inside:
            for tokens in (*args[:1], kwargs.get("input")):
                if isinstance(tokens, torch.Tensor):
                    guard.check_head(math.prod(tokens.shape[:-1]))
        return plain.forward(self, *args, **kwargs)

    return _subclass(plain, {"forward": forward})


@functools.cache
def _guarded_model(plain: Any) -> type:
    names = list(inspect.signature(plain.forward).parameters)[1:]

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        guard: PassGuard = self._flash_guard
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        shape = guard.check_call(call, makes_logits=True)
        pieces = guard.loss_positions(shape, call, self) if shape is not None and shape.has_loss else None
        with guard.inside(), guard.chunked.suspended():
            begin_pass(given_cache(call))  # not before: a refused pass has written nothing
            run = functools.partial(plain.forward, self)
            if pieces is None:
                output = run(*args, **kwargs)
            else:
                output = guard.chunked.run(run, call, pieces[0], available_bytes=pieces[1])
                release_free_memory()  # of the pieces: the heap of a thread that passes once would keep them
        end_pass(given_cache(call))
        made = made_cache(output)
        if shape is not None and made is not None and made is not given_cache(call):
            guard.note(made, pass_items(guard.facts, shape))
        return output

    def loss_function(self: Any) -> Any:
        return self._flash_guard.chunked.loss_function(plain.loss_function.fget(self))

    members: dict[str, Any] = {"forward": forward, **generation_members(plain)}
    if isinstance(getattr(plain, "loss_function", None), property):
        members["loss_function"] = property(loss_function, plain.loss_function.fset)
    members["plain_loss_function"] = lambda self: plain.loss_function.fget(self)
    return _subclass(plain, members)


def _subclass(plain: type, members: dict[str, Any]) -> type:
    """Return a subclass that looks like its base: transformers and others go by names of classes."""
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (plain,), {**names, **members})


def _num_kept(call: dict[str, Any], num_tokens: int) -> int:
    kept = call.get("logits_to_keep", 0)
    if isinstance(kept, torch.Tensor):
        return int(kept.numel())
    return len(range(num_tokens)[-int(kept) :]) if kept else num_tokens  # as models slice: -1 is all but the first


def _is_masked(mask: Any) -> bool:
    if not isinstance(mask, torch.Tensor):
        return mask is not None
    return mask.dim() != 2 or not bool(mask.all())


def _describe(shape: PassShape) -> str:
    sequences = f"{shape.num_sequences} sequences of " if shape.num_sequences > 1 else ""
    logits = f" with the logits of {shape.num_kept} positions each" if shape.num_kept > 1 else ""
    return f"a pass of {sequences}{shape.num_tokens} tokens{logits}"
