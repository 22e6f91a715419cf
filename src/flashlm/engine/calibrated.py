"""A pack's calibration as the engine uses it: is there one, may `auto` rely on it, and the predictors that it holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers.activations import ACT2FN

from flashlm.engine.config import ResolvedMode, Settings
from flashlm.errors import ConfigError, PackError
from flashlm.memory.cache_plan import LayerUse
from flashlm.pack.manifest import Manifest
from flashlm.sparsity.calibration_document import Sparsity, read_sparsity, read_tensors, tensors_path
from flashlm.sparsity.predictor import Predictor, load_predictor

logger = logging.getLogger(__name__)

EXACT = "exact: every weight takes part in every token; the placement changes no bit"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A pack's calibration, read and checked.

    Attributes:
        pack: The pack's folder.
        manifest: Its manifest.
        sparsity: The document.
    """

    pack: Path
    manifest: Manifest
    sparsity: Sparsity

    @property
    def predictor_bytes(self) -> int:
        """DRAM of the predictors."""
        return tensors_path(self.pack).stat().st_size

    @property
    def uses(self) -> list[LayerUse]:
        """How each layer is used."""
        return [
            LayerUse(num_rows=entry.num_rows, use_curve=layer.use_curve)
            for entry, layer in zip(self.manifest.layers, self.sparsity.layers, strict=True)
        ]

    @property
    def is_trusted(self) -> bool:
        """Whether an error budget was met."""
        return self.sparsity.evaluation is not None and self.sparsity.evaluation.has_passed

    def exactness(self) -> str:
        """Return one line on how far mode `sparse` is from exact."""
        evaluation = self.sparsity.evaluation
        if evaluation is None:
            return "approximate: rows are predicted; what that costs in perplexity was not measured"
        verdict = "" if evaluation.has_passed else f", NOT within the {evaluation.max_increase:.1%} allowed"
        return (
            f"approximate: rows are predicted; perplexity {evaluation.increase:+.2%} on held-out {self.sparsity.text}"
            f"{verdict}"
        )

    def load_predictors(self) -> list[Predictor]:
        """Read every layer's predictor.

        Raises:
            PackError: They are missing, damaged, or do not fit the layers.
        """
        tensors = read_tensors(self.pack, self.sparsity)
        predictors = []
        for index, (entry, layer) in enumerate(zip(self.manifest.layers, self.sparsity.layers, strict=True)):
            assert layer.predictor is not None
            predictors.append(
                load_predictor(
                    index,
                    layer.predictor,
                    tensors,
                    hidden_size=self.manifest.hidden_size,
                    num_rows=entry.num_rows,
                    activation=ACT2FN[self.manifest.activation],
                )
            )
        return predictors


def find_calibration(pack: Path, manifest: Manifest, settings: Settings) -> Calibration | None:
    """Return the pack's calibration where mode `sparse` or `auto` may use it.

    Raises:
        ConfigError: Mode `sparse` is asked for and the pack has no predictors.
        PackError: Mode `sparse` is asked for, and the calibration is damaged or of other weights.
    """
    if settings.mode not in ("sparse", "auto"):
        return None
    try:
        sparsity = read_sparsity(pack, manifest)
    except PackError as error:
        if settings.mode == "sparse":
            raise
        logger.warning("mode auto does without this pack's calibration: %s", error)
        return None
    if sparsity is not None and sparsity.has_predictors:
        return Calibration(pack=pack, manifest=manifest, sparsity=sparsity)
    if settings.mode == "sparse":
        raise ConfigError(f"{pack} has no predictors, which mode sparse needs: run `flashlm calibrate {pack}` first")
    return None


def resolve_mode(settings: Settings, calibration: Calibration | None, *, fits: bool) -> ResolvedMode:
    """Return the mode that runs.

    `auto` is `hybrid`, which is exact and never slower than `naive`, unless the model does not fit (`fits`) and a
    calibration has met its error budget.
    """
    if settings.mode != "auto":
        return settings.mode
    return "sparse" if calibration is not None and calibration.is_trusted and not fits else "hybrid"
