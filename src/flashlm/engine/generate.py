"""One prompt through a pack, with what it cost: what `flashlm generate` runs, for programs too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashlm.engine.config import make_settings
from flashlm.engine.model import FlashModel, load
from flashlm.errors import ConfigError, PackError
from flashlm.memory.limits import peak_process_bytes
from flashlm.planner.needs import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; None leaves a choice to the pack's generation_config.json.

    Attributes:
        max_new_tokens: Tokens to generate at most.
        temperature: 0 takes the most likely token always (greedy); above 0 samples.
        top_p: Sample from the smallest set of tokens with this probability mass, in (0, 1].
        top_k: Sample from this many most likely tokens, at least 1.
        seed: Seed of the sampler; the same seed gives the same text.
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1")

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for transformers' `generate`."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        named = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in named.items() if value is not None}
        return chosen | given | ({"do_sample": True} if given else {})


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
    on_loaded: Callable[[FlashModel], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Load `pack`, continue `prompt`, and report the cost.

    Args:
        pack: Folder made by `flashlm convert`.
        prompt: The text to continue.
        dram, mode, context, pin, plan, expert_policy, check: As in `load`; context defaults to just what this run needs.
        sampling: How tokens are chosen.
        is_chat: Wrap the prompt in the pack's chat template, as the user's turn.
        on_loaded: Called once the model is ready.
        on_text: Called with every piece of new text as it comes.

    Raises:
        ConfigError: A setting is out of range, or the prompt does not fit the context or the model.
        PackError, BudgetError, StorageError: As in `load`.
    """
    import torch

    sampling = sampling or Sampling()
    settings = make_settings(dram, mode, context, plan=plan, expert_policy=expert_policy, check=check)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("the prompt is not UTF-8 text")
    tokenizer = read_tokenizer(pack, is_checked=settings.check != "none")
    inputs = _encode(tokenizer, prompt, is_chat=is_chat)
    num_prompt_tokens = int(inputs["input_ids"].shape[1])
    wanted = num_prompt_tokens + sampling.max_new_tokens
    _check_positions(pack, num_prompt_tokens, sampling.max_new_tokens, is_checked=settings.check != "none")
    if settings.context is not None and wanted > settings.context:
        raise ConfigError(
            f"the prompt has {num_prompt_tokens} tokens and {sampling.max_new_tokens} more are wanted,"
            f" but context is {settings.context}: raise --context to {wanted} or more, or ask for fewer tokens"
        )
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
    if on_loaded is not None:
        on_loaded(model.flash)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    output = model.generate(**inputs, **sampling.arguments(), streamer=_streamer(tokenizer, on_text))
    new_ids = output[0, num_prompt_tokens:]
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    return Generation(text=text, stats=collect_stats(model, num_prompt_tokens, len(new_ids)))


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
        from jinja2 import TemplateError

        message = [{"role": "user", "content": prompt}]
        try:
            return tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ConfigError(f"this pack's chat template does not take the prompt: {error}") from error
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError("the prompt is empty: give --prompt or --prompt-file some text")
    return inputs


def _check_positions(pack: Path, num_prompt_tokens: int, max_new_tokens: int, *, is_checked: bool) -> None:
    """Refuse a run past the positions that the model was built for, before anything is loaded."""
    text = read_config(pack, is_checked=is_checked).get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and num_prompt_tokens + max_new_tokens > limit:
        raise ConfigError(
            f"the prompt has {num_prompt_tokens} tokens and {max_new_tokens} more are wanted, but the model has"
            f" {limit} positions: shorten the prompt or lower --max-new-tokens"
        )


def _streamer(tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None) -> Any:
    if on_text is None:
        return None
    emit = on_text
    from transformers import TextStreamer

    class _CallbackStreamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text)

    return _CallbackStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
