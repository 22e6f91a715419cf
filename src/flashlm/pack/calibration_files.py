"""Whether the files that a calibration left in a pack are whole. What they say is read by `flashlm.sparsity`.

`sparsity.json` and `routing.json` carry a checksum of their own text, and the first one those of the tensors beside it.
"""

from __future__ import annotations

from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict

from flashlm.documents import DocumentKind
from flashlm.errors import PackError
from flashlm.pack.manifest import FLASH_DIR, Manifest
from flashlm.storage.outside import open_regular

_DOCUMENTS = ("sparsity.json", "routing.json")
_ADVICE = "run `flashlm calibrate` again"
MAX_DOCUMENT_BYTES = 64 << 20
_PIECE_BYTES = 16 << 20


class _Described(BaseModel):
    """What such a document says of the files beside it, whatever else it says."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    fingerprint: str
    tensors_checksum: str | None = None
    profile_checksum: str | None = None


_KIND = DocumentKind(model=_Described, version_key=None, max_bytes=MAX_DOCUMENT_BYTES, advice=_ADVICE, is_sealed=True)


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
            document = _KIND.read(path)
        except PackError as error:
            problems.append(str(error))
            continue
        if document is None:
            continue
        if document.fingerprint != manifest.weights_fingerprint:
            problems.append(f"{path} was made for other weights than this pack holds: {_ADVICE}, or delete it")
        if document.tensors_checksum is not None:
            problems += _file_problems(path.with_name("sparsity.safetensors"), document.tensors_checksum)
        if document.profile_checksum is not None:
            problems += _file_problems(path.with_name("profile.safetensors"), document.profile_checksum)
    return problems


def _file_problems(path: Path, expected: str) -> list[str]:
    try:
        found = file_checksum(path)
    except FileNotFoundError:
        return [f"{path} is missing: {_ADVICE}"]
    except PackError as error:
        return [str(error)]
    return [] if found == expected else [f"{path} is damaged or of another calibration: {_ADVICE}"]
