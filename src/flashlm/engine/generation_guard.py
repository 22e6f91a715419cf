"""Know what a `generate` will take before its first token: refuse what can't fit, or stop at `context` with what there is.

A length that the caller gave is a wish: where it does not fit, nothing is computed. A length that nobody chose
(transformers' 20 tokens, a pipeline's 256, a server's 1024, a model's generation_config.json) is shortened with one warning.
The figures are taken where transformers has put lengths, beams and caches together: `_prepare_cache_for_generation`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashlm.engine.cache_room import cache_room, past_tokens
from flashlm.errors import BudgetError
from flashlm.memory.generation_memory import GenerationShape, generation_items
from flashlm.memory.needs import kv_cache_bytes_per_token
from flashlm.memory.pass_memory import (
    BEAM_LOGIT_BYTES,
    GREEDY_LOGIT_BYTES,
    OTHER_CACHES,
    PASS_SLACK_BYTES,
    SAMPLING_LOGIT_BYTES,
    SCORE_PIECE_TOKENS,
    check_pass,
    logits_bytes,
    most_that_fits,
)
from flashlm.transformers_seam import given_cache, pipeline_defaults, previous_cache_length

if TYPE_CHECKING:
    from flashlm.engine.pass_guard import PassGuard

logger = logging.getLogger(__name__)

STATIC = "static"  # in the names of transformers' cache implementations of a fixed size
DEFAULT_DRAFT_TOKENS = 20
SERVER_DEFAULT_TOKENS = 1024  # `transformers serve`, where neither the request nor the model says
MAX_FRAMES = 16
MAX_REQUESTS = 16  # of continuous batching at once, where the caller does not say
MAX_BATCH_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a caller of `generate` asked for, before transformers filled in defaults.

    Attributes:
        is_explicit: Whether the caller chose the length.
        num_input: Tokens of a sequence of the inputs, 0 where there are none.
        assistant: The assistant model, or None.
    """

    is_explicit: bool
    num_input: int
    assistant: Any = None


class Wishes:
    """The wishes of the generations that run now, innermost last; of each thread its own."""

    def __init__(self) -> None:
        self._threads = threading.local()

    @contextmanager
    def during(self, wish: Wish) -> Iterator[None]:
        """Make `wish` the present one."""
        stack = self._threads.__dict__.setdefault("stack", [])
        stack.append(wish)
        try:
            yield
        finally:
            stack.pop()

    @property
    def present(self) -> Wish:
        """The innermost wish of this thread."""
        stack = self._threads.__dict__.get("stack")
        return stack[-1] if stack else Wish(is_explicit=True, num_input=0)


def read_wish(call: dict[str, Any]) -> Wish:
    """Return the wish in the arguments of a `generate`."""
    config = call.get("generation_config")
    given = [call.get(name) or getattr(config, name, None) for name in ("max_new_tokens", "max_length")]
    lengths = [length for length in given if length is not None]
    inputs = [call.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
    shapes = [tensor.shape for tensor in inputs if tensor is not None and len(tensor.shape) > 1]
    return Wish(
        is_explicit=any(not _is_default_of_program(length) for length in lengths),
        num_input=max((int(shape[1]) for shape in shapes), default=0),
        assistant=call.get("assistant_model"),
    )


def _is_default_of_program(length: Any) -> bool:
    """Return whether one of transformers' own programs, a pipeline or its server, calls with a length of its own."""
    frame: Any = sys._getframe(1)
    for _ in range(MAX_FRAMES):
        if frame is None:
            return False
        module = frame.f_globals.get("__name__", "")
        if module.startswith("transformers.pipelines"):
            defaults = pipeline_defaults(frame.f_locals.get("self"))
            if defaults is not None:
                return bool(length == defaults.max_new_tokens)
        if module.startswith("transformers.cli"):
            return bool(length == SERVER_DEFAULT_TOKENS)
        frame = frame.f_back
    return False


def prepare_generation(
    guard: PassGuard, model: Any, config: Any, model_kwargs: dict[str, Any], batch_size: int, max_cache_length: int
) -> int:
    """Refuse a generation that can't fit, or shorten it where its length is only a default; return the cache's length.

    Args:
        guard: The model's.
        model: The model.
        config: transformers' generation config with all defaults filled in; `max_length` and the prefill's piece change.
        model_kwargs: The arguments of the passes to come.
        batch_size: Sequences before beams and returned sequences multiply them.
        max_cache_length: Tokens of a sequence that will have passed through the model.

    Raises:
        BudgetError: Before the first token.
    """
    wish, cache = guard.wishes.present, given_cache(model_kwargs)
    shape = _shape(guard, model, config, model_kwargs, batch_size, max_cache_length, wish)
    wanted = shape.num_new
    allowed = min(wanted, guard.context // shape.num_sequences - shape.num_past - shape.num_prompt + 1)
    if allowed < wanted and (wish.is_explicit or allowed < 1):
        hint = f"; or ask for at most max_new_tokens={allowed}" if allowed > 0 else ""
        guard.check_context(shape.num_sequences, shape.num_total, hint)
    shape = _in_pieces(guard, replace(shape, num_new=allowed), config, model_kwargs)
    if not wish.is_explicit and not _fits(guard, shape, cache):
        most = most_that_fits(lambda num: _fits(guard, replace(shape, num_new=num), cache), allowed)
        shape = replace(shape, num_new=max(most, 1))
    _check(guard, shape, cache)
    lost = wanted - shape.num_new
    if lost:
        config.max_length -= lost
        if config.max_new_tokens is not None:
            config.max_new_tokens -= lost
        logger.warning(
            "this generation stops after %d new tokens instead of the default %d: context=%d counts the tokens of all"
            " sequences together, and there are %d of %d prompt tokens; load the model with a larger context for more",
            shape.num_new,
            wanted,
            guard.context,
            shape.num_sequences,
            shape.num_past + shape.num_prompt,
        )
    config.prefill_chunk_size = shape.prefill_tokens
    return max_cache_length - lost


def _shape(
    guard: PassGuard,
    model: Any,
    config: Any,
    model_kwargs: dict[str, Any],
    batch_size: int,
    max_cache_length: int,
    wish: Wish,
) -> GenerationShape:
    cache = given_cache(model_kwargs)
    past = past_tokens(cache)
    has_whole_input = wish.num_input > past  # else only what is new was passed, beside the cache that holds the rest
    num_prompt = max(wish.num_input - past, 1) if has_whole_input else max(wish.num_input, 1)
    num_new = max_cache_length + 1 - (past + num_prompt if has_whole_input else num_prompt)
    width, tokens = _fixed(model, config, cache, max_cache_length)
    mask = model_kwargs.get("attention_mask")
    num_drafted, draft_bytes = _drafts(config, wish.assistant, num_new)
    rows = batch_size * max(config.num_beams or 1, config.num_return_sequences or 1)
    keeps = bool(config.return_dict_in_generate)
    if wish.assistant is not None and not hasattr(wish.assistant, "flash"):
        draft_bytes += rows * max_cache_length * _kv_token_bytes(wish.assistant)
    return GenerationShape(
        num_sequences=rows,
        num_past=past,
        num_prompt=num_prompt,
        num_new=max(num_new, 1),
        fixed_width=width,
        fixed_tokens=tokens,
        prefill_tokens=config.prefill_chunk_size,
        has_cache=config.use_cache is not False,
        row_bytes=_row_bytes(config),
        is_masked=mask is not None,
        num_kept_logits=keeps * (bool(config.output_scores) + bool(config.output_logits)),
        keeps_hidden_states=keeps and bool(config.output_hidden_states),
        keeps_attentions=keeps and bool(config.output_attentions),
        makes_hidden_states=bool(config.output_hidden_states),
        makes_attentions=bool(config.output_attentions),
        num_drafted=num_drafted,
        draft_bytes=draft_bytes,
        has_second_cache=config.guidance_scale not in (None, 1),
    )


def _row_bytes(config: Any) -> int:
    if config.do_sample:
        return SAMPLING_LOGIT_BYTES
    return BEAM_LOGIT_BYTES if (config.num_beams or 1) > 1 else GREEDY_LOGIT_BYTES


def _fixed(model: Any, config: Any, cache: Any, max_cache_length: int) -> tuple[int, int]:
    """Return width and mean tokens of a cache of a fixed size that was given or will be made; zeros where it grows."""
    if cache is not None:
        room = cache_room(cache, max_cache_length)
        return (room.width, room.num_cached) if room.capacity else (0, 0)
    if STATIC not in str(config.cache_implementation):
        return 0, 0
    # transformers never makes one smaller than the last one
    lengths = (
        max_cache_length,
        getattr(config, "max_cache_len", None) or 0,
        previous_cache_length(model),
    )
    return max(lengths), max(lengths)


def _drafts(config: Any, assistant: Any, num_new: int) -> tuple[int, int]:
    """Return how many tokens are proposed at once, and the bytes of the proposer's logits."""
    if config.prompt_lookup_num_tokens:
        return int(config.prompt_lookup_num_tokens), 0
    if assistant is None:
        return 0, 0
    drafting = getattr(assistant, "generation_config", None)
    num_drafted = int(getattr(drafting, "num_assistant_tokens", None) or DEFAULT_DRAFT_TOKENS)
    if "heuristic" in str(getattr(drafting, "num_assistant_tokens_schedule", "")):
        num_drafted *= 3  # it grows by two with every proposal that was taken whole
    num_drafted = min(num_drafted, num_new)
    vocab_size = int(assistant.config.get_text_config(decoder=True).vocab_size)
    return num_drafted, num_drafted * vocab_size * 12


def _kv_token_bytes(assistant: Any) -> int:
    return kv_cache_bytes_per_token(assistant.config, assistant.dtype.itemsize)


def _in_pieces(guard: PassGuard, shape: GenerationShape, config: Any, model_kwargs: dict[str, Any]) -> GenerationShape:
    """Return `shape` with the prompt in pieces, where attention writes its scores out and the whole does not fit."""
    cache = given_cache(model_kwargs)
    has_states = any(getattr(cache, "is_linear", None) or ())  # a prompt in pieces would need their states carried on
    if (
        not guard.facts.writes_scores
        or not shape.has_cache
        or shape.num_drafted
        or has_states
        or config.prefill_chunk_size is not None
        or _fits(guard, shape, cache)
    ):
        return shape
    most = -(-shape.num_prompt // SCORE_PIECE_TOKENS)
    pieces = most_that_fits(
        lambda num: _fits(guard, replace(shape, prefill_tokens=num * SCORE_PIECE_TOKENS), cache), most
    )
    return replace(shape, prefill_tokens=pieces * SCORE_PIECE_TOKENS) if pieces else shape


def _items(guard: PassGuard, shape: GenerationShape, cache: Any) -> dict[str, int]:
    items = generation_items(guard.facts, shape)
    items[OTHER_CACHES] = items.get(OTHER_CACHES, 0) + guard.caches.others_bytes(cache)
    return items


def _fits(guard: PassGuard, shape: GenerationShape, cache: Any) -> bool:
    return sum(_items(guard, shape, cache).values()) + PASS_SLACK_BYTES <= guard.available_bytes()


def _check(guard: PassGuard, shape: GenerationShape, cache: Any) -> None:
    if not _fits(guard, shape, cache):
        guard.caches.forget_dead()
    sequences = f"{shape.num_sequences} sequences of " if shape.num_sequences > 1 else ""
    what = f"generating {shape.num_new} tokens after {sequences}{shape.num_past + shape.num_prompt}"
    check_pass(_items(guard, shape, cache), guard.available_bytes(), what)


def bound_batching(guard: PassGuard, config: Any) -> None:
    """Keep continuous batching, whose cache would fill the machine's memory, within `context`.

    Args:
        guard: The model's.
        config: transformers' continuous batching config; what it leaves open is set.

    Raises:
        BudgetError: It asks for more.
    """
    page = int(config.page_size)
    if config.num_blocks is None:
        page = config.page_size = min(page, max(guard.context // 4, 4))
        config.num_blocks = max(guard.context // page, 1)
    if config.max_batch_tokens is None:
        config.max_batch_tokens = min(guard.context, MAX_BATCH_TOKENS)
    if config.max_requests_per_batch is None:
        config.max_requests_per_batch = MAX_REQUESTS
    config.use_async_batching = bool(config.use_async_batching)
    guard.check_context(1, config.num_blocks * page, " (continuous batching: num_blocks x page_size)")
    rows_bytes = logits_bytes(guard.facts, int(config.max_requests_per_batch), has_loss=True)
    if rows_bytes + PASS_SLACK_BYTES > guard.available_bytes():
        raise BudgetError(
            f"continuous batching of {config.max_requests_per_batch} requests makes logits of {rows_bytes} bytes, more than"
            f" the {guard.available_bytes()} that the budget has: lower max_requests_per_batch",
            needed_bytes=rows_bytes,
            available_bytes=guard.available_bytes(),
        )


def generation_members(plain: Any) -> dict[str, Any]:
    """Return the methods of a guarded model's class that concern `generate`; none where it can't generate."""
    if not hasattr(plain, "_prepare_cache_for_generation"):
        return {}
    names = list(inspect.signature(plain.generate).parameters)[1:]
    signature = inspect.signature(plain._prepare_cache_for_generation)

    @functools.wraps(plain.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        wish = read_wish({**dict(zip(names, args, strict=False)), **kwargs})
        with self._flash_guard.wishes.during(wish):
            return plain.generate(self, *args, **kwargs)

    @functools.wraps(plain._prepare_cache_for_generation)
    def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        call = bound.arguments
        call["max_cache_length"] = prepare_generation(
            self._flash_guard,
            self,
            call["generation_config"],
            call["model_kwargs"],
            call["batch_size"],
            call["max_cache_length"],
        )
        return plain._prepare_cache_for_generation(*bound.args, **bound.kwargs)

    members = {"generate": generate, "_prepare_cache_for_generation": _prepare_cache_for_generation}
    if hasattr(plain, "init_continuous_batching"):
        members["init_continuous_batching"] = _batching(plain)
    return members


def _batching(plain: Any) -> Any:
    signature = inspect.signature(plain.init_continuous_batching)

    @functools.wraps(plain.init_continuous_batching)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        from flashlm.transformers_seam import ContinuousBatchingConfig

        bound = signature.bind(self, *args, **kwargs)
        config = bound.arguments.get("continuous_batching_config")
        if config is None:
            generation = bound.arguments.get("generation_config") or self.generation_config
            found = getattr(generation, "continuous_batching_config", None)
            config = found if isinstance(found, ContinuousBatchingConfig) else ContinuousBatchingConfig()
            bound.arguments["continuous_batching_config"] = config
        bound_batching(self._flash_guard, config)
        return plain.init_continuous_batching(*bound.args, **bound.kwargs)

    return init_continuous_batching
