"""What a run reports, one JSON object per line: training every so many steps, validation after each epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """The metrics file of a run.

    Args:
        path: Appended to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int, epoch: int) -> None:
        """Drop what was reported after a checkpoint: steps beyond it, and validations of epochs not finished there."""
        kept = [
            row
            for row in read_metrics(self.path)
            if row["step"] <= step and (row["kind"] != "valid" or row["epoch"] < epoch)
        ]
        draft = self.path.with_name(self.path.name + ".tmp")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
        draft.replace(self.path)

    def add(self, kind: str, **values: Any) -> None:
        """Append a row."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
