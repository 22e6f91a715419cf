"""From what a user gives to token ids: text, messages through the pack's chat template, or ids as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from flashlm.engine.opened import OpenedPack
from flashlm.errors import ConfigError, PackError
from flashlm.pack.files import is_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = "str | Sequence[Message] | Sequence[int] | torch.Tensor"
"""Text; messages with `role` and `content`; or token ids, (num_tokens,) or (1, num_tokens)."""


def read_tokenizer(opened: OpenedPack) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a pack.

    Raises:
        PackError: A pack without a tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    pack = opened.folder
    has_none = PackError(
        f"{pack} has no tokenizer: none could be made of its source. Copy the model's tokenizer files into it"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(pack, config=opened.config, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        names = {path.name for path in pack.iterdir()} - {"generation_config.json"}
        if not any(map(is_tokenizer, names)):
            raise has_none from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PackError(f"{pack} has no tokenizer that transformers can load: {reason}") from error
    if not len(tokenizer):  # what transformers makes of a folder without tokenizer files
        raise has_none
    return tokenizer


def as_message(text: str) -> list[Message]:
    """Return a text as the user's turn."""
    return [{"role": "user", "content": text}]


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        tokenizer: The pack's; None takes ids only.
        prompt: What was given.

    Raises:
        ConfigError: It is empty or no UTF-8 text, text without a tokenizer, or messages that the pack's template does not
            take.
    """
    if not isinstance(prompt, str) and not _are_messages(prompt):
        ids = _as_ids(prompt)
    elif tokenizer is None:
        raise ConfigError("text needs a tokenizer: make the session with one, or give token ids")
    elif isinstance(prompt, str):
        check_text(prompt)
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        ids = _from_template(tokenizer, prompt)
    if not ids:
        raise ConfigError("the prompt is empty: give it some text")
    return ids


def check_vocabulary(config: Any, ids: Sequence[int]) -> None:
    """Refuse tokens that a model does not have.

    Args:
        config: The transformers config of the whole model.
        ids: Of the prompt.

    Raises:
        ConfigError: There is one.
    """
    size = config.get_text_config(decoder=True).vocab_size
    if not 0 <= min(ids) <= max(ids) < size:
        beyond = next(each for each in ids if not 0 <= each < size)
        raise ConfigError(
            f"the prompt has token {beyond}, the model {size} tokens: the pack's tokenizer is that of another model"
        )


def check_text(prompt: str | Sequence[Message]) -> None:
    """Refuse what can't be encoded in any pack; `encode` does, too, but needs the tokenizer.

    Raises:
        ConfigError: It has halves of characters.
    """
    texts = [prompt] if isinstance(prompt, str) else [str(message.get("content", "")) for message in prompt]
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise ConfigError("the prompt is not UTF-8 text")


def _are_messages(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _as_ids(prompt: Any) -> list[int]:
    ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]
    if not all(type(each) is int for each in ids):
        raise ConfigError("a prompt of ids is one sequence of whole numbers: (num_tokens,) or (1, num_tokens)")
    return ids


def _from_template(tokenizer: PreTrainedTokenizerBase, messages: Any) -> list[int]:
    check_text(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("this pack's tokenizer has no chat template: leave --chat out")
    from jinja2 import TemplateError  # a template is a program, which may fail as programs do

    try:
        encoded: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"this pack's chat template does not take the prompt: {error}") from error
    return list(encoded["input_ids"])
