"""One prompt through a pack, with what it cost: what `flashlm generate` runs, for programs too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashlm.engine.config import make_settings
from flashlm.engine.decoding import Decoding, Sampling, decide_decoding
from flashlm.engine.load_progress import Progress, watch_loading
from flashlm.engine.model import FlashModel, load
from flashlm.engine.positions import check_positions
from flashlm.errors import ConfigError, PackError
from flashlm.memory.limits import peak_process_bytes
from flashlm.memory.needs import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What came out: the new text and what it cost, ready for JSON."""

    text: str
    stats: dict[str, Any]


def generate(
    pack: Path,
    prompt: str,
    *,
    dram: str | int | None = None,
    mode: str | None = None,
    context: int | None = None,
    pin: str | int | None = None,
    plan: str | Path | None = None,
    expert_policy: str | None = None,
    check: str | None = None,
    sampling: Sampling | None = None,
    is_chat: bool = False,
    on_decided: Callable[[Decoding], None] | None = None,
    on_loading: Progress | None = None,
    on_loaded: Callable[[FlashModel], None] | None = None,
    on_prompt: Progress | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Load `pack`, continue `prompt`, and report the cost.

    Args:
        pack: Folder made by `flashlm convert`.
        prompt: The text to continue.
        dram, mode, context, pin, plan, expert_policy, check: As in `load`; context defaults to just what this run needs.
        sampling: How tokens are chosen.
        is_chat: Wrap the prompt in the pack's chat template, as the user's turn.
        on_decided: Called before loading, with how tokens will be chosen.
        on_loading: Called with (bytes read, bytes in all, "reading weights") while weights are read.
        on_loaded: Called once the model is ready.
        on_prompt: Called with (layers done, layers, "prompt") as the prompt goes through the model.
        on_text: Called with every piece of new text as it comes; with beams once, at the end.

    Raises:
        ConfigError: A setting is out of range, or the prompt does not fit the context or the model.
        PackError, BudgetError, StorageError: As in `load`.
    """
    import torch

    sampling = sampling or Sampling()
    settings = make_settings(dram, mode, context, plan=plan, expert_policy=expert_policy, check=check)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("the prompt is not UTF-8 text")
    is_checked = settings.check != "none"
    tokenizer = read_tokenizer(pack, is_checked=is_checked)
    decoding = decide_decoding(pack, sampling)
    inputs = _encode(tokenizer, prompt, is_chat=is_chat)
    num_prompt_tokens = int(inputs["input_ids"].shape[1])
    check_positions(read_config(pack, is_checked=is_checked), num_prompt_tokens, sampling.max_new_tokens)
    wanted = _wanted_context(num_prompt_tokens, sampling.max_new_tokens, decoding.num_beams, settings.context)
    if on_decided is not None:
        on_decided(decoding)
    started_s = time.perf_counter()
    with watch_loading(on_loading):
        model = load(
            pack,
            dram=dram,
            mode=mode,
            context=settings.context or wanted,
            pin=pin,
            plan=plan,
            expert_policy=expert_policy,
            check=check,
        )
    loaded_s = time.perf_counter()
    if on_loaded is not None:
        on_loaded(model.flash)
    decoding.apply(model.generation_config)
    if decoding.seed is not None:
        torch.manual_seed(decoding.seed)
    arrivals: list[float] = []
    streamer = _streamer(tokenizer, on_text, arrivals) if decoding.can_stream else None
    with _watch_prompt(model, on_prompt):
        output = model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,  # named here: a length that was asked for is never shortened
            streamer=streamer,
            stopping_criteria=_stopping(tokenizer, decoding.stop_strings, num_prompt_tokens),
        )
    done_s = time.perf_counter()
    new_ids = output[0, num_prompt_tokens:]
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    if streamer is None and on_text is not None:
        on_text(text)
    times = {
        "load_s": loaded_s - started_s,
        "first_token_s": arrivals[0] - loaded_s if arrivals else None,
        "generate_s": done_s - loaded_s,
    }
    stats = collect_stats(model, num_prompt_tokens, len(new_ids))
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


def collect_stats(model: PreTrainedModel, num_prompt_tokens: int, num_new_tokens: int) -> dict[str, Any]:
    """Return what the forward passes of `model` so far cost, as JSON-ready values; times in seconds, sizes in bytes."""
    flash: FlashModel = model.flash
    assert flash.telemetry is not None
    assert flash.resident_load is not None
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
        "prefill": flash.telemetry.prefill().to_dict(),
        "decode": flash.telemetry.decode().to_dict(),
        "verify": flash.telemetry.verify().to_dict(),
    }


def read_tokenizer(pack: Path, *, is_checked: bool | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a pack.

    Raises:
        PackError: Not a finished pack, or one without a tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    read_config(pack, is_checked=is_checked)
    try:
        tokenizer = AutoTokenizer.from_pretrained(pack, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PackError(f"{pack} has no tokenizer that transformers can load: {reason}") from error
    if not len(tokenizer):  # what transformers makes of a folder without tokenizer files
        raise PackError(f"{pack} has no tokenizer: its source had none. Copy the model's tokenizer files into it")
    return tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, is_chat: bool) -> Any:
    if is_chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("this pack's tokenizer has no chat template: leave --chat out")
        from jinja2 import TemplateError  # a template is a program, which may fail as programs do

        message = [{"role": "user", "content": prompt}]
        try:
            encoded = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"this pack's chat template does not take the prompt: {error}") from error
        inputs = _model_inputs(encoded)
    else:
        inputs = _model_inputs(tokenizer(prompt, return_tensors="pt"))
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError("the prompt is empty: give it some text")
    return inputs


def _model_inputs(encoded: Any) -> dict[str, Any]:
    """Keep what a decoder takes: some tokenizers give token types and more besides, which `generate` refuses."""
    return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}


@contextmanager
def _watch_prompt(model: PreTrainedModel, on_prompt: Progress | None) -> Iterator[None]:
    """Report each streamed layer that the first pass has gone through: all that can be told of a long prompt."""
    if on_prompt is None:
        yield
        return
    from torch import nn

    manifest = model.flash.manifest
    names = [entry.module for entry in (manifest.experts or manifest.layers)]
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


def _stopping(tokenizer: PreTrainedTokenizerBase, stop_strings: tuple[str, ...], num_prompt_tokens: int) -> Any:
    """Return what ends a sequence once its new text holds a stop string.

    transformers' own criterion works from the vocabulary alone, and fails for tokenizers that can't spell its test words.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class _StopStrings(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            tail = 4 * max(map(len, stop_strings)) + 8  # a character takes up to four tokens of a byte each
            new_ids = input_ids[:, max(num_prompt_tokens, input_ids.shape[1] - tail) :]
            texts = tokenizer.batch_decode(new_ids)
            return torch.tensor([any(stop in text for stop in stop_strings) for text in texts])

    return StoppingCriteriaList([_StopStrings()] if stop_strings else [])


def _streamer(tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None, arrivals: list[float]) -> Any:
    """Return a streamer that hands text to `on_text` and notes when each token came in `arrivals`, in seconds."""
    from transformers import TextStreamer

    class _CallbackStreamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                arrivals.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None:
                on_text(text)

    return _CallbackStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
