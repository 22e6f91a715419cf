"""Which ranks a layer's predictor may have: one number, the paper's table, or whatever costs least (`auto`)."""

from __future__ import annotations

from flashlm.errors import ConfigError
from flashlm.sparsity.presets import paper_preset

MIN_RANK = 4
AUTO_RANKS = (16, 32, 64, 128, 256, 512, 1024)


def parse_rank(rank: str | int) -> str | int:
    """Return "auto", "paper" or a number.

    Raises:
        ConfigError: Anything else.
    """
    text = str(rank).strip().lower()
    if text in ("auto", "paper"):
        return text
    if not text.isdecimal() or int(text) < MIN_RANK:
        raise ConfigError(f"rank={rank!r}: give auto, paper, or a number of at least {MIN_RANK}")
    return int(text)


def check_rank(rank: str | int, *, hidden_size: int, num_rows: int) -> None:
    """Refuse a rank that a layer can't have.

    Raises:
        ConfigError: It is larger than both sides of the layer.
    """
    limit = min(hidden_size, num_rows)
    if isinstance(rank, int) and rank > limit:
        raise ConfigError(f"rank={rank} is above {limit}, the most that a layer of {hidden_size} x {num_rows} can use")


def ranks_of_layer(
    rank: str | int, layer: int, *, num_layers: int, model_type: str, hidden_size: int, num_rows: int
) -> list[int]:
    """Return the ranks to try for `layer`, ascending; one where there is nothing to choose."""
    limit = min(hidden_size, num_rows)
    if isinstance(rank, int):
        return [min(rank, limit)]
    most = max(limit // 2, min(MIN_RANK, limit))
    if rank == "paper":
        return [min(paper_preset(model_type).rank(layer, num_layers), most)]
    return [each for each in AUTO_RANKS if each <= most] or [most]
