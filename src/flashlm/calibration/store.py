"""What a calibration has done so far, in `flash/calibration.partial/`, so that one that was stopped goes on.

The folder belongs to one set of weights, settings and text; with any other it is begun anew. Every file in it appears
whole or not at all. It is removed when the calibration has been written.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flashlm.calibration.fitting import FittedPredictor, Trial
from flashlm.calibration.operating import Operating
from flashlm.calibration.sketch import Factors
from flashlm.errors import PackError, StorageError
from flashlm.pack.direct_file import write_error, write_small_file
from flashlm.pack.manifest import FLASH_DIR
from flashlm.sizes import format_size
from flashlm.storage.outside import check_regular, read_json

PARTIAL_NAME = "calibration.partial"
SPARE_BYTES = 64 << 20  # left free beside what is captured, for the predictors
MAX_PARTIAL_BYTES = 64 << 20
_SETTINGS_NAME = "settings.json"


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
        self.was_begun = self.read(_SETTINGS_NAME) == settings
        try:
            if not self.was_begun and self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        self.write(_SETTINGS_NAME, settings)

    def read(self, name: str) -> Any:
        """Return what `write` was given, None where there is nothing (readable)."""
        try:
            return read_json(self.folder / name, MAX_PARTIAL_BYTES)
        except (OSError, PackError):
            return None

    def write(self, name: str, content: Any) -> None:
        """Write a small JSON file."""
        write_small_file(self.folder / name, json.dumps(content).encode())

    def check_space(self, num_bytes: int) -> None:
        """Refuse before work where `num_bytes` more do not fit.

        Raises:
            StorageError: The device has less free.
        """
        free_bytes = shutil.disk_usage(self.folder).free
        if free_bytes < num_bytes + SPARE_BYTES:
            raise StorageError(
                f"calibrating takes {format_size(num_bytes + SPARE_BYTES)} beside the pack for a while, and"
                f" {self.folder.parent} has {format_size(free_bytes)} free: free some, or lower --max-tokens",
                path=str(self.folder),
                wanted_bytes=num_bytes + SPARE_BYTES,
                got_bytes=free_bytes,
            )

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
        about = {
            "kind": fitted.kind,
            "is_shifted": fitted.is_shifted,
            "knee": fitted.knee,
            "operating": [asdict(point) for point in fitted.operating],
            "trials": [trial.model_dump() for trial in fitted.trials],
        }
        tensors = {"reduce": fitted.factors.reduce, "expand": fitted.factors.expand, "bias": fitted.factors.bias}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_small_file(self._predictor_path(layer), save(tensors, metadata={"about": json.dumps(about)}))

    def load_predictor(self, layer: int) -> FittedPredictor | None:
        """Return a finished layer, None where it is still to do."""
        try:
            check_regular(self._predictor_path(layer))
            with safe_open(self._predictor_path(layer), framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                factors = Factors(**{name: file.get_tensor(name).clone() for name in ("reduce", "expand", "bias")})
            return FittedPredictor(
                kind=about["kind"],
                factors=factors,
                operating=tuple(Operating(**point) for point in about["operating"]),
                is_shifted=about["is_shifted"],
                knee=about["knee"],
                trials=tuple(Trial(**trial) for trial in about["trials"]),
            )
        except (OSError, PackError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def _predictor_path(self, layer: int) -> Path:
        return self.folder / f"predictor-{layer:05d}.safetensors"

    def remove(self) -> None:
        """Delete the folder; the calibration is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
