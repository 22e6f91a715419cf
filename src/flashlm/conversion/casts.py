"""What a change of element type does to weights: none may become infinite, and those that become zero are counted.

Looks at the result first, as integers, which costs a fraction of the copy: only where there are zeros, infinities or NaNs
at all is the source looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from flashlm.errors import PackError

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}


@dataclass(kw_only=True)
class CastCounts:
    """Weights that became zero, by the name of their tensor in the checkpoint."""

    zeroed: dict[str, int] = field(default_factory=dict)

    def check(self, target: torch.Tensor, source: torch.Tensor, name: str) -> None:
        """Compare what was written with what it was cast from; the same shape.

        Raises:
            PackError: A finite value became infinite, with the tensor's name and the value.
        """
        if not _may_lose(source.dtype, target.dtype) or not target.numel():
            return
        dense = target.contiguous()  # a copy costs less than these passes over parts of rows
        low, high = torch.aminmax(dense)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            _refuse_overflow(target, source, name)
        bits = dense.view(_INTEGERS[dense.dtype.itemsize])
        if _has_zeros(bits):
            lost = int(torch.count_nonzero(source[bits + bits == 0]))  # without the sign
            if lost:
                self.zeroed[name] = self.zeroed.get(name, 0) + lost


def describe_zeroed(zeroed: dict[str, int], dtype: str) -> str | None:
    """Return one line about weights that became zero; None where there are none."""
    if not zeroed:
        return None
    worst = max(zeroed, key=lambda name: (zeroed[name], name))
    return (
        f"{sum(zeroed.values())} weights that are not zero became zero in {dtype}, in {len(zeroed)} tensors, most"
        f" ({zeroed[worst]}) in {worst}: convert with --dtype {_keeps(dtype)} to keep them"
    )


def _keeps(dtype: str) -> str:
    return "bfloat16 or float32" if dtype == "float16" else "float32"


def _may_lose(source: torch.dtype, target: torch.dtype) -> bool:
    """Return whether values of `source` may lie outside what `target` can tell from zero and infinity."""
    if source == target or not (source.is_floating_point and target.is_floating_point):
        return False
    was, becomes = torch.finfo(source), torch.finfo(target)
    return was.max > becomes.max or was.smallest_normal * was.eps < becomes.smallest_normal * becomes.eps


def _has_zeros(bits: torch.Tensor) -> bool:
    """Return whether any value is zero, of either sign, by the values' bits as integers."""
    # -0.0 is the smallest integer, as bits.
    return int(torch.count_nonzero(bits)) < bits.numel() or int(bits.min()) == torch.iinfo(bits.dtype).min


def _refuse_overflow(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    overflown = torch.isinf(target) & torch.isfinite(source)
    if overflown.any():
        value = float(source[overflown][0])
        dtype = str(target.dtype).removeprefix("torch.")
        limit = torch.finfo(target.dtype).max
        wider = _WIDER.get(target.dtype)
        advice = (
            f"convert with --dtype {wider}"
            if wider
            else "a pack has nothing wider. Make such weights smaller in the source, or save it again as what it was"
            " trained in"
        )
        raise PackError(f"{name} holds {value:g}, too large for {dtype} ({limit:g}): {advice}")
