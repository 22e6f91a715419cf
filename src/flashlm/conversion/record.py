"""What an unfinished conversion has done so far: `flash/progress.json`, so that it can go on after any interruption.

The record is replaced atomically after each finished file, and only after that file is synced; a file that it does not
name is written again. It is gone once the manifest is there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import Field

from flashlm.documents import DocumentKind, Strict
from flashlm.errors import ConfigError, PackError, StorageError
from flashlm.pack.manifest import FLASH_DIR, MAX_MANIFEST_BYTES, manifest_path, read_manifest
from flashlm.storage.writer import is_temporary, sync_folder, write_error

PROGRESS_NAME = "progress.json"
PROGRESS_VERSION: Literal[1] = 1


class ProgressRecord(Strict):
    """The record.

    Attributes:
        progress_version: Version of this document.
        fingerprint: What identifies the conversion.
        finished: Checksums of each finished file, by its name.
        zeroed: Of each of them, how many weights became zero that were not, by the tensor's name in the checkpoint.
    """

    progress_version: Literal[1] = PROGRESS_VERSION
    fingerprint: str
    finished: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    zeroed: dict[str, dict[str, int]] = Field(default_factory=dict)


_KIND = DocumentKind(
    model=ProgressRecord,
    version_key="progress_version",
    max_bytes=MAX_MANIFEST_BYTES,
    advice="delete the unfinished pack and convert again",
)


def prepare_folder(pack: Path) -> bool:
    """Make the folder of a pack, or accept one that is a pack already, finished or not.

    Returns:
        Whether there was none.

    Raises:
        ConfigError: The folder holds something else.
        StorageError: It can't be made.
    """
    is_new = not pack.exists()
    try:
        if _is_fresh(pack):
            (pack / FLASH_DIR).mkdir(parents=True, exist_ok=True)
        elif not manifest_path(pack).exists() and not (pack / FLASH_DIR / PROGRESS_NAME).exists():
            raise ConfigError(f"{pack} is not empty and is no unfinished pack: choose another folder")
    except OSError as error:
        raise write_error(pack, error) from error
    return is_new


def open_record(pack: Path, fingerprint: str) -> ProgressRecord | None:
    """Return what is done in a prepared folder, or None where the pack is finished. Call it under `only_one`.

    Leftover temporary files are removed.

    Raises:
        ConfigError: The folder holds another conversion, finished or not.
        PackError: The record is damaged, or of another version.
        StorageError: The folder can't be written.
    """
    if manifest_path(pack).exists():
        _check_finished(pack, fingerprint)
        return None
    path = pack / FLASH_DIR / PROGRESS_NAME
    try:
        _remove_leftovers(pack)
        record = _KIND.read(path)
        if record is None:
            record = ProgressRecord(fingerprint=fingerprint)
            save_record(pack, record)
    except OSError as error:
        raise write_error(pack, error) from error
    if record.fingerprint != fingerprint:
        raise ConfigError(
            f"{pack} holds an unfinished conversion of another source or with other settings:"
            " delete it, or give the same source and settings"
        )
    return record


def save_record(pack: Path, record: ProgressRecord) -> None:
    """Replace the record."""
    _KIND.write(pack / FLASH_DIR / PROGRESS_NAME, record)


def remove_record(pack: Path) -> None:
    """Remove the record of a conversion that is finished."""
    (pack / FLASH_DIR / PROGRESS_NAME).unlink(missing_ok=True)
    sync_folder(pack / FLASH_DIR)


def discard(pack: Path, files: Iterable[Path], *, with_folder: bool) -> None:
    """Remove a conversion that nothing can finish.

    Args:
        pack: The folder.
        files: What it has written, or would have.
        with_folder: Whether the folder is removed, too.
    """
    with suppress(OSError):  # what is left is no pack, and what went wrong before is what is told
        _remove_leftovers(pack)
        for path in files:
            path.unlink(missing_ok=True)
        remove_record(pack)
        (pack / FLASH_DIR).rmdir()
        if with_folder:
            pack.rmdir()


@contextmanager
def only_one(pack: Path) -> Iterator[None]:
    """Hold the pack against a second conversion at the same time; the lock dies with the process.

    Raises:
        ConfigError: Another process is converting into `pack`.
        StorageError: The folder can't be opened.
    """
    try:
        fd = os.open(pack / FLASH_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"{pack} can't be opened: {error.strerror}", path=str(pack), errno=error.errno) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{pack} is being written by another conversion") from None
        yield
    finally:
        os.close(fd)


def _check_finished(pack: Path, fingerprint: str) -> None:
    try:
        found = read_manifest(pack).source.fingerprint
    except PackError as error:  # "convert again" would lead here again
        raise ConfigError(f"choose another folder, or delete {pack}, which can't be converted over: {error}") from error
    if found != fingerprint:
        raise ConfigError(
            f"{pack} is a finished pack of another source or with other settings: choose another folder, or delete it"
        )
    remove_record(pack)


def _is_fresh(pack: Path) -> bool:
    """Return whether nothing is in the folder but what a conversion killed in its first moments leaves."""
    if not pack.exists():
        return True
    flash = pack / FLASH_DIR
    inside = list(flash.iterdir()) if flash.is_dir() else []
    return all(path == flash and path.is_dir() for path in pack.iterdir()) and all(map(is_temporary, inside))


def _remove_leftovers(pack: Path) -> None:
    for folder in (pack, pack / FLASH_DIR):
        for path in folder.iterdir():
            if is_temporary(path):
                path.unlink()
