"""A unit: whatever is streamed. Its kind, its geometry, and how many of its blocks a token uses; nothing of files or models.

Units stand in the order in which a forward pass meets them. Manifest, budget, planner and engine speak of the same ones:

* `ffn`: a feed-forward layer, whose rows are its neurons;
* `experts`: the routed experts of a layer, each a block of which a token uses a few;
* `linear`: a matrix that every token is multiplied with: attention's projections, the output layer;
* `embedding`: a table of which a token looks up one row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from flashlm.errors import ConfigError
from flashlm.rows.layout import LayerLayout

Kind = Literal["ffn", "experts", "linear", "embedding"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One unit, as sizes.

    Attributes:
        kind: What it is.
        layout: Its geometry.
        num_active: Blocks that a token uses: all; a few of a layer of experts; of an embedding the one with its row.
    """

    kind: Kind
    layout: LayerLayout
    num_active: int

    @classmethod
    def dense(cls, kind: Literal["ffn", "linear"], layout: LayerLayout) -> Unit:
        """Make a unit of which a token uses every block."""
        return cls(kind=kind, layout=layout, num_active=layout.num_blocks)

    @classmethod
    def table(cls, layout: LayerLayout) -> Unit:
        """Make an embedding."""
        return cls(kind="embedding", layout=layout, num_active=1)

    @property
    def is_dense(self) -> bool:
        """Whether a token uses all of it."""
        return self.kind in ("ffn", "linear")

    @property
    def num_blocks(self) -> int:
        """Its blocks: experts, where it is a layer of these."""
        return self.layout.num_blocks


def of_kind(units: Iterable[Unit], kind: Kind) -> list[Unit]:
    """Return the units of one kind, in order."""
    return [unit for unit in units if unit.kind == kind]


def has_rows(units: Iterable[Unit]) -> bool:
    """Return whether the rows of all feed-forward layers lie by themselves, so that they can be read one by one."""
    return not any(unit.layout.is_by_block for unit in units if unit.kind == "ffn")


def check_rows(units: Iterable[Unit], name: str, what: str) -> None:
    """Refuse what reads rows of feed-forward layers one by one, of a model or pack `name` that has none.

    Raises:
        ConfigError: Its blocks keep the groups of a quantised checkpoint, which go across neurons.
    """
    kept = [unit.layout.encoding for unit in units if unit.kind == "ffn" and unit.layout.is_by_block]
    if kept:
        raise ConfigError(
            f"{what} reads single rows, but those of {name} don't lie by themselves: its blocks keep the groups of the"
            f" checkpoint ({', '.join(sorted(set(kept)))}). Load it with mode='hybrid', or convert the model with"
            " --quantize q8_0"
        )


def dense_units(units: Iterable[Unit]) -> list[Unit]:
    """Return those of which a token uses every block, in order: what goes through the staging."""
    return [unit for unit in units if unit.is_dense]
