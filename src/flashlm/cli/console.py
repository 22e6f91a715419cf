"""What the command line shows: tables on stdout, progress and notes on stderr, nothing but text where it is piped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flashlm.sizes import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Progress = Callable[[int, int, str], None]


def print_json(content: Any) -> None:
    """Write `content` to stdout as JSON."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def note(message: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(message + "\n")


def print_table(rows: list[tuple[str, str]], title: str) -> None:
    """Write two columns to stdout: a drawn table on a terminal, plain aligned text elsewhere."""
    if not sys.stdout.isatty():
        width = max(len(name) for name, _ in rows)
        print(title)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextmanager
def progress_bar(unit: str = "bytes") -> Iterator[Progress]:
    """Yield a callback `(done, total, what)` that draws a bar on stderr where that is a terminal; counts are in `unit`."""
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    bars = _bars(unit)
    with bars:
        task = bars.add_task("", total=None)
        yield lambda done, total, what: bars.update(task, completed=done, total=total, description=what)


@contextmanager
def passing_bar(unit: str = "bytes", *, is_shown: bool = True) -> Iterator[Progress]:
    """As `progress_bar`, but the bar comes with the first call and goes without a trace once all is done."""
    if not (is_shown and sys.stderr.isatty()):
        yield lambda done, total, what: None
        return
    running: list[Any] = []

    def show(done: int, total: int, what: str) -> None:
        if not running and done < total:
            bars = _bars(unit, is_transient=True)
            bars.start()
            running.append((bars, bars.add_task(what, total=total)))
        if running:
            bars, task = running[0]
            bars.update(task, completed=done, total=total, description=what)
            if done >= total:
                bars.stop()
                running.clear()

    try:
        yield show
    finally:
        for bars, _ in running:
            bars.stop()


def _bars(unit: str, *, is_transient: bool = False) -> Bars:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    counts: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn(unit)]
    if unit == "bytes":
        counts = [DownloadColumn(binary_units=True), TransferSpeedColumn()]
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=is_transient,
    )


def stats_rows(stats: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table that `generate --stats` ends with."""
    peak, cap = stats["peak_process_bytes"], stats["dram_bytes"]
    rows = [
        *_time_rows(stats.get("times")),
        ("mode", stats["mode"]),
        ("exactness", stats["exactness"]),
        ("reader", stats["reader"]),
        ("resident / pinned", f"{format_size(stats['resident_bytes'])} / {format_size(stats['pinned_bytes'])}"),
    ]
    for phase, label in (("prefill", "prompt"), ("decode", "decode"), ("verify", "verify")):
        rows += _phase_rows(stats[phase], label)
    rows += _expert_rows(stats.get("experts"))
    return [*rows, ("peak memory / dram", f"{format_size(peak)} / {format_size(cap)} ({peak / cap:.0%})")]


def _time_rows(times: dict[str, float | None] | None) -> list[tuple[str, str]]:
    if times is None:
        return []
    names = (("load_s", "loading"), ("first_token_s", "then to the first token"), ("generate_s", "then in all"))
    return [(label, f"{times[name]:.2f} s") for name, label in names if times[name] is not None]


def _phase_rows(phase: dict[str, Any], label: str) -> list[tuple[str, str]]:
    if not phase["num_passes"]:
        return []
    passes = phase["num_passes"]
    cached = []
    for what, share in (("rows", "hit_share"), ("experts", "expert_hit_share")):
        asked = phase[f"hit_{what}"] + phase[f"miss_{what}"]
        if asked:
            cached.append((f"{label}: {what} a pass", f"{asked / passes:.0f}, {phase[share]:.0%} held in DRAM"))
    return [
        (f"{label}: tokens/s", f"{phase['tokens_per_s']:.2f} ({phase['num_tokens']} tokens, {phase['wall_s']:.2f} s)"),
        (
            f"{label}: read a pass",
            f"{format_size(phase['bytes_read'] / passes)} in {phase['num_reads'] / passes:.0f} reads,"
            f" {phase['read_gb_per_s']:.2f} GB/s",
        ),
        *cached,
        (f"{label}: time waiting for flash / computing", f"{phase['wait_share']:.0%} / {1 - phase['wait_share']:.0%}"),
    ]


def _expert_rows(experts: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return what the expert cache held and lacked, for each layer."""
    if experts is None:
        return []
    layers = zip(experts["slots"], experts["num_experts"], experts["hits"], experts["misses"], strict=True)
    pinned = f", {sum(experts['num_pinned'])} pinned" if any(experts["num_pinned"]) else ""
    policy = f"{experts['policy']}: {sum(experts['slots'])} of {sum(experts['num_experts'])} fit{pinned}"
    return [
        ("expert cache", policy),
        *(
            (
                f"experts, layer {index}",
                f"{hits} held, {misses} read ({hits / max(hits + misses, 1):.0%} held); {slots} of {count} fit",
            )
            for index, (slots, count, hits, misses) in enumerate(layers)
        ),
    ]
