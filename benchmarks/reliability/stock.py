"""Programs that know nothing of flashlm, given a pack: with flashlm registering itself, and without it.

    python benchmarks/reliability/stock.py [--quick]

Run it with a Python in whose environment flashlm is installed (a wheel or an editable install). `FLASHLM_AUTOLOAD=0`
stands for "flashlm is not there". What a program needs beside transformers is not installed here: where it is missing
(`fastapi` and `uvicorn` for `transformers serve`, `lm_eval`) the row says so. The right answer is the source model's.
Results go to benchmarks/results/reliability-stock.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from small_packs import make_pack

RESULT = Path(__file__).parents[1] / "results" / "reliability-stock.json"
LIMIT_S = 240
PROMPT = "w9 w10 w11 w12 w40 w41"
BEGIN = "import sys, torch; folder = sys.argv[1]; ids = torch.tensor([[9, 10, 11, 12, 40, 41]])\n"
FROM_PRETRAINED = "m = AutoModelForCausalLM.from_pretrained(folder{})\n"
GENERATE = "print('ANSWER', m.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None).tolist())"
IMPORT = "from transformers import AutoModelForCausalLM\n"


def script(arguments: str = "", imports: str = IMPORT, model: str = FROM_PRETRAINED) -> str:
    """A plain transformers script."""
    return BEGIN + imports + model.replace("{}", arguments) + GENERATE


PROGRAMS = {
    "script": script(),
    "script, use_safetensors=True": script(", use_safetensors=True"),
    "script, use_safetensors=False": script(", use_safetensors=False"),
    "script, device_map=cpu": script(", device_map='cpu'"),
    "script, device_map=auto": script(", device_map='auto'"),
    "script, dtype=float32": script(", dtype='float32'"),
    "script, torch_dtype=auto": script(", torch_dtype='auto'"),
    "script, low_cpu_mem_usage": script(", low_cpu_mem_usage=True"),
    "script, local_files_only": script(", local_files_only=True"),
    "script, variant=fp32": script(", variant='fp32'"),
    "script, the model's class": script(
        imports="from transformers import LlamaForCausalLM\n", model="m = LlamaForCausalLM.from_pretrained(folder)\n"
    ),
    "script, config given": script(
        imports="from transformers import AutoConfig, AutoModelForCausalLM\n",
        model="m = AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))\n",
    ),
    "script, base model": BEGIN
    + "from transformers import AutoModel\nm = AutoModel.from_pretrained(folder)\n"
    + "print('ANSWER', m(ids).last_hidden_state.argmax(-1).tolist())",
    "pipeline": "import sys; from transformers import pipeline\n"
    f"out = pipeline('text-generation', model=sys.argv[1])({PROMPT!r}, max_new_tokens=12, do_sample=False)\n"
    "print('ANSWER', out[0]['generated_text'])",
    "pipeline, device_map=auto": "import sys; from transformers import pipeline\n"
    "run = pipeline('text-generation', model=sys.argv[1], device_map='auto')\n"
    f"print('ANSWER', run({PROMPT!r}, max_new_tokens=12, do_sample=False)[0]['generated_text'])",
    "accelerate dispatch": BEGIN
    + "from accelerate import init_empty_weights, load_checkpoint_and_dispatch\n"
    + "from transformers import AutoConfig, AutoModelForCausalLM\n"
    + "config = AutoConfig.from_pretrained(folder)\n"
    + "with init_empty_weights():\n    m = AutoModelForCausalLM.from_config(config)\n"
    + "m = load_checkpoint_and_dispatch(m, folder, device_map={'': 'cpu'})\n"
    + GENERATE,
}


def run_program(code: str, folder: Path, autoload: str) -> tuple[str, str]:
    """Return the answer and what was on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment(autoload),
    )  # fmt: skip
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    return (answers[0] if answers and done.returncode == 0 else ""), done.stderr


def environment(autoload: str) -> dict[str, str]:
    return {**os.environ, "FLASHLM_AUTOLOAD": autoload, "HF_HUB_OFFLINE": "1", "FLASHLM_CONTEXT": "1024"}


def last_line(text: str) -> str:
    """The last line of an error, with no path of this machine."""
    lines = [line for line in text.strip().splitlines() if line.strip() and not line.startswith(" ")]
    error = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
    return error.replace(tempfile.gettempdir(), "")[:300]


def judge(answer: str, expected: str, stderr: str) -> dict[str, str]:
    if answer:
        return {"outcome": "right" if answer == expected else "SILENT WRONG", "answer": answer}
    return {"outcome": "named failure", "error": last_line(stderr)}


def serve(folder: Path, autoload: str, work: Path) -> tuple[str, str]:
    """`transformers serve`, asked twice over its HTTP interface; the answer, and what went wrong."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (work / f"serve-{autoload}.log").open("w+")
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)]
    if not Path(command[0]).exists():
        main = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
        command = [sys.executable, "-c", main, *command[1:]]
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment(autoload))
    body = {
        "model": str(folder), "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "temperature": 0.0,
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    answer, problem = "", "no answer"
    try:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and server.poll() is None:
            request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:
                    answer = "ANSWER " + json.loads(reply.read())["choices"][0]["message"]["content"]
                break
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
    finally:
        server.terminate()
        server.wait(30)
    log.seek(0)
    said = log.read()
    log.close()
    return answer, f"{said}\n{problem}: {last_line(said)}"


def lm_eval(folder: Path, autoload: str, work: Path) -> tuple[str, str]:
    """`lm_eval --model hf` on a task of our own: loglikelihoods of words."""
    task = work / "task"
    task.mkdir(exist_ok=True)
    rows = [
        {"text": f"w{i} w{i + 1} w{i + 2}", "choices": [f"w{i + 3}", f"w{i + 9}"], "label": 0} for i in range(9, 39)
    ]
    (task / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (task / "words.yaml").write_text(
        "task: words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {task / 'data.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n"
    )
    out = work / f"lm_eval-{autoload}-{folder.name}"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32",
         "--tasks", "words", "--include_path", str(task), "--device", "cpu", "--output_path", str(out),
         "--log_samples", "--batch_size", "4"],
        capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment(autoload),
    )  # fmt: skip
    samples = sorted(out.rglob("samples_*.jsonl"))
    if done.returncode or not samples:
        return "", done.stderr
    found = [json.loads(line)["filtered_resps"] for line in samples[0].read_text().splitlines()]
    return f"ANSWER {[[round(float(each[0]), 3) for each in row] for row in found]}", done.stderr


def startup(count: int) -> dict[str, Any]:
    """Start of an interpreter with and without, in turn: medians and their difference, in ms."""
    times: dict[str, list[float]] = {"0": [], "1": []}
    files = {"with the .pth, FLASHLM_AUTOLOAD=0": "0", "with it": "1"}
    for _ in range(count):
        for autoload in times:
            started_s = time.perf_counter()
            subprocess.run([sys.executable, "-c", "pass"], check=True, env=environment(autoload))
            times[autoload].append(1e3 * (time.perf_counter() - started_s))
    differences = [on - off for on, off in zip(times["1"], times["0"], strict=True)]
    found: dict[str, Any] = {name: round(statistics.median(times[key]), 3) for name, key in files.items()}
    return found | {"paired difference, median": round(statistics.median(differences), 3), "pairs": count}


def startup_without_the_pth(count: int) -> dict[str, Any]:
    """The same against a twin folder of packages that has no .pth at all."""
    files = importlib.metadata.files("flashlm") or ()
    installed = next(Path(str(file.locate())) for file in files if file.name == "flashlm-autoload.pth")
    with tempfile.TemporaryDirectory() as folder:
        sites = {}
        for name in ("without", "with"):
            sites[name] = Path(folder) / name
            sites[name].mkdir()
        shutil.copy(installed, sites["with"])
        times: dict[str, list[float]] = {name: [] for name in sites}
        for attempt in range(count + 1):  # the first one warms the files
            for name, site in sites.items():
                code = f"import site; site.addsitedir({str(site)!r})"
                started_s = time.perf_counter()
                subprocess.run([sys.executable, "-S", "-c", code], check=True, env=environment("1"))
                if attempt:
                    times[name].append(1e3 * (time.perf_counter() - started_s))
    differences = [on - off for on, off in zip(times["with"], times["without"], strict=True)]
    return {
        "without the .pth": round(statistics.median(times["without"]), 3),
        "with it": round(statistics.median(times["with"]), 3),
        "paired difference, median": round(statistics.median(differences), 3),
        "pairs": count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three programs, nothing written")
    parser.add_argument("--only", nargs="*", help="programs with one of these words; the others stay as they were")
    arguments = parser.parse_args()
    quick, only = arguments.quick, arguments.only
    programs = dict(list(PROGRAMS.items())[:3]) if quick else PROGRAMS
    programs = {name: code for name, code in programs.items() if not only or any(word in name for word in only)}
    rows: dict[str, Any] = json.loads(RESULT.read_text())["programs"] if only else {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pack = make_pack(work, "llama")
        source = work / "source"
        plain, _ = run_program(PROGRAMS["script"], source, "0")
        for name, code in programs.items():
            # What the source model's folder does not have (a pickle, a variant) is no reason for another answer.
            expected = run_program(code, source, "0")[0] or plain
            for autoload in ("1", "0"):
                rows[f"{name}, flashlm {'there' if autoload == '1' else 'not there'}"] = judge(
                    *_with_expected(run_program(code, pack, autoload), expected)
                )
        for name, modules, run in (
            ("transformers serve", ("fastapi", "uvicorn"), serve),
            ("lm_eval --model hf", ("lm_eval",), lm_eval),
        ):
            if only and not any(word in name for word in only):
                continue
            rows.pop(name, None)
            if quick or not all(map(importlib.util.find_spec, modules)):
                rows[name] = {"outcome": "not installed"}
                continue
            expected, said = run(source, "0", work)
            if not expected:
                rows[name] = {"outcome": "does not run with the source model", "error": last_line(said)}
                continue
            for autoload in ("1", "0"):
                rows[f"{name}, flashlm {'there' if autoload == '1' else 'not there'}"] = judge(
                    *_with_expected(run(pack, autoload, work), expected)
                )
    for name, row in rows.items():
        print(f"{name:52} {row['outcome']:15} {row.get('error', '')[:110]}", flush=True)
    count = 5 if quick else 60
    found = {"switch": startup(count), "file": startup_without_the_pth(count)}
    print(json.dumps(found, indent=1))
    if not quick:
        _write(rows, found)


def _with_expected(ran: tuple[str, str], expected: str) -> tuple[str, str, str]:
    return ran[0], expected, ran[1]


def _write(rows: dict[str, Any], start: dict[str, Any]) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from machine import describe_commit, describe_machine, today

    outcomes = [row["outcome"] for row in rows.values()]
    content = {
        "script": "benchmarks/reliability/stock.py",
        "date": today(),
        "summary": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "programs": rows,
        "start of Python, ms": start,
        "machine": describe_machine(),
        "commit": describe_commit(Path(__file__).parents[2]),
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
