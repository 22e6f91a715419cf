"""One prompt through a pack, with what it cost: what `flashlm generate` runs, for programs too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from flashlm.engine.decoding import Decoding, Sampling, decide_decoding
from flashlm.engine.load import load_opened
from flashlm.engine.load_progress import Progress, watch_loading
from flashlm.engine.opened import open_pack
from flashlm.engine.positions import check_positions
from flashlm.engine.prompts import as_message, check_text, check_vocabulary, encode, read_tokenizer
from flashlm.engine.runtime import FlashRuntime
from flashlm.engine.session import Session
from flashlm.errors import ConfigError
from flashlm.memory.limits import peak_process_bytes
from flashlm.planner.settings import Asked, make_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What came out: the new text and what it cost, ready for JSON."""

    text: str
    stats: dict[str, Any]


def generate(
    pack: Path,
    prompt: str,
    *,
    sampling: Sampling | None = None,
    is_chat: bool = False,
    on_decided: Callable[[Decoding], None] | None = None,
    on_loading: Progress | None = None,
    on_loaded: Callable[[FlashRuntime], None] | None = None,
    on_prompt: Progress | None = None,
    on_text: Callable[[str], None] | None = None,
    **asked: Unpack[Asked],
) -> Generation:
    """Load `pack`, continue `prompt`, and report the cost.

    Args:
        pack: Folder made by `flashlm convert`.
        prompt: The text to continue.
        sampling: How tokens are chosen.
        is_chat: Wrap the prompt in the pack's chat template, as the user's turn.
        on_decided: Called before loading, with how tokens will be chosen.
        on_loading: Called with (bytes read, bytes in all, "reading weights") while weights are read.
        on_loaded: Called once the model is ready.
        on_prompt: Called with (layers done, layers, "prompt") as the prompt goes through the model.
        on_text: Called with every piece of new text as it comes; with beams once, at the end.
        **asked: `dram`, `mode`, `context` and so on, as in `load`; context defaults to just what this run needs.

    Raises:
        ConfigError: A setting is out of range, or the prompt does not fit the context or the model.
        PackError, BudgetError, StorageError: As in `load`.
    """
    import torch

    sampling = sampling or Sampling()
    settings = make_settings(**asked)
    given = as_message(prompt) if is_chat else prompt
    check_text(given)
    opened = open_pack(pack, is_checked=settings.is_checked)
    tokenizer = read_tokenizer(opened)
    decoding = decide_decoding(pack, sampling)
    ids = encode(tokenizer, given)
    check_vocabulary(opened.config, ids)
    num_prompt_tokens = len(ids)
    check_positions(opened.config, num_prompt_tokens, sampling.max_new_tokens)
    wanted = _wanted_context(num_prompt_tokens, sampling.max_new_tokens, decoding.num_beams, settings.context)
    if on_decided is not None:
        on_decided(decoding)
    started_s = time.perf_counter()
    with watch_loading(on_loading):
        model = load_opened(opened, replace(settings, context=settings.context or wanted))
    loaded_s = time.perf_counter()
    if on_loaded is not None:
        on_loaded(model.flash)
    decoding.apply(model.generation_config)
    if decoding.seed is not None:
        torch.manual_seed(decoding.seed)
    session = Session(model, tokenizer)
    tokens: list[int] = []
    first_s: float | None = None
    with _watch_prompt(model, on_prompt):
        for step in session.stream(
            given, max_new_tokens=sampling.max_new_tokens, stop_strings=decoding.stop_strings
        ):  # the length is named: one that was asked for is never shortened
            if first_s is None and decoding.can_stream:
                first_s = time.perf_counter() - loaded_s
            tokens.append(step.token)
            if on_text is not None and step.text:
                on_text(step.text)
    done_s = time.perf_counter()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    times = {
        "load_s": loaded_s - started_s,
        "first_token_s": first_s,
        "generate_s": done_s - loaded_s,
    }
    stats = collect_stats(session, num_prompt_tokens, len(tokens))
    return Generation(text=text, stats={"seed": decoding.seed, "times": times} | stats)


def _wanted_context(num_prompt_tokens: int, max_new_tokens: int, num_beams: int, context: int | None) -> int:
    """Return the tokens that the KV cache will hold, over all beams; refuse more than `context`."""
    wanted = (num_prompt_tokens + max_new_tokens) * num_beams
    if context is None or wanted <= context:
        return wanted
    beams = f" in {num_beams} beams" if num_beams > 1 else ""
    raise ConfigError(
        f"the prompt has {num_prompt_tokens} tokens and {max_new_tokens} more are wanted{beams}, but context is"
        f" {context} (tokens of all sequences): raise --context to {wanted} or more, or ask for fewer tokens"
    )


def collect_stats(session: Session, num_prompt_tokens: int, num_new_tokens: int) -> dict[str, Any]:
    """Return what the forward passes of a session so far cost, as JSON-ready values; times in seconds, sizes in bytes."""
    flash, telemetry = session.flash, session.telemetry
    return {
        "mode": flash.mode,
        "exactness": flash.exactness,
        "reader": flash.reader.describe(),
        "context": flash.context,
        "num_prompt_tokens": num_prompt_tokens,
        "num_new_tokens": num_new_tokens,
        "dram_bytes": flash.placement.dram_bytes,
        "peak_process_bytes": peak_process_bytes(),
        "resident_bytes": flash.placement.needs.resident_bytes,
        "pinned_bytes": flash.placement.pinned_bytes,
        "streamed_bytes_per_pass": flash.placement.streamed_bytes,
        "experts": None if flash.experts is None else flash.experts.describe(),
        "resident_load": asdict(flash.resident_load),
        "prefill": telemetry.prefill().to_dict(),
        "decode": telemetry.decode().to_dict(),
        "verify": telemetry.verify().to_dict(),
    }


@contextmanager
def _watch_prompt(model: PreTrainedModel, on_prompt: Progress | None) -> Iterator[None]:
    """Report each streamed layer that the first pass has gone through: all that can be told of a long prompt."""
    if on_prompt is None:
        yield
        return
    from torch import nn

    manifest = model.flash.manifest
    names = [entry.module for entry in (manifest.experts or manifest.ffns)]
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done <= len(names):
            on_prompt(done, len(names), "prompt")

    # By the base class: a layer that stands for a linear one (OPT's) refuses hooks of others, which it would not call.
    hooks = [nn.Module.register_forward_hook(model.get_submodule(name), count) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
