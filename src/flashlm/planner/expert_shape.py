"""What the planner needs to know of a mixture of experts: its layers of experts, and how often the cache will have one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flashlm.memory.expert_budget import ExpertUse
from flashlm.planner.outline import outline
from flashlm.rows.layout import DTYPE_BYTES, LayerLayout
from flashlm.structure.experts import ExpertLayer


@dataclass(frozen=True, kw_only=True)
class HitCurve:
    """The share of a token's experts that the cache has, over the share of all experts that it holds.

    Attributes:
        points: (share held, share found), ascending; between them, and to (0, 0) and (1, 1), the line. None at all is
            uniform routing: every expert is as likely as any other, whatever came before.
        origin: Where it comes from.
    """

    points: tuple[tuple[float, float], ...] = ()
    origin: str

    def hit_share(self, held_share: float) -> float:
        """Return the share that is found where `held_share` of the experts are held."""
        line = [(0.0, 0.0), *self.points, (1.0, 1.0)]
        for (low, low_hits), (high, high_hits) in pairwise(line):
            if low <= held_share <= high and high > low:
                return low_hits + (held_share - low) / (high - low) * (high_hits - low_hits)
        return 1.0


UNIFORM = HitCurve(origin="ASSUMED uniform: as many found as are held")


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """A mixture of experts as the cost model sees it.

    Attributes:
        name: Where it comes from, as it was given.
        model_type: The transformers model type.
        config: Its transformers config.
        uses: The layers of experts, in forward order.
        resident_bytes: Weights that stay in DRAM.
        matrix_bytes: Of these, what every token multiplies with.
        num_matrices: Linear layers that these make.
        num_layers: Decoder layers, those without experts too.
        is_pack: Whether it is converted already.
        hits: How often the cache has an expert.
    """

    name: str
    model_type: str
    config: Any
    uses: tuple[ExpertUse, ...]
    resident_bytes: int
    matrix_bytes: int
    num_matrices: int
    num_layers: int
    is_pack: bool
    hits: HitCurve = UNIFORM

    @property
    def dtype(self) -> str:
        """Element type of the pack, a key of `DTYPE_BYTES`."""
        return self.uses[0].layout.dtype

    @property
    def outline(self) -> str:
        """Model type, dtype and layers of experts, in words that differ where any of these do."""
        return outline(self.model_type, [(use.layout, use.num_active) for use in self.uses])

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all experts' files."""
        return sum(use.layout.file_bytes for use in self.uses)

    @property
    def total_bytes(self) -> int:
        """Disk that the pack takes, a few small files aside."""
        return self.resident_bytes + self.streamed_bytes


def uses_of_layers(layers: tuple[ExpertLayer, ...], dtype: str) -> tuple[ExpertUse, ...]:
    """Return the layers of experts that a conversion to `dtype` would make."""
    return tuple(
        ExpertUse(
            layout=LayerLayout(
                hidden_size=layer.hidden_size,
                num_rows=layer.num_experts * layer.num_rows,
                has_gate=layer.has_gate,
                dtype=dtype,
                block_rows=layer.num_rows,
            ),
            num_active=layer.num_active,
        )
        for layer in layers
    )


def expert_weights(layers: tuple[ExpertLayer, ...]) -> int:
    """Return how many weights are streamed."""
    return sum(
        layer.num_experts * layer.num_rows * layer.hidden_size * (3 if layer.has_gate else 2) for layer in layers
    )


def resident_bytes(num_weights: int, layers: tuple[ExpertLayer, ...], dtype: str) -> int:
    """Return the bytes of what is left of a model's weights in DRAM."""
    return (num_weights - expert_weights(layers)) * DTYPE_BYTES[dtype]
