"""What stands for logits that were not kept: it has their shape and dtype, and says so by name when it is used."""

from __future__ import annotations

from typing import Any

import torch

from flashlm.errors import BudgetError
from flashlm.sizes import format_size

# What may be asked without having the values.
_FACTS = ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_sparse", "is_quantized", "is_meta")
_ALLOWED = {getattr(torch.Tensor, name).__get__ for name in _FACTS} | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.element_size,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
}


class WithheldLogits(torch.Tensor):
    """Logits of a pass whose loss was made in pieces, (num_sequences, num_tokens, vocab_size); on the meta device.

    Made by `withhold`. Any use of a value raises `BudgetError`.
    """

    available_bytes = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about the shape, refuse everything else."""
        if func in _ALLOWED:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise _refusal(next((arg for arg in args if isinstance(arg, WithheldLogits)), None))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Say what it is."""
        return f"WithheldLogits(shape={tuple(self.shape)}: not computed, the loss was made in pieces)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled or copied."""
        raise _refusal(self)


def withhold(shape: tuple[int, ...], dtype: torch.dtype, available_bytes: int) -> WithheldLogits:
    """Return what stands for logits of `shape`, where the budget had `available_bytes` for them."""
    withheld = torch.empty(shape, dtype=dtype, device="meta").as_subclass(WithheldLogits)
    withheld.available_bytes = available_bytes
    return withheld


def _refusal(withheld: WithheldLogits | None) -> BudgetError:
    if withheld is None:
        return BudgetError("these logits were not kept", needed_bytes=0, available_bytes=0)
    needed_bytes = withheld.numel() * withheld.element_size()
    available_bytes = max(withheld.available_bytes, 0)
    return BudgetError(
        f"the logits of all {tuple(withheld.shape)[:-1]} positions were not kept: they are"
        f" {format_size(needed_bytes)}, and with their loss more than the {format_size(available_bytes)} that the budget"
        " had left, so the loss was made in pieces. Use .loss alone, or run the pass without labels= and with"
        " logits_to_keep=N, fewer tokens, or more dram",
        needed_bytes=needed_bytes,
        available_bytes=available_bytes,
    )
