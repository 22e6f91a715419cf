# ruff: noqa: E402  # the benchmarks and tests that this borrows from are found by path
"""Adapters, moves and copies on loaded packs: right, refused by name, or silently wrong? The last must not happen.

    python benchmarks/reliability/adapters.py [--quick] [--work DIR]

Tiny random models, each as a checkpoint under transformers and peft, and as a pack of which every row is streamed.
An adapter that goes on must give the logits and greedy tokens of the checkpoint with the same adapter; one that is refused
must leave the model as it was, to the bit. The same for what else finds weights by name, moves, casts, copies or saves.
Needs peft. Takes a few minutes. One process does it all: a kill or a hang leaves no result.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import pickle
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import accelerate
import peft
import torch
import transformers
from machine import describe_commit, describe_machine, today
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import flashlm
from flashlm.conversion.convert import convert
from flashlm.errors import FlashError
from tests.models import EXPERT_FAMILIES, FAMILIES, save_checkpoint

RESULT = ROOT / "benchmarks" / "results" / "reliability-adapters.json"
GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
POSITIONS = {"gpt2": "n_positions", "gptj": "n_positions", "codegen": "n_positions", "gpt_bigcode": "n_positions"}
TARGETS = {"opt": ["fc1", "fc2", "q_proj"], "gpt2": ["c_fc", "c_proj", "c_attn"]}
LLAMA_TARGETS = ["gate_proj", "up_proj", "down_proj", "q_proj"]
QUICK = ["llama", "opt", "gpt2", "phi3"]
# fp32 sums in another order differ by a few eps of what they add up; wrong answers differ by much more than this.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


class Packs:
    """Tiny checkpoints and packs, made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self, family: str) -> Path:
        folder = self._folder / family
        if not (folder / "pack").exists():
            overrides: dict[str, Any] = {POSITIONS.get(family, "max_position_embeddings"): 160}
            if family == "stablelm":
                overrides["hidden_size"] = 64
            save_checkpoint(folder / "source", family, **overrides)
            rows = None if family in EXPERT_FAMILIES else 16
            convert(folder / "source", folder / "pack", dtype="float32", block_rows=rows)
        return folder

    def pack(self, family: str) -> Any:
        return flashlm.load(self.make(family) / "pack", dram="3GiB", context=400, pin=0)

    def reference(self, family: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.make(family) / "source").eval()


def logits(model: Any, shape: tuple[int, int] = (2, 6)) -> torch.Tensor:
    tokens = torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(shape[1]))
    with torch.no_grad():
        return model(tokens).logits


def is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool(
        (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp(min=1)
    )


def answers(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a few tokens (row kernels) and of a prompt (matrix products), and greedy tokens."""
    tokens = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(6))
    return logits(model), logits(model, (2, 40)), model.generate(input_ids=tokens, **GREEDY)


def attempt(act: Callable[[], Any]) -> tuple[str, str, Any]:
    """Do something; return how it went, what was said, and the result."""
    try:
        return "works", "", act()
    except FlashError as error:
        return "refused by name", str(error), None
    except Exception as error:  # whatever a library raises: it is counted, not hidden
        return "other error", f"{type(error).__name__}: {error}", None


def train(model: Any) -> Any:
    """Stand in for training: every adapter weight away from its start."""
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def kinds(targets: list[str]) -> dict[str, Callable[[], Any]]:
    """Adapters of all kinds on attention and feed-forward layers."""
    ffn, down = targets[:-1], targets[-2:-1]

    def lora(**settings: Any) -> Callable[[], Any]:
        return lambda: LoraConfig(**{"r": 4, "target_modules": targets, **settings})

    return {
        "lora": lora(),
        "lora, rank-stabilised": lora(use_rslora=True),
        "lora with dropout": lora(lora_dropout=0.3),
        "lora with a bias of its own": lora(lora_bias=True),
        "lora, gaussian start": lora(init_lora_weights="gaussian"),
        "lora, orthogonal start": lora(init_lora_weights="orthogonal"),
        "lora on all-linear": lora(target_modules="all-linear"),
        "lora by a regular expression": lora(target_modules=rf".*\.({'|'.join(targets)})"),
        "lora on one layer": lora(layers_to_transform=[1]),
        "lora with rank and alpha patterns": lora(rank_pattern={ffn[0]: 7}, alpha_pattern={ffn[1]: 3}),
        "lora on attention": lora(target_modules=targets[-1:]),
        "lora and lm_head": lora(modules_to_save=["lm_head"]),
        "lora and tokens": lora(trainable_token_indices=[4, 5]),
        "lora and biases": lora(bias="all"),
        "lora and a feed-forward part": lora(target_modules=targets[-1:], modules_to_save=ffn[:1]),
        "lora on parameters": lora(target_modules=targets[-1:], target_parameters=[f"{ffn[0]}.weight"]),
        "DoRA": lora(use_dora=True),
        "aLoRA": lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        "PiSSA": lora(init_lora_weights="pissa"),
        "OLoRA": lora(init_lora_weights="olora"),
        "layer replication": lora(layer_replication=[(0, 2), (1, 2)]),
        "AdaLoRA": lambda: peft.AdaLoraConfig(r=4, total_step=10, target_modules=targets),
        "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=targets),
        "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=targets),
        "IA3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=down),
        "OFT": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=targets),
        "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=targets),
        "VeRA": lambda: peft.VeraConfig(r=4, target_modules=ffn),
        "RandLoRA": lambda: peft.RandLoraConfig(r=4, target_modules=ffn),
        "HRA": lambda: peft.HRAConfig(r=4, target_modules=targets),
        "FourierFT": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=targets),
        "C3A": lambda: peft.C3AConfig(block_size=8, target_modules=targets),
        "MiSS": lambda: peft.MissConfig(r=4, target_modules=targets),
        "SHiRA": lambda: peft.ShiraConfig(r=4, target_modules=targets),
        "VB-LoRA": lambda: peft.VBLoRAConfig(num_vectors=8, vector_length=8, target_modules=ffn),
        "DeLoRA": lambda: peft.DeloraConfig(r=4, target_modules=targets),
        "layer norms": lambda: peft.LNTuningConfig(
            target_modules=["final_layer_norm", "post_attention_layernorm", "ln_2"]
        ),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }


def adapter_cases(packs: Packs, family: str, only: set[str] | None) -> list[dict[str, Any]]:
    """Every kind of adapter on one family."""
    chosen = kinds(TARGETS.get(family, LLAMA_TARGETS))
    cases = []
    for kind, config in chosen.items():
        if only is None or kind in only:
            with tempfile.TemporaryDirectory() as folder:
                cases += cases_of_kind(packs, family, kind, config, folder)
    return cases


def cases_of_kind(packs: Packs, family: str, kind: str, config: Callable[[], Any], folder: str) -> list[dict[str, Any]]:
    """One kind, loaded by peft and by transformers, and added; each way is tried on the checkpoint first."""

    def add(model: Any) -> Any:
        adapted = get_peft_model(model, config())
        peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(folder))
        return adapted.eval()

    def load_in_place(model: Any) -> Any:
        model.load_adapter(folder)
        return model

    def make() -> Any:
        reference = train(get_peft_model(packs.reference(family), config()))
        reference.save_pretrained(folder)
        return reference

    def load(model: Any) -> Any:
        return PeftModel.from_pretrained(model, folder)

    how, said, reference = attempt(make)
    if how != "works":
        return [case("adapter", family, kind, "made", "not possible under transformers either", said)]
    ways = {"PeftModel.from_pretrained": load, "get_peft_model": add}
    if not reference.peft_config["default"].is_prompt_learning:
        ways["model.load_adapter"] = load_in_place
    cases = []
    for way, attach in ways.items():
        how, said, wanted = attempt(lambda: answers(attach(packs.reference(family))))  # noqa: B023  # called at once
        if how == "works":
            cases.append(adapter_case(packs.pack(family), family, kind, way, attach, wanted))
        else:
            cases.append(case("adapter", family, kind, way, "not possible under transformers either", said))
    return cases


def adapter_case(
    model: Any, family: str, kind: str, way: str, attach: Callable[[Any], Any], wanted: tuple[torch.Tensor, ...]
) -> dict[str, Any]:
    """An adapter on a pack: the checkpoint's answers, or a refusal that changes nothing."""
    before = logits(model)
    how, said, got = attempt(lambda: answers(attach(model)))
    if how == "works":
        is_equal = is_close(got[0], wanted[0]) and is_close(got[1], wanted[1]) and torch.equal(got[2], wanted[2])
        return case("adapter", family, kind, way, "equal" if is_equal else "SILENTLY WRONG", "")
    is_same = torch.equal(logits(model), before)
    return case("adapter", family, kind, way, how if is_same else "REFUSED, BUT CHANGED", said)


def case(group: str, family: str, what: str, way: str, outcome: str, said: str) -> dict[str, Any]:
    said = next((line for line in said.splitlines() if line.strip()), "").replace(tempfile.gettempdir(), "")[:160]
    return {"group": group, "family": family, "what": what, "way": way, "outcome": outcome, "said": said}


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def other_ways(packs: Packs, family: str, folder: Path) -> dict[str, Callable[[Any], Any]]:
    """What else moves, casts, copies, saves, loads or reads weights."""
    reference = packs.reference(family)
    plus_one = {name: weight + 1 for name, weight in reference.state_dict().items()}

    def streamed(model: Any) -> Any:
        return model.get_submodule((model.flash.manifest.layers or model.flash.manifest.experts)[0].module)

    return {
        "to(cpu)": lambda m: m.to("cpu"),
        "to(same dtype)": lambda m: m.to(torch.float32),
        "float()": lambda m: m.float(),
        "to(meta)": lambda m: m.to("meta"),
        "to(cuda)": lambda m: m.to("cuda"),
        "cuda()": lambda m: m.cuda(),
        "half()": lambda m: m.half(),
        "bfloat16()": lambda m: m.bfloat16(),
        "double()": lambda m: m.double(),
        "to_empty(cpu)": lambda m: m.to_empty(device="cpu"),
        "share_memory()": lambda m: m.share_memory(),
        "base model to(meta)": lambda m: m.base_model.to("meta"),
        "wrapped, to(meta)": lambda m: Around(m).to("meta"),
        "wrapped, half()": lambda m: Around(m).half(),
        "streamed layer to(meta)": lambda m: streamed(m).to("meta"),
        "accelerate.cpu_offload": lambda m: accelerate.cpu_offload(m, execution_device=torch.device("cpu")),
        "accelerate.disk_offload": lambda m: accelerate.disk_offload(m, folder / "offload"),
        "accelerate.dispatch_model": lambda m: accelerate.dispatch_model(m, {"": "cpu"}),
        "Accelerator.prepare": lambda m: accelerate.Accelerator(cpu=True).prepare(m),
        "DataParallel": lambda m: nn.DataParallel(m)(torch.ones(1, 2, dtype=torch.long)),
        "Trainer": lambda m: transformers.Trainer(
            m, transformers.TrainingArguments(str(folder / "trainer"), use_cpu=True, report_to=[])
        ),
        "requires_grad_(True)": lambda m: m.requires_grad_(True),
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": pickle.dumps,
        "torch.save": lambda m: torch.save(m, folder / "model.pt"),
        "torch.save(state_dict)": lambda m: torch.save(m.state_dict(), folder / "weights.pt"),
        "save_pretrained": lambda m: m.save_pretrained(folder / "saved"),
        "push_to_hub": lambda m: m.push_to_hub("nobody/nothing"),
        "load_state_dict(strict)": lambda m: m.load_state_dict(plus_one),
        "load_state_dict(strict=False)": lambda m: m.load_state_dict(plus_one, strict=False),
        "its own state_dict": lambda m: m.load_state_dict(m.state_dict()),
        "parameters_to_vector": lambda m: nn.utils.parameters_to_vector(m.parameters()),
        "clip_grad_norm_": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0),
        "every weight times two": lambda m: [weight.data.mul_(1) for weight in list(m.parameters())[::-1]],
        "quantize_dynamic": lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}),
        "tie_weights": lambda m: m.tie_weights(),
        "init_weights": lambda m: m.init_weights(),
        "inputs on meta": lambda m: m(torch.ones(1, 2, dtype=torch.long, device="meta")),
        "embeddings on meta": lambda m: m(inputs_embeds=torch.zeros(1, 2, 48, device="meta")),
        "gradient": lambda m: m(inputs_embeds=torch.zeros(1, 2, 48, requires_grad=True)),
    }


def way_cases(packs: Packs, family: str) -> list[dict[str, Any]]:
    cases = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for what, act in other_ways(packs, family, Path(folder)).items():
            model = packs.pack(family)
            before = logits(model)
            how, said, _ = attempt(partial(act, model))
            after = attempt(partial(logits, model))[2]
            is_same = after is not None and torch.equal(after, before)
            outcome = "equal" if how == "works" else how
            cases.append(case("other ways", family, what, "", outcome if is_same else "REFUSED, BUT CHANGED", said))
    return cases


def merge_cases(packs: Packs, family: str) -> list[dict[str, Any]]:
    cases = []
    for what in ("merge_and_unload", "merge_adapter", "unload"):
        config = LoraConfig(r=4, target_modules="all-linear")
        plain = packs.pack(family)
        unadapted = logits(plain)
        model = train(get_peft_model(plain, config))
        before = logits(model)
        how, said, result = attempt(getattr(model, what))
        if how == "works":
            how = "equal" if torch.equal(logits(result), unadapted) else "SILENTLY WRONG"
        elif not torch.equal(logits(model), before):
            how = "REFUSED, BUT CHANGED"
        cases.append(case("merging", family, what, "", how, said))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four families; nothing is written")
    parser.add_argument("--work", type=Path, help="folder for the tiny models; a temporary one, removed, by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    work = arguments.work or Path(tempfile.mkdtemp())
    packs = Packs(work)
    started_s = time.perf_counter()
    cases: list[dict[str, Any]] = []
    families = QUICK if arguments.quick else sorted(FAMILIES)
    for family in families:
        cases += adapter_cases(packs, family, None if family in ("llama", "opt", "gpt2") else {"lora on all-linear"})
        gc.collect()
    for family in ("llama", "opt", "mixtral"):
        cases += way_cases(packs, family)
        cases += merge_cases(packs, family) if family != "mixtral" else []
        gc.collect()
    if arguments.work is None:
        shutil.rmtree(work)
    report(cases, time.perf_counter() - started_s, is_kept=not arguments.quick)


def report(cases: list[dict[str, Any]], elapsed_s: float, *, is_kept: bool) -> None:
    outcomes = sorted({each["outcome"] for each in cases})
    table = {
        group: Counter(each["outcome"] for each in cases if each["group"] == group)
        for group in ("adapter", "merging", "other ways")
    }
    print(f"{'':12}" + "".join(f"{outcome:>26}" for outcome in outcomes))
    for group, counts in table.items():
        print(f"{group:12}" + "".join(f"{counts[outcome]:>26}" for outcome in outcomes))
    for each in cases:
        if each["outcome"] not in ("equal", "refused by name"):
            print(f"  {each['outcome']}: {each['family']}, {each['what']} {each['way']}: {each['said']}")
    wrong = [each for each in cases if each["outcome"].isupper()]
    print(f"{len(cases)} tries in {elapsed_s:.0f} s, {len(wrong)} silently wrong or changed by a refusal")
    if is_kept:
        document = {
            "benchmark": "reliability-adapters",
            "date": today(),
            "machine": describe_machine(),
            "commit": describe_commit(ROOT),
            "versions": {each.__name__: each.__version__ for each in (torch, transformers, peft, accelerate)},
            "elapsed_s": round(elapsed_s, 1),
            "num_tries": len(cases),
            "num_silently_wrong": sum(each["outcome"] == "SILENTLY WRONG" for each in cases),
            "num_changed_by_a_refusal": sum(each["outcome"] == "REFUSED, BUT CHANGED" for each in cases),
            "summary": {group: dict(counts) for group, counts in table.items()},
            "cases": cases,
        }
        RESULT.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
