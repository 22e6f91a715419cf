"""Words to ids: the corpora's conventions, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flashlm.errors import ConfigError, PackError
from flashlm.pru.training.encoding import TokenizerEncoding, WordEncoding, load_encoding, read_lines


def test_every_line_ends_in_one_eos_and_blank_lines_count() -> None:
    encoding = WordEncoding.of(["a b", " ", "b"])
    assert encoding.words == ["a", "b", "<eos>"]
    assert encoding.encode(["a b", " ", "b"], "text").tolist() == [0, 1, 2, 2, 1, 2]


def test_lines_are_cut_at_newlines_only(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_bytes("a\u2028b\x85c d\x0c\ne".encode())
    assert read_lines(file) == ["a\u2028b\x85c d\x0c", "e"]


def test_unknown_words_become_unk_and_are_counted() -> None:
    encoding = WordEncoding.of(["a <unk>"])
    assert encoding.encode(["a z"], "text").tolist() == [0, 1, 2]
    assert encoding.count_unknown(["a z y"]) == 2


def test_an_unknown_word_without_unk_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"valid.txt, line 2: the word 'z' is not among the 2 words"):
        WordEncoding.of(["a"]).encode(["a", "z"], "valid.txt")


def test_a_saved_vocabulary_is_a_transformers_tokenizer(tmp_path: Path) -> None:
    encoding = WordEncoding.of(["the cat sat <unk>", "on the mat"])
    encoding.save(tmp_path)
    loaded = load_encoding(tmp_path)
    assert isinstance(loaded, WordEncoding)
    assert loaded.words == encoding.words
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("the dog sat <eos>").input_ids == [0, 3, 2, 4]


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "BPE"}}', "[1]"])
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(PackError, match=r"tokenizer.json can't be read"):
        load_encoding(tmp_path)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"has no tokenizer\.json"):
        load_encoding(tmp_path)


def byte_tokenizer(folder: Path, **special: str) -> None:
    alphabet = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(alphabet, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def test_any_tokenizer_takes_the_words_place(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path, eos_token="<end>")
    encoding = TokenizerEncoding(str(tmp_path))
    ids = encoding.encode(["ab", "", "é"], "text").tolist()
    assert encoding.vocab_size == 257
    assert [token == encoding.eos_id for token in ids] == [False, False, True, True, False, False, True]
    encoding.save(tmp_path / "saved")
    assert load_encoding(tmp_path / "saved").encode(["ab"], "").tolist() == ids[:3]


def test_a_tokenizer_without_an_end_or_none_at_all_is_refused(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="has no eos_token"):
        TokenizerEncoding(str(tmp_path))
    with pytest.raises(ConfigError, match="can't be loaded"):
        TokenizerEncoding(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n", "is empty"), (b"ab\xff", "not UTF-8: byte 0xff at offset 2")]
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "train.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_lines(file)
