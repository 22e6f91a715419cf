"""From a finished run to a model folder: bfloat16 weights, tokenizer, generation settings, and what was measured on them."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from demo_training.activity import active_fractions
from demo_training.card import write_card
from demo_training.corpus import encode, read_split
from demo_training.loss_curve import draw_loss_curve
from demo_training.perplexity import Perplexity, count_words, score_tokens
from demo_training.run import Run

OVERLAP = 256
"""Context that every scored token has at least, where the model has more positions than that."""
NUM_ACTIVITY_TOKENS = 16384
"""Validation tokens over which active neurons are counted."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the model card must say and the run cannot know."""

    data_name: str
    """Name of the training text."""
    licence: str
    """Licence of the training text, as an identifier that model cards use."""
    remark: str = ""
    """What else a reader should know of the training, such as settings changed on the way."""


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Return sampling defaults for a small model, which would repeat itself without the two brakes on repetition.

    The corpus' unknown-word mark is never generated.
    """
    unknown = [index for token, index in tokenizer.get_vocab().items() if token.removeprefix("Ġ") == "<unk>"]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_k=50,
        top_p=0.95,
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        max_new_tokens=128,
        suppress_tokens=sorted(unknown) or None,
    )


def write_weights(run: Run, folder: Path) -> None:
    """Write weights in bfloat16, configuration, tokenizer and generation settings to `folder`."""
    model = run.model.to(torch.bfloat16)
    model.generation_config = generation_config(run.tokenizer)
    model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def measure(folder: Path, data: Path) -> dict[str, object]:
    """Measure the exported model: perplexity of valid and test, and active neurons.

    The bfloat16 weights are multiplied in float32, so the figures do not depend on the CPU's bfloat16.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    overlap = min(OVERLAP, model.config.max_position_embeddings // 2)
    figures: dict[str, object] = {"overlap": overlap}
    for split in ("valid", "test"):
        text = read_split(data, split)
        ids = encode(tokenizer, text)
        nll_nats = score_tokens(model, ids, tokenizer.bos_token_id, overlap)
        result = Perplexity(nll_nats=nll_nats, num_tokens=ids.numel(), num_words=count_words(text))
        figures[split] = asdict(result) | {
            "perplexity_per_token": round(result.per_token, 3),
            "perplexity_per_word": round(result.per_word, 3),
        }
        if split == "valid":
            fractions = active_fractions(model, ids[:NUM_ACTIVITY_TOKENS])
            figures["active_neurons"] = [round(fraction, 4) for fraction in fractions]
    return figures


def export(
    run: Run, folder: Path, data: Path, *, precision: str, threads: int, provenance: Provenance
) -> dict[str, object]:
    """Write the model folder and return the record that it keeps as training.json."""
    write_weights(run, folder)
    record = asdict(provenance) | {
        "num_parameters": sum(param.numel() for param in run.model.parameters()),
        "steps": run.step,
        "decay_start_step": run.schedule.decay_start,
        "tokens_seen": run.num_tokens_seen,
        "epochs": round(run.num_epochs, 3),
        "training_minutes": round(run.clock.seconds / 60, 1),
        "precision": precision,
        "machine": f"{threads} threads, {platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}",
        "settings": asdict(run.settings),
        "suppresses_unknown": run.model.generation_config.suppress_tokens is not None,
        **measure(folder, data),
    }
    record["has_loss_curve"] = draw_loss_curve(run.metrics.read(), folder / "loss.png")
    _write(folder / "training.json", json.dumps(record, indent=2) + "\n")
    _write(folder / "README.md", write_card(record))
    return record


def _write(path: Path, text: str) -> None:
    sibling = path.with_name(path.name + ".tmp")
    sibling.write_text(text, encoding="utf-8")
    sibling.replace(path)
