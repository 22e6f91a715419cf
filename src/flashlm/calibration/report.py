"""What a calibration found, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashlm.calibration.fitting import Trial
from flashlm.sizes import format_size
from flashlm.sparsity.calibration_document import Evaluation, PredictorEntry


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer.

    Attributes:
        layer: Its index.
        active_share: Truly active rows of a token over all rows.
        both_share: Rows that are active and predicted over all rows.
        activation_threshold: Above it a neuron is active.
        predictor: As used: kind, rank, threshold, recall, false positives, predicted rows.
        predictor_bytes: Its size.
        use_curve: s_agg(1), s_agg(2), ... of the predicted rows.
        active_use_curve: The same of the truly active rows.
        trials: Every predictor that was tried, at the lowest recall level.
    """

    layer: int
    active_share: float
    both_share: float
    activation_threshold: float
    predictor: PredictorEntry
    predictor_bytes: int
    use_curve: tuple[float, ...]
    active_use_curve: tuple[float, ...]
    trials: tuple[Trial, ...]


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """The whole calibration.

    Attributes:
        pack: The pack's folder.
        text: Name of the text.
        num_tokens: Tokens profiled.
        window_tokens: Tokens of a window; each starts without a past.
        layers: One entry per streamed layer.
        evaluation: Perplexity on the held-out part, dense and sparse.
        increase_error: Standard error of the rise.
        asked_recall: Recall asked for, the least that any layer aims at.
        asked_predicted_share: Rows predicted at that recall, over all rows of all layers.
        predicted_share: Rows predicted with the levels that were chosen.
        wall_s: Time that it took, of this run if it was resumed.
        was_resumed: Whether earlier work was continued.
    """

    pack: Path
    text: str
    num_tokens: int
    window_tokens: int
    layers: tuple[LayerReport, ...]
    evaluation: Evaluation
    increase_error: float
    asked_recall: float
    asked_predicted_share: float
    predicted_share: float
    wall_s: float
    was_resumed: bool

    @property
    def recall(self) -> float:
        """Mean over layers."""
        return sum(layer.predictor.recall for layer in self.layers) / len(self.layers)

    @property
    def predictor_bytes(self) -> int:
        """DRAM of all predictors."""
        return sum(layer.predictor_bytes for layer in self.layers)

    def verdict(self) -> str:
        """Return one line: within the error budget or not."""
        evaluation = self.evaluation
        against = f"{evaluation.increase:+.2%} (± {self.increase_error:.2%}) of {evaluation.max_increase:.1%} allowed"
        if evaluation.has_passed:
            return f"passed: {against}"
        return f"NOT passed: {against}; this is the best that was found, and mode auto will not use it"

    def layer_rows(self) -> list[tuple[str, ...]]:
        """Return the table of layers, its header first."""
        table: list[tuple[str, ...]] = [
            ("layer", "active", "predicted", "recall", "false pos.", "kind", "rank", "predictor", "k=1..5 new rows")
        ]
        for layer in self.layers:
            entry = layer.predictor
            steps = [after - before for before, after in zip(layer.use_curve, layer.use_curve[1:6], strict=False)]
            table.append(
                (
                    str(layer.layer),
                    f"{layer.active_share:.1%}",
                    f"{entry.predicted_share:.1%}",
                    f"{entry.recall:.1%}",
                    f"{entry.false_positive:.1%}",
                    entry.kind,
                    str(entry.rank),
                    format_size(layer.predictor_bytes),
                    " ".join(f"{step:.1%}" for step in steps),
                )
            )
        return table

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary."""
        evaluation = self.evaluation
        num_layers = len(self.layers)
        active = sum(layer.active_share for layer in self.layers) / num_layers
        return [
            ("text", f"{self.text}, {self.num_tokens} tokens in windows of {self.window_tokens}"),
            ("rows truly active", f"{active:.1%} (mean over layers)"),
            (
                "rows predicted",
                f"{self.predicted_share:.1%} of all ({self.asked_predicted_share:.1%} at recall {self.asked_recall:.0%})",
            ),
            ("recall", f"{self.recall:.1%} (mean over layers, held-out)"),
            ("predictors", format_size(self.predictor_bytes)),
            (
                "perplexity",
                f"{evaluation.dense_perplexity:.3f} dense, {evaluation.sparse_perplexity:.3f} sparse"
                f" ({evaluation.num_tokens} held-out tokens)",
            ),
            ("error budget", self.verdict()),
            ("time", f"{self.wall_s:.0f} s{' (continued)' if self.was_resumed else ''}"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        content = {name: value for name, value in vars(self).items() if name not in ("layers", "evaluation", "pack")}
        layers = []
        for layer in self.layers:
            nested = {"predictor": layer.predictor.model_dump(), "trials": [each.model_dump() for each in layer.trials]}
            layers.append({**asdict(layer), **nested})
        return {
            "pack": str(self.pack),
            **content,
            "recall": self.recall,
            "predictor_bytes": self.predictor_bytes,
            "increase": self.evaluation.increase,
            "has_passed": self.evaluation.has_passed,
            "evaluation": self.evaluation.model_dump(),
            "layers": layers,
        }
