"""Cut a corpus to the size of another: the first tokens of each split, the most frequent words, the rest `<unk>`.

The defaults make a text of Penn Treebank's size: 929,589 training tokens with one <eos> per line, 73,760 and 82,430 of
valid and test, 10,000 words with <eos> and <unk>. The last line is cut short where the count says so; its end is the
last token.

    python recipes/pru/cut_corpus.py WIKITEXT OUT
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from flashlm.pru.training.corpus import SPLITS, split_file
from flashlm.pru.training.encoding import EOS, UNKNOWN, read_lines

PENN = {"train": 929_589, "valid": 73_760, "test": 82_430}


def cut(lines: list[str], num_tokens: int) -> list[list[str]]:
    """Return lines of words that make exactly so many tokens, line ends counted."""
    kept: list[list[str]] = []
    left = num_tokens
    for line in lines:
        words = line.split()[: left - 1]
        kept.append(words)
        left -= len(words) + 1
        if left == 0:
            return kept
    raise SystemExit(f"the text has {num_tokens - left:,} tokens, fewer than {num_tokens:,}")


def frequent(lines: list[list[str]], size: int) -> set[str]:
    """Return the most frequent words, <eos> and <unk> among them; of equally frequent ones those that come first."""
    counts = Counter(word for words in lines for word in [*words, EOS])
    chosen = [word for word, _ in counts.most_common() if word not in (EOS, UNKNOWN)]
    return {EOS, UNKNOWN, *chosen[: size - 2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with train, valid and test text")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--vocabulary", type=int, default=10_000)
    for split, number in PENN.items():
        parser.add_argument(f"--{split}-tokens", type=int, default=number)
    arguments = parser.parse_args()
    texts = {
        split: cut(read_lines(split_file(arguments.source, split)), getattr(arguments, f"{split}_tokens"))
        for split in SPLITS
    }
    known = frequent(texts["train"], arguments.vocabulary)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, lines in texts.items():
        mapped = [" ".join(word if word in known else UNKNOWN for word in words) for words in lines]
        (arguments.out / f"{split}.txt").write_text("\n".join(mapped) + "\n")
        tokens = sum(len(words) + 1 for words in lines)
        unknown = sum(line.split().count(UNKNOWN) for line in mapped)
        print(f"{split}: {len(lines):,} lines, {tokens:,} tokens, {unknown:,} {UNKNOWN}")
    print(f"vocabulary: {len(known):,}")


if __name__ == "__main__":
    main()
