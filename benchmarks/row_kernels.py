"""Row kernels against the memory's own rate and torch: GB/s at 1 to 16 tokens, and one block's GEMM at 128 tokens.

    python benchmarks/row_kernels.py [--mib 512] [--simd avx2] [--only plain|grouped] [--out benchmarks/results/kernels.json]

Of encodings with groups: GB/s of encoded bytes, and their share of the rate at which a plain sum reads the same bytes;
`int8` is `project` of tokens in 8 bits (of fp8_block it is `project`).

Rows of `[gate | up | down]`, hidden 4096, blocks of 256 rows, cold (more rows than any cache). Kernel, torch and plain
sum alternate block by block. The fastest tenth's edge is reported: on a busy machine the median measures the others.
With more than one thread on a busy machine torch's figures, the sum's too, collapse at its barriers: see
`load_average` in the result, and use `--threads 1` there. Answers are checked first.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from flashlm import _native
from flashlm.rows import kernels
from flashlm.rows.encodings import ENCODINGS, Encoding

HIDDEN, ROWS, PARTS = 4096, 256, 3
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_BYTES = 4 << 20
SLOW_S = 0.05  # a torch product slower than this is timed on few blocks


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fast(times: list[float]) -> float:
    return sorted(times)[len(times) // 10]


def row_block(block: torch.Tensor) -> kernels.RowBlock:
    return kernels.matrix_rows(block, num_parts=PARTS)


def check(block: torch.Tensor) -> None:
    rows, x, out, y = row_block(block), torch.randn(4, HIDDEN), torch.empty(4, ROWS), torch.zeros(4, HIDDEN)
    kernels.project(x, rows, 1, out)
    kernels.accumulate(out, rows, y)
    torch.testing.assert_close(out, x @ block[:, 1].float().T, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(y, out @ block[:, 2].float(), rtol=1e-4, atol=0.2)


def decode(blocks: torch.Tensor, num_tokens: int) -> dict[str, float]:
    x, h = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, ROWS)
    y, out = torch.zeros(num_tokens, HIDDEN), torch.empty(num_tokens, ROWS)
    x_low, h_low = x.to(blocks.dtype), h.to(blocks.dtype)
    works: dict[str, Callable[[torch.Tensor], object]] = {
        "sum": lambda block: block.view(-1).view(torch.float32)[: ROWS * HIDDEN * block.element_size() // 4].sum(),
        "up": lambda block: kernels.project(x, row_block(block), 1, out),
        "torch_up": lambda block: F.linear(x_low, block[:, 1]),
        "down": lambda block: kernels.accumulate(h, row_block(block), y),
        "torch_down": lambda block: h_low @ block[:, 2],
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(len(blocks)):
        for j, (name, work) in enumerate(works.items()):
            if i > 3 and times[name][-1] > SLOW_S:
                continue
            # its own block for each, far from the others', so that none finds it in a cache
            block = blocks[(i + j * len(blocks) // 5) % len(blocks)]
            times[name].append(seconds(partial(work, block)))
    num_bytes = ROWS * HIDDEN * blocks.element_size()
    return {f"{name}_gb_s": round(num_bytes / fast(t) / 1e9, 2) for name, t in times.items()}


def prefill(block: torch.Tensor, num_tokens: int, repeats: int) -> dict[str, float]:
    x, x_low = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, HIDDEN).to(block.dtype)
    wide = torch.empty(ROWS, HIDDEN)

    def widen_and_multiply() -> None:
        kernels.widen(row_block(block), 1, wide)
        torch.mm(x, wide.T)

    works: dict[str, Callable[[], object]] = {
        "torch_mm_gflop_s": lambda: torch.mm(x_low, block[:, 1].T),
        "widen_mm_gflop_s": widen_and_multiply,
        "torch_copy_mm_gflop_s": lambda: torch.mm(x, block[:, 1].float().T),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(repeats):
        for name, work in works.items():
            if i < 2 or times[name][-1] < 1.0:
                times[name].append(seconds(work))
    flop = 2 * num_tokens * ROWS * HIDDEN
    return {name: round(flop / fast(t) / 1e9, 1) for name, t in times.items()}


def encoded_rows(encoding: Encoding, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random rows in an encoding, uint8, and the fp32 that they mean. Groups with huge elements are zero."""
    groups = torch.randint(
        0, 256, (num_rows * HIDDEN // encoding.group_elements, encoding.group_bytes), dtype=torch.uint8
    )
    wide = torch.empty(len(groups), encoding.group_elements)
    one_group = kernels.RowFormat.alike(encoding.group_bytes, encoding.group_elements, encoding.code, 1)
    kernels.widen(kernels.RowBlock(groups, len(groups), one_group), 0, wide)
    is_huge = ~(wide.abs() < 1e3).all(dim=1)  # or NaN
    groups[is_huge], wide[is_huge] = 0, 0
    return groups.view(num_rows, -1), wide.view(num_rows, HIDDEN)


def grouped(encoding: Encoding, num_tokens: int, num_bytes: int) -> dict[str, float]:
    row_bytes = encoding.bytes_of(HIDDEN)
    num_rows = BLOCK_BYTES // row_bytes // 16 * 16
    rows, wide = encoded_rows(encoding, num_rows)
    row_format = kernels.RowFormat.alike(row_bytes, HIDDEN, encoding.code, 1)
    blocks = rows.expand(max(num_bytes // rows.numel(), 8), -1, -1).clone()
    x, h = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, num_rows)
    out, y, scratch = torch.empty(num_tokens, num_rows), torch.zeros(num_tokens, HIDDEN), torch.empty_like(wide)
    block = kernels.RowBlock(rows, num_rows, row_format)
    kernels.project(x, block, 0, out)
    exact, magnitude = x.double() @ wide.double().T, x.double().abs() @ wide.double().abs().T
    assert ((out - exact).abs() <= 1e-5 * magnitude).all()
    tokens = kernels.quantize_tokens(x)
    kernels.project(tokens, block, 0, out)
    assert ((out - exact).abs() <= 2e-2 * magnitude).all()
    works: dict[str, Callable[[torch.Tensor], object]] = {
        "sum": lambda block: block.view(-1).view(torch.int64).sum(),
        "project": lambda block: kernels.project(x, kernels.RowBlock(block, num_rows, row_format), 0, out),
        "int8": lambda block: kernels.project(tokens, kernels.RowBlock(block, num_rows, row_format), 0, out),
        "accumulate": lambda block: kernels.accumulate(h, kernels.RowBlock(block, num_rows, row_format), y),
        "widen": lambda block: kernels.widen(kernels.RowBlock(block, num_rows, row_format), 0, scratch),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(len(blocks)):
        for j, (name, work) in enumerate(works.items()):
            times[name].append(seconds(partial(work, blocks[(i + j * len(blocks) // len(works)) % len(blocks)])))
    rates = {name: rows.numel() / fast(t) / 1e9 for name, t in times.items()}
    shares = {f"{name}_share": round(rates[name] / rates["sum"], 2) for name in rates if name != "sum"}
    return {f"{name}_gb_s": round(rate, 2) for name, rate in rates.items()} | shares


def machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": model[0] if model else platform.processor(),
        "simd": _native.simd_level(),
        "threads": _native.num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": Path("/proc/loadavg").read_text().split()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512, help="rows of each dtype, in MiB")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"))
    parser.add_argument("--threads", type=int, default=_native.num_threads(), help="for torch and for the kernels")
    parser.add_argument("--simd", help="instruction set of the kernels; default: the best here")
    parser.add_argument("--only", choices=("plain", "grouped"), help="only these encodings")
    arguments = parser.parse_args()
    _native.set_simd_level(arguments.simd)
    torch.set_num_threads(arguments.threads)
    _native.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    results: list[dict[str, object]] = []
    for dtype in () if arguments.only == "grouped" else DTYPES:
        num_blocks = (arguments.mib << 20) // (ROWS * PARTS * HIDDEN * dtype.itemsize)
        blocks = torch.empty(num_blocks, ROWS, PARTS, HIDDEN, dtype=dtype)
        blocks[:] = torch.randn(ROWS, PARTS, HIDDEN).to(dtype)
        check(blocks[0])
        for num_tokens in (1, 4, 16):
            results.append({"dtype": str(dtype)[6:], "num_tokens": num_tokens, **decode(blocks, num_tokens)})
            print(*(f"{key}={value}" for key, value in results[-1].items()), flush=True)
        results.append({"dtype": str(dtype)[6:], "num_tokens": 128, **prefill(blocks[0], 128, 15)})
        print(*(f"{key}={value}" for key, value in results[-1].items()), flush=True)
    for encoding in () if arguments.only == "plain" else ENCODINGS.values():
        for num_tokens in (1, 4, 16):
            if not encoding.is_plain:
                rates = grouped(encoding, num_tokens, arguments.mib << 20)
                results.append({"encoding": encoding.name, "num_tokens": num_tokens, **rates})
                print(*(f"{key}={value}" for key, value in results[-1].items()), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
