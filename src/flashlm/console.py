"""What the command line shows: tables on stdout, progress and notes on stderr, nothing but text where it is piped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flashlm.sizes import format_size

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
    bars = Bars(
        TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn(), console=Console(stderr=True)
    )
    with bars:
        task = bars.add_task("", total=None)
        yield lambda done, total, what: bars.update(task, completed=done, total=total, description=what)


def stats_rows(stats: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table that `generate --stats` ends with."""
    peak, cap = stats["peak_process_bytes"], stats["dram_bytes"]
    rows = [
        ("mode", stats["mode"]),
        ("exactness", stats["exactness"]),
        ("reader", stats["reader"]),
        ("resident / pinned", f"{format_size(stats['resident_bytes'])} / {format_size(stats['pinned_bytes'])}"),
    ]
    for phase, label in (("prefill", "prompt"), ("decode", "decode"), ("verify", "verify")):
        rows += _phase_rows(stats[phase], label)
    rows += _expert_rows(stats.get("experts"))
    return [*rows, ("peak memory / dram", f"{format_size(peak)} / {format_size(cap)} ({peak / cap:.0%})")]


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
        (f"{label}: waiting / computing", f"{phase['wait_share']:.0%} / {1 - phase['wait_share']:.0%}"),
    ]


def _expert_rows(experts: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return what the expert cache held and lacked, for each layer."""
    if experts is None:
        return []
    layers = zip(experts["slots"], experts["num_experts"], experts["hits"], experts["misses"], strict=True)
    pinned = f", {sum(experts['num_pinned'])} for good" if any(experts["num_pinned"]) else ""
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
