"""Encodings: what the bytes of a matrix mean. One table, the native one, by which sizes are computed and kernels chosen.

A row's part is made of whole groups of elements. In the plain encodings a group is one element; in the others elements
share something, like a scale, and `group_bytes` says how many bytes hold all of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashlm import _native
from flashlm.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to write elements down.

    Attributes:
        name: As the manifest has it.
        group_elements: Elements of a group.
        group_bytes: Bytes of a group.
        code: What native calls take.
        dtype: Of torch, where elements are plain; else None.
    """

    name: str
    group_elements: int
    group_bytes: int
    code: int
    dtype: torch.dtype | None

    @property
    def is_plain(self) -> bool:
        """Whether an element stands for itself, as in a tensor of torch's."""
        return self.dtype is not None

    def fits(self, num_elements: int) -> bool:
        """Return whether so many elements are whole groups."""
        return num_elements % self.group_elements == 0

    def bytes_of(self, num_elements: int) -> int:
        """Return the bytes of so many elements.

        Raises:
            ConfigError: They are not whole groups.
        """
        num_groups, rest = divmod(num_elements, self.group_elements)
        if rest:
            raise ConfigError(f"{num_elements} elements are not whole groups of {self.group_elements} ({self.name})")
        return num_groups * self.group_bytes


ENCODINGS = {
    name: Encoding(name, group_elements, group_bytes, code, _DTYPES.get(name))
    for code, (name, group_elements, group_bytes) in enumerate(_native.encodings())
}
BY_DTYPE = {encoding.dtype: encoding for encoding in ENCODINGS.values() if encoding.dtype is not None}


def encoding_of(dtype: torch.dtype | str) -> Encoding:
    """Return the encoding of plain elements of a torch dtype, or of its name like "bfloat16".

    Raises:
        ConfigError: No rows are written so.
    """
    plain: torch.dtype | None = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    found = None if plain is None else BY_DTYPE.get(plain)
    if found is None:
        raise ConfigError(f"rows must be bfloat16, float16 or float32, got {dtype}")
    return found


def bytes_per_element(dtype: str) -> int:
    """Return the bytes of an element of a pack's dtype, like "bfloat16"."""
    return encoding_of(dtype).group_bytes
