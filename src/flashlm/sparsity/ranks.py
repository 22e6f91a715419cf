"""Which ranks a layer's predictor may have: one number, the paper's table, or whatever costs least (`auto`)."""

from __future__ import annotations

from flashlm.errors import ConfigError

MIN_RANK = 4
AUTO_RANKS = (16, 32, 64, 128, 256, 512, 1024)
# Paper, Appendix B: rank of most layers, rank of the sensitive ones, and which are sensitive.
_PAPER_LAST = {"opt": (128, 1024, 4, 32), "falcon": (256, 1152, 4, 32), "persimmon": (256, 1152, 4, 36)}
_PAPER_MIDDLE = {"llama": (256, 1024, 4, 32)}
_PAPER_PHI = (160, 160, 480, 800, 800, 480, 160, 800)  # groups of 4 of 32 layers; the last has none there
_DEFAULT = _PAPER_LAST["opt"]


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
        return [min(paper_rank(model_type, layer, num_layers), most)]
    return [each for each in AUTO_RANKS if each <= most] or [most]


def paper_rank(model_type: str, layer: int, num_layers: int) -> int:
    """Return the rank of Appendix B for a layer, the table stretched to the model's number of layers.

    A model that the paper does not have gets OPT's.
    """
    if model_type == "phi":
        return _PAPER_PHI[layer * len(_PAPER_PHI) // num_layers]
    usual, sensitive, count, of_layers = (_PAPER_LAST | _PAPER_MIDDLE).get(model_type, _DEFAULT)
    num_sensitive = max(round(count * num_layers / of_layers), 1)
    first = num_layers - num_sensitive
    if model_type in _PAPER_MIDDLE:
        first = (num_layers - num_sensitive) // 2
    return sensitive if first <= layer < first + num_sensitive else usual
