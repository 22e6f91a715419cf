"""Every error that flashlm raises on purpose, as one tree.

    FlashError
    ├── ConfigError            a setting or an argument is wrong
    ├── UnsupportedModelError  the model has no FFN that can be placed
    ├── PackError              a pack or a checkpoint on disk is wrong
    ├── BudgetError            what was asked does not fit the memory budget
    ├── TrainingError          a training run can't go on
    └── StorageError           the device or the file system failed

A message says what happened, the value seen, the value expected, and what to do. The CLI catches `FlashError` once,
prints one line and exits with the class's `exit_code`.
"""

from __future__ import annotations


class FlashError(Exception):
    """Base of all errors raised on purpose by flashlm."""

    exit_code = 1


class ConfigError(FlashError):
    """A setting or an argument is wrong: field, value and allowed range are in the message."""

    exit_code = 2


class UnsupportedModelError(FlashError):
    """The model's feed-forward layers can't be placed; the message names the model type and the module."""

    exit_code = 4


class PackError(FlashError):
    """A pack or a source checkpoint is missing something, damaged, or of an unknown version."""

    exit_code = 4


class BudgetError(FlashError):
    """A request does not fit the memory budget.

    Attributes:
        needed_bytes: What the request needs in all.
        available_bytes: What the budget allows.
    """

    exit_code = 3

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class TrainingError(FlashError):
    """A training run can't go on; the message says at which step, and which checkpoint is good."""


class StorageError(FlashError):
    """A read or write failed, or gave fewer bytes than the file must hold.

    Attributes:
        path: The file.
        offset: First byte of the request in the file, or None where it concerns the whole file.
        wanted_bytes: Length of the request, or None.
        got_bytes: What the device gave, or None.
        errno: The operating system's error number, or None for a short read.
    """

    exit_code = 4

    def __init__(
        self,
        message: str,
        *,
        path: str,
        offset: int | None = None,
        wanted_bytes: int | None = None,
        got_bytes: int | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset
        self.wanted_bytes = wanted_bytes
        self.got_bytes = got_bytes
        self.errno = errno
