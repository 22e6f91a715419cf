"""`flashlm eval`: perplexity on a text, dense against sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashlm.cli import console
from flashlm.cli.options import ActivationsOption, DramOption, JsonOption, PackArgument


def evaluate(
    pack: PackArgument,
    text: Annotated[Path, typer.Option(help="UTF-8 text file.", show_default=False)],
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="hybrid, naive or sparse; give it twice to compare. Default: hybrid, and sparse where calibrated.",
            show_default=False,
        ),
    ] = None,
    dram: DramOption = None,
    activations: ActivationsOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window; each starts without a past.")] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(help="Only so many tokens from the text's start.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on a text, and the traffic that it took.

    Mode sparse runs token by token, as generation does, and activations of 8 bits as verified tokens do; else the text runs
    in pieces of a prompt.
    """
    from flashlm.calibration.evaluate import evaluate as run
    from flashlm.calibration.evaluate import rows
    from flashlm.pack.manifest import read_manifest
    from flashlm.sparsity.calibration_document import read_sparsity

    if not mode:
        manifest = read_manifest(pack)
        sparsity = read_sparsity(pack, manifest)
        mode = ["hybrid", "sparse"] if sparsity is not None and sparsity.has_predictors else ["hybrid"]
        mode = ["experts"] if manifest.experts else mode
    with console.progress_bar(unit="tokens") as progress:
        results = run(
            pack,
            text,
            modes=mode,
            dram=dram,
            activations=activations,
            window=window,
            max_tokens=max_tokens,
            progress=progress,
            on_loaded=lambda flash: console.note(flash.describe()),
        )
    if as_json:
        console.print_json({"pack": str(pack), "text": str(text), "modes": [result.to_dict() for result in results]})
    else:
        console.print_table(rows(results), title=str(pack))
