"""Calibrations made by hand, for packs of random models."""

from __future__ import annotations

from pathlib import Path

import torch

from flashlm.pack.manifest import read_manifest
from flashlm.sparsity.calibration_document import (
    Evaluation,
    LayerSparsity,
    PredictorEntry,
    Sparsity,
    fingerprint,
    predictor_names,
    write_sparsity,
)


def write_calibration(
    pack: Path,
    *,
    predicts_all: bool = False,
    evaluation: Evaluation | None = None,
    activation_threshold: float = 0.0,
    seed: int = 0,
) -> Sparsity:
    """Give `pack` random predictors, or ones that ask for every row."""
    manifest = read_manifest(pack)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    rank = 8
    layers = []
    for index, entry in enumerate(manifest.layers):
        reduce, expand, bias = predictor_names(index)
        tensors[reduce] = torch.randn(rank, manifest.hidden_size, generator=generator)
        tensors[expand] = torch.randn(entry.num_rows, rank, generator=generator)
        tensors[bias] = torch.zeros(entry.num_rows)
        if predicts_all:
            tensors[expand].zero_()
            tensors[bias].fill_(10.0)
        layers.append(
            LayerSparsity(
                activation_threshold=activation_threshold,
                active_share=0.5,
                use_curve=(0.5, 0.75, 0.9, 1.0),
                predictor=PredictorEntry(
                    kind="trained", rank=rank, threshold=0.5, recall=1.0, false_positive=0.0, predicted_share=0.5
                ),
            )
        )
    return write_sparsity(
        pack,
        Sparsity(
            fingerprint=fingerprint(manifest),
            text="random",
            num_tokens=1,
            layers=tuple(layers),
            evaluation=evaluation,
            tensors_checksum="",
        ),
        tensors,
    )


def evaluation(*, has_passed: bool) -> Evaluation:
    """An evaluation that met its budget, or did not."""
    sparse = 10.05 if has_passed else 11.0
    return Evaluation(num_tokens=100, dense_perplexity=10.0, sparse_perplexity=sparse, max_increase=0.01)
