"""Random rows in every encoding with groups, and what their bytes mean to the format's own reference."""

from __future__ import annotations

import gguf
import numpy as np
import torch

from flashlm.rows.encodings import ENCODINGS

# Where a group's scales and offsets in fp16 are: bytes from its start.
FP16_PLACES = {
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
}
GROUPED = (*FP16_PLACES, "mxfp4", "fp8_block")


def reference(name: str, groups: np.ndarray) -> np.ndarray:
    """Return the fp32 elements of groups, uint8 (..., bytes of a group), flat, as the format's reference decodes them."""
    groups = groups.reshape(-1, ENCODINGS[name].group_bytes)
    with np.errstate(all="ignore"):
        if name == "mxfp4":
            e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            nibbles = np.concatenate([groups[:, 1:] & 15, groups[:, 1:] >> 4], axis=1)
            values = np.concatenate([e2m1, 0.0 - e2m1])[nibbles]  # its zero has no sign
            return (values * 2.0 ** (groups[:, :1].astype(np.float64) - 127)).astype(np.float32).ravel()
        if name == "fp8_block":
            elements = torch.from_numpy(groups[:, 4:].copy()).view(torch.float8_e4m3fn).float()
            return (elements.numpy() * groups[:, :4].copy().view(np.float32)).ravel()
        return gguf.quants.dequantize(groups, gguf.GGMLQuantizationType[name.upper()]).ravel()


def tame_groups(name: str, num_groups: int, random: np.random.Generator) -> np.ndarray:
    """Return random groups, uint8 (num_groups, bytes of a group), with scales such that sums of elements stay finite."""
    groups = random.integers(0, 256, (num_groups, ENCODINGS[name].group_bytes), dtype=np.uint8)
    scales = random.standard_normal((num_groups, 2)) * 10.0 ** random.integers(-6, 3, (num_groups, 1))
    for index, place in enumerate(FP16_PLACES.get(name, ())):
        groups[:, place : place + 2] = scales[:, index, None].astype(np.float16).view(np.uint8)
    if name == "mxfp4":
        groups[:, 0] = random.integers(105, 140, num_groups)
    if name == "fp8_block":
        groups[:, :4] = scales[:, :1].astype(np.float32).view(np.uint8)
        elements = groups[:, 4:]
        elements[elements & 127 == 127] = 3
    return groups
