"""The command line: one thin command per verb. Results go to stdout, progress and errors to stderr.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once. Exit codes: 0, 1 (other errors),
2 usage, 3 does not fit, 4 corrupt or unsupported, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashlm.cli import console
from flashlm.cli.calibrate import calibrate
from flashlm.cli.evaluate import evaluate
from flashlm.cli.options import ContextOption, JsonOption, LoadOptions, PackArgument, with_options
from flashlm.cli.plan import plan as plan_command
from flashlm.cli.probe import doctor, probe
from flashlm.cli.pru import app as pru_app
from flashlm.errors import ConfigError, FlashError

if TYPE_CHECKING:
    from flashlm.engine.decoding import Decoding
    from flashlm.sparsity.calibration_document import Sparsity
    from flashlm.sparsity.routing import Routing

app = typer.Typer(
    name="flashlm",
    help="Run language models that are larger than memory: convert once, then generate under a hard memory cap.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TEXT_OPTIONS = ("--prompt", "--prompt-file")  # whose value may be any word


class DtypeChoice(StrEnum):
    """Element types of a pack."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class QuantizeChoice(StrEnum):
    """Encodings that a conversion writes by itself."""

    q8_0 = "q8_0"


def _version(value: bool) -> None:
    if value:
        from flashlm._version import __version__

        print(f"flashlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and log messages.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    if debug:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(help="Model folder with safetensors, a .gguf file, or a hub id (of several .gguf: ID:FILE)."),
    ],
    pack: Annotated[Path, typer.Argument(help="Folder to write; an unfinished one is continued.")],
    dtype: Annotated[
        DtypeChoice | None,
        typer.Option(help="Element type of what is not quantised. Default: bf16; of a .gguf fp32.", show_default=False),
    ] = None,
    quantize: Annotated[
        QuantizeChoice | None,
        typer.Option(
            help="Write what is streamed anew, in 8.5 bits a weight. Default: as it is if quantised, else in --dtype.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the source.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a Hugging Face model or a GGUF file into a pack that can be streamed.

    Weights that are quantised already (GGUF, MXFP4, FP8) are kept as they are. transformers opens the pack like any other
    model folder, where flashlm is installed. Killed half-way and started again, the conversion goes on where it was.
    """
    from flashlm.conversion.convert import convert as run
    from flashlm.pack.description import describe

    with console.progress_bar() as progress:
        run(
            source,
            pack,
            dtype=None if dtype is None else dtype.value,
            quantize=None if quantize is None else quantize.value,
            trust_remote_code=trust_remote_code,
            progress=progress,
            announce=console.note,
        )
    _print_info(describe(pack), as_json)


@app.command()
def info(pack: PackArgument, context: ContextOption = None, as_json: JsonOption = False) -> None:
    """Print shapes, what is resident, what is streamed, and the smallest --dram that works."""
    from flashlm.memory.smallest import smallest_dram_bytes
    from flashlm.pack.description import describe
    from flashlm.pack.manifest import read_manifest
    from flashlm.planner.settings import make_settings
    from flashlm.sizes import format_size
    from flashlm.sparsity.calibration_document import read_sparsity
    from flashlm.sparsity.routing import read_routing

    described = describe(pack)
    floor_bytes = smallest_dram_bytes(pack, context, is_checked=make_settings().is_checked)
    manifest = read_manifest(pack)
    found = read_routing(pack, manifest) if manifest.experts else read_sparsity(pack, manifest)
    _print_info(described, as_json, floor_bytes=floor_bytes, floor=format_size(floor_bytes), calibration=found)


@app.command()
def verify(
    pack: PackArgument,
    accept: Annotated[
        bool,
        typer.Option("--accept", help="First take config.json and the files beside it as they are: I changed them."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that the pack carries.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read the whole pack and check every checksum, and that the manifest fits the model."""
    from flashlm.conversion.verify import accept_small_files
    from flashlm.conversion.verify import verify as run
    from flashlm.sizes import format_size

    if accept:
        console.note(f"accepted as they are: {', '.join(accept_small_files(pack)) or 'nothing had changed'}")
    with console.progress_bar() as progress:
        report = run(pack, trust_remote_code=trust_remote_code, progress=progress)
    if as_json:
        console.print_json(
            {"pack": str(pack), "num_checked_bytes": report.num_bytes, "problems": list(report.problems)}
        )
    report.raise_for_problems()
    if not as_json:
        print(f"{pack}: {format_size(report.num_bytes)} in {report.num_files} files checked, all checksums match")


@app.command()
@with_options
def generate(
    pack: PackArgument,
    text: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Text to continue. Without one, what is piped in.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The same, as an option.", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue; - reads stdin.", show_default=False)
    ] = None,
    options: LoadOptions = LoadOptions(),  # noqa: B008  # frozen
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: the pack's own.", show_default=False)
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.", show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest.", show_default=False)] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Makes sampling repeatable. Default: one is drawn, and printed.", show_default=False),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the pack's chat template.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the text (and errors).")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="End with a table of what it cost.")] = False,
    stats_file: Annotated[
        Path | None, typer.Option(help="Write the statistics to this JSON file.", show_default=False)
    ] = None,
    plot_experts: Annotated[
        Path | None,
        typer.Option(help="Draw the experts held and read in each layer into this PNG.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, streaming tokens as they come, under a memory bound.

    The text goes to stdout; how the model is held in memory, and the seed of a sampled run, to stderr.
    --stats ends with a table; --stats FILE.json writes the same figures to a file too.
    """
    from transformers.utils.logging import disable_progress_bar

    from flashlm.engine.decoding import Sampling
    from flashlm.engine.generate import Generation
    from flashlm.engine.generate import generate as run

    disable_progress_bar()  # ours tells bytes, and only on a terminal
    if stats_file is not None:
        _check_writable(stats_file, "the statistics")
    if plot_experts is not None:
        _check_plot_experts(pack, plot_experts)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    note = (lambda message: None) if quiet else console.note
    with (
        console.passing_bar(is_shown=not quiet) as on_loading,
        console.passing_bar("layers", is_shown=not quiet) as on_prompt,
    ):
        result: Generation = run(
            pack,
            _read_prompt(text, prompt, prompt_file),
            sampling=sampling,
            is_chat=chat,
            on_decided=lambda decoding: _note_decoding(decoding, note),
            on_loaded=lambda flash: note(flash.describe()),
            on_loading=on_loading,
            on_prompt=on_prompt,
            on_text=None if as_json else _write_text,
            **options.asked(),
        )
    if as_json:
        console.print_json({"text": result.text, "stats": result.stats})
    else:
        print()
    if stats_file is not None:
        _write_stats(stats_file, result.stats)
    if plot_experts is not None:
        from flashlm.calibration.expert_plots import write_traffic_plot

        passes = f"{result.stats['num_prompt_tokens']} tokens of prompt, {result.stats['num_new_tokens']} new"
        write_traffic_plot(plot_experts, result.stats["experts"], title=f"{pack.name}: {passes}")
    if stats and not as_json:
        console.print_table(console.stats_rows(result.stats), title="statistics")


app.command("eval")(evaluate)
app.command()(calibrate)
app.command("plan")(plan_command)
app.command()(probe)
app.command()(doctor)
app.add_typer(pru_app, name="pru")


def _write_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _check_plot_experts(pack: Path, path: Path) -> None:
    """Refuse, before the work, a plot that can't be drawn after it."""
    from flashlm.calibration.plots import check_matplotlib
    from flashlm.pack.manifest import read_manifest

    if path.suffix != ".png":
        raise ConfigError(f"--plot-experts {path}: figures are PNG; end the name in .png")
    if not read_manifest(pack).experts:
        raise ConfigError("--plot-experts: this pack has no experts; leave it out")
    check_matplotlib("--plot-experts")
    _check_writable(path, "the figure")


def _check_writable(path: Path, what: str) -> None:
    """Refuse, before the work, a file that can't be written after it."""
    try:
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{what} can't be written to {path}: {error.strerror}") from error


def _write_stats(path: Path, stats: dict[str, Any]) -> None:
    import json

    try:
        path.write_text(json.dumps(stats, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"the statistics can't be written to {path}: {error.strerror}") from error


def _note_decoding(decoding: Decoding, note: Callable[[str], None]) -> None:
    for line in decoding.notes:
        note(line)
    if decoding.seed is not None:
        note(f"seed {decoding.seed}: the same text again with --seed {decoding.seed}")


def _read_prompt(text: str | None, prompt: str | None, prompt_file: Path | None) -> str:
    """Return the one prompt that was given: as an argument, an option, a file, or through a pipe."""
    given = [each for each in (text, prompt) if each is not None]
    if len(given) + (prompt_file is not None) > 1:
        raise ConfigError(
            "more than one prompt was given: PROMPT, --prompt and --prompt-file are three ways to give it"
        )
    if given:
        return given[0]
    try:
        if prompt_file is not None and str(prompt_file) != "-":
            return prompt_file.read_text(encoding="utf-8")
        if sys.stdin is None or (prompt_file is None and sys.stdin.isatty()):
            raise ConfigError('no prompt was given: flashlm generate PACK "TEXT", --prompt-file FILE, or a pipe')
        piped = sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompt can't be read from {prompt_file or 'stdin'}: {error}") from error
    # `echo TEXT |` ends its text with a line break that nobody meant.
    return piped if prompt_file is not None else piped.removesuffix("\n")


def _print_info(
    described: Any,
    as_json: bool,
    floor_bytes: int | None = None,
    floor: str | None = None,
    calibration: Sparsity | Routing | None = None,
) -> None:
    if as_json:
        extra: dict[str, Any] = {} if floor_bytes is None else {"smallest_dram_bytes": floor_bytes}
        if calibration is not None:
            extra["calibration"] = calibration.model_dump(mode="json")
        console.print_json(described.to_dict() | extra)
        return
    rows = described.rows()
    if floor is not None:
        rows.append(("smallest --dram", floor))
    if calibration is not None:
        rows += calibration.rows()
    console.print_table(rows, title=str(described.pack))


def _expand_stats(arguments: list[str]) -> list[str]:
    """Let `--stats` take an optional file: `--stats FILE.json` means `--stats --stats-file FILE.json`."""
    expanded: list[str] = []
    for argument in arguments:
        if argument.startswith("--stats="):
            expanded += ["--stats", "--stats-file", argument.removeprefix("--stats=")]
        elif expanded and expanded[-1] == "--stats" and argument.endswith(".json"):
            expanded += ["--stats-file", argument]
        else:
            expanded.append(argument)
    return expanded


def _hoist_debug(arguments: list[str]) -> list[str]:
    """Let `--debug` stand on both sides of the verb; after an option that takes a text it is that text."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    is_flag = [
        each == "--debug" and (index == 0 or arguments[index - 1] not in _TEXT_OPTIONS)
        for index, each in enumerate(arguments[:end])
    ]
    if not any(is_flag):
        return arguments
    kept = [each for each, is_debug in zip(arguments[:end], is_flag, strict=True) if not is_debug]
    return ["--debug", *kept, *arguments[end:]]


def main(arguments: list[str] | None = None, is_interrupted: Callable[[], bool] = lambda: False) -> None:
    """Run the command line and exit; the one place that catches errors.

    An error after Ctrl-C says nothing: whoever watches for Ctrl-C tells that (`flashlm.__main__`).
    """
    arguments = _hoist_debug(_expand_stats(sys.argv[1:] if arguments is None else arguments))
    try:
        app(args=arguments, prog_name="flashlm")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # the edge of the program: one line for people, the traceback for --debug
        if is_interrupted():
            raise
        _fail(error, error.exit_code if isinstance(error, FlashError) else 1, arguments)


def _fail(error: Exception, exit_code: int, arguments: list[str]) -> None:
    if arguments[:1] == ["--debug"]:
        raise error
    name = "" if isinstance(error, FlashError) else f"{type(error).__name__}: "
    message = " ".join(str(error).split())
    hint = "" if isinstance(error, FlashError) else " (--debug shows where)"
    sys.stderr.write(f"flashlm: {name}{message}{hint}\n")
    sys.exit(exit_code)
