"""The paper's Figures 4a and 9 for a calibrated model: use curves, and active against predicted rows per layer.

matplotlib is an optional extra and imported only here. The figures need nothing but figures: see `LayerFigures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flashlm.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXTRA = "recipes"
MAX_CURVES = 8  # layers in the use curve, evenly spread
_BLUE, _ORANGE, _GREEN = "#3b6ea8", "#d9822b", "#3f8f5f"
USE_CURVE_NAME = "use-curve.png"
PREDICTED_NAME = "predicted-rows.png"


class _Entry(Protocol):
    @property
    def predicted_share(self) -> float: ...


class LayerFigures(Protocol):
    """What is drawn of one layer; `LayerReport` has it."""

    @property
    def layer(self) -> int: ...  # noqa: D102
    @property
    def active_share(self) -> float: ...  # noqa: D102
    @property
    def both_share(self) -> float: ...  # noqa: D102
    @property
    def use_curve(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def predictor(self) -> _Entry: ...  # noqa: D102


def check_matplotlib(option: str = "--plots") -> None:
    """Refuse where matplotlib is missing; `option` is what asked for it.

    Raises:
        ConfigError: It names the extra.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f"plots need matplotlib: pip install 'flashlm[{EXTRA}]', or leave {option} out") from None


def write_plots(folder: Path, layers: Sequence[LayerFigures], *, title: str) -> list[Path]:
    """Draw both figures as PNG into `folder`, which is made; return their paths.

    Raises:
        ConfigError: matplotlib is missing.
        StorageError: They can't be written.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    paths = [folder / USE_CURVE_NAME, folder / PREDICTED_NAME]
    figures: list[Any] = []
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    figure.suptitle(title)
    held, new = figure.subplots(1, 2)
    _draw_use_curves(held, new, layers)
    figures.append(figure)
    figure = Figure(figsize=(max(5.5, 0.3 * len(layers) + 3.5), 3.8), layout="constrained")
    figure.suptitle(title)
    _draw_predicted(figure.subplots(), layers)
    figures.append(figure)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for each, path in zip(figures, paths, strict=True):
            each.savefig(path, dpi=150)
    except OSError as error:
        raise StorageError(f"{folder}: the figures can't be written: {error.strerror}", path=str(folder)) from error
    return paths


def _draw_use_curves(held: Axes, new: Axes, layers: Sequence[LayerFigures]) -> None:
    """Draw s_agg(k) on the left and s_agg(k+1) - s_agg(k) on the right (Fig 4a); light to dark is first to last layer."""
    from matplotlib import colormaps

    count = min(len(layers), MAX_CURVES)
    shown = [layers[round(place * (len(layers) - 1) / max(count - 1, 1))] for place in range(count)]
    for place, layer in enumerate(shown):
        colour = colormaps["viridis_r"](0.15 + 0.85 * place / max(count - 1, 1))
        percent = [100 * share for share in layer.use_curve]
        windows = range(1, len(percent) + 1)
        held.plot(windows, percent, color=colour, label=f"layer {layer.layer}", linewidth=1.6)
        steps = [after - before for before, after in pairwise(percent)]
        new.plot(windows[:-1], steps, color=colour, linewidth=1.6)
    held.set_ylabel("rows used by the last k tokens, %")
    new.set_ylabel("new rows per token at window k, %")
    held.set_title("held: s_agg(k)")
    new.set_title("read: s_agg(k+1) - s_agg(k)")
    held.set_ylim(0, 100)
    held.legend(fontsize="small", frameon=False)
    for axes in (held, new):
        axes.set_xlabel("window k, tokens")
        _plain(axes)
    new.set_ylim(bottom=0)


def _draw_predicted(axes: Axes, layers: Sequence[LayerFigures]) -> None:
    """Draw truly active, predicted, and both, per layer (Fig 9)."""
    from matplotlib.ticker import MaxNLocator

    numbers = [layer.layer for layer in layers]
    curves = (
        ("predicted", [layer.predictor.predicted_share for layer in layers], _ORANGE, "o"),
        ("truly active", [layer.active_share for layer in layers], _BLUE, "s"),
        ("both", [layer.both_share for layer in layers], _GREEN, "^"),
    )
    for label, shares, colour, marker in curves:
        axes.plot(numbers, [100 * share for share in shares], label=label, color=colour, marker=marker, markersize=4)
    axes.set_xlabel("layer")
    axes.set_ylabel("rows per token, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
