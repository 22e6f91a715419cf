"""Walk all causal model types of the installed transformers: convert a tiny model of each, load it, compare.

    python benchmarks/reliability/models.py [--quick] [--types TYPE ...] [--again] [--docs]

Each type gets a process of its own, so that none can hang or kill the walk. Results go into
`benchmarks/results/reliability-models.json` after every type, and a walk that is started again goes on where it was;
`--docs` writes `docs/models.md` from that file and runs nothing.

    equal      logits of prompts and of single tokens, and greedy tokens, are those of transformers in fp32
    refused    flashlm says by name why not
    different  anything else came out: there must be none
    error      an error that is not one of flashlm's
    not built  transformers itself does not build or run a tiny model of this type here
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import flashlm
from flashlm.errors import FlashError

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import describe_machine

from tests import tiny_models

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reliability-models.json"
DOCS = ROOT / "docs" / "models.md"
MAX_ERROR = 2e-5  # of the largest logit: fp32 sums in another order, through four layers
NUM_NEW_TOKENS = 12
TIMEOUT_S = 180.0
HUNG, KILLED = "no answer within", "the process ended with code"
QUICK = ("apertus", "bert", "bloom", "gptj", "jetmoe", "lfm2", "mixtral", "olmo_hybrid", "qwen3_next", "rwkv")


def examine(model_type: str) -> dict[str, Any]:
    """Convert, load and compare one type, in this process."""
    with tempfile.TemporaryDirectory(prefix="flashlm-walk-") as name:
        source, pack = Path(name) / "source", Path(name) / "pack"
        try:
            tiny_models.save_tiny(model_type, source)
            reference = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
            wanted = _answers(reference)
        except Exception as error:
            return {"outcome": "not built", "reason": _first_line(error)}
        try:
            manifest = flashlm.convert(source, pack, dtype="float32")
            streamed = flashlm.load(pack, pin=0)
        except FlashError as error:
            return {"outcome": "refused", "reason": _reason(error).replace(str(source), "the checkpoint")}
        facts = {
            "streams": "experts" if manifest.experts else "ffn",
            "num_streamed": len(manifest.units),
            "activation": manifest.main.activation,
            "has_gate": manifest.main.layout.has_gate,
        }
        found = _answers(streamed)
        errors = [
            float((mine - theirs).abs().max() / theirs.abs().max())
            for mine, theirs in zip(found[0], wanted[0], strict=True)
        ]
        is_equal = max(errors) <= MAX_ERROR and torch.equal(found[1], wanted[1])
        return facts | {"outcome": "equal" if is_equal else "different", "max_error": max(errors)}


def _answers(model: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits for prompts of 1 and 40 tokens, 2 sequences each, and greedy tokens after 9."""
    logits = []
    with torch.no_grad():
        for num_tokens in (1, 40):
            ids = torch.randint(3, 96, (2, num_tokens), generator=torch.Generator().manual_seed(num_tokens))
            logits.append(model(ids).logits.float())
        ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(9))
        wish = {"max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **wish)
    return logits, greedy


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _reason(error: FlashError) -> str:
    return re.sub(r"^model type '[^']*' is not supported: ", "", str(error).splitlines()[0])


def _child(model_type: str, queue: Any) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        queue.put(examine(model_type))
    except BaseException as error:
        queue.put({"outcome": "error", "reason": _first_line(error), "trace": traceback.format_exc()[-1500:]})


def examine_apart(model_type: str) -> dict[str, Any]:
    """`examine` in a process of its own, for `TIMEOUT_S` at most."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_child, args=(model_type, queue))
    started_s = time.perf_counter()
    process.start()
    while process.is_alive() and queue.empty() and time.perf_counter() - started_s < TIMEOUT_S:
        time.sleep(0.01)
    if not queue.empty():
        result: dict[str, Any] = queue.get()
    elif process.is_alive():
        result = {"outcome": "error", "reason": f"{HUNG} {TIMEOUT_S:g} s"}
    else:
        result = {"outcome": "error", "reason": f"{KILLED} {process.exitcode}"}
    process.join(5.0)
    if process.is_alive():
        process.kill()
    return result | {"seconds": round(time.perf_counter() - started_s, 2)}


def walk(types: list[str], results: dict[str, Any], save: Path | None) -> None:
    for number, model_type in enumerate(types, start=1):
        outcome = examine_apart(model_type)
        if outcome["outcome"] == "equal":  # the flashlm that first had it so
            outcome["since"] = results.get(model_type, {}).get("since", flashlm.__version__)
        results[model_type] = outcome
        note = outcome.get("reason", f"{outcome.get('streams')}, {outcome.get('max_error', 0.0):.1e}")
        print(f"{number:4}/{len(types)} {model_type:28} {outcome['outcome']:10} {note}"[:200], flush=True)
        if save is not None:
            save.write_text(json.dumps(document(results), indent=1) + "\n")


def counts(results: dict[str, Any]) -> dict[str, int]:
    outcomes = [result["outcome"] for result in results.values()]
    return {name: outcomes.count(name) for name in ("equal", "refused", "different", "error", "not built")}


def document(results: dict[str, Any]) -> dict[str, Any]:
    return {
        "what": "a tiny random fp32 model of each causal model type, converted, loaded with nothing pinned, compared",
        "flashlm": flashlm.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "machine": describe_machine(),
        "tries": len(results),
        "counts": counts(results),
        "silent_wrong_answers": counts(results)["different"],
        "kills": sum(result.get("reason", "").startswith(KILLED) for result in results.values()),
        "hangs": sum(result.get("reason", "").startswith(HUNG) for result in results.values()),
        "named_errors": counts(results)["refused"],
        "max_error_allowed": MAX_ERROR,
        "types": dict(sorted(results.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten types, nothing written")
    parser.add_argument("--types", nargs="+", help="these types only")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--docs", action="store_true", help="only write docs/models.md from the results")
    arguments = parser.parse_args()
    known: dict[str, Any] = json.loads(RESULTS.read_text())["types"] if RESULTS.exists() else {}
    if arguments.docs:
        import models_page

        DOCS.write_text(models_page.page(json.loads(RESULTS.read_text())))
        return 0
    types = list(QUICK) if arguments.quick else arguments.types or tiny_models.causal_types()
    results = {} if arguments.quick else known
    wanted = [name for name in types if arguments.again or arguments.types or name not in results]
    walk(wanted, results, None if arguments.quick else RESULTS)
    print(", ".join(f"{count} {name}" for name, count in counts(results).items()))
    return 1 if counts(results)["different"] + counts(results)["error"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
