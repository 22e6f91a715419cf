"""`flashlm pru`: training, evaluation and export of the recurrent language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashlm.cli import console

app = typer.Typer(
    help="Train, evaluate and export Pyramidal Recurrent Unit language models.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataOption = Annotated[
    Path, typer.Option(help="Folder with train.txt, valid.txt and test.txt, one sentence or paragraph a line.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def train(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished one is continued.")],
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file with name, preset, [model] and [training].", show_default=False)
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="standard (the default), awd or awd-finetune.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of the model or the training, repeatable.", show_default=False),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the text.", show_default=False)] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Run, or saved model, to start from (for awd-finetune).", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Hugging Face tokenizer (folder or hub id) instead of words.", show_default=False),
    ] = None,
    device: DeviceOption = "auto",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Metrics for TensorBoard too.")] = False,
    checkpoint_every_s: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 120.0,
    log_every: Annotated[int, typer.Option(help="Steps between rows of metrics.jsonl.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Train a model. Killed at any time, the same command goes on, to the bit.

    Several processes: torchrun --nproc-per-node N -m flashlm pru train ...
    """
    from flashlm.pru.training.allocator import keep_freed_memory
    from flashlm.pru.training.corpus import read_corpus, recognise
    from flashlm.pru.training.encoding import TokenizerEncoding
    from flashlm.pru.training.evaluate import exp
    from flashlm.pru.training.saved import BEST
    from flashlm.pru.training.settings import assigned, make_recipe, note_on_values
    from flashlm.pru.training.trainer import Trainer

    model, training = assigned(set_ or [])
    if epochs is not None:
        training["epochs"] = epochs
    made = make_recipe(recipe, preset, model, training)
    corpus = read_corpus(data) if tokenizer is None else read_corpus(data, lambda _: TokenizerEncoding(tokenizer))
    name, warning = recognise(corpus)
    keep_freed_memory()
    with console.progress_bar(unit="tokens") as progress:
        trainer = Trainer(
            corpus,
            made,
            out,
            start=start,
            device=device,
            checkpoint_every_s=checkpoint_every_s,
            log_every=log_every,
            has_tensorboard=tensorboard,
            on_progress=progress,
            note=console.note,
        )
        if trainer.processes.is_main:
            num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
            console.note(warning or f"{corpus.describe()}" + (f" ({name})" if name else ""))
            if values := note_on_values(made, name):
                console.note(values)
            console.note(f"{made.name}: {num_parameters:,} parameters, {made.training.epochs} epochs, into {out}")
        reached = trainer.run()
    if not trainer.processes.is_main:
        return
    best = None if reached.best_loss is None else exp(reached.best_loss)
    result: dict[str, Any] = {
        "name": made.name,
        "corpus": name or str(data),
        "num_parameters": num_parameters,
        "epochs": reached.epoch - 1,
        "steps": reached.step,
        "best_valid_perplexity": best,
        "model": str(out / BEST),
    }
    _print(result, as_json, title=str(out))


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a run, or of a saved model.", show_default=False)],
    data: DataOption,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    batch_size: Annotated[int, typer.Option(help="Columns that the text is cut into; 1 loses no token.")] = 1,
    max_tokens: Annotated[
        int | None, typer.Option(help="Only so many tokens from the text's start.", show_default=False)
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Dynamic evaluation too: learn from the text while scoring it.")
    ] = False,
    grid: Annotated[
        bool, typer.Option("--grid", help="Find --lr and --lamb on the validation text (24 passes over it).")
    ] = False,
    grid_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the validation text for --grid.", show_default="all")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of --dynamic.")] = 5e-5,
    lamb: Annotated[float, typer.Option(help="Decay of --dynamic towards the trained weights.")] = 2e-3,
    segment: Annotated[int, typer.Option(help="Tokens between updates of --dynamic.")] = 5,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity: token-exact, and as the papers' code counts it."""
    from flashlm.errors import ConfigError
    from flashlm.pru.training.allocator import keep_freed_memory
    from flashlm.pru.training.dynamic import DynamicSettings
    from flashlm.pru.training.reports import evaluate_folder

    if grid and not dynamic:
        raise ConfigError("--grid belongs to --dynamic")
    keep_freed_memory()
    with console.progress_bar(unit="tokens") as progress:
        report = evaluate_folder(
            model,
            data,
            split=split,
            batch_size=batch_size,
            max_tokens=max_tokens,
            dynamic=DynamicSettings(lr=lr, lamb=lamb, segment=segment) if dynamic else None,
            has_grid=grid,
            grid_tokens=grid_tokens,
            device=device,
            on_progress=progress,
            note=console.note,
        )
    if as_json:
        console.print_json(report)
        return
    learnt = {f"dynamic_{name}": value for name, value in report.pop("dynamic", {}).items() if name != "grid"}
    _print(report | learnt, False, title=str(model))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Folder of a run, or of a saved model.", show_default=False)],
    onnx: Annotated[Path, typer.Option(help="File to write; one that is there is replaced.", show_default=False)],
    stateless: Annotated[
        bool, typer.Option("--stateless", help="Begin every call at zeros instead of taking the state as input.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the model as an ONNX file: token ids and state in, logits and state out.

    The recurrent matrices become dense, so the file is larger than the model. Needs the package onnx.
    """
    from flashlm.pru.onnx_export import export_onnx
    from flashlm.pru.training.saved import load_model

    export_onnx(load_model(model), onnx, has_state=not stateless)
    result = {"file": str(onnx), "bytes": onnx.stat().st_size, "has_state_inputs": not stateless}
    _print(result, as_json, title=str(model))


def _print(result: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        console.print_json(result)
        return
    rows = [(name.replace("_", " "), _shown(value)) for name, value in result.items() if value is not None]
    console.print_table(rows, title=title)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) else str(value)
