"""What `paired_speed.py` times, in one checkout's process: questions come one a line, answers go back.

The checkouts may be laid out in other ways: only what both have is used, which is flashlm's documented names and commands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe_commit

SIZES = {"vocab_size": 4096, "hidden_size": 2048, "num_hidden_layers": 4, "max_position_embeddings": 1024}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True}
DENSE = {"model_type": "llama", "intermediate_size": 2048, "hidden_act": "relu"}
MIXTURE = {"model_type": "qwen3_moe", "moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4}
MODES = {  # mode, rows of an expert (0: no experts), share of the streamed bytes that is kept
    "naive": ("naive", 0, 0.0),
    "hybrid, all streamed": ("hybrid", 0, 0.0),
    "hybrid, all pinned": ("hybrid", 0, 1.0),
    "sparse, least held": ("sparse", 0, 0.0),
    "sparse, all held": ("sparse", 0, 1.0),
    "experts of 128, half held": ("experts", 128, 0.5),
    "experts of 40, all held": ("experts", 40, 1.0),
}
CASES = [f"{mode}, {dtype}" for dtype in ("bfloat16", "float32") for mode in MODES]
CASES += ["conversion, bfloat16", "start-up"]
CASES += [f"recurrent M={size} g={groups}" for size, groups in ((64, 4), (128, 4), (400, 4), (400, 1))]
SIMULATED = "but in mode sparse, which is the demo model's, weights are random; 4 layers, hidden size 2048, 2048 rows"
DEMO = (
    Path(__file__).resolve().parents[1] / "recipes" / "demo_lm" / "model"
)  # a calibration of a larger one takes minutes


def make_source(folder: Path, *, rows: int, dtype: str) -> Path:
    """Write a random checkpoint where there is none: of experts of `rows`, or dense with 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = folder / f"{dtype}-{rows}"
    if not (source / "config.json").exists():
        torch.manual_seed(0)
        kind = {**MIXTURE, "moe_intermediate_size": rows} if rows else DENSE
        config = AutoConfig.for_model(**SIZES, **HEADS, **kind, dtype=dtype)
        AutoModelForCausalLM.from_config(config).save_pretrained(source)
    return source


def feed_forward_bytes(rows: int, dtype: str) -> int:
    """Return the bytes of all feed-forward layers or experts, without padding."""
    per_layer = rows * int(MIXTURE["num_experts"]) if rows else int(DENSE["intermediate_size"])
    itemsize = 4 if dtype == "float32" else 2
    return int(SIZES["num_hidden_layers"]) * 3 * per_layer * int(SIZES["hidden_size"]) * itemsize


def command_line(*arguments: str) -> str:
    """Run `flashlm ARGUMENTS` of this checkout; return its stdout."""
    command = [sys.executable, "-m", "flashlm", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def calibrate(pack: Path) -> None:
    # A threshold of one's own: the error budget is then measured once and not searched.
    options = ("--max-tokens", "1024", "--rank", "16", "--threshold", "0.5", "--device", "cpu")
    command_line("calibrate", str(pack), "--text", str(DEMO / "README.md"), *options)


def load_tightly(pack: Path, **settings: Any) -> Any:
    """Load with 256 KiB more than the least, which the refusal of less tells: both checkouts get the smallest cache."""
    import flashlm

    dram_bytes = 1 << 20
    while True:
        try:
            return flashlm.load(pack, dram=dram_bytes, **settings)
        except flashlm.BudgetError as error:  # the least grows once predictors are looked at
            dram_bytes = error.needed_bytes + (256 << 10)


def streamed(case: str, folder: Path) -> dict[str, Any]:
    """Load one case; return calls of each size."""
    import torch
    from transformers import DynamicCache

    import flashlm

    name, dtype = case.rsplit(", ", 1)
    mode, rows, share = MODES[name]
    source = DEMO if mode == "sparse" else make_source(folder.parent, rows=rows, dtype=dtype)
    pack = folder / f"{dtype}-{rows}{'-calibrated' * (mode == 'sparse')}"
    made = folder / f"{pack.name}.made"
    if not made.exists():
        shutil.rmtree(pack, ignore_errors=True)
        flashlm.convert(source, pack, dtype=dtype)
        if mode == "sparse":
            calibrate(pack)
        made.touch()
    settings: dict[str, Any] = {"mode": mode, "context": 512 if mode == "sparse" else 1024}
    if mode == "sparse" and share < 1:
        model: Any = load_tightly(pack, **settings).eval()
    else:
        told = json.loads(command_line("info", str(pack), "--json"))
        # What one checkout streams beside the feed-forward layers, attention, another keeps resident: both keep it here.
        left_bytes = (1 - share) * feed_forward_bytes(rows, dtype)
        bound = {} if mode == "sparse" else {"pin": int(told["streamed_bytes"] - left_bytes)}
        model = flashlm.load(pack, dram="12GiB", **settings, **bound).eval()
    print(case, model.flash.describe(), file=sys.stderr)
    works: dict[str, Any] = {}
    for batch in (1, 16, 17, 64) if rows == 40 else (1, 16):
        ids, cache = torch.arange(batch * 8).view(batch, 8) * 7 % 4096, DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        works[f"token, batch {batch}"] = lambda ids=ids, cache=cache: (
            model(ids[:, -1:], past_key_values=cache),
            cache.crop(-1),
        )
    for length in (10, 512):
        prompt = torch.arange(length).view(1, -1) * 13 % 4096
        works[f"prompt of {length}"] = lambda prompt=prompt: model(prompt, logits_to_keep=1, use_cache=False)
    return works


def conversion(case: str, folder: Path) -> dict[str, Any]:
    """Return conversions of a dense model and of one of experts, each into an empty folder."""
    import flashlm

    def convert(source: Path, dtype: str) -> None:
        shutil.rmtree(folder / "converted", ignore_errors=True)
        flashlm.convert(source, folder / "converted", dtype=dtype)

    dtype = case.rsplit(", ", 1)[1]
    sources = {
        name: make_source(folder.parent, rows=rows, dtype=dtype) for name, rows in (("dense", 0), ("experts", 128))
    }
    return {name: lambda source=source: convert(source, dtype) for name, source in sources.items()}


def start_up() -> dict[str, Any]:
    """Return what is asked of the command line before anything heavy is needed, each in a process of its own."""
    asked = {"flashlm --help": ["--help"], "flashlm generate --help": ["generate", "--help"]}
    return {name: lambda arguments=arguments: command_line(*arguments) for name, arguments in asked.items()}


def works_of(case: str, folder: Path) -> dict[str, Any]:
    if case.startswith("conversion"):
        return conversion(case, folder)
    if case.startswith("start-up"):
        return start_up()
    return recurrent(case) if case.startswith("recurrent") else streamed(case, folder)


def recurrent(case: str) -> dict[str, Any]:
    import torch

    from flashlm.pru import PRU, PRUConfig, PRUForCausalLM

    size, groups = (int(word.split("=")[1]) for word in case.split()[1:])
    torch.manual_seed(0)
    layer, x, ids = PRU(size, size, groups=groups).eval(), torch.randn(1, 1, size), torch.tensor([[5]])
    model = PRUForCausalLM(PRUConfig(vocab_size=10_000, embedding_size=size, hidden_size=size, groups=groups)).eval()
    state, kept = layer(x)[1], model(ids).state
    return {"layer, token": lambda: layer(x, state), "model, token": lambda: model(ids, state=kept)}


def used_s() -> float:
    """Return the processor seconds of this process, all threads, and of its children that have ended."""
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


def child(folder: Path) -> None:
    """Answer questions, one a line: what this is, which works a case has, what a work takes."""
    import torch

    import flashlm

    works: dict[str, Any] = {}
    answer: Any
    with torch.no_grad():
        for line in sys.stdin:
            asked = json.loads(line)
            if "case" in asked:
                works.clear()  # before the next model is loaded
                works = works_of(asked["case"], folder)
                answer = list(works)
            elif "work" in asked:
                work, count = works[asked["work"]], asked["repeats"]
                started_s, cpu_s = time.perf_counter(), used_s()
                for _ in range(count):
                    work()
                answer = (time.perf_counter() - started_s) / count, (used_s() - cpu_s) / count
            else:
                answer = describe_commit(Path(flashlm.__file__).parents[2])
            print("ANSWER", json.dumps(answer), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    child(parser.parse_args().folder)
