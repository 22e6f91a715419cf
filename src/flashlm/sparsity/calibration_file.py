"""Reading the JSON documents that a calibration leaves in a pack: sizes and versions are checked before contents."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from flashlm.errors import PackError
from flashlm.pack.sealed import unseal
from flashlm.storage.outside import parse_json, read_document

Document = TypeVar("Document", bound=BaseModel)


def read_calibration_file(
    path: Path, document: type[Document], *, version_key: str, version: int, max_bytes: int
) -> Document | None:
    """Return the document in `path`, None where there is no file.

    Args:
        path: The file.
        document: Its pydantic model.
        version_key: Where the document keeps its version.
        version: The one that is read.
        max_bytes: Larger files are refused unread.

    Raises:
        PackError: It can't be read, is damaged, or of another version.
    """
    try:
        text = read_document(path, max_bytes, advice="run `flashlm calibrate` again")
    except FileNotFoundError:
        return None
    content = parse_json(text, path, advice="run `flashlm calibrate` again")
    found = content.get(version_key) if isinstance(content, dict) else None
    if type(found) is not int or found != version:
        raise PackError(f"{path} has version {found!r}, this flashlm reads {version}: calibrate again")
    try:
        return document.model_validate_json(unseal(text, path, "Run `flashlm calibrate` again"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise PackError(f"{path} is invalid at {where}: {first['msg']}. Run `flashlm calibrate` again") from error


def other_weights(path: Path, pack: Path) -> PackError:
    """Return the error for a calibration of another content of the weights than `pack` holds."""
    return PackError(
        f"{path} was made for other weights than this pack holds: run `flashlm calibrate {pack}` again, or delete it"
    )
