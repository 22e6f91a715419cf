"""Whether the files that a calibration left in a pack are whole. What they say is read by `flashlm.sparsity`.

`sparsity.json` and `routing.json` carry a checksum of their own text, and the first one those of the tensors beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from flashlm.errors import PackError
from flashlm.pack.manifest import FLASH_DIR, Manifest
from flashlm.pack.sealed import unseal
from flashlm.storage.outside import open_regular, parse_json, read_document

_DOCUMENTS = ("sparsity.json", "routing.json")
_DESCRIBED = {"tensors_checksum": "sparsity.safetensors", "profile_checksum": "profile.safetensors"}
_ADVICE = "Run `flashlm calibrate` again"
MAX_DOCUMENT_BYTES = 64 << 20
_PIECE_BYTES = 16 << 20


def file_checksum(path: Path) -> str:
    """Return xxh3-64 of a file, read piece by piece.

    Raises:
        FileNotFoundError: There is none.
        PackError: It is no regular file, or can't be read.
    """
    digest = xxhash.xxh3_64()
    with open_regular(path) as file:
        try:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
        except OSError as error:
            raise PackError(f"{path} can't be read: {error.strerror}") from error
    return digest.hexdigest()


def calibration_problems(pack: Path, manifest: Manifest) -> list[str]:
    """Return one line for each calibration file that is damaged, missing, or of other weights; none without one."""
    problems: list[str] = []
    for name in _DOCUMENTS:
        path = pack / FLASH_DIR / name
        try:
            document = _read(path)
        except PackError as error:
            problems.append(str(error))
            continue
        if document is None:
            continue
        if document.get("fingerprint") != manifest.weights_fingerprint:
            problems.append(f"{path} was made for other weights than this pack holds. {_ADVICE}, or delete it")
        for key, described in _DESCRIBED.items():
            if document.get(key) is not None:
                problems += _file_problems(path.with_name(described), document[key])
    return problems


def _read(path: Path) -> dict[str, Any] | None:
    try:
        text = read_document(path, MAX_DOCUMENT_BYTES, advice=_ADVICE)
    except FileNotFoundError:
        return None
    body = unseal(text, path, _ADVICE)
    content = parse_json(body, path, advice=_ADVICE)
    if not isinstance(content, dict):
        raise PackError(f"{path} is damaged: an object expected. {_ADVICE}")
    return content


def _file_problems(path: Path, expected: object) -> list[str]:
    try:
        found = file_checksum(path)
    except FileNotFoundError:
        return [f"{path} is missing. {_ADVICE}"]
    except PackError as error:
        return [str(error)]
    return [] if found == expected else [f"{path} is damaged or of another calibration. {_ADVICE}"]
