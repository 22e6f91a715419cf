"""Packs to interrupt, and the sweep that does it, in a process of its own under the faults of `tests/storage/faults.c`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flashlm.conversion.convert import convert
from tests.engine.calibrations import write_calibration
from tests.models import save_checkpoint

SWEEP = Path(__file__).parents[2] / "benchmarks" / "reliability" / "interrupt_sweep.py"
TIMEOUT_S = 3600
MODES = ("hybrid", "naive", "sparse", "experts")
# Blocks of 48 KiB, 16 in all: at the floor there are two staging slots, and most blocks are streamed.
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "hybrid": ("llama", {"hidden_size": 128, "intermediate_size": 256}),
    "naive": ("llama", {"hidden_size": 128, "intermediate_size": 256}),
    "sparse": ("opt", {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256}),
    "experts": ("qwen3_moe", {}),
}


def make_pack(folder: Path, mode: str) -> Path:
    """Make a pack to run in `mode`; its files are such that `faults.c` touches them."""
    family, sizes = SHAPES[mode]
    pack = folder / f"{mode}.faulty"
    save_checkpoint(folder / f"{mode}-source", family, max_position_embeddings=160, **sizes)
    convert(folder / f"{mode}-source", pack, dtype="float32", block_rows=None if mode == "experts" else 32)
    if mode == "sparse":
        write_calibration(pack)
    return pack


def sweep(pack: Path, mode: str, library: Path, backend: str, *arguments: str) -> dict[str, Any]:
    """Interrupt a model of `pack` as `arguments` say; return what came of it, with the exit status."""
    preload = f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()
    environment = {"LD_PRELOAD": preload, "FAULT": "late", "FLASHLM_IO_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, str(SWEEP), str(pack), mode, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    document: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {"results": {}}
    return document | {"exit_status": done.returncode, "stderr": "" if done.returncode == 0 else done.stderr[-4000:]}
