"""Documents of ours: what is written is what is read; anything else is refused by name, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm.documents import DocumentKind, Strict, parse_json, seal
from flashlm.errors import ConfigError, FlashError, PackError


class Note(Strict):
    note_version: Literal[2] = 2
    text: str
    shares: tuple[float, ...] = ()


PLAIN = DocumentKind(model=Note, version_key="note_version", max_bytes=400, advice="write it again", error=ConfigError)
SEALED = DocumentKind(model=Note, version_key="note_version", max_bytes=400, advice="write it again", is_sealed=True)
KINDS: list[DocumentKind[Note]] = [PLAIN, SEALED]


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "sealed"])
@given(text=st.text(max_size=20), shares=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3))
def test_what_is_written_is_read(kind: DocumentKind[Note], text: str, shares: list[float]) -> None:
    note = Note(text=text, shares=tuple(shares))
    assert kind.parse(kind.encode(note), Path("note.json")) == note


def test_a_document_takes_the_place_of_another_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    assert SEALED.read(path) is None
    for text in ("one", "two"):
        SEALED.write(path, Note(text=text))
        assert SEALED.read(path) == Note(text=text)
    assert [each.name for each in tmp_path.iterdir()] == ["note.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is larger than the 400 bytes"),
        ("[" * 390, "is not JSON"),
        ('{"note_version": 2, "text": "a", "text": "b"}', "is not JSON .the key 'text' comes twice"),
        ('{"note_version": 2, "text": "a", "shares": [NaN]}', "is not JSON .NaN is no number"),
        ('{"note_version": 2, "text": "a", "shares": [-Infinity]}', "is not JSON .-Infinity is no number"),
        ("[]", "has note version None, this flashlm reads version 2: write it again"),
        ('{"note_version": 1, "text": "a"}', "has note version 1, this flashlm reads version 2: write it again"),
        ('{"note_version": 3}', "has note version 3, .* version 2: update flashlm, or write it again"),
        ('{"note_version": true}', "has note version True, this flashlm reads version 2"),
        ('{"note_version": 2, "text": 3}', "is invalid at text: .*string.*: write it again"),
        ('{"note_version": 2, "text": "a", "shares": [1, "b"]}', r"is invalid at shares\.1: "),
        ('{"note_version": 2, "text": "a", "more": 1}', "is invalid at more: "),
        ('{"note_version": 2, "more": 1}', "is invalid at text: .* and 1 more: write it again"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"note\.json {said}"):
        PLAIN.read(path)


def test_a_seal_holds_every_byte() -> None:
    text = SEALED.encode(Note(text="a", shares=(0.5,)))
    for place in range(len(text)):
        changed = bytearray(text)
        changed[place] ^= 1
        with pytest.raises(PackError, match=r"note\.json .*: (update flashlm, or )?write it again"):
            SEALED.parse(bytes(changed), Path("note.json"))
    for length in range(len(text)):
        with pytest.raises(PackError, match=r"note\.json"):
            SEALED.parse(text[:length], Path("note.json"))


@given(text=st.binary(max_size=60))
def test_any_bytes_are_read_or_a_named_error(text: bytes) -> None:
    for kind in KINDS:
        with pytest.raises(FlashError, match=r"note\.json"):
            kind.parse(text, Path("note.json"))


def test_only_an_object_can_be_sealed() -> None:
    with pytest.raises(ValueError, match="JSON object"):
        seal("[]")


def test_what_others_wrote_is_read_by_their_rules(tmp_path: Path) -> None:
    assert parse_json(b'{"a": 1, "a": Infinity}', tmp_path) == {"a": float("inf")}
    with pytest.raises(PackError, match="is not JSON"):
        parse_json(b"{", tmp_path)
