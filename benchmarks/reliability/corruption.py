"""What becomes of a pack that was damaged, or made by somebody who means harm: found where, refused how, wrong how often.

    python benchmarks/reliability/corruption.py [--quick]

Every try runs in a process of its own, with a time limit. Random weights are enough: an answer is compared to the bit
with that of the undamaged pack. Results go to benchmarks/results/reliability-corruption.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hostile import fuzz_documents, signed_lies
from small_packs import make_pack
from transformers.utils import logging as transformers_logging

import flashlm
from flashlm.engine.generate import read_tokenizer
from flashlm.errors import FlashError

RESULT = Path(__file__).parents[1] / "results" / "reliability-corruption.json"
LIMIT_S = 30.0
LIMIT_BYTES = 512 << 20  # of growth in one try
PROMPT = "w9 w10 w11 w12 w40 w41"
# Of each pack: how it is loaded. `pin=0` streams all that can be streamed.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"pinned": {}, "streamed": {"pin": 0}, "streamed, check=all": {"pin": 0, "check": "all"}},
    "opt": {"sparse": {"mode": "sparse"}, "sparse, check=all": {"mode": "sparse", "check": "all"}},
    "qwen3_moe": {"held": {}, "streamed": {"pin": 0}, "streamed, check=all": {"pin": 0, "check": "all"}},
}
PROMISED = ("pinned", "held", "check=all")  # ways in which the default, or the switch, promises to find everything


def answer(pack: Path, **load: Any) -> tuple[bytes, str]:
    """Everything that a user sees of a pack: the tokens of a text, logits, how generation is set."""
    tokenizer = read_tokenizer(pack)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    model = flashlm.load(pack, dram="4GiB", context=160, **load)
    with torch.no_grad():
        logits = [model(ids).logits] + [model(ids[:, :count]).logits for count in (1, 3)]
    settings = json.dumps(model.generation_config.to_dict(), sort_keys=True, default=str)
    return b"".join(each.numpy().tobytes() for each in logits), settings + tokenizer.decode(ids[0])


def in_child(run: Callable[[], str]) -> str:
    """Return what `run` says, from a process of its own; or how it died."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = run()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        sender.send("memory" if grown > LIMIT_BYTES else outcome)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    outcome = None
    if receiver.poll(LIMIT_S):
        try:
            outcome = receiver.recv()
        except EOFError:
            outcome = "killed"
    else:
        outcome = "hang"
    if outcome == "hang":
        process.kill()
    process.join()
    receiver.close()
    sender.close()
    return outcome


def guarded(run: Callable[[], str]) -> str:
    """Return what `run` says, or the kind of the error that it raised."""
    try:
        return run()
    except FlashError:
        return "refused"
    except Exception as error:  # what is looked for
        return f"foreign: {type(error).__name__}"


def loading(pack: Path, expected: tuple[bytes, str], load: dict[str, Any]) -> str:
    """Load, run, and compare."""

    def run() -> str:
        import logging

        class Counting(logging.Handler):
            count = 0

            def emit(self, record: logging.LogRecord) -> None:
                self.count += record.levelno >= logging.WARNING and "if that was not you" in record.getMessage()

        seen = Counting()
        logging.getLogger("flashlm").addHandler(seen)
        try:
            found = answer(pack, **load)
        except FlashError:
            raise
        except Exception:
            if not seen.count:
                raise
        return "announced" if seen.count else "same" if found == expected else "WRONG"

    return in_child(lambda: guarded(run))


def verifying(pack: Path) -> str:
    """Verify."""
    return in_child(lambda: guarded(lambda: "refused" if flashlm.verify(pack).problems else "unnoticed"))


def files_of(pack: Path) -> list[Path]:
    """Every file of a pack, relative to it."""
    return sorted(path.relative_to(pack) for path in pack.rglob("*") if path.is_file())


def flips(packs: dict[str, Path], expected: dict[str, Any], num_flips: int) -> Iterator[tuple[str, str]]:
    """One bit flipped in each file at `num_flips` places, each loaded in every way, and verified."""
    generator = random.Random(0)
    for family, pack in packs.items():
        for name in files_of(pack):
            path = pack / name
            before = path.read_bytes()
            for _ in range(num_flips):
                at, bit = generator.randrange(len(before)), 1 << generator.randrange(8)
                path.write_bytes(before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :])
                kind = kind_of(name)
                for way, load in WAYS[family].items():
                    yield f"{family}/{kind}/load, {way}", loading(pack, expected[family, way], load)
                yield f"{family}/{kind}/verify", verifying(pack)
            path.write_bytes(before)


def kind_of(name: Path) -> str:
    """Files of rows are one kind."""
    return f"*{name.suffix}" if name.suffix in (".rows", ".order") else name.name


def swaps(packs: dict[str, Path], expected: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Two files of rows exchanged: all sizes are right."""
    for family, pack in packs.items():
        first, second, *_ = sorted((pack / "flash").glob("*.rows"))
        spare = pack.parent / "spare"
        for _ in range(2):  # and back
            first.rename(spare), second.rename(first), spare.rename(second)
            for way, load in WAYS[family].items():
                outcome = loading(pack, expected[family, way], load)
                if _ == 0:
                    yield f"{family}/swapped/load, {way}", outcome
            if _ == 0:
                yield f"{family}/swapped/verify", verifying(pack)


def replacements(path: Path, before: bytes) -> dict[str, Callable[[], Any]]:
    """What may stand in the place of a file, and how it is put there."""

    def bound_socket() -> None:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
        os.chdir(here)

    return {
        "empty": lambda: path.write_bytes(b""),
        "one byte": lambda: path.write_bytes(before[:1]),
        "half": lambda: path.write_bytes(before[: len(before) // 2]),
        "one byte less": lambda: path.write_bytes(before[:-1]),
        "one byte more": lambda: path.write_bytes(before + b"\0"),
        "deleted": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "socket": bound_socket,
        "link to nowhere": lambda: path.symlink_to("nothing-here"),
        "link to itself": lambda: path.symlink_to(path.name),
    }


def specials(pack: Path, expected: tuple[bytes, str]) -> Iterator[tuple[str, str]]:
    """Every file replaced by something that is none, or of another length; load, verify, info and plan."""
    from flashlm.memory.smallest import smallest_dram_bytes
    from flashlm.pack.description import describe
    from flashlm.planner.shape import read_shape

    def info() -> str:
        describe(pack), smallest_dram_bytes(pack)
        return "same"

    def plan() -> str:
        read_shape(pack)
        return "same"

    for name in files_of(pack):
        path = pack / name
        before = path.read_bytes()
        for kind, make in replacements(path, before).items():
            path.unlink()
            make()
            yield f"{kind}/load", loading(pack, expected, {})
            yield f"{kind}/verify", verifying(pack)
            yield f"{kind}/info", in_child(lambda: guarded(info))
            yield f"{kind}/plan", in_child(lambda: guarded(plan))
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif os.path.lexists(path):
                path.unlink()
            path.write_bytes(before)


def summarise(tries: Iterator[tuple[str, str]], what: str) -> dict[str, dict[str, int]]:
    """Count outcomes by what was tried, and show the table."""
    counts: dict[str, Counter[str]] = {}
    for tried, outcome in tries:
        counts.setdefault(tried, Counter())[outcome] += 1
    print(f"\n{what}")
    for tried, found in sorted(counts.items()):
        print(f"  {tried:58}", ", ".join(f"{outcome} {number}" for outcome, number in found.most_common()), flush=True)
    return {tried: dict(found) for tried, found in sorted(counts.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer flips and documents, nothing written")
    parser.add_argument(
        "--only-lies", action="store_true", help="the signed lies alone, put into the results there are"
    )
    arguments = parser.parse_args()
    quick = arguments.quick
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started_s = time.perf_counter()
    results: dict[str, Any] = {"script": "benchmarks/reliability/corruption.py"}
    with tempfile.TemporaryDirectory() as folder:
        packs = {each: make_pack(Path(folder) / each, each, is_calibrated=each != "llama") for each in WAYS}
        if arguments.only_lies:
            lies = signed_lies(packs["llama"], packs["qwen3_moe"], Path(folder) / "lies", in_child, guarded, verifying)
            results = json.loads(RESULT.read_text()) | {"signed lies": summarise(lies, "signed lies")}
            results |= {"summary": judge(results), "signed lies run again": True}
            RESULT.write_text(json.dumps(results, indent=1) + "\n")
            return
        expected = {
            (family, way): answer(packs[family], **load) for family, ways in WAYS.items() for way, load in ways.items()
        }
        results["flips"] = summarise(flips(packs, expected, 1 if quick else 6), "one bit flipped")
        results["swaps"] = summarise(swaps(packs, expected), "files of rows exchanged")
        special = Path(shutil.copytree(packs["llama"], Path(folder) / "special"))
        results["specials"] = summarise(specials(special, expected["llama", "pinned"]), "no files, other lengths")
        lies = signed_lies(packs["llama"], packs["qwen3_moe"], Path(folder) / "lies", in_child, guarded, verifying)
        results["signed lies"] = summarise(lies, "manifest and config.json changed, and signed again")
        fuzzed = fuzz_documents(packs, Path(folder) / "fuzz", 100 if quick else 1000)
        results["documents"] = summarise(fuzzed, "random changes of documents, in process")
    results["seconds"] = round(time.perf_counter() - started_s, 1)
    results["summary"] = judge(results)
    print("\n", results["summary"])
    if not quick:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from machine import describe_commit, describe_machine, today

        repository = Path(__file__).parents[2]
        results |= {"date": today(), "machine": describe_machine(), "commit": describe_commit(repository)}
        RESULT.write_text(json.dumps(results, indent=1) + "\n")


def judge(results: dict[str, Any]) -> dict[str, int]:
    """Count tries, and what must not be."""
    found: Counter[str] = Counter()
    for part in ("flips", "swaps", "specials", "signed lies", "documents"):
        for tried, outcomes in results[part].items():
            promised = part in ("signed lies", "specials") or any(way in tried for way in PROMISED)
            for outcome, number in outcomes.items():
                found["tries"] += number
                found["named errors"] += number * (outcome == "refused")
                found["announced"] += number * (outcome == "announced")
                found["foreign errors"] += number * outcome.startswith("foreign")
                found["hangs"] += number * (outcome == "hang")
                found["kills and memory"] += number * (outcome in ("killed", "memory"))
                found["silent wrong, promised to be found"] += number * (outcome == "WRONG" and promised)
                found["silent wrong, streamed and not asked to be checked"] += number * (
                    outcome == "WRONG" and not promised
                )
                found["not found by verify"] += number * (outcome == "unnoticed")
    return dict(found)


if __name__ == "__main__":
    main()
