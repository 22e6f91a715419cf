"""JSON documents that carry a checksum of their own text: the manifest, and what a calibration leaves in a pack.

The last field, `checksum`, is xxh3-64 of the bytes before it. It is in the file and not beside it because a document is
replaced by one rename: of two files an interruption could leave the old and the new. (`config.json` could not hold that
of the manifest either: the manifest has that of config.json.)
"""

from __future__ import annotations

import re
from pathlib import Path

import xxhash

from flashlm.errors import PackError

_END = re.compile(rb',\n "checksum": "([0-9a-f]{16})"\n\}\n\Z')
_END_BYTES = len(b',\n "checksum": "0123456789abcdef"\n}\n')
_CLOSED = b"\n}"


def seal(document: str) -> bytes:
    """Return `document`, a JSON object written with an indent of 1, with its checksum as the last field."""
    text = document.encode()
    if not text.endswith(_CLOSED):
        raise ValueError("a JSON object written with an indent expected")
    body = text[: -len(_CLOSED)]
    return body + f',\n "checksum": "{xxhash.xxh3_64_hexdigest(body)}"\n}}\n'.encode()


def unseal(text: bytes, path: Path, advice: str) -> bytes:
    """Return the document without its checksum.

    Raises:
        PackError: It is not as it was written.
    """
    found = _END.search(text[-_END_BYTES:])
    body = text[:-_END_BYTES]
    checksum = xxhash.xxh3_64_hexdigest(body)
    if found is None:
        raise PackError(f"{path} does not end with its checksum: it was cut short or changed. {advice}")
    if found[1].decode() != checksum:
        raise PackError(
            f"{path} is not as it was written: checksum {checksum} found, {found[1].decode()} expected. {advice}"
        )
    return body + _CLOSED
