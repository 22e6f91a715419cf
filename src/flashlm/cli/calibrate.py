"""`flashlm calibrate`: profiles, predictors and the error budget of a pack; the routing of one of experts."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from flashlm.cli import console
from flashlm.errors import ConfigError

# What a pack of experts has no use for: its routers foresee exactly.
_DENSE_ONLY = ("rank", "recall", "threshold", "window", "preset", "device", "max_ppl_increase", "seed", "reorder")


def calibrate(
    context: typer.Context,
    pack: Annotated[Path, typer.Argument(help="Folder made by `flashlm convert`.", show_default=False)],
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text like what the model will see. Default: a short English sample, good for a first try only.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        str,
        typer.Option(help="Of the predictors: auto (cheapest), paper (its table), or a number for all layers."),
    ] = "auto",
    recall: Annotated[
        float, typer.Option(help="Least share of the active neurons that a predictor aims at; lower predicts fewer.")
    ] = 0.95,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Probability above which a neuron is predicted, the same in all layers; --recall is then not used.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Hold the rows of the last so many tokens. Default: LRU, all that fit.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="paper: its ranks, threshold and window for this family.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Where predictors are trained: auto, cpu or cuda.")] = "auto",
    max_ppl_increase: Annotated[
        str, typer.Option(help="Error budget: allowed rise of held-out perplexity, like 1% or 0.01.")
    ] = "1%",
    max_tokens: Annotated[int, typer.Option(help="Only so many tokens from the text's start.")] = 16384,
    dram: Annotated[
        str | None,
        typer.Option(help="Bound on the process while the model runs, like 6GiB.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Makes training repeatable.")] = 0,
    plots: Annotated[
        Path | None, typer.Option(help="Draw what was found into this folder (PNG).", show_default=False)
    ] = None,
    reorder: Annotated[
        bool, typer.Option(help="Lay the rows down hot ones first, then those that fire together side by side.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Teach a pack which neurons each token needs, so that mode sparse reads only these.

    The text is cut into three parts. The first is run through the model to see which neurons fire, and one small predictor
    per layer learns to foresee it. The second sets the predictors' thresholds. The third, which nothing has seen, tells
    recall and perplexity, dense against sparse. Where perplexity rises beyond the error budget, the layers that hurt
    most predict more rows until it fits; if it can't, the best is stored and marked as not passed, and mode auto stays
    exact.

    Writes flash/sparsity.json and .safetensors into the pack, and its rows in a new order.
    Interrupted, it goes on with the same command.

    A pack of experts needs no predictors: its routers choose. There the text shows which experts are used, and which cache
    policy finds most of them at several cache sizes; flash/routing.json keeps it, and generate goes by it.
    """
    from flashlm.pack.manifest import read_manifest

    if read_manifest(pack).experts:
        _refuse_dense_options(context)
        _calibrate_experts(pack, text, max_tokens=max_tokens, dram=dram, plots=plots, as_json=as_json)
        return
    allowed = parse_share(max_ppl_increase)
    from transformers.utils.logging import disable_progress_bar

    from flashlm.calibration.dense import calibrate as run

    disable_progress_bar()  # ours is enough
    try:
        with console.progress_bar(unit="steps") as progress:
            report = run(
                pack,
                text,
                rank=rank,
                recall=recall,
                threshold=threshold,
                window=window,
                preset=preset,
                device=device,
                max_ppl_increase=allowed,
                max_tokens=max_tokens,
                dram=dram,
                seed=seed,
                progress=progress,
                announce=console.note,
                plots=plots,
                reorder=reorder,
            )
    except KeyboardInterrupt:
        console.note("what is done is kept: the same command goes on from here")
        raise
    if as_json:
        console.print_json(report.to_dict())
        return
    print_columns(report.layer_rows())
    console.print_table(report.rows(), title=str(pack))


def _refuse_dense_options(context: typer.Context) -> None:
    """Refuse options of dense packs that were given for one of experts."""
    given = [
        "--" + name.replace("_", "-")
        for name in _DENSE_ONLY
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    if given:
        raise ConfigError(f"{', '.join(given)}: this pack streams experts, which its routers choose; leave it out")


def _calibrate_experts(
    pack: Path, text: Path | None, *, max_tokens: int, dram: str | None, plots: Path | None, as_json: bool
) -> None:
    from transformers.utils.logging import disable_progress_bar

    from flashlm.calibration.experts import calibrate_experts

    disable_progress_bar()  # ours is enough
    with console.progress_bar(unit="steps") as progress:
        report = calibrate_experts(
            pack, text, max_tokens=max_tokens, dram=dram, progress=progress, announce=console.note, plots=plots
        )
    if as_json:
        console.print_json(report.to_dict())
        return
    print_columns(report.layer_rows())
    console.print_table(report.rows(), title=str(pack))


def parse_share(text: str) -> float:
    """Return 0.01 for `1%` and for `0.01`.

    Raises:
        ConfigError: It is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text)
    if match is None:
        raise ConfigError(f"max-ppl-increase={text!r} is not a share: write it like 1% or 0.01")
    return float(match.group(1)) / (100.0 if match.group(2) else 1.0)


def print_columns(rows: list[tuple[str, ...]]) -> None:
    """Write a table with a header to stdout: drawn on a terminal, aligned text elsewhere."""
    if not sys.stdout.isatty():
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*(rows[0]))
    for column in table.columns:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
