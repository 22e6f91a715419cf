"""Back ends, files of random bytes, and scripts run under injected faults."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flashlm.errors import ConfigError
from flashlm.storage.reader import Backend, Reader

KIB = 1 << 10
SCRIPT_TIMEOUT_S = 60

Run = Callable[..., str]

# What the scripts share: `path` is a file of 1 MiB, `content` its bytes; pieces are small, so there are many.
PRELUDE = """
import gc, os, signal, sys, threading, time
from pathlib import Path
from flashlm.errors import FlashError, StorageError
from flashlm.storage.reader import AlignedBuffer, Reader, ReadRequest

path = Path(sys.argv[1])
content = path.read_bytes()

def make_reader(**settings):
    return Reader(**{"queue_depth": 2, "num_threads": 2, "piece_bytes": 65536, **settings})

def begin(reader, file, buffer, offset=0, num_bytes=None):
    return reader.submit([ReadRequest(file, offset, num_bytes or len(content), buffer)])
"""


@pytest.fixture(scope="session", params=["io_uring", "threads"])
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    try:
        Reader(backend=chosen).close()
    except ConfigError as refused:
        pytest.skip(str(refused))
    return chosen


@pytest.fixture
def reader(backend: Backend) -> Iterator[Reader]:
    with Reader(backend=backend, queue_depth=3, num_threads=3, piece_bytes=64 * KIB) as opened:
        yield opened


@pytest.fixture(scope="session")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 MiB of random bytes."""
    return write_random(tmp_path_factory.mktemp("files") / "random.bin", 1024 * KIB, seed=0)


def write_random(path: Path, num_bytes: int, *, seed: int) -> Path:
    path.write_bytes(np.random.default_rng(seed).bytes(num_bytes))
    return path


@pytest.fixture
def run_script(random_file: Path, backend: Backend) -> Run:
    """Run a script after `PRELUDE` in a process of its own; returns what it prints."""

    def run(script: str, **environment: str) -> str:
        return _run(script, random_file, {"FLASHLM_IO_BACKEND": backend, **environment})

    return run


@pytest.fixture(scope="session")
def run_faultily(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a script as `run_script` does, under the faults of `faults.c`."""
    folder = tmp_path_factory.mktemp("faults")
    library = build_faults(folder)
    if library is None:
        pytest.skip("faults are injected by a preloaded library: needs Linux and cc")
    path = write_random(folder / "random.faulty", 1024 * KIB, seed=1)

    def run(script: str, fault: str, **environment: str) -> str:
        preload = f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()
        return _run(script, path, {"LD_PRELOAD": preload, "FAULT": fault, **environment})

    return run


def build_faults(folder: Path) -> Path | None:
    """Compile `faults.c` for LD_PRELOAD; None where that can't be done."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    source, library = Path(__file__).with_name("faults.c"), folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def _run(script: str, path: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SCRIPT_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
