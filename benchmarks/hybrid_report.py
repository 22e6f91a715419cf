"""From the records of a hybrid benchmark to its summary, table, plot and the claims, met or not."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashlm.sizes import format_size

Record = dict[str, Any]

SYSTEM_NAMES = {
    "naive": "flashlm naive",
    "hybrid": "flashlm hybrid",
    "accelerate": "transformers + accelerate, weights copied",
    "accelerate-mapped": "transformers + accelerate, as it comes",
    "llama.cpp": "llama.cpp (mmap)",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of ours and the figure that decides it; `is_met` is None where nothing was measured."""

    statement: str
    figure: str
    is_met: bool | None


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def rounds_of(whole: Record, system: str) -> dict[int, Record]:
    """Return the records of a system by round."""
    found = {}
    for name, record in whole["records"].items():
        head, _, rest = name.partition("-")
        number, _, what = rest.partition("-")
        if head == "round" and what == system:
            found[int(number)] = record
    return found


def decode_samples(record: Record) -> list[Record]:
    """Return the decode samples of a record without the first, which is the warm-up."""
    samples: list[Record] = record["result"].get("decode", [])[1:]
    return samples


def summarise_system(records: dict[int, Record]) -> Record:
    """Return medians over all rounds of one system, and every round's own median."""
    results = [record["result"] for record in records.values()]
    decode = [sample for record in records.values() for sample in decode_samples(record)]
    prefill = [sample for result in results for sample in result.get("prefill", [])]
    peaks = [record["run"].get("peak_bytes") for record in records.values()]
    return {
        "s_per_token": _median(sample["wall_s"] for sample in decode),
        "s_per_token_by_round": {
            number: _median(sample["wall_s"] for sample in decode_samples(record)) for number, record in records.items()
        },
        "s_per_token_samples": [sample["wall_s"] for sample in decode],
        "bytes_read_per_token": _median(sample["bytes_read"] for sample in decode if "bytes_read" in sample),
        "disk_bytes_per_token": _median(sample["disk_read_bytes"] for sample in decode),
        "wait_s_per_token": _median(sample["wait_s"] for sample in decode if "wait_s" in sample),
        "prompt_s": _median(result["prompt"]["wall_s"] for result in results if "prompt" in result),
        "prefill_s": _median(sample["wall_s"] for sample in prefill),
        "prefill_bytes_read": _median(sample["bytes_read"] for sample in prefill if "bytes_read" in sample),
        "load_s": _median(result["load_s"] for result in results if "load_s" in result),
        "peak_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "num_oom_kills": sum(record["run"].get("num_oom_kills", 0) for record in records.values()),
        "all_ok": all(record["ok"] for record in records.values()),
        "facts": results[0].get("facts", {}),
    }


def summarise_rates(whole: Record) -> Record:
    """Return the device's rates over all passes: the reader's, where it was there, is the denominator."""
    passes: dict[str, list[float]] = {}
    memory = []
    for name, record in whole["records"].items():
        if name.startswith("rates-") and record["ok"]:
            for kind, values in record["result"]["sequential_gb_per_s"].items():
                passes.setdefault(kind, []).extend(values)
            memory.append(record["result"]["memory_read_gb_per_s"])
    medians = {kind: statistics.median(values) for kind, values in passes.items()}
    return {
        "sequential_gb_per_s": medians,
        "sequential_passes": passes,
        "denominator": "reader" if "reader" in medians else "plain",
        "rate_gb_per_s": medians.get("reader", medians.get("plain")),
        "memory_read_gb_per_s": _median(memory),
    }


def compare_logits(steps: Path) -> Record:
    """Compare the logits of the first round: placements bit by bit, and against accelerate within rounding."""
    paths = {system: steps / f"round-1-{system}.npy" for system in ("naive", "hybrid", "accelerate")}
    logits = {system: np.load(path) for system, path in paths.items() if path.exists()}
    found: Record = {}
    for other in ("naive", "accelerate"):
        if "hybrid" not in logits or other not in logits:
            continue
        rows = min(len(logits["hybrid"]), len(logits[other]))
        ours, theirs = logits["hybrid"][:rows], logits[other][:rows]
        found[f"hybrid_and_{other}"] = {
            "num_positions": rows,
            "bit_identical": bool(np.array_equal(ours, theirs)),
            "same_greedy_token": int((ours.argmax(1) == theirs.argmax(1)).sum()),
            "largest_difference": float(np.abs(ours - theirs).max()),
            "largest_logit": float(np.abs(theirs).max()),
        }
    return found


def _times_as_fast(other: str, theirs: float | None, ours: float | None, bound: float) -> Claim:
    """Judge a ratio of seconds per token."""
    statement = f"hybrid is at least {bound:g}x as fast as {other}"
    if not theirs or not ours:
        return Claim(statement=statement, figure="not measured", is_met=None)
    return Claim(statement=statement, figure=f"{theirs / ours:.2f}x", is_met=theirs / ours >= bound)


def _share_of_rate(statement: str, gb_per_s: float | None, of_gb_per_s: float | None, bound: float) -> Claim:
    """Judge a rate as a part of another."""
    if not gb_per_s or not of_gb_per_s:
        return Claim(statement=statement, figure="not measured", is_met=None)
    share = gb_per_s / of_gb_per_s
    return Claim(
        statement=statement, figure=f"{share:.0%}: {gb_per_s:.2f} of {of_gb_per_s:.2f} GB/s", is_met=share >= bound
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def peak_claim(summary: Record, cap_bytes: int) -> Claim:
    """Judge whether flashlm lived within the cap."""
    statement = f"flashlm stays within the cap of {format_size(cap_bytes)}, nothing killed"
    found = [summary["systems"][name] for name in ("naive", "hybrid") if name in summary["systems"]]
    peaks = [system["peak_bytes"] for system in found if system["peak_bytes"] is not None]
    if not peaks:
        return Claim(statement=statement, figure="not measured", is_met=None)
    kills = sum(system["num_oom_kills"] for system in found)
    is_met = max(peaks) <= cap_bytes and kills == 0 and all(system["all_ok"] for system in found)
    return Claim(statement=statement, figure=f"peak {format_size(max(peaks))}, {kills} killed", is_met=is_met)


def prompt_claim(summary: Record, whole: Record) -> Claim:
    """Judge a long prompt against the slower of one streaming pass and its own arithmetic."""
    tokens = whole["settings"]["prefill_tokens"]
    statement = f"a prompt of {tokens} tokens takes at most 1.3x the slower of one streaming pass and its arithmetic"
    hybrid = summary["systems"].get("hybrid", {})
    rate = summary["rates"]["rate_gb_per_s"]
    references = {
        "streaming pass": hybrid["prefill_bytes_read"] / rate / 1e9 if hybrid.get("prefill_bytes_read") else None,
        "arithmetic": whole["records"].get("arithmetic", {}).get("result", {}).get("scaled_s"),
    }
    summary["prefill_references_s"] = references
    known = [value for value in references.values() if value]
    if not hybrid.get("prefill_s") or not known:
        return Claim(statement=statement, figure="not measured", is_met=None)
    ratio = hybrid["prefill_s"] / max(known)
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in references.items() if value)
    return Claim(
        statement=statement, figure=f"{hybrid['prefill_s']:.2f} s = {ratio:.2f}x ({parts})", is_met=ratio <= 1.3
    )


def exactness_claim(summary: Record) -> Claim:
    """Judge whether naive and hybrid gave the same bits."""
    statement = "naive and hybrid give bit-identical logits"
    found = summary["exactness"].get("hybrid_and_naive")
    if found is None:
        return Claim(statement=statement, figure="not measured", is_met=None)
    figure = f"{found['num_positions']} positions, largest difference {found['largest_difference']:g}"
    return Claim(statement=statement, figure=figure, is_met=found["bit_identical"])


def judge(summary: Record, whole: Record) -> list[Claim]:
    """Return every claim with its figure."""
    systems, rate = summary["systems"], summary["rates"]["rate_gb_per_s"]
    hybrid = systems.get("hybrid", {})
    ours = hybrid.get("s_per_token")
    streamed_bytes = hybrid.get("bytes_read_per_token")
    resident = hybrid.get("facts", {}).get("resident_load", {})
    resident_rate = _ratio(resident.get("num_bytes"), resident.get("elapsed_s"))
    conversion = summary["conversion"]
    return [
        _times_as_fast("accelerate at its best", systems.get("accelerate", {}).get("s_per_token"), ours, 2.5),
        _times_as_fast("accelerate as it comes", systems.get("accelerate-mapped", {}).get("s_per_token"), ours, 2.5),
        _times_as_fast("llama.cpp", systems.get("llama.cpp", {}).get("s_per_token"), ours, 2.0),
        _share_of_rate(
            "hybrid streams at 85 % of the device's sequential rate or more",
            streamed_bytes / ours / 1e9 if streamed_bytes and ours else None,
            rate,
            0.85,
        ),
        peak_claim(summary, whole["cap_bytes"]),
        prompt_claim(summary, whole),
        _share_of_rate(
            "the resident part loads at 80 % of the sequential rate or more",
            resident_rate / 1e9 if resident_rate else None,
            rate,
            0.8,
        ),
        _share_of_rate(
            "conversion writes at half the rate of dd or more",
            conversion.get("gb_per_s"),
            conversion.get("dd_gb_per_s"),
            0.5,
        ),
        exactness_claim(summary),
    ]


def summarise_conversion(whole: Record) -> Record:
    """Return the conversion's rate beside dd's."""
    convert, dd = whole["records"].get("convert"), whole["records"].get("dd")
    found: Record = {"dd_gb_per_s": dd["result"]["gb_per_s"]} if dd else {}
    if convert and convert["ok"]:
        seconds = convert["result"]["wall_s"]
        found |= {"s": seconds, "bytes": convert["pack_bytes"], "gb_per_s": convert["pack_bytes"] / seconds / 1e9}
        found["peak_rss_bytes"] = convert["result"]["max_rss_bytes"]
    return found


def summarise(whole: Record, steps: Path) -> Record:
    """Return `whole` with a `summary`: what each system took, the rates, exactness, and the claims."""
    systems = {name: rounds_of(whole, name) for name in SYSTEM_NAMES}
    summary: Record = {
        "systems": {name: summarise_system(records) for name, records in systems.items() if records},
        "rates": summarise_rates(whole),
        "conversion": summarise_conversion(whole),
        "exactness": compare_logits(steps),
    }
    hybrid, rate = summary["systems"].get("hybrid", {}), summary["rates"]["rate_gb_per_s"]
    streamed = hybrid.get("facts", {}).get("streamed_bytes")
    summary["ideal_hybrid_s_per_token"] = streamed / rate / 1e9 if streamed and rate else None
    summary["claims"] = [asdict(claim) for claim in judge(summary, whole)]
    return {"summary": summary, **whole}


def _cell(value: float | None, text: str = "{:.2f}") -> str:
    return "" if value is None else text.format(value)


def markdown_table(whole: Record) -> str:
    """Return the table of the systems."""
    summary = whole["summary"]
    ours = summary["systems"].get("hybrid", {}).get("s_per_token")
    lines = [
        "| system | s/token | to hybrid | read per token | load s | prompt s | peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, system in summary["systems"].items():
        state = "" if system["all_ok"] else " (killed)" if system["num_oom_kills"] else " (failed)"
        cells = [
            SYSTEM_NAMES[name] + state,
            _cell(system["s_per_token"]),
            _cell(_ratio(system["s_per_token"], ours), "{:.2f}x"),
            _cell(_ratio(system["disk_bytes_per_token"], 1e9), "{:.2f} GB"),
            _cell(system["load_s"], "{:.1f}"),
            _cell(system["prefill_s"]),
            format_size(system["peak_bytes"]) if system["peak_bytes"] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    ideal = summary["ideal_hybrid_s_per_token"]
    if ideal:
        lines.append(f"| *ideal hybrid: streamed bytes / sequential rate* | {ideal:.2f} | | | | | |")
    return "\n".join(lines)


def markdown_claims(whole: Record) -> str:
    """Return the claims as a list, each met, NOT met or not measured."""
    words = {True: "met", False: "**NOT met**", None: "not measured"}
    claims = whole["summary"]["claims"]
    return "\n".join(f"- {claim['statement']}: {words[claim['is_met']]} ({claim['figure']})" for claim in claims)


def markdown(whole: Record) -> str:
    """Return the whole section for `docs/benchmarks.md`."""
    machine, rates, settings = whole["machine"], whole["summary"]["rates"], whole["settings"]
    rate = f"{rates['rate_gb_per_s']:.2f} GB/s sequential ({rates['denominator']})" if rates["rate_gb_per_s"] else ""
    facts = whole["summary"]["systems"].get("llama.cpp", {}).get("facts", {})
    stand_in = facts.get("architecture")
    lines = [
        f"### Hybrid, {whole['shape']}, every process capped at {format_size(whole['cap_bytes'])}",
        "",
        f"{whole['date']}, commit `{whole.get('commit', 'unknown')[:12]}`. {machine['cpu']},"
        f" {machine['num_cpus']} cores, {machine['cpu_level']}, {format_size(machine['memory_bytes'])},"
        f" Linux {machine['kernel']}; device {rate}. Weights: {format_size(whole['weight_bytes'])} in 16 bits."
        " Page cache empty before every run, swap off.",
        "",
        markdown_table(whole),
        "",
        f"Medians over {settings['rounds']} round(s); prompt: {settings['prefill_tokens']} tokens at once."
        f" Simulated: {whole['simulated']}."
        + (f" llama.cpp runs the `{stand_in}` architecture, {settings['gguf_dtype']}." if stand_in else ""),
        "",
        markdown_claims(whole),
        "",
    ]
    return "\n".join(lines)


def plot(whole: Record, path: Path) -> None:
    """Draw seconds per token of every system, every sample a dot, and the ideal hybrid as a line."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    summary = whole["summary"]
    shown = {name: system for name, system in summary["systems"].items() if system["s_per_token"]}
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(shown) + 1.8), layout="constrained")
    for row, (name, system) in enumerate(shown.items()):
        colour = "#1f6fb4" if name in ("naive", "hybrid") else "#9a9a9a"
        axes.barh(row, system["s_per_token"], color=colour, height=0.6)
        axes.plot(system["s_per_token_samples"], [row] * len(system["s_per_token_samples"]), "k.", ms=4, alpha=0.6)
        right = max(system["s_per_token_samples"])
        axes.annotate(
            f"median {system['s_per_token']:.2f} s", (right, row), (6, 0), textcoords="offset points", va="center"
        )
    ideal = summary["ideal_hybrid_s_per_token"]
    if ideal:
        axes.axvline(ideal, color="#d62728", ls="--", lw=1.2, label=f"ideal hybrid: {ideal:.2f} s")
        axes.legend(loc="lower right", frameon=False)
    axes.set_yticks(range(len(shown)), [SYSTEM_NAMES[name] for name in shown])
    axes.invert_yaxis()
    axes.margins(x=0.28)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds per token (bar: median, dots: samples; shorter is better)")
    axes.set_title(f"{whole['shape']}, 16 bits, process capped at {format_size(whole['cap_bytes'])}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def replace_section(document: Path, name: str, text: str) -> None:
    """Put `text` between the markers of `name` in a Markdown file, at its end where they are missing."""
    begin, end = f"<!-- {name}: begin, written by benchmarks/hybrid.py -->", f"<!-- {name}: end -->"
    old = document.read_text() if document.exists() else "# Benchmarks\n"
    block = f"{begin}\n{text}{end}\n"
    if begin in old:
        head, _, rest = old.partition(begin)
        _, _, tail = rest.partition(end + "\n")
        document.write_text(head + block + tail)
    else:
        document.write_text(f"{old.rstrip()}\n\n{block}")


def publish(whole: Record, *, results: Path, docs: Path | None) -> None:
    """Print table and claims; write JSON, plot and, where asked, the Markdown section."""
    print(markdown(whole))
    results.mkdir(parents=True, exist_ok=True)
    stem = f"hybrid-{whole['shape']}"
    (results / f"{stem}.json").write_text(json.dumps(whole, indent=1) + "\n")
    plot(whole, results / f"{stem}.png")
    if docs is not None:
        replace_section(docs, stem, markdown(whole))
    print(f"written: {stem}.json and .png in {results}", file=sys.stderr)
