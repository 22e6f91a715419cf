"""The paper's Fig 2b for this device, and its Fig 7 as predicted: latency over DRAM. matplotlib is imported only here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashlm.errors import BudgetError, ConfigError, StorageError
from flashlm.planner.expert_shape import ExpertShape
from flashlm.planner.plan import make_plan
from flashlm.planner.plan_document import Plan
from flashlm.planner.rates import Rates
from flashlm.planner.shape import ModelShape
from flashlm.probe.device_profile import DeviceProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXTRA = "recipes"
NUM_BUDGETS = 24
MIB = 1 << 20
# Paper, Fig 2b (read off): random reads of a MacBook M1 Max, MB/s by chunk in KiB, for 2 to 32 threads.
PUBLISHED_KIB = (4, 8, 16, 32, 64)
PUBLISHED_MB_PER_S = {
    2: (65, 133, 244, 463, 798),
    8: (291, 548, 1003, 1748, 2864),
    32: (597, 1162, 2103, 3702, 5063),
}


def check_matplotlib() -> None:
    """Refuse where matplotlib is missing.

    Raises:
        ConfigError: It names the extra.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f"plots need matplotlib: pip install 'flashlm[{EXTRA}]', or leave --plot out") from None


def plot_reads(profile: DeviceProfile, path: Path) -> None:
    """Draw random-read throughput over read size, one curve per depth, beside the published ones.

    Raises:
        StorageError: The file can't be written.
    """
    figure, axes = _axes(f"Random reads: this device ({profile.file_system}, {profile.backend}) and the paper's M1 Max")
    own = [
        point
        for point in profile.reads
        if point.pattern == "random" and point.backend == profile.backend and point.read_bytes <= MIB
    ]
    depths = sorted({point.queue_depth for point in own})
    for shade, depth in enumerate(depths):
        curve = sorted((point.read_bytes / 1024, point.gb_per_s) for point in own if point.queue_depth == depth)
        color = (0.15, 0.25, 0.45 + 0.5 * shade / max(len(depths) - 1, 1))
        axes.plot(*zip(*curve, strict=True), marker="o", ms=4, color=color, label=f"here, {depth} in flight")
    for shade, (threads, rates) in enumerate(PUBLISHED_MB_PER_S.items()):
        axes.plot(
            PUBLISHED_KIB,
            [rate / 1e3 for rate in rates],
            linestyle="--",
            color="#d9822b",
            alpha=0.4 + 0.25 * shade,
            label=f"paper, {threads} threads",
        )
    axes.axhline(profile.stream_gb_per_s, color="#888888", linewidth=1, label="here, sequential")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({point.read_bytes // 1024 for point in own})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    rates_shown = [0.03, 0.1, 0.3, 1, 3]
    axes.set_yticks(rates_shown, [str(rate) for rate in rates_shown])
    axes.set_xlabel("read size, KiB")
    axes.set_ylabel("GB/s")
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_latency(shape: ModelShape | ExpertShape, rates: Rates, context: int | None, path: Path) -> None:
    """Draw the predicted time of a token over DRAM, from the floor to where everything fits, per mode.

    Raises:
        StorageError: The file can't be written.
    """
    floor_bytes = _floor_bytes(shape, rates, context)
    top_bytes = floor_bytes + shape.streamed_bytes + (512 << 20)
    figure, axes = _axes(f"{shape.name}: predicted, {shape.dtype}")
    for mode, label, color in _curves(shape):
        found: list[Plan] = []
        for step in range(NUM_BUDGETS + 1):
            dram_bytes = floor_bytes + (top_bytes - floor_bytes) * step // NUM_BUDGETS
            try:
                found.append(make_plan(shape, rates, dram_bytes, context=context, mode=mode))
            except BudgetError:
                continue
        sizes = [plan.dram_bytes / (1 << 30) for plan in found]
        axes.plot(sizes, [plan.token_s for plan in found], color=color, label=label)
        axes.plot(sizes, [plan.roofline_s for plan in found], color=color, linestyle=":", label=f"its roofline, {mode}")
    axes.set_xlabel("dram, GiB")
    axes.set_ylabel("seconds a token")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    _save(figure, path)


def _curves(shape: ModelShape | ExpertShape) -> list[tuple[str, str, str]]:
    """Return (mode, label, color) of what can be drawn."""
    if isinstance(shape, ExpertShape):
        return [("experts", f"experts, exact ({shape.hits.origin})", "#3b6ea8")]
    curves = [("hybrid", "hybrid, exact", "#3b6ea8")]
    if shape.sparse is not None:
        curves.append(("sparse", f"sparse ({shape.sparse.origin})", "#d9822b"))
    return curves


def _floor_bytes(shape: ModelShape | ExpertShape, rates: Rates, context: int | None) -> int:
    mode = "experts" if isinstance(shape, ExpertShape) else "hybrid"
    try:
        make_plan(shape, rates, 1, context=context, mode=mode)
    except BudgetError as error:
        return error.needed_bytes
    return 1


def _axes(title: str) -> tuple[Figure, Any]:
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=130, format="png")
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror}", path=str(path)) from error
