"""BigMoeOnEdge as one of the mixture benchmark's systems: its own program, which streams experts past llama.cpp.

The program keeps a model open and takes prompts as lines of JSON, so decoding and the prompts after it are one process, as
they are for every other system. Two things differ. It takes text: a prompt is as many bytes as there are to be tokens, which
the twin's vocabulary has a token each for. And it draws the tokens that it decodes itself: at so high a temperature that all
are as likely, like the random ids of the others; what drawing takes is not in its times.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hybrid_child import Recorder
    from torch_runner import Spec

MIB = 1 << 20
NUM_AROUND = 4  # the token that begins a text, and the three bytes of the space that the vocabulary puts before it
RANDOM_TOKENS = ("--temp", "1000", "--top-k", "0", "--top-p", "1", "--seed", "1")


def random_text(num_tokens: int, seed: int) -> str:
    """Return a text that the twin's vocabulary makes `num_tokens` tokens of, each of some 150 bytes as likely."""
    random = np.random.default_rng(seed)
    # no digits, of which the vocabulary has whole tokens, and nothing that JSON or the vocabulary's own names need
    short = [chr(code) for code in range(33, 127) if chr(code) not in '0123456789"\\<>']
    long = [chr(code) for code in range(0xA1, 0x800)]
    text = ""
    while (missing := num_tokens - NUM_AROUND - len(text.encode())) > 0:
        text += str(random.choice(long if missing > 1 and random.random() < 0.3 else short))
    return text


class BigMoe:
    """The program with a model open."""

    def __init__(self, spec: Spec, log: Path) -> None:
        self._argv = [spec["program"], "-m", spec["gguf"], "--moe-stream", "--session", "--progress", *RANDOM_TOKENS]
        self._argv += ["-t", str(spec["num_threads"]), "-c", str(spec["context"])]
        self._argv += ["--cache-mb", str(spec["cache_bytes"] // MIB), *spec["options"]]
        self._log = log.open("w")
        self._process = subprocess.Popen(
            self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.ready = self._wait_for("BMOE_READY")[0]
        version = subprocess.run([spec["program"], "--version"], capture_output=True, text=True, check=True)
        self.version = version.stdout.strip()

    def _wait_for(self, last: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return what comes in the line `last`, and in the lines of tokens before it."""
        tokens: list[dict[str, Any]] = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            name, _, text = line.partition(" ")
            if name == "BMOE_ERROR":
                raise RuntimeError(f"BigMoeOnEdge says {text.strip()}")
            if name == "BMOE_PROGRESS":
                tokens.append(json.loads(text))
            if name == last:
                return json.loads(text), tokens
        raise RuntimeError(f"BigMoeOnEdge ended with status {self._process.wait()}; {self._log.name} has what it said")

    def generate(self, num_prompt: int, num_tokens: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the sums of a prompt and the tokens decoded after it, and each token's record."""
        assert self._process.stdin is not None
        request = {"cmd": "generate", "id": seed, "prompt": random_text(num_prompt, seed), "n_predict": num_tokens}
        self._process.stdin.write(json.dumps(request, ensure_ascii=False) + "\n")
        self._process.stdin.flush()
        return self._wait_for("BMOE_DONE")

    def close(self) -> None:
        """End the program."""
        self._process.communicate()
        self._log.close()


def measure(spec: Spec, recorder: Recorder) -> None:
    """Open the model, then a short prompt and decode tokens, then the long prompts: the job of `hybrid_child.measure`."""
    program = BigMoe(spec, recorder.path.with_suffix(".log"))
    facts = {
        "settings": " ".join(["--moe-stream", f"--cache-mb {spec['cache_bytes'] // MIB}", *spec["options"]]),
        "versions": {"BigMoeOnEdge": program.version},
        "architecture": program.ready["arch"],
        "built_from": spec["built_from"],
    }
    recorder.note(load_s=program.ready["load_s"], facts=facts)
    done, tokens = program.generate(max(spec["prompt_tokens"], NUM_AROUND + 1), spec["decode_tokens"] + 1, seed=1)
    decode = [
        {
            "num_tokens": 1,
            "wall_s": each["wall_ms"] / 1e3,
            "cpu_s": each["cpu_ms"] / 1e3,
            "wait_s": each["io_ms"] / 1e3 if "--overlap" not in spec["options"] else each["stall_ms"] / 1e3,
            "compute_s": each["compute_ms"] / 1e3,
            "bytes_read": int(each["read_mb"] * MIB),
            "demanded_bytes": int(done["token_demand_mib"] * MIB),
            "major_faults": each["majflt"],
        }
        for each in tokens
    ]
    recorder.note(decode=decode, whole=_plain(done))
    prefill: list[dict[str, Any]] = []
    for seed, num_tokens in enumerate(spec["prefill_lengths"] * spec["num_prefills"], start=2):
        done, _ = program.generate(num_tokens, 1, seed=seed)
        prefill.append({"num_tokens": done["n_prompt"], "wall_s": done["prefill_s"]})
        recorder.note(prefill=prefill)
    program.close()
    recorder.note(finished=True)


def _plain(done: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in done.items() if name not in ("text", "reasoning")}
