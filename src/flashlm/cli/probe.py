"""`flashlm probe`: what this machine and a device can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashlm.cli import console
from flashlm.cli.calibrate import print_columns


def probe(
    folder: Annotated[Path, typer.Argument(help="Folder on the device to measure.")] = Path(),
    size: Annotated[
        str, typer.Option(help="Of the file that is written and read; less where there is little room.")
    ] = "2GiB",
    seconds: Annotated[
        float, typer.Option(help="Spent on reading, about; the whole takes about twice as long.")
    ] = 15.0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw random reads, beside the paper's, into this PNG.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
) -> None:
    """Measure this machine through flashlm's own reader and kernels, and keep the profile for `flashlm plan`.

    Throughput over read size and depth, sequential and random, past the page cache; reads a second at saturation;
    memory; products per dtype; how much reading and computing slow each other. A file without a name is written, so that
    nothing is left behind however the probe ends.
    """
    from flashlm.probe.device_profile import profile_path
    from flashlm.probe.probe import probe as run
    from flashlm.probe.probe import profile_rows
    from flashlm.sizes import format_size, parse_size_bytes

    if plot is not None:
        from flashlm.planner.plots import check_matplotlib

        check_matplotlib()
    with console.progress_bar(unit="points") as progress:
        profile = run(
            folder, file_bytes=parse_size_bytes(size), seconds=seconds, progress=progress, announce=console.note
        )
    console.note(f"kept in {profile_path(folder)}")
    if plot is not None:
        from flashlm.planner.plots import plot_reads

        plot_reads(profile, plot)
    if as_json:
        console.print_json(profile.model_dump(mode="json"))
        return
    depths = sorted({point.queue_depth for point in profile.reads})
    sizes = sorted({point.read_bytes for point in profile.reads if point.pattern == "random"})
    rates = {
        (point.read_bytes, point.queue_depth): point.gb_per_s
        for point in profile.reads
        if point.pattern == "random" and point.backend == profile.backend
    }
    header = ("random, GB/s", *(f"{depth} in flight" for depth in depths))
    print_columns(
        [
            header,
            *(
                (
                    format_size(size),
                    *(f"{rates[size, depth]:.3f}" if (size, depth) in rates else "" for depth in depths),
                )
                for size in sizes
            ),
        ]
    )
    console.print_table(profile_rows(profile), title="")


def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder that holds packs, or will.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what on this machine makes streaming slow or impossible, and what to do about it.

    Exits with 1 if something is bad; what only costs speed is a warning.
    """
    from flashlm.probe.doctor import examine

    findings = examine(folder)
    if as_json:
        console.print_json([finding.to_dict() for finding in findings])
    else:
        for each in findings:
            print(f"{each.level:<5} {each.what:<14} {each.fact}")
            if each.advice:
                print(f"{'':<20} {each.advice}")
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(1)
