"""What a run says: a line that moves on a terminal, a log line every few steps elsewhere, and metrics as JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ERASE_LINE = "\r\033[K"


class Progress:
    """Writes to stderr; results belong to stdout."""

    def __init__(self, log_steps: int) -> None:
        self._log_steps = log_steps
        self._on_terminal = sys.stderr.isatty()

    def step(self, step: int, line: str) -> None:
        """Show the state of training after `step`."""
        if self._on_terminal:
            print(ERASE_LINE + line, end="", file=sys.stderr, flush=True)
        elif step % self._log_steps == 0:
            self.note(line)

    def note(self, line: str) -> None:
        """Say something that stays."""
        print((ERASE_LINE if self._on_terminal else "") + line, file=sys.stderr, flush=True)


class Metrics:
    """One JSON object per step, appended. After a crash steps may repeat; the later record is the one that counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, record: dict[str, float | int]) -> None:
        """Add the record of one step."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, float | int]]:
        """Return the records in the order of their steps; a line cut off by a crash is left out."""
        by_step = {}
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            by_step[record["step"]] = record
        return [by_step[step] for step in sorted(by_step)]
