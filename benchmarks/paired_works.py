"""What `paired_speed.py` times, in one checkout's process: questions come one a line, answers go back."""

from __future__ import annotations

import argparse
import json
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
    "sparse, a quarter held": ("sparse", 0, 0.25),
    "sparse, all held": ("sparse", 0, 1.0),
    "experts of 128, half held": ("experts", 128, 0.5),
    "experts of 40, all held": ("experts", 40, 1.0),
}
CASES = [f"{mode}, {dtype}" for dtype in ("bfloat16", "float32") for mode in MODES]
CASES += [f"recurrent M={size} g={groups}" for size, groups in ((64, 4), (128, 4), (400, 4), (400, 1))]
SIMULATED = "weights and predictors are random; models of 4 layers, hidden size 2048, 2048 rows"


def streamed(case: str, folder: Path) -> dict[str, Any]:
    """Load one case; return calls of each size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    import flashlm
    from flashlm.engine import model as loading
    from flashlm.pack.manifest import read_manifest

    name, dtype = case.rsplit(", ", 1)
    mode, rows, share = MODES[name]
    source, pack = folder.parent / f"{dtype}-{rows}", folder / f"{dtype}-{rows}"
    if not (source / "config.json").exists():
        torch.manual_seed(0)
        kind = {**MIXTURE, "moe_intermediate_size": rows} if rows else DENSE
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **HEADS, **kind, dtype=dtype)).save_pretrained(
            source
        )
    if not pack.exists():
        flashlm.convert(source, pack, dtype=dtype)
    manifest = read_manifest(pack)
    kept_bytes = share * manifest.streamed_bytes
    if mode == "sparse":
        from tests.engine.calibrations import write_calibration

        write_calibration(pack)
        loading.place = sized(loading.place, share)
    bound = {} if mode == "sparse" else {"pin": int(kept_bytes)}
    model: Any = flashlm.load(pack, dram="12GiB", mode=mode, context=1024, **bound).eval()
    works: dict[str, Any] = {}
    for batch in (1, 16, 17, 64) if rows == 40 else (1, 16):
        ids, cache = torch.arange(batch * 8).view(batch, 8) * 7 % 4096, DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        works[f"token, batch {batch}"] = lambda ids=ids, cache=cache: (
            model(ids[:, -1:], past_key_values=cache),
            cache.crop(-1),
        )
    for length in (10, 300):
        prompt = torch.arange(length).view(1, -1) * 13 % 4096
        works[f"prompt of {length}"] = lambda prompt=prompt: model(prompt, logits_to_keep=1, use_cache=False)
    return works


def sized(place: Any, share: float) -> Any:
    """Return `place` with the budget that caches `share` of the rows, whatever else a checkout counts."""

    def find(units: Any, needs: Any, dram_bytes: int, *, uses: Any = (), **bounds: Any) -> Any:
        if not uses:
            return place(units, needs, dram_bytes, **bounds)

        def try_place(budget_bytes: int) -> Any:
            try:
                placement = place(units, needs, budget_bytes, uses=uses)
            except Exception:  # too little
                return None
            return placement if placement.cache_bytes >= wanted_bytes else None

        layouts = [each.layout for each in units if each.kind == "ffn"]
        wanted_bytes = share * sum(each.num_rows * each.row_stride_bytes for each in layouts)
        low, high = 0, dram_bytes
        while high - low > 4096:
            middle = (low + high) // 2
            low, high = (middle, high) if try_place(middle) is None else (low, middle)
        return try_place(high)

    return find


def recurrent(case: str) -> dict[str, Any]:
    import torch

    from flashlm.pru import PRU, PRUConfig, PRUForCausalLM

    size, groups = (int(word.split("=")[1]) for word in case.split()[1:])
    torch.manual_seed(0)
    layer, x, ids = PRU(size, size, groups=groups).eval(), torch.randn(1, 1, size), torch.tensor([[5]])
    model = PRUForCausalLM(PRUConfig(vocab_size=10_000, embedding_size=size, hidden_size=size, groups=groups)).eval()
    state, kept = layer(x)[1], model(ids).state
    return {"layer, token": lambda: layer(x, state), "model, token": lambda: model(ids, state=kept)}


def child(folder: Path) -> None:
    """Answer questions, one a line: what this is, which works a case has, what a work takes."""
    import torch

    import flashlm

    sys.path.insert(0, str(Path(flashlm.__file__).parents[2]))
    works: dict[str, Any] = {}
    answer: Any
    with torch.no_grad():
        for line in sys.stdin:
            asked = json.loads(line)
            if "case" in asked:
                works.clear()  # before the next model is loaded
                works = streamed(asked["case"], folder) if "float" in asked["case"] else recurrent(asked["case"])
                answer = list(works)
            elif "work" in asked:
                work, count = works[asked["work"]], asked["repeats"]
                started_s, cpu_s = time.perf_counter(), time.process_time()
                for _ in range(count):
                    work()
                answer = (time.perf_counter() - started_s) / count, (time.process_time() - cpu_s) / count
            else:
                answer = describe_commit(Path(flashlm.__file__).parents[2])
            print("ANSWER", json.dumps(answer), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    child(parser.parse_args().folder)
