"""Ctrl-C that counts, wherever it lands.

Python turns Ctrl-C into a `KeyboardInterrupt` at whatever line happens to run. In the middle of an import, libraries
turn that into other errors or abort the process; in a destructor it is lost. The watch leaves at once in the first case
and remembers in the second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn, Self

INTERRUPTED = 130  # the exit code


class InterruptWatch:
    """While entered, `seen` tells whether Ctrl-C came. An ignored SIGINT (`nohup ... &`) stays ignored."""

    def __init__(self) -> None:
        self.seen = False
        self._is_installed = False

    def __enter__(self) -> Self:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_interrupt)
            self._is_installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        if _is_importing(frame):
            leave()  # every command survives being killed
        raise KeyboardInterrupt


def leave() -> NoReturn:
    """Say that Ctrl-C came and end the process.

    Not through the interpreter's own exit: after an interrupted import that can crash, and after an interrupted `eval`
    it replaces the exit code.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.write("\nflashlm: interrupted\n")
        sys.stderr.flush()
    os._exit(INTERRUPTED)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
