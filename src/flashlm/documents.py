"""JSON documents: ours are read strictly, each by its kind, and written whole or not at all; those of others only bounded.

A kind says what a document is: its pydantic model, which field is its version, how large it may be, what to do about one
that can't be used, and whether it carries a checksum of its own text. Reading refuses, in this order, what is no regular
file, what is too large, what is not JSON (keys that come twice and NaN included), another version, another checksum, and the
first field that the model does not take. Nobody else parses a document of ours.

The checksum of a sealed document is its last field, `checksum`: xxh3-64 of the bytes before it. It is in the file and not
beside it because a document is replaced by one rename: of two files an interruption could leave the old and the new.
(`config.json` could not hold that of the manifest either: the manifest has that of config.json.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from flashlm.errors import FlashError, PackError
from flashlm.storage.outside import read_bounded
from flashlm.storage.writer import write_small_file

_SEAL = re.compile(rb',\n "checksum": "([0-9a-f]{16})"\n\}\n\Z')
_SEAL_BYTES = len(b',\n "checksum": "0123456789abcdef"\n}\n')
_CLOSED = b"\n}"
_MAX_SHOWN = 40  # characters of what a document says, in a message


class Strict(BaseModel):
    """Base of everything in a document: no conversion of types, no field that is not known, no change afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


Document = TypeVar("Document", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class DocumentKind(Generic[Document]):
    """What one kind of document is.

    Attributes:
        model: Its fields.
        version_key: Which of them is the version; the one that is written is the field's default. None: there is none.
        versions: Which are read; none: the one that is written.
        max_bytes: A larger file is refused unread.
        advice: What to do about one that can't be used, as "convert the model again"; ends every message.
        error: What is raised.
        is_sealed: Whether it carries a checksum of its own text.
    """

    model: type[Document]
    version_key: str | None
    max_bytes: int
    advice: str
    error: type[FlashError] = PackError
    is_sealed: bool = False
    versions: tuple[int, ...] = ()

    def read(self, path: Path) -> Document | None:
        """Return the document in `path`, None where there is nothing.

        Raises:
            PackError (or `error`): It can't be read, is damaged, of another version, or not what the model takes.
        """
        try:
            text = read_bounded(path, self.max_bytes, error=self.error, advice=self.advice)
        except FileNotFoundError:
            return None
        return self.parse(text, path)

    def parse(self, text: bytes, path: Path) -> Document:
        """Return the document that `text` is, which was found in `path`; raises like `read`."""
        try:
            content = json.loads(text, object_pairs_hook=without_twins, parse_constant=_no_number)
        except (ValueError, RecursionError) as problem:
            raise self._refused(path, f"is not JSON ({problem})") from problem
        self._check_version(content, path)
        body = unseal(text, path, error=self.error, advice=self.advice) if self.is_sealed else text
        try:
            return self.model.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            more = f" and {error.error_count() - 1} more" if error.error_count() > 1 else ""
            raise self._refused(path, f"is invalid at {where}: {first['msg']}{more}") from error

    def encode(self, document: Document) -> bytes:
        """Return the text of a document."""
        text = document.model_dump_json(indent=1)
        return seal(text) if self.is_sealed else f"{text}\n".encode()

    def write(self, path: Path, document: Document) -> None:
        """Write a document in the place of whatever is there, in one step, synced.

        Raises:
            StorageError: It can't be written.
        """
        write_small_file(path, self.encode(document))

    def _check_version(self, content: Any, path: Path) -> None:
        if self.version_key is None:
            return
        wanted = self.model.model_fields[self.version_key].default
        found = content.get(self.version_key) if isinstance(content, dict) else None
        versions = self.versions or (wanted,)
        if type(found) is int and found in versions:  # True == 1
            return
        name = self.version_key.replace("_", " ")
        shown = repr(found)[:_MAX_SHOWN] if isinstance(found, int | float | str | None) else "of no number"
        newer = "update flashlm, or " if type(found) is int and found > wanted else ""
        advice = newer + self.advice
        raise self._refused(path, f"has {name} {shown}, this flashlm reads {describe_versions(versions)}", advice)

    def _refused(self, path: Path, why: str, advice: str | None = None) -> FlashError:
        return self.error(f"{path} {why}: {advice or self.advice}")


def describe_versions(versions: Sequence[int]) -> str:
    """Return "version 5", or "versions 4 and 5"."""
    return f"version{'s' * (len(versions) > 1)} {' and '.join(map(str, versions))}"


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dict, for `object_pairs_hook`.

    Raises:
        ValueError: A key comes twice.
    """
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key[:_MAX_SHOWN]!r} comes twice")
        content[key] = value
    return content


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def seal(text: str) -> bytes:
    """Return a JSON object written with an indent of 1, with the checksum of its text as the last field."""
    written = text.encode()
    if not written.endswith(_CLOSED):
        raise ValueError("a JSON object written with an indent expected")
    body = written[: -len(_CLOSED)]
    return body + f',\n "checksum": "{xxhash.xxh3_64_hexdigest(body)}"\n}}\n'.encode()


def unseal(text: bytes, path: Path, *, advice: str, error: type[FlashError] = PackError) -> bytes:
    """Return a sealed document without its checksum.

    Raises:
        PackError (or `error`): It is not as it was written.
    """
    found = _SEAL.search(text[-_SEAL_BYTES:])
    body = text[:-_SEAL_BYTES]
    checksum = xxhash.xxh3_64_hexdigest(body)
    if found is None:
        raise error(f"{path} does not end with its checksum, it was cut short or changed: {advice}")
    if found[1].decode() != checksum:
        raise error(
            f"{path} is not as it was written, checksum {checksum} found, {found[1].decode()} expected: {advice}"
        )
    return body + _CLOSED


def parse_json(text: bytes, path: Path, *, advice: str = "") -> Any:
    """Return the JSON value of `text`, which was read from `path` and is another program's: Python's rules, as theirs.

    Raises:
        PackError: It is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        end = f": {advice}" if advice else ""
        raise PackError(f"{path} is not JSON ({problem}){end}") from problem


def read_json(path: Path, max_bytes: int) -> Any:
    """Return the JSON value in another program's small file.

    Raises:
        FileNotFoundError: There is nothing.
        PackError: It is no regular file, too large, or not JSON.
    """
    return parse_json(read_bounded(path, max_bytes), path)
