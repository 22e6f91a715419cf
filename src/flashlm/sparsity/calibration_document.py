"""What a calibration leaves in a pack: `flash/sparsity.json` and the predictors beside it in `flash/sparsity.safetensors`.

Everything is by row position in the layer files. The document belongs to one content of the weights: its fingerprint is
compared with the manifest's, so that predictors of another checkpoint, or of another neuron order, are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flashlm.errors import PackError
from flashlm.pack.calibration_files import file_checksum
from flashlm.pack.direct_file import sync_folder, write_error, write_small_file
from flashlm.pack.manifest import FLASH_DIR, MAX_DIMENSION, Manifest
from flashlm.pack.sealed import seal
from flashlm.sparsity.calibration_file import other_weights, read_calibration_file

SPARSITY_VERSION: Literal[2] = 2
DOCUMENT_NAME = "sparsity.json"
TENSORS_NAME = "sparsity.safetensors"
PROFILE_NAME = "profile.safetensors"
MAX_DOCUMENT_BYTES = 64 << 20
MAX_WINDOW = 1024  # of the cache policy, in tokens

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class PredictorEntry(_Strict):
    """One layer's predictor and how good it was on held-out text.

    Attributes:
        kind: "trained" (low rank, balanced loss) or "sketch" (a low-rank sketch of the weights themselves).
        rank: R of d → R → d_ff.
        threshold: Rows whose score is above it are predicted. A trained predictor's score is a probability; a sketch's is
            |act(its estimate of the pre-activation)|.
        recall: Truly active rows that it predicted, over all truly active ones.
        false_positive: Inactive rows that it predicted, over all inactive ones.
        predicted_share: Predicted rows over all rows.
    """

    kind: Literal["trained", "sketch"]
    rank: Annotated[int, Field(gt=0, le=MAX_DIMENSION)]
    threshold: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    recall: Share
    false_positive: Share
    predicted_share: Share

    @model_validator(mode="after")
    def _threshold_is_in_range(self) -> PredictorEntry:
        if self.kind == "trained" and not 0.0 < self.threshold < 1.0:
            raise ValueError(
                f"the threshold of a trained predictor is a probability above 0 and below 1: {self.threshold}"
            )
        return self


class LayerSparsity(_Strict):
    """What is known about one layer.

    Attributes:
        activation_threshold: A neuron is active where |act(its trigger)| is above this; 0 where zeros are exact (ReLU).
            The trigger is the gate's output in a gated FFN, the up-projection's otherwise.
        active_share: Truly active rows of a token over all rows.
        use_curve: s_agg(k) of the predicted rows (of the active ones before there are predictors) for k = 1, 2, ...: share
            of rows that at least one of k successive tokens uses (paper, Fig 4a).
        predictor: None before it is trained.
    """

    activation_threshold: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    active_share: Share
    use_curve: tuple[Share, ...]
    predictor: PredictorEntry | None = None


class Evaluation(_Strict):
    """Held-out perplexity of the sparse model against the dense one.

    Attributes:
        num_tokens: Tokens predicted.
        dense_perplexity, sparse_perplexity: Per token.
        max_increase: Allowed relative rise, 0.01 for 1 %.
    """

    num_tokens: Annotated[int, Field(gt=0)]
    dense_perplexity: Annotated[float, Field(gt=0)]
    sparse_perplexity: Annotated[float, Field(gt=0)]
    max_increase: Annotated[float, Field(gt=0)]

    @property
    def increase(self) -> float:
        """The relative rise."""
        return self.sparse_perplexity / self.dense_perplexity - 1.0

    @property
    def has_passed(self) -> bool:
        """Whether the rise is within what was allowed."""
        return self.increase <= self.max_increase


class Sparsity(_Strict):
    """A pack's calibration.

    Attributes:
        sparsity_version: Version of this document.
        fingerprint: `fingerprint(manifest)` of the weights that were calibrated.
        text: Name of the calibration text.
        num_tokens: Tokens it was profiled on.
        layers: One entry per streamed layer.
        window: k of the neuron cache's policy `window(k)`; None is LRU.
        evaluation: None where no error budget was evaluated.
        tensors_checksum: xxh3-64 of `sparsity.safetensors`.
        profile_checksum: xxh3-64 of `profile.safetensors`; None where there is none.
    """

    sparsity_version: Literal[2] = SPARSITY_VERSION
    fingerprint: str
    text: str
    num_tokens: Annotated[int, Field(gt=0)]
    layers: tuple[LayerSparsity, ...]
    window: Annotated[int, Field(gt=0, le=MAX_WINDOW)] | None = None
    evaluation: Evaluation | None = None
    tensors_checksum: str
    profile_checksum: str | None = None

    @property
    def has_predictors(self) -> bool:
        """Whether every layer has one."""
        return all(layer.predictor is not None for layer in self.layers)

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines that `flashlm info` prints."""
        rows = [
            ("calibrated on", f"{self.text}, {self.num_tokens} tokens"),
            ("neuron cache", "LRU" if self.window is None else f"rows of the last {self.window} tokens"),
        ]
        for index, layer in enumerate(self.layers):
            entry = layer.predictor
            if entry is None:
                continue
            ratio = entry.predicted_share / layer.active_share if layer.active_share else float("inf")
            rows.append(
                (
                    f"predictor of layer {index}",
                    f"{entry.kind}, rank {entry.rank}: recall {entry.recall:.1%}, false positives"
                    f" {entry.false_positive:.1%}, predicts {entry.predicted_share:.1%} of the rows"
                    f" ({ratio:.1f} times the active ones)",
                )
            )
        if self.evaluation is not None:
            found = self.evaluation
            verdict = "passed" if found.has_passed else "NOT passed: mode auto stays exact"
            rows.append(
                (
                    "held-out perplexity",
                    f"{found.dense_perplexity:.3f} dense, {found.sparse_perplexity:.3f} sparse ({found.increase:+.2%},"
                    f" {found.max_increase:.1%} allowed): {verdict}",
                )
            )
        return rows


def fingerprint(manifest: Manifest) -> str:
    """Return what identifies the weights of a pack, their order included: a digest of all its checksums."""
    return manifest.weights_fingerprint


def document_path(pack: Path) -> Path:
    """Return where a pack keeps its calibration."""
    return pack / FLASH_DIR / DOCUMENT_NAME


def tensors_path(pack: Path) -> Path:
    """Return where a pack keeps its predictors."""
    return pack / FLASH_DIR / TENSORS_NAME


def profile_path(pack: Path) -> Path:
    """Return where a pack keeps how its neurons fired."""
    return pack / FLASH_DIR / PROFILE_NAME


def predictor_names(layer: int) -> tuple[str, str, str]:
    """Return the tensor names of a predictor: `reduce` (rank, d_model), `expand` (d_ff, rank), `bias` (d_ff,)."""
    return f"layers.{layer}.reduce", f"layers.{layer}.expand", f"layers.{layer}.bias"


def read_sparsity(pack: Path, manifest: Manifest) -> Sparsity | None:
    """Return the calibration of `pack`, None where there is none.

    Raises:
        PackError: It is damaged, of an unknown version, or of other weights than the pack holds.
    """
    path = document_path(pack)
    found = read_calibration_file(
        path, Sparsity, version_key="sparsity_version", version=SPARSITY_VERSION, max_bytes=MAX_DOCUMENT_BYTES
    )
    if found is None:
        return None
    if found.fingerprint != fingerprint(manifest) or len(found.layers) != len(manifest.layers):
        raise other_weights(path, pack)
    return found


def write_sparsity(pack: Path, sparsity: Sparsity, tensors: dict[str, torch.Tensor]) -> Sparsity:
    """Write predictors, then the document that names their checksum; return the document.

    The old document goes first: what an interruption leaves is no calibration, and not half of one.

    Raises:
        StorageError: They can't be written.
    """
    forget_sparsity(pack)
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    profile = profile_path(pack)
    stamped = sparsity.model_copy(
        update={
            "tensors_checksum": xxhash.xxh3_64_hexdigest(content),
            "profile_checksum": file_checksum(profile) if profile.exists() else None,
        }
    )
    write_small_file(tensors_path(pack), content)
    write_small_file(document_path(pack), seal(stamped.model_dump_json(indent=1)))
    return stamped


def forget_sparsity(pack: Path) -> None:
    """Remove the document of a calibration, before what it describes is changed.

    Raises:
        StorageError: It can't be removed.
    """
    try:
        document_path(pack).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(document_path(pack), error) from error
    sync_folder(pack / FLASH_DIR)


def write_profile(pack: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write how the neurons fired: `layers.N.firing_rate` (d_ff,), `.use_curve`, `.sampled_rows`, `.coactivation`.

    It is there to be studied, and to order neurons by; running a model does not read it.

    Raises:
        StorageError: It can't be written.
    """
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_small_file(profile_path(pack), content)


def read_tensors(pack: Path, sparsity: Sparsity) -> dict[str, torch.Tensor]:
    """Return the predictors' tensors by name, in anonymous memory.

    Raises:
        PackError: They are missing or not the ones that the document describes.
    """
    path = tensors_path(pack)
    try:
        if file_checksum(path) != sparsity.tensors_checksum:
            raise PackError(f"{path} is damaged or of another calibration: run `flashlm calibrate` again")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PackError(f"{path} is missing: run `flashlm calibrate` again") from None
    except (OSError, SafetensorError) as error:
        raise PackError(f"{path} can't be read: {error}") from error
