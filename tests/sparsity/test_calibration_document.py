"""The sparsity document: what is written is read; anything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from flashlm.errors import PackError
from flashlm.pack.manifest import FLASH_DIR, MANIFEST_NAME, read_manifest
from flashlm.sparsity.calibration_document import (
    DOCUMENT_NAME,
    Evaluation,
    LayerSparsity,
    PredictorEntry,
    Sparsity,
    fingerprint,
    predictor_names,
    read_sparsity,
    read_tensors,
    tensors_path,
    write_sparsity,
)
from flashlm.sparsity.predictor import load_predictor
from tests.pack.packs import replace_sealed, sealed

CHECKSUM = "0123456789abcdef"
RANK, HIDDEN, ROWS = 4, 32, 48


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A manifest alone: the document needs nothing else of a pack."""
    unit = {
        "kind": "ffn",
        "hidden_size": HIDDEN,
        "num_rows": ROWS,
        "parts": ["up", "down"],
        "encodings": ("fp32",) * 2,
        "block_rows": 16,
        "row_stride_bytes": 512,
        "block_stride_bytes": 8192,
        "num_active": 3,
        "activation": "relu",
        "checksums": [CHECKSUM] * 3,
    }
    content = {
        "format_version": 4,
        "flashlm_version": "0",
        "num_hidden_layers": 2,
        "model_type": "opt",
        "dtype": "float32",
        "units": [
            unit | {"module": f"model.layers.{index}.mlp", "file": f"layer-{index:05d}.rows"} for index in range(2)
        ],
        "resident": {"num_bytes": 10, "chunk_bytes": 10, "checksums": [CHECKSUM]},
        "source": {"name": "tiny", "files": {}},
    }
    (tmp_path / FLASH_DIR).mkdir()
    (tmp_path / FLASH_DIR / MANIFEST_NAME).write_bytes(sealed(content))
    return tmp_path


def _tensors() -> dict[str, torch.Tensor]:
    shapes = ((RANK, HIDDEN), (ROWS, RANK), (ROWS,))
    return {
        name: torch.randn(shape)
        for layer in range(2)
        for name, shape in zip(predictor_names(layer), shapes, strict=True)
    }


def _entry(**changes: object) -> PredictorEntry:
    known = {"kind": "trained", "rank": RANK, "threshold": 0.4, "recall": 0.9, "false_positive": 0.1}
    return PredictorEntry(**{**known, "predicted_share": 0.2, **changes})  # type: ignore[arg-type]


@pytest.fixture
def written(pack: Path) -> Callable[..., tuple[Sparsity, dict[str, torch.Tensor]]]:
    def write(**changes: object) -> tuple[Sparsity, dict[str, torch.Tensor]]:
        layer = LayerSparsity(
            activation_threshold=0.01, active_share=0.1, use_curve=(0.1, 0.15), predictor=_entry(**changes)
        )
        known = fingerprint(read_manifest(pack))
        evaluation = Evaluation(num_tokens=9, dense_perplexity=10.0, sparse_perplexity=10.05, max_increase=0.01)
        document = Sparsity(
            fingerprint=known,
            text="t",
            num_tokens=99,
            layers=(layer, layer),
            evaluation=evaluation,
            tensors_checksum="",
        )
        tensors = _tensors()
        return write_sparsity(pack, document, tensors), tensors

    return write


def test_what_is_written_is_read(pack: Path, written: Callable[..., tuple[Sparsity, dict[str, torch.Tensor]]]) -> None:
    document, tensors = written()
    found = read_sparsity(pack, read_manifest(pack))
    assert found == document
    assert found.has_predictors
    assert found.evaluation is not None
    assert found.evaluation.has_passed
    read = read_tensors(pack, found)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_pack_without_calibration_has_none(pack: Path) -> None:
    assert read_sparsity(pack, read_manifest(pack)) is None


def test_another_checkpoint_is_refused(
    pack: Path, written: Callable[..., tuple[Sparsity, dict[str, torch.Tensor]]]
) -> None:
    written()
    path = pack / FLASH_DIR / MANIFEST_NAME
    replace_sealed(path, CHECKSUM, "0123456789abcdee")
    with pytest.raises(PackError, match="made for other weights than this pack holds"):
        read_sparsity(pack, read_manifest(pack))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"sparsity_version": 2',
            '"sparsity_version": 3',
            "has sparsity version 3, this flashlm reads version 2: update flashlm, or run",
        ),
        ('"sparsity_version": 2', '"sparsity_version": true', "has sparsity version True"),
        ('"threshold": 0.4', '"threshold": 1.0', "above 0 and below 1"),
        ('"threshold": 0.4', '"threshold": -0.1', "invalid at layers.0.predictor.threshold"),
        ('"recall": 0.9', '"recall": 1.5', "invalid at layers.0.predictor.recall"),
        ('"kind": "trained"', '"kind": "guess"', "invalid at layers.0.predictor.kind"),
        ('"text": "t"', '"text": "t", "extra": 1', "invalid at extra"),
        ("{", "", "is not JSON"),
    ],
)
def test_a_changed_document_is_refused(
    pack: Path,
    written: Callable[..., tuple[Sparsity, dict[str, torch.Tensor]]],
    old: str,
    new: str,
    message: str,
) -> None:
    written()
    path = pack / FLASH_DIR / DOCUMENT_NAME
    assert old in path.read_text()
    replace_sealed(path, old, new)
    with pytest.raises(PackError, match=message):
        read_sparsity(pack, read_manifest(pack))


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "nonsense"])
def test_damaged_tensors_are_refused(
    pack: Path, written: Callable[..., tuple[Sparsity, dict[str, torch.Tensor]]], damage: str
) -> None:
    document, _ = written()
    path = tensors_path(pack)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    changed = {"flipped": bytes(content), "cut": bytes(content[:-8]), "nonsense": b"\xff" * 40}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(PackError, match="run `flashlm calibrate` again"):
        read_tensors(pack, document)


def test_a_sketch_may_have_any_threshold_but_a_negative_one() -> None:
    assert _entry(kind="sketch", threshold=3.0).threshold == 3.0
    with pytest.raises(ValidationError):
        _entry(kind="sketch", threshold=-1.0)


def test_tensors_of_another_shape_are_refused() -> None:
    tensors = _tensors()
    shape = {"hidden_size": HIDDEN, "num_rows": ROWS, "activation": torch.relu}
    assert load_predictor(0, _entry(), tensors, **shape).predict(torch.randn(2, HIDDEN)).shape == (2, ROWS)
    name = predictor_names(0)[1]
    for wrong in (torch.randn(ROWS, RANK + 1), None):
        with pytest.raises(PackError, match=name):
            load_predictor(0, _entry(), {**tensors, name: wrong}, **shape)
