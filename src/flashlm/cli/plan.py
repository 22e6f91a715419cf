"""`flashlm plan`: what a model would do under a budget on this machine, before anything is downloaded or converted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashlm.cli import console
from flashlm.cli.calibrate import print_columns
from flashlm.cli.options import ActivationsOption, JsonOption
from flashlm.errors import BudgetError, ConfigError
from flashlm.planner.choices import Mode

if TYPE_CHECKING:
    from flashlm.planner.plan_document import Plan
    from flashlm.planner.rates import Rates
    from flashlm.planner.shape import ModelShape

COLUMNS = ("dram", "mode", "exact", "held", "read a token", "tokens/s", "prompt tokens/s", "at the roofline")


def plan(
    source: Annotated[
        str, typer.Argument(help="Pack, model folder, .gguf file, config.json, or hub id (only its config is fetched).")
    ],
    dram: Annotated[
        str | None,
        typer.Option(
            help="Bounds on the whole process, comma-separated, like 4GiB,8GiB. Default: what is free.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that the KV cache may hold. Default: 2048.", show_default=False)
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Plan for this mode alone; auto: the cheapest that is allowed.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the pack, where it is still to be made: bf16, fp16 or fp32. Default: as `convert`.",
            show_default=False,
        ),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Of what is streamed, where it is still to be made: q8_0.", show_default=False)
    ] = None,
    assume_sparse: Annotated[
        bool,
        typer.Option(
            "--assume-sparse",
            help="Plan mode sparse before a calibration, for ReLU models, as if as sparse as the paper's.",
        ),
    ] = False,
    probe_dir: Annotated[
        Path | None,
        typer.Option(help="Folder on the device that will hold the pack. Default: the pack's, else this one."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the plan (of one budget) to this file.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latency over DRAM into this PNG.", show_default=False)] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the source.")
    ] = False,
    activations: ActivationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict speed and memory under one or several budgets, from the model's shape and this machine's measured rates.

    Nothing is downloaded but the config, and nothing is written. The machine's rates come from `flashlm probe`; without a
    profile a quick probe is made first.
    """
    from flashlm.memory.limits import read_memory_limits
    from flashlm.planner.machine import rates_for
    from flashlm.planner.plan import check_activations, check_fits, check_mode, make_plan
    from flashlm.planner.plan_document import save_plan
    from flashlm.planner.published import assume_sparsity
    from flashlm.planner.settings import as_tokens
    from flashlm.sizes import parse_budget_bytes

    budgets = (
        [read_memory_limits().default_dram_bytes]
        if dram is None
        else [parse_budget_bytes(each) for each in dram.split(",")]
    )
    context = as_tokens(context)
    if save is not None and len(budgets) != 1:
        raise ConfigError("--save takes a plan of one budget: give one --dram SIZE")
    shape = source_shape(source, dtype, quantize, trust_remote_code=trust_remote_code)
    if assume_sparse:
        shape = assume_sparsity(shape)
    check_mode(shape, mode)
    activations = activations or "exact"
    check_activations(activations, shape.quantised, shape.name)
    try:
        check_fits(shape, max(budgets), context)  # before the probe, which takes a minute
    except BudgetError as error:
        _print_plans([(dram_bytes, error) for dram_bytes in budgets], shape, None, as_json)
        raise
    folder = probe_dir or (Path(source) if shape.is_pack else Path.cwd())
    rates = rates_for(folder, shape.dtype, console.note, activations)
    found: list[tuple[int, Plan | BudgetError]] = []
    for dram_bytes in budgets:
        try:
            found.append(
                (dram_bytes, make_plan(shape, rates, dram_bytes, context=context, mode=mode, activations=activations))
            )
        except BudgetError as error:
            found.append((dram_bytes, error))
    plans = [plan for _, plan in found if not isinstance(plan, BudgetError)]
    if not plans:
        _print_plans(found, shape, _assumed(shape, rates), as_json)
        raise next(error for _, error in found if isinstance(error, BudgetError))
    if save is not None:
        save_plan(plans[0], save)
    if plot is not None:
        from flashlm.planner.plots import plot_latency

        plot_latency(shape, rates, context, plot)
    _print_plans(found, shape, _assumed(shape, rates), as_json)


def source_shape(
    source: str, dtype: str | None = None, quantize: str | None = None, *, trust_remote_code: bool = False
) -> ModelShape:
    """Return the shape of a source: of a GGUF file exactly, from its header, else by its config."""
    from flashlm.conversion.plan import plan_conversion
    from flashlm.conversion.source import find_gguf, open_source
    from flashlm.planner.shape import planned_shape, read_shape

    path = find_gguf(source)
    if path is None:
        return read_shape(source, dtype=dtype or "bf16", quantize=quantize, trust_remote_code=trust_remote_code)
    with open_source(source, path) as opened:
        planned = plan_conversion(opened, Path(), dtype, None, trust_remote_code=False, quantize=quantize)
    return planned_shape(
        source,
        planned.source.config,
        planned.model,
        [file.found for file in planned.streamed],
        tuple(file.unit for file in planned.streamed),
        dtype=planned.dtype,
        resident_bytes=planned.resident.num_bytes,
    )


def _print_plans(
    found: list[tuple[int, Plan | BudgetError]], shape: ModelShape, assumed: str | None, as_json: bool
) -> None:
    from flashlm.sizes import format_size

    known = _known(shape)
    if as_json:
        console.print_json(_as_json(found, known, assumed))
        return
    print_columns([COLUMNS, *(_row(dram_bytes, plan) for dram_bytes, plan in found)])
    plans = [plan for _, plan in found if not isinstance(plan, BudgetError)]
    console.print_table(
        [
            ("disk", f"{format_size(shape.total_bytes)} for the pack" + (" (there already)" if shape.is_pack else "")),
            ("resident", f"{format_size(shape.resident_bytes)} whatever the budget"),
            *([("rates", assumed)] if assumed else []),
            (known[0], known[1] or "unknown: exact modes only, until `flashlm calibrate`"),
            *[
                (f"at {format_size(plan.dram_bytes)}", f"{_settings(plan)}; more {plan.would_help}")
                for plan in plans
            ],
        ],
        title=f"{shape.name}: {shape.model_type}, {shape.dtype}",
    )  # fmt: skip


def _assumed(shape: ModelShape, rates: Rates) -> str | None:
    """Return what rates are assumed: of encodings that the device's profile holds none of."""
    names = shape.assumed(rates)
    return f"ASSUMED for {', '.join(names)}: as many bytes a second as measured for {shape.dtype}" if names else None


def _known(shape: ModelShape) -> tuple[str, str | None]:
    """Return (what the speed depends on beside sizes, where that comes from), None where nothing is known."""
    if shape.experts:
        return "routing", shape.hits.origin
    return "sparsity", shape.sparse.origin if shape.sparse else None


def _row(dram_bytes: int, plan: Plan | BudgetError) -> tuple[str, ...]:
    from flashlm.planner.plan import ERROR_BAND
    from flashlm.sizes import format_size

    if isinstance(plan, BudgetError):
        needs = f"does not fit: {format_size(plan.needed_bytes)} needed"
        return (format_size(dram_bytes), needs, *("",) * (len(COLUMNS) - 2))
    low, high = plan.tokens_per_s / (1 + ERROR_BAND), plan.tokens_per_s * (1 + ERROR_BAND)
    return (
        format_size(dram_bytes),
        plan.mode,
        "yes" if plan.is_exact else "no",
        format_size(plan.resident_bytes + plan.pinned_bytes + plan.cache_bytes),
        format_size(plan.read_bytes),
        f"{plan.tokens_per_s:.2f} ({low:.2f}-{high:.2f})",
        f"{plan.prompt_tokens / plan.prompt_s:.1f}",
        f"{1 / plan.roofline_s:.2f}" if plan.roofline_s else "",
    )


def _settings(plan: Plan) -> str:
    """Return how the plan reads."""
    from flashlm.sizes import format_size

    if plan.mode == "sparse":
        gaps = f", gaps of {plan.max_gap} read through" if plan.max_gap else ""
        return f"rows of a window of {plan.window} tokens held, {plan.queue_depth} reads in flight{gaps}"
    if not plan.read_bytes:
        return "all in memory"
    if plan.hit_share is not None:
        return f"{plan.hit_share:.0%} of a token's experts found in memory, {plan.num_reads:.0f} read"
    ahead = f"{format_size(plan.staging_bytes)} ahead" if plan.mode == "hybrid" else "layer by layer"
    return f"read {ahead}, {plan.queue_depth} pieces of {format_size(plan.piece_bytes)} in flight"


def _as_json(
    found: list[tuple[int, Plan | BudgetError]], known: tuple[str, str | None], assumed: str | None
) -> dict[str, Any]:
    budgets: list[dict[str, Any]] = []
    for dram_bytes, plan in found:
        if isinstance(plan, BudgetError):
            budgets.append({"dram_bytes": dram_bytes, "fits": False, "needed_bytes": plan.needed_bytes})
        else:
            budgets.append({"fits": True, **plan.model_dump(mode="json")})
    return {known[0]: known[1], "rates": assumed or "measured", "budgets": budgets}
