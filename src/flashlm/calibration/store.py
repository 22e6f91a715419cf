"""What a calibration has done so far, in `flash/calibration.partial/`, so that one that was stopped goes on.

The folder belongs to one set of weights, settings and text; with any other it is begun anew. Every file in it appears
whole or not at all. It is removed when the calibration has been written. What can't be read in it is not there: that work is
done again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flashlm.calibration.error_budget import Rise
from flashlm.calibration.fitting import FittedPredictor, Trial
from flashlm.calibration.operating import Operating
from flashlm.calibration.sketch import Factors
from flashlm.documents import DocumentKind, Strict
from flashlm.errors import PackError, StorageError
from flashlm.pack.manifest import FLASH_DIR
from flashlm.storage.outside import check_regular
from flashlm.storage.writer import check_room, write_error, write_small_file

PARTIAL_NAME = "calibration.partial"
SPARE_BYTES = 64 << 20  # left free beside what is captured, for the predictors
MAX_PARTIAL_BYTES = 64 << 20
STAGE_VERSION: Literal[1] = 1
_SETTINGS_NAME = "settings.json"


class Stage(Strict):
    """What a stage of a calibration came to; `stage_version` is that of all these documents."""

    stage_version: Literal[1] = STAGE_VERSION


class Settings(Stage):
    """What the work belongs to."""

    settings: dict[str, JsonValue]


class Numbers(Stage):
    """One number for each layer, or each token."""

    values: tuple[float, ...]


class MeasuredRise(Stage):
    """What a choice of rows costs on a text."""

    rise: Rise


class AboutPredictor(Stage):
    """A fitted predictor without its tensors: the fields of `FittedPredictor`."""

    kind: Literal["trained", "sketch"]
    is_shifted: bool
    knee: float
    operating: tuple[Operating, ...]
    trials: tuple[Trial, ...]


AnyStage = TypeVar("AnyStage", bound=Stage)


def _kind(model: type[AnyStage]) -> DocumentKind[AnyStage]:
    again = "delete the folder and calibrate again"
    return DocumentKind(model=model, version_key="stage_version", max_bytes=MAX_PARTIAL_BYTES, advice=again)


class CalibrationStore:
    """The folder of one unfinished calibration.

    Args:
        pack: The pack's folder.
        settings: What the work belongs to, JSON values.

    Attributes:
        folder: Where it is.
        was_begun: Whether work of the same settings was found.

    Raises:
        StorageError: The folder can't be made or cleared.
    """

    def __init__(self, pack: Path, settings: dict[str, Any]) -> None:
        self.folder = pack / FLASH_DIR / PARTIAL_NAME
        found = self.read(_SETTINGS_NAME, Settings)
        self.was_begun = found is not None and found.settings == settings
        try:
            if not self.was_begun and self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        self.write(_SETTINGS_NAME, Settings(settings=settings))

    def read(self, name: str, model: type[AnyStage]) -> AnyStage | None:
        """Return what `write` was given, None where there is nothing (readable)."""
        try:
            return _kind(model).read(self.folder / name)
        except PackError:
            return None

    def write(self, name: str, stage: Stage) -> None:
        """Keep what a stage came to."""
        _kind(type(stage)).write(self.folder / name, stage)

    def check_space(self, num_bytes: int) -> None:
        """Refuse before work where `num_bytes` more do not fit.

        Raises:
            StorageError: The device has less free.
        """
        what = "what a calibration keeps beside the pack while it runs"
        check_room(self.folder, num_bytes + SPARE_BYTES, what=what, advice="free some, or lower --max-tokens")

    def create(self, name: str, shape: tuple[int, int], dtype: type[np.generic]) -> np.memmap[Any, Any]:
        """Return a new array in a mapped file."""
        try:
            return np.lib.format.open_memmap(self.folder / name, mode="w+", dtype=dtype, shape=shape)
        except OSError as error:
            raise write_error(self.folder / name, error) from error

    def open(self, name: str) -> npt.NDArray[Any]:
        """Return an array that `create` made.

        Raises:
            StorageError: It is gone or damaged.
        """
        path = self.folder / name
        try:
            check_regular(path)
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, PackError) as error:
            raise StorageError(
                f"{path} can't be read ({error}): delete {self.folder} and calibrate again", path=str(path)
            ) from error
        return array

    def save_predictor(self, layer: int, fitted: FittedPredictor) -> None:
        """Keep a finished layer."""
        about = AboutPredictor(
            kind=fitted.kind,
            is_shifted=fitted.is_shifted,
            knee=fitted.knee,
            operating=fitted.operating,
            trials=fitted.trials,
        )
        tensors = {"reduce": fitted.factors.reduce, "expand": fitted.factors.expand, "bias": fitted.factors.bias}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        text = _kind(AboutPredictor).encode(about).decode()
        write_small_file(self._predictor_path(layer), save(tensors, metadata={"about": text}))

    def load_predictor(self, layer: int) -> FittedPredictor | None:
        """Return a finished layer, None where it is still to do."""
        path = self._predictor_path(layer)
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as file:
                about = _kind(AboutPredictor).parse(file.metadata()["about"].encode(), path)
                factors = Factors(**{name: file.get_tensor(name).clone() for name in ("reduce", "expand", "bias")})
        except (OSError, PackError, SafetensorError, KeyError, TypeError):
            return None
        return FittedPredictor(
            kind=about.kind,
            factors=factors,
            operating=about.operating,
            is_shifted=about.is_shifted,
            knee=about.knee,
            trials=about.trials,
        )

    def _predictor_path(self, layer: int) -> Path:
        return self.folder / f"predictor-{layer:05d}.safetensors"

    def remove(self) -> None:
        """Delete the folder; the calibration is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
