"""One measured process of the hybrid benchmark: it loads one system, times it, and writes what it saw as JSON.

    python hybrid_child.py SPEC.json OUT.json

`SPEC.json` names the job and its settings; `hybrid.py` writes it, and starts this file inside the memory cgroup.
Results are written after every sample, so that a child killed for memory leaves what it had. Every system is fed the
same fixed random token ids, so that logits can be compared between systems.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch_runner import Runner, Spec, TorchRunner


def load_accelerate(spec: Spec) -> Runner:
    """Load a checkpoint with what fits of it in memory and the rest on disk, as `device_map="auto"` does it."""
    import accelerate
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        spec["checkpoint"],
        dtype=getattr(torch, spec["dtype"]),
        device_map="auto",
        max_memory={"cpu": spec["cpu_bytes"]},
        offload_folder=spec["offload_folder"],
    )
    if spec["copy_resident"]:
        # safetensors hands out views of the mapped file, whose pages the kernel drops under the cap and reads again
        # for every token; copied weights stay
        for weight in model.parameters():
            if not weight.is_meta:
                weight.data = weight.data.clone()
    placement = list(getattr(model, "hf_device_map", {"": "cpu"}).values())  # no map where everything fits
    facts = {
        "settings": f"device_map='auto', max_memory={{'cpu': {spec['cpu_bytes']}}}, offload_folder, {spec['dtype']}",
        "resident_weights": "copied out of the mapped file" if spec["copy_resident"] else "mapped",
        "num_modules_in_memory": placement.count("cpu"),
        "num_modules_on_disk": placement.count("disk"),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
        "num_threads": torch.get_num_threads(),
    }
    return TorchRunner(model.eval(), facts)


def _keep_from_repacking(api: Any) -> None:
    """Keep llama.cpp from a second copy of quantised weights in a layout of its own; its Python face has no such setting."""
    make = api.llama_model_default_params

    def without() -> Any:
        params = make()
        params.use_extra_bufts = False
        return params

    api.llama_model_default_params = without


class LlamaCppRunner:
    """llama.cpp through llama-cpp-python, weights memory-mapped."""

    def __init__(self, spec: Spec) -> None:
        if "omp_wait_policy" in spec:
            os.environ["OMP_WAIT_POLICY"] = spec["omp_wait_policy"]  # read when the library is loaded
        import llama_cpp

        if not spec.get("repacks", True):
            _keep_from_repacking(llama_cpp.llama_cpp)
        self.api = llama_cpp
        self.llama = llama_cpp.Llama(
            model_path=spec["gguf"],
            n_ctx=spec["context"],
            n_batch=max(spec["prefill_tokens"], 32),
            n_threads=spec["num_threads"],
            n_threads_batch=spec["num_threads"],
            use_mmap=True,
            use_mlock=False,
            logits_all=False,
            verbose=False,
        )

    def forward(self, token_ids: list[int]) -> np.ndarray:
        self.llama.eval(token_ids)
        logits = self.api.llama_get_logits_ith(self.llama.ctx, -1)
        return np.ctypeslib.as_array(logits, shape=(self.llama.n_vocab(),)).copy()

    def reset(self) -> None:
        self.llama.reset()

    def facts(self) -> dict[str, Any]:
        system = self.api.llama_print_system_info().decode()
        return {
            "settings": f"mmap on, mlock off, n_threads={self.llama.n_threads}",
            "versions": {"llama-cpp-python": self.api.__version__},
            "system_info": system,
            "architecture": self.llama.metadata["general.architecture"],
        }

    def last_telemetry(self) -> dict[str, Any]:
        return {}


def load_flashlm(spec: Spec) -> Runner:
    from flashlm_face import load

    runner = load(spec)
    if spec.get("routing_skew") is not None:
        from expert_routing import SkewedRouting

        SkewedRouting(runner.model, spec["routing_skew"])
    return runner


LOADERS = {"flashlm": load_flashlm, "accelerate": load_accelerate, "llama.cpp": LlamaCppRunner}


class Recorder:
    """The result so far, on disk after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result: dict[str, Any] = {}

    def note(self, **values: Any) -> None:
        self.result.update(values)
        self.result["max_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.result, indent=1))
        partial.rename(self.path)


def disk_read_bytes() -> int:
    """Return the bytes that this process has had read from the device, page faults included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def timed_forward(runner: Runner, token_ids: list[int]) -> tuple[dict[str, Any], np.ndarray]:
    """Run one forward; return its record and its logits. Raises where the logits are not numbers."""
    bytes_before, cpu_before_s, start_s = disk_read_bytes(), time.process_time(), time.perf_counter()
    logits = runner.forward(token_ids)
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_before_s
    if not np.isfinite(logits).all():
        raise ArithmeticError("the logits are not finite")
    record = {"num_tokens": len(token_ids), "wall_s": wall_s, "cpu_s": cpu_s, "argmax": int(logits.argmax())}
    record["disk_read_bytes"] = disk_read_bytes() - bytes_before
    return record | runner.last_telemetry(), logits


def measure(spec: Spec, recorder: Recorder) -> None:
    """Load the system, then a short prompt and decode tokens, then long prompts; all samples kept."""
    ids = np.random.default_rng(1).integers(3, spec["vocab_size"], size=spec["context"]).tolist()
    start_s = time.perf_counter()
    runner = LOADERS[spec["system"]](spec)
    recorder.note(load_s=time.perf_counter() - start_s, facts=runner.facts())
    watch = watch_device(spec)
    num_prompt = spec["prompt_tokens"]
    prompt, logits = timed_forward(runner, ids[:num_prompt])
    recorder.note(prompt=prompt)
    decode: list[dict[str, Any]] = []
    kept = [logits]
    for token in ids[num_prompt : num_prompt + spec["decode_tokens"] + 1]:
        record, logits = timed_forward(runner, [token])
        decode.append(record | watch())
        kept.append(logits)
        recorder.note(decode=decode)
    np.save(recorder.path.with_suffix(".npy"), np.stack(kept))
    prefill: list[dict[str, Any]] = []
    for num_tokens in spec.get("prefill_lengths", [spec["prefill_tokens"]]) * spec["num_prefills"]:
        runner.reset()
        record, _ = timed_forward(runner, ids[:num_tokens])
        prefill.append(record | watch())
        recorder.note(prefill=prefill)
    recorder.note(facts=runner.facts(), finished=True)


def watch_device(spec: Spec) -> Callable[[], dict[str, Any]]:
    """Return what measures device and memory after a forward, where the spec asks for it."""
    if not spec.get("watch_device"):
        return dict
    from expert_state import ExpertState

    state = ExpertState(Path(spec["pack"]))
    return lambda: {"device": state.measure()}


def convert(spec: Spec, recorder: Recorder) -> None:
    """Convert a checkpoint to a pack."""
    from flashlm_face import convert_checkpoint

    start_s = time.perf_counter()
    dtype = None if spec["checkpoint"].endswith(".gguf") else spec["dtype"]  # a GGUF file has its own
    convert_checkpoint(Path(spec["checkpoint"]), Path(spec["pack"]), dtype)
    recorder.note(wall_s=time.perf_counter() - start_s, finished=True)


def write_twin(spec: Spec, recorder: Recorder) -> None:
    """Write the GGUF of a shape."""
    from gguf_twin import STAND_INS, write_gguf
    from shapes import config_of

    config = config_of(spec["shape"])
    larger = spec.get("embeddings_larger")
    size = write_gguf(Path(spec["gguf"]), config, dtype=spec["dtype"], embeddings_larger=larger)
    recorder.note(bytes=size, architecture=STAND_INS[config.model_type], dtype=spec["dtype"], finished=True)


def write_weights(spec: Spec, recorder: Recorder) -> None:
    """Write the random checkpoint of a shape."""
    from random_weights import write_checkpoint
    from shapes import config_of

    config = config_of(spec["shape"], num_layers=spec.get("num_layers"))
    size = write_checkpoint(Path(spec["checkpoint"]), config)
    recorder.note(bytes=size, vocab_size=config.vocab_size, weights="random", finished=True)


def rates(spec: Spec, recorder: Recorder) -> None:
    """Measure the sequential rate over the given files, and memory."""
    from device_rate import memory_read_rate, sequential_rates

    files = [Path(path) for path in spec["files"]]
    recorder.note(
        sequential_gb_per_s=sequential_rates(files, limit_bytes=spec["limit_bytes"], num_passes=spec["num_passes"]),
        files=spec["files_are"],
        memory_read_gb_per_s=memory_read_rate(),
        finished=True,
    )


def arithmetic(spec: Spec, recorder: Recorder) -> None:
    """Time a long prompt with every layer resident, on a model of few layers, and scale to all of them."""
    from flashlm_face import load, time_layers

    runner = load(spec)
    ids = np.random.default_rng(1).integers(3, spec["vocab_size"], size=spec["prefill_tokens"]).tolist()
    recorder.note(**time_layers(runner, ids, num_layers=spec["full_layers"], repeats=spec["repeats"]), finished=True)


def measure_bigmoe(spec: Spec, recorder: Recorder) -> None:
    """Measure BigMoeOnEdge, a program of its own: it is a child of this process, under the same cap."""
    import bigmoe

    bigmoe.measure(spec, recorder)


JOBS = {
    "measure": measure,
    "bigmoe": measure_bigmoe,
    "convert": convert,
    "gguf": write_twin,
    "checkpoint": write_weights,
    "rates": rates,
    "arithmetic": arithmetic,
}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    recorder = Recorder(Path(sys.argv[2]))
    JOBS[spec["job"]](spec, recorder)


if __name__ == "__main__":
    main()
