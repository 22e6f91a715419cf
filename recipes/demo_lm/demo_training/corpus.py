"""Text in, token ids out: the tokenizer, the token streams, and which windows of them a step trains on.

A step's windows follow from the seed and the step's position alone, so resuming needs no state beyond that position.
Tokens of a word-level corpus keep its spelling (" @-@ ", " <unk>"): perplexity is comparable only if nothing is cleaned.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "valid", "test")
DOCUMENT_MARK = "</s>"
DOCUMENT_START = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE)
"""The title line of a WikiText article; a text without any is one document."""

# GPT-2's pieces, with the corpus' own unknown-word mark kept whole, so that generation can leave it out as one token.
PIECES = Regex(r" ?<unk>|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def read_split(folder: Path, split: str) -> str:
    """Read `folder/split.txt`, exactly (no newline translation)."""
    return (folder / f"{split}.txt").read_bytes().decode("utf-8")


def train_tokenizer(text: str, vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE tokenizer of `vocab_size` entries; id 0 marks the start of a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_MARK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_MARK,
        eos_token=DOCUMENT_MARK,
        pad_token=DOCUMENT_MARK,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Return the ids of `text`, int64, with nothing added."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def encode_documents(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Return the ids of `text`, int64, with the document mark before every document."""
    starts = [match.start() for match in DOCUMENT_START.finditer(text)]
    bounds = [0, *(start for start in starts if start > 0), len(text)]
    mark = torch.tensor([tokenizer.bos_token_id])
    pieces = [piece for begin, end in pairwise(bounds) for piece in (mark, encode(tokenizer, text[begin:end]))]
    return torch.cat(pieces)


class Windows:
    """Windows of `length` + 1 ids over one stream: every epoch a new random shift and order, fixed by seed and epoch."""

    def __init__(self, ids: torch.Tensor, length: int, seed: int) -> None:
        self._ids = ids
        self._length = length
        self._seed = seed
        self._epoch: int | None = None
        self.num_windows = (ids.numel() - 1 - length) // length
        """Windows in an epoch."""
        if self.num_windows < 1:
            raise ValueError(
                f"the training text has {ids.numel()} tokens; windows of {length} need more than {2 * length}"
            )

    def batch(self, first: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, int64 [batch_size, length], of the windows number `first` and following."""
        both = torch.stack([self._window(first + row) for row in range(batch_size)])
        return both[:, :-1], both[:, 1:]

    def _window(self, number: int) -> torch.Tensor:
        epoch, place = divmod(number, self.num_windows)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._shift = int(rng.integers(self._length))
            self._order = rng.permutation(self.num_windows)
            self._epoch = epoch
        start = self._shift + int(self._order[place]) * self._length
        return self._ids[start : start + self._length + 1]
