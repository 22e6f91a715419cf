"""Whether a pack's files are there and as long as the manifest says; no content is read (`verify` does that)."""

from __future__ import annotations

import os
from pathlib import Path

from flashlm.errors import StorageError
from flashlm.pack.manifest import RESIDENT_NAME, Manifest, layer_path


def check_files(pack: Path, manifest: Manifest) -> None:
    """Compare the sizes of all weight files with the manifest.

    Raises:
        StorageError: A file is missing, can't be looked at, or is of another size.
    """
    check_resident_file(pack, manifest)
    for entry, layout in manifest.files:
        _check_size(layer_path(pack, entry), layout.file_bytes)


def check_resident_file(pack: Path, manifest: Manifest) -> None:
    """Compare the size of `model.safetensors` with the manifest; raises like `check_files`."""
    _check_size(pack / RESIDENT_NAME, manifest.resident.num_bytes)


def _check_size(path: Path, wanted_bytes: int) -> None:
    try:
        got_bytes = path.stat().st_size
    except OSError as error:
        raise StorageError(
            f"{path} can't be opened: {os.strerror(error.errno or 0)}: the pack is incomplete, convert again",
            path=str(path),
            errno=error.errno,
        ) from error
    if got_bytes != wanted_bytes:
        raise StorageError(
            f"{path} has {got_bytes} bytes, {wanted_bytes} expected: it is truncated or from another pack;"
            " convert again",
            path=str(path),
            wanted_bytes=wanted_bytes,
            got_bytes=got_bytes,
        )
