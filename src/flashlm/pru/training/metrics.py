"""What a run reports, one JSON object per line: training every so many steps, validation after each epoch.

TensorBoard's files and the loss curve are made from the same rows, where tensorboard and matplotlib are installed.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashlm.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"


class Metrics:
    """The metrics file of a run.

    Args:
        path: Appended to.
        has_tensorboard: Write the numbers for TensorBoard too, into `tensorboard/` beside it.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, path: Path, has_tensorboard: bool = False) -> None:
        self.path = path
        self._has_tensorboard = has_tensorboard
        self._board: Any = None
        if has_tensorboard and find_spec("tensorboard") is None:
            raise ConfigError(
                "--tensorboard needs the package tensorboard, which is not installed: pip install tensorboard"
            )

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
        if self._has_tensorboard:
            self._open_board(step)
            for row in kept:
                if row["step"] == step:
                    self._show(row)

    def add(self, kind: str, **values: Any) -> None:
        """Append a row."""
        row = {"kind": kind, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._has_tensorboard:
            if self._board is None:
                self._open_board(None)
            self._show(row)

    def draw(self) -> bool:
        """Draw loss.png; return whether matplotlib is there to do it."""
        if find_spec("matplotlib") is None:
            return False
        from matplotlib.figure import Figure

        rows = read_metrics(self.path)
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for kind, name, label in (("train", "cross_entropy", "training"), ("valid", "loss", "validation")):
            points = [(row["step"], row[name]) for row in rows if row["kind"] == kind]
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o" * (kind == "valid"), label=label)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.legend()
        axes.grid(alpha=0.3)
        draft = self.path.with_name("loss.tmp.png")
        figure.savefig(draft, dpi=120)
        draft.replace(self.path.with_name(CURVE_FILE))
        return True

    def _open_board(self, first_step: int | None) -> None:
        """Begin a file of events; TensorBoard drops those of earlier files from `first_step` on."""
        from torch.utils.tensorboard import SummaryWriter

        if self._board is not None:
            self._board.close()
        self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=first_step)

    def _show(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("kind", "step", "epoch"):
                self._board.add_scalar(f"{row['kind']}/{name}", float(value), row["step"])
        self._board.flush()


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
