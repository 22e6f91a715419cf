"""Sizes of the pyramid: what each level takes in and gives out, and which sizes are refused. Plain arithmetic, no torch.

Widths are those of the authors' released code, from which the published parameter counts follow exactly; the paper's
figure 2 draws equal widths, which `split="equal"` gives.
"""

from __future__ import annotations

from typing import Literal, get_args

from flashlm.errors import ConfigError

Split = Literal["code", "equal"]
Subsampling = Literal["average", "max", "skip", "conv"]
Init = Literal["code", "per_group"]
NUM_GATES = 4


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise ConfigError unless `value` is one of a Literal's."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_positive(**sizes: int) -> None:
    """Raise ConfigError for a size that is not a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name} must be a positive integer, got {size!r}")


def level_input_sizes(input_size: int, levels: int) -> list[int]:
    """Return the features that each level sees: halved once per level after the first.

    Raises:
        ConfigError: The input can't be halved so often without remainder.
    """
    check_positive(input_size=input_size, levels=levels)
    factor = 2 ** (levels - 1)
    if input_size % factor:
        raise ConfigError(
            f"a pyramid of {levels} levels halves its input {levels - 1} times: input_size must be divisible by {factor},"
            f" got {input_size}; take fewer levels or another size"
        )
    return [input_size >> level for level in range(levels)]


def level_output_sizes(output_size: int, levels: int, split: Split = "code") -> list[int]:
    """Return the features that each level contributes; level 1 takes the remainder.

    `code`: level k gives ceil(M / 2^k). `equal`: M / K each.

    Raises:
        ConfigError: A level would be left without features, or `split` is unknown.
    """
    check_choice("split", split, Split)
    check_positive(output_size=output_size, levels=levels)
    deeper = [
        -(-output_size // 2**level) if split == "code" else output_size // levels for level in range(2, levels + 1)
    ]
    first = output_size - sum(deeper)
    if min([first, *deeper]) < 1:
        raise ConfigError(
            f"{levels} levels can't share {output_size} outputs: a level would have none; take fewer levels"
        )
    return [first, *deeper]


def group_size(size: int, groups: int, name: str = "hidden_size") -> int:
    """Return the features of a group.

    Raises:
        ConfigError: `size` is not divisible by `groups`.
    """
    check_positive(groups=groups, **{name: size})
    if size % groups:
        raise ConfigError(
            f"{name} must be divisible by groups={groups}, got {size}: the context is cut into equal groups"
        )
    return size // groups
