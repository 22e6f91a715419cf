"""One sentence for bytes that are not what the manifest says, wherever that is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from flashlm.errors import PackError

ADVICE = "The file was damaged after conversion: copy it again, or convert the model again"


def check_bytes(content: Any, expected: str, path: Path, what: str) -> None:
    """Hold bytes (anything with a buffer) that were read against their checksum in the manifest.

    Raises:
        PackError: They differ.
    """
    found = xxhash.xxh3_64_hexdigest(content)
    if found != expected:
        raise PackError(f"{path}: {what} is damaged: checksum {found}, {expected} expected. {ADVICE}")
