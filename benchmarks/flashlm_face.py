"""flashlm as one of the hybrid benchmark's systems: converting, loading with its telemetry, prompts timed layer by layer."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch_runner import Spec, TorchRunner


def convert_checkpoint(source: Path, pack: Path, dtype: str | None) -> None:
    """Convert a checkpoint to a pack; None takes the dtype that suits the source."""
    from flashlm.conversion.convert import convert

    convert(source, pack, **({} if dtype is None else {"dtype": dtype}))


def layer_files(pack: Path) -> list[Path]:
    """Return the streamed files of a pack, in layer order."""
    return sorted((pack / "flash").glob("layer-*.rows"))


class FlashRunner(TorchRunner):
    """A loaded pack with flashlm's own telemetry."""

    def last_telemetry(self) -> dict[str, Any]:
        record = asdict(self.model.flash.telemetry.records[-1])
        record["forward_s"] = record.pop(
            "wall_s"
        )  # the wall time of the call is measured outside, for every system alike
        return record


def load(spec: Spec) -> FlashRunner:
    """Load the pack of `spec` with its budget and mode."""
    import torch
    import transformers

    import flashlm

    options = {"activations": spec["activations"]} if "activations" in spec else {}
    model = flashlm.load(spec["pack"], dram=spec["dram_bytes"], mode=spec["mode"], context=spec["context"], **options)
    flash = model.flash
    placement = flash.placement
    facts = {
        "settings": f"dram={spec['dram_bytes']}, mode={spec['mode']}, context={spec['context']}",
        "mode": flash.mode,
        "described": flash.describe(),
        "is_exact": "(exact)" in flash.describe(),
        "pinned_bytes": placement.pinned_bytes,
        "streamed_bytes": placement.streamed_bytes,
        "staging_bytes": placement.staging_bytes,
        "planned_bytes": placement.planned_bytes,
        "num_threads": torch.get_num_threads(),
        "versions": {
            "flashlm": flashlm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if flash.resident_load is not None:
        facts["resident_load"] = asdict(flash.resident_load)
    return FlashRunner(model, facts)


def _layer_timers(model: Any) -> tuple[list[float], list[Any]]:
    """Hook every decoder layer; return the list that collects their seconds, and the hooks."""
    seconds: list[float] = []
    started: list[float] = []
    hooks = []
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("layers"):
            hooks.append(module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())))
            hooks.append(module.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - started.pop())))
    return seconds, hooks


def time_layers(runner: FlashRunner, token_ids: list[int], *, num_layers: int, repeats: int) -> dict[str, Any]:
    """Time a prompt with everything resident and scale the time of the layers to `num_layers`.

    The model's own code runs, so this is the arithmetic that a streamed prompt has to do beside its reading.
    """
    seconds, hooks = _layer_timers(runner.model)
    samples = []
    for _ in range(repeats + 1):
        runner.reset()
        seconds.clear()
        start_s = time.perf_counter()
        runner.forward(token_ids)
        wall_s = time.perf_counter() - start_s
        scaled_s = wall_s - sum(seconds) + statistics.mean(seconds) * num_layers
        samples.append({"wall_s": wall_s, "layers_s": list(seconds), "scaled_s": scaled_s})
    for hook in hooks:
        hook.remove()
    return {
        "num_tokens": len(token_ids),
        "num_layers_timed": len(seconds),
        "num_layers_scaled_to": num_layers,
        "streamed_bytes": runner.facts()["streamed_bytes"],
        "samples": samples[1:],
        "scaled_s": statistics.median(sample["scaled_s"] for sample in samples[1:]),
    }
