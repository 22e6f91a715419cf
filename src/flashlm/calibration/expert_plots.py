"""Figures of expert traffic: what a run held and read in each layer, how a text used experts, what each cache policy finds.

matplotlib is an optional extra and imported only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashlm.calibration.plots import check_matplotlib
from flashlm.errors import StorageError
from flashlm.sparsity.routing import Routing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

USE_NAME = "expert-use.png"
POLICIES_NAME = "expert-policies.png"
_HELD, _READ, _OTHER = "#3b6ea8", "#d9822b", "#3f8f5f"
MOST_TIMES_EVEN = 4.0  # where the colours of the heat map end


def write_traffic_plot(path: Path, experts: dict[str, Any], *, title: str) -> None:
    """Draw, for each layer, the experts that were found in the cache and that were read.

    Args:
        path: A PNG.
        experts: What `ExpertStore.describe` returns: `hits`, `misses`, `slots`, `num_experts`, `policy`.
        title: Above the figure.

    Raises:
        ConfigError: matplotlib is missing.
        StorageError: The file can't be written.
    """
    hits, misses = np.array(experts["hits"]), np.array(experts["misses"])
    layers = np.arange(len(hits))
    figure = _figure(max(6.0, 0.22 * len(hits) + 3.0), 3.8, title)
    axes = figure.subplots()
    axes.bar(layers, misses, color=_READ, label="read from flash", width=0.8)
    axes.bar(layers, hits, bottom=misses, color=_HELD, label="held in DRAM", width=0.8)
    _integers(axes)
    axes.set_xlim(-0.6, len(hits) - 0.4)
    axes.set_xlabel("layer of experts")
    axes.set_ylabel("experts asked for")
    asked = max(int(hits.sum() + misses.sum()), 1)
    slots, count = sum(experts["slots"]), sum(experts["num_experts"])
    axes.set_title(
        f"{hits.sum() / asked:.0%} held; {slots} of {count} experts fit; {experts['policy']}", fontsize="medium"
    )
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def write_routing_plots(folder: Path, routing: Routing, *, title: str) -> list[Path]:
    """Draw how a text used the experts of each layer, and what each policy finds; return the paths.

    Raises:
        ConfigError: matplotlib is missing.
        StorageError: A file can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} can't be made: {error.strerror}", path=str(folder)) from error
    _save(_draw_use(routing.counts, title), folder / USE_NAME)
    _save(_draw_policies(routing, title), folder / POLICIES_NAME)
    return [folder / USE_NAME, folder / POLICIES_NAME]


def _draw_use(counts: Sequence[Sequence[int]], title: str) -> Figure:
    """Draw layer by expert; a colour is how often it was used, over what even use would give."""
    width = max(len(layer) for layer in counts)
    use = np.full((len(counts), width), np.nan)
    for index, layer in enumerate(counts):
        use[index, : len(layer)] = np.array(layer) * len(layer) / max(sum(layer), 1)
    figure = _figure(min(max(6.0, 0.08 * width + 3.0), 14.0), min(max(3.0, 0.14 * len(counts) + 1.8), 11.0), title)
    axes = figure.subplots()
    image = axes.imshow(use, aspect="auto", cmap="Blues", vmin=0.0, vmax=MOST_TIMES_EVEN, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, extend="max")
    bar.set_label("uses, times even use")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer of experts")
    axes.set_title(
        f"most used: {np.nanmax(use):.1f} times even use; never used: {int((use == 0).sum())}", fontsize="medium"
    )
    _integers(axes)
    return figure


def _draw_policies(routing: Routing, title: str) -> Figure:
    figure = _figure(6.0, 3.8, title)
    axes = figure.subplots()
    sizes = [100 * each.cache_share for each in routing.replays]
    curves = (("lru", _HELD, "o"), ("lfu", _READ, "s"), ("pinned", _OTHER, "^"))
    for policy, colour, marker in curves:
        found = [100 * getattr(each, policy) for each in routing.replays]
        axes.plot(sizes, found, color=colour, marker=marker, markersize=5, label=policy)
    axes.plot(sizes, sizes, color="#999999", linestyle=":", label="even use, no order")
    axes.set_xlabel("experts that fit, %")
    axes.set_ylabel("experts found, %")
    axes.set_ylim(0, 100)
    axes.set_title(f"replayed on {routing.num_replayed_tokens} tokens, one by one", fontsize="medium")
    axes.legend(frameon=False)
    _plain(axes)
    return figure


def _figure(width: float, height: float, title: str) -> Figure:
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _integers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _plain(axes: Axes) -> None:
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise StorageError(f"{path}: the figure can't be written: {error.strerror}", path=str(path)) from error
