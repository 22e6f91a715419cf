"""Files from outside (a pack's, a source's, a plan): only regular files are opened, and only so much of them is read.

A fifo in the place of a file would block for ever, a device would never end; both are refused at once, as are folders,
sockets and links that lead nowhere. Links to regular files are followed: the hub's cache is made of them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from flashlm.errors import FlashError, PackError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path, *, error: type[FlashError] = PackError) -> int:
    """Return the size of a regular file, in bytes.

    Raises:
        FileNotFoundError: There is nothing.
        PackError (or `error`): It is something else than a regular file, or can't be looked at.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise error(f"{path} is a link to {path.readlink()}, which is not there") from None
        raise
    except (OSError, ValueError) as problem:  # a loop of links, no permission; a name with a zero byte
        raise error(f"{path} can't be read: {getattr(problem, 'strerror', None) or problem}") from problem
    _check_mode(path, found.st_mode, error)
    return found.st_size


def _check_mode(path: Path, mode: int, error: type[FlashError]) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise error(f"{path} is {kind}: a regular file expected")


def open_regular(path: Path, *, error: type[FlashError] = PackError) -> BinaryIO:
    """Open a regular file for reading; raises like `check_regular`, and never blocks."""
    check_regular(path, error=error)
    try:
        # It may have been put in place of the file since: opened this way not even a pipe blocks.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        raise error(f"{path} can't be read: {problem.strerror}") from problem
    file = os.fdopen(fd, "rb")
    try:
        _check_mode(path, os.fstat(fd).st_mode, error)
    except BaseException:
        file.close()
        raise
    return file


def read_bounded(path: Path, max_bytes: int, *, error: type[FlashError] = PackError, advice: str = "") -> bytes:
    """Return the content of a small file.

    Args:
        path: The file.
        max_bytes: A larger one is refused, unread.
        error: What is raised.
        advice: What to do about a file that can't be used; ends the message.

    Raises:
        FileNotFoundError: There is nothing.
        PackError (or `error`): It is no regular file, too large, or can't be read.
    """
    end = f": {advice}" if advice else ""
    with open_regular(path, error=error) as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as problem:
            raise error(f"{path} can't be read: {problem.strerror}{end}") from problem
    if len(content) > max_bytes:
        raise error(f"{path} is larger than the {max_bytes} bytes that such a file may have{end}")
    return content
