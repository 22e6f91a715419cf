"""Text to token ids: words split on whitespace with one `<eos>` per line (the corpora's convention), or any tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashlm.errors import ConfigError, PackError

EOS, UNKNOWN = "<eos>", "<unk>"
TOKENIZER_FILE = "tokenizer.json"
Ids = npt.NDArray[np.int64]


class Encoding(Protocol):
    """What turns lines into ids."""

    @property
    def vocab_size(self) -> int:
        """How many different ids there are."""

    @property
    def eos_id(self) -> int:
        """The id that ends each line."""

    def encode(self, lines: Iterable[str], source: str) -> Ids:
        """Return the ids of all lines, `eos_id` after each; `source` is named in errors."""

    def count_unknown(self, lines: Iterable[str]) -> int:
        """Return how many words a text has that can only be encoded as unknown."""

    def save(self, folder: Path) -> None:
        """Write what `AutoTokenizer.from_pretrained` needs."""


class WordEncoding:
    """One id per word of the training text, in order of appearance, as in the authors' code.

    Args:
        words: The vocabulary, `<eos>` included.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self._id_of = {word: position for position, word in enumerate(words)}
        if EOS not in self._id_of:
            raise ConfigError(f"a word vocabulary must have {EOS}; this one has {len(words)} words without it")

    @classmethod
    def of(cls, lines: Iterable[str]) -> WordEncoding:
        """Return the vocabulary of a text."""
        words: dict[str, None] = {}
        for line in lines:
            words.update(dict.fromkeys(line.split()))
            words.setdefault(EOS)
        return cls(list(words))

    @property
    def vocab_size(self) -> int:
        """Words, `<eos>` included."""
        return len(self.words)

    @property
    def eos_id(self) -> int:
        """The id of `<eos>`."""
        return self._id_of[EOS]

    def encode(self, lines: Iterable[str], source: str) -> Ids:
        """Return int64 ids, words outside the vocabulary as `<unk>`.

        Raises:
            ConfigError: There is such a word and the vocabulary has no `<unk>`.
        """
        ids: list[int] = []
        unknown = self._id_of.get(UNKNOWN)
        for number, line in enumerate(lines, 1):
            for word in line.split():
                found = self._id_of.get(word, unknown)
                if found is None:
                    raise ConfigError(
                        f"{source}, line {number}: the word {word!r} is not among the {self.vocab_size} words of the"
                        f" training text, which has no {UNKNOWN} to stand for it; replace such words by {UNKNOWN} in"
                        " all three files"
                    )
                ids.append(found)
            ids.append(self.eos_id)
        return np.array(ids, dtype=np.int64)

    def count_unknown(self, lines: Iterable[str]) -> int:
        """Return how many words are outside the vocabulary."""
        return sum(word not in self._id_of for line in lines for word in line.split())

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; words are split on whitespace there too."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import PreTrainedTokenizerFast

        unknown = UNKNOWN if UNKNOWN in self._id_of else None
        tokenizer = Tokenizer(WordLevel(self._id_of, unk_token=unknown or EOS))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=EOS, **({"unk_token": unknown} if unknown else {})
        )
        wrapped.save_pretrained(str(folder))


class TokenizerEncoding:
    """A Hugging Face tokenizer: each line by itself, without special tokens but the end-of-text one after it.

    Args:
        source: Folder or hub id.

    Raises:
        ConfigError: It can't be loaded, or has no token that ends a text.
    """

    def __init__(self, source: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ConfigError(f"tokenizer {source!r} can't be loaded: {error}") from error
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer {source!r} has no eos_token, which must end each line")

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return len(self._tokenizer)

    @property
    def eos_id(self) -> int:
        """The id of the tokenizer's end-of-text token."""
        return int(self._tokenizer.eos_token_id)

    def encode(self, lines: Iterable[str], source: str) -> Ids:
        """Return int64 ids."""
        encoded = self._tokenizer(list(lines), add_special_tokens=False, verbose=False).input_ids
        return np.array([token for line in encoded for token in [*line, self.eos_id]], dtype=np.int64)

    def count_unknown(self, lines: Iterable[str]) -> int:
        """Return how many tokens of a text are the tokenizer's unknown token."""
        unknown = self._tokenizer.unk_token_id
        return 0 if unknown is None or unknown == self.eos_id else int((self.encode(lines, "") == unknown).sum())

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self._tokenizer.save_pretrained(str(folder))


def load_encoding(folder: Path) -> Encoding:
    """Read what either encoding's `save` wrote.

    Raises:
        PackError: The file is missing or damaged.
    """
    path = folder / TOKENIZER_FILE
    try:
        content = json.loads(path.read_bytes())
        is_words = content["model"]["type"] == "WordLevel" and content["pre_tokenizer"]["type"] == "WhitespaceSplit"
    except FileNotFoundError as error:
        raise PackError(f"{folder} has no {TOKENIZER_FILE}, so its text can't be encoded") from error
    except (OSError, ValueError, KeyError, TypeError):
        is_words = False  # of some other tokenizer, or damaged: transformers will say
    if is_words:
        id_of: dict[str, int] = content["model"]["vocab"]
        return WordEncoding(sorted(id_of, key=id_of.__getitem__))
    try:
        return TokenizerEncoding(str(folder))
    except Exception as error:  # transformers raises whatever its parser hit
        raise PackError(f"{path} can't be read: {error}") from error


def read_lines(path: Path) -> list[str]:
    """Return a UTF-8 file's lines, cut at newlines only.

    Raises:
        ConfigError: The file is missing, empty or not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    if not content.strip():
        raise ConfigError(f"{path} is empty: it must have text")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; convert it first"
        ) from error
    lines = text.split("\n")  # not splitlines: the corpora have other separators inside lines
    return lines[:-1] if not lines[-1] else lines
