"""Lay a calibrated pack's rows down in a better order, and everything that goes by row position with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from flashlm.errors import PackError
from flashlm.pack.calibration_files import file_checksum
from flashlm.pack.manifest import read_manifest
from flashlm.pack.reorder import remove_strays, reorder
from flashlm.sparsity.calibration_document import (
    fingerprint,
    forget_sparsity,
    predictor_names,
    profile_path,
    read_sparsity,
    read_tensors,
    write_profile,
    write_sparsity,
)

Order = npt.NDArray[np.int64]


def order_pack(
    pack: Path, orders: Sequence[Order], progress: Callable[[int, int, str], None] = lambda done, total, what: None
) -> None:
    """Give every layer of `pack` a new row order, its predictors included.

    Stopped half-way, the pack is whole but its calibration is refused, and has to be made again.

    Args:
        pack: A calibrated pack.
        orders: For each layer: `order[position]` is the present position of the row that comes to lie there.
        progress: Called with bytes done, bytes in all, file name.

    Raises:
        PackError: The pack has no calibration, or is damaged.
        StorageError: A file can't be read or written.
    """
    manifest = read_manifest(pack)
    sparsity = read_sparsity(pack, manifest)
    if sparsity is None:
        raise PackError(f"{pack} has no calibration: run `flashlm calibrate {pack}` first")
    tensors = read_tensors(pack, sparsity)
    for layer, order in enumerate(orders):
        _, expand, bias = predictor_names(layer)
        for name in (expand, bias):
            if name in tensors:
                tensors[name] = tensors[name][torch.from_numpy(order)]
    has_profile = sparsity.profile_checksum is not None
    if has_profile and file_checksum(profile_path(pack)) != sparsity.profile_checksum:
        raise PackError(f"{profile_path(pack)} is damaged: run `flashlm calibrate {pack}` again")
    forget_sparsity(pack)
    ordered = reorder(pack, manifest, orders, progress)
    if has_profile:
        _order_profile(pack, orders)
    write_sparsity(pack, sparsity.model_copy(update={"fingerprint": fingerprint(ordered)}), tensors)
    remove_strays(pack, ordered)


def _order_profile(pack: Path, orders: Sequence[Order]) -> None:
    path = profile_path(pack)
    tensors = load_file(path)
    for layer, order in enumerate(orders):
        rate, sampled = f"layers.{layer}.firing_rate", f"layers.{layer}.sampled_rows"
        if rate in tensors:
            tensors[rate] = tensors[rate][torch.from_numpy(order)]
        if sampled in tensors:
            position = torch.from_numpy(np.argsort(order))
            tensors[sampled] = position[tensors[sampled].long()].to(tensors[sampled].dtype)
    write_profile(pack, tensors)
