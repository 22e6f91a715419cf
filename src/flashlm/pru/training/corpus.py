"""A corpus: a folder with train, valid and test text as token ids, checked against the published counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashlm.errors import ConfigError
from flashlm.pru.training.encoding import Encoding, Ids, WordEncoding, read_lines

SPLITS = ("train", "valid", "test")
# Lines, and tokens with one <eos> per line, of train, valid and test; vocabulary with <eos>.
PUBLISHED = {
    "Penn Treebank": ((42_068, 3_370, 3_761), (929_589, 73_760, 82_430), 10_000),
    "WikiText-2": ((36_718, 3_760, 4_358), (2_088_628, 217_646, 245_569), 33_278),
}
_CLOSE = 0.02


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of the three splits.

    Attributes:
        folder: Where the text was.
        encoding: What made the ids.
        ids: int64 (num_tokens,) by split.
        num_lines: By split.
        num_words: Whitespace-separated words and one per line end, by split; what word-level perplexity counts.
        fingerprint: Of ids and vocabulary size; two corpora with the same train alike.
    """

    folder: Path
    encoding: Encoding
    ids: dict[str, Ids]
    num_lines: dict[str, int]
    num_words: dict[str, int]
    fingerprint: str

    def describe(self) -> str:
        """Return one line: tokens, vocabulary, and which published corpus it is."""
        tokens = ", ".join(f"{len(self.ids[split]):,} {split}" for split in SPLITS)
        return f"{self.folder}: {tokens} tokens, vocabulary {self.encoding.vocab_size:,}"


def read_corpus(folder: Path, make_encoding: Callable[[list[str]], Encoding] = WordEncoding.of) -> Corpus:
    """Read train, valid and test (`train.txt` or the corpora's own `wiki.train.tokens`, `ptb.train.txt`).

    Args:
        folder: With one file per split.
        make_encoding: Gives the encoding from the training lines; default: its words.

    Raises:
        ConfigError: A file is missing, empty, not UTF-8, or has a word that can't be encoded.
    """
    texts = {split: read_lines(split_file(folder, split)) for split in SPLITS}
    encoding = make_encoding(texts["train"])
    ids = {split: encoding.encode(lines, str(split_file(folder, split))) for split, lines in texts.items()}
    digest = hashlib.sha256(str(encoding.vocab_size).encode())
    for split in SPLITS:
        digest.update(hashlib.sha256(ids[split].tobytes()).digest())
    return Corpus(
        folder=folder,
        encoding=encoding,
        ids=ids,
        num_lines={split: len(lines) for split, lines in texts.items()},
        num_words={split: sum(len(line.split()) + 1 for line in lines) for split, lines in texts.items()},
        fingerprint=digest.hexdigest(),
    )


def split_file(folder: Path, split: str) -> Path:
    """Return the file of a split.

    Raises:
        ConfigError: There is none.
    """
    names = (f"{split}.txt", f"wiki.{split}.tokens", f"ptb.{split}.txt")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{folder} has no {split} text: expected one of {', '.join(names)}")


def recognise(corpus: Corpus) -> tuple[str | None, str | None]:
    """Return the published corpus that this is, by its counts, and a warning where it is close to one but not equal."""
    lines = tuple(corpus.num_lines[split] for split in SPLITS)
    tokens = tuple(corpus.num_words[split] for split in SPLITS)
    for name, (published_lines, published_tokens, vocabulary) in PUBLISHED.items():
        is_word_level = isinstance(corpus.encoding, WordEncoding)
        found = (lines, tokens, corpus.encoding.vocab_size if is_word_level else vocabulary)
        if found == (published_lines, published_tokens, vocabulary):
            return name, None
        if any(abs(seen - meant) <= _CLOSE * meant for seen, meant in zip(tokens, published_tokens, strict=True)):
            return None, (
                f"{corpus.folder} is close to {name} but not equal, so its perplexities can't be compared with published"
                f" ones: lines {_listed(lines)} (published {_listed(published_lines)}), tokens with <eos>"
                f" {_listed(tokens)} ({_listed(published_tokens)}), vocabulary {found[2]:,} ({vocabulary:,})"
            )
    return None, None


def _listed(numbers: tuple[int, ...]) -> str:
    return " / ".join(f"{number:,}" for number in numbers)
