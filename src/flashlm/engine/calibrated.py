"""A pack's calibration as the engine uses it: is there one, may `auto` rely on it, and the predictors that it holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers.activations import ACT2FN

from flashlm.errors import ConfigError, PackError
from flashlm.pack.manifest import Manifest
from flashlm.pack.units import check_rows, has_rows
from flashlm.planner.choices import Activations
from flashlm.planner.settings import Settings
from flashlm.sparsity.calibration_document import PredictorEntry, Sparsity, read_sparsity, read_tensors, tensors_path
from flashlm.sparsity.predictor import Predictor, load_predictor
from flashlm.sparsity.routing import Routing, read_routing

logger = logging.getLogger(__name__)

_EXACT = "exact: every weight takes part in every token; the placement changes no bit"
_ROUNDED = "approximate: tokens are rounded to 8 bits for their products with encoded weights"


def exactness(manifest: Manifest, calibration: Calibration | None, activations: Activations) -> str:
    """Return one line: exact, or how far from it, and whether the weights are the source's or quantised."""
    line = _EXACT if calibration is None else calibration.exactness()
    if activations == "int8":
        line = _ROUNDED if calibration is None else f"{line}; {_ROUNDED.partition(': ')[2]}"
    quantised = ", ".join(manifest.quantised)
    if not quantised:
        return line
    how = f"{quantised}, as the source has them" if manifest.keeps_groups else f"quantised to {quantised}"
    return f"{line}; of weights that were {how}"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A pack's calibration, read and checked.

    Attributes:
        pack: The pack's folder.
        manifest: Its manifest.
        sparsity: The document.
        predictors: What it says of each layer's predictor.
    """

    pack: Path
    manifest: Manifest
    sparsity: Sparsity
    predictors: tuple[PredictorEntry, ...]

    @property
    def predictor_bytes(self) -> int:
        """DRAM of the predictors."""
        return tensors_path(self.pack).stat().st_size

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
        return [
            load_predictor(
                index,
                predictor,
                tensors,
                hidden_size=self.manifest.main.hidden_size,
                num_rows=entry.num_rows,
                activation=ACT2FN[self.manifest.main.activation],
            )
            for index, (entry, predictor) in enumerate(zip(self.manifest.ffns, self.predictors, strict=True))
        ]


def find_calibration(pack: Path, manifest: Manifest, settings: Settings) -> Calibration | None:
    """Return the pack's calibration where mode `sparse` or `auto` may use it.

    Raises:
        ConfigError: Mode `sparse` is asked for and the pack has no predictors, or no rows that lie by themselves.
        PackError: Mode `sparse` is asked for, and the calibration is damaged or of other weights.
    """
    if settings.mode not in ("sparse", "auto"):
        return None
    units = [entry.unit for entry in manifest.ffns]
    if settings.mode == "sparse":
        check_rows(units, str(pack), "mode sparse")
    if not has_rows(units):
        return None
    try:
        sparsity = read_sparsity(pack, manifest)
    except PackError as error:
        if settings.mode == "sparse":
            raise
        logger.warning("mode auto does without this pack's calibration: %s", error)
        return None
    predictors = (
        () if sparsity is None else tuple(each.predictor for each in sparsity.layers if each.predictor is not None)
    )
    if sparsity is not None and len(predictors) == len(sparsity.layers):
        return Calibration(pack=pack, manifest=manifest, sparsity=sparsity, predictors=predictors)
    if settings.mode == "sparse":
        raise ConfigError(f"{pack} has no predictors, which mode sparse needs: run `flashlm calibrate {pack}` first")
    return None


def find_routing(pack: Path, manifest: Manifest, *, must_exist: bool) -> Routing | None:
    """Return what the pack's calibration saw of its experts' routing; None without one that can be used.

    Raises:
        ConfigError: There is none, and there must be.
        PackError: There must be one, and it is damaged or of other weights.
    """
    try:
        routing = read_routing(pack, manifest)
    except PackError as error:
        if must_exist:
            raise
        logger.warning("the expert cache does without this pack's routing calibration: %s", error)
        return None
    if routing is None and must_exist:
        raise ConfigError(
            f"{pack} has no routing calibration, which expert policy pinned needs: run `flashlm calibrate {pack}` first"
        )
    return routing
