"""The model card: what was trained, on what, how well it does, and what it is not for."""

from __future__ import annotations

from typing import Any

CARD = """\
---
license: {licence}
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [opt, demo]
---

# A small OPT demo model

A decoder of the OPT architecture with {millions:.1f} M parameters (embeddings tied), trained from random weights on
{data_name}, so that flashlm can be tried on real text without a download. `{command}` makes it.

| | |
|---|---|
| layers, hidden size, FFN neurons per layer, heads | {num_layers}, {hidden_size}, {ffn_size}, {num_heads} |
| positions | {context_length} |
| activation | ReLU |
| tokenizer | byte-level BPE, {vocab_size} entries, trained on the same text |
| weights | bfloat16, safetensors |

## Training

| | |
|---|---|
| data | {data_name}, training split |
| steps | {steps}, the learning rate falling from step {decay_start_step} on |
| tokens seen | {tokens_seen:,} ({epochs:.2f} epochs) |
| optimiser, peak learning rate | Muon (matrices in layers), {muon_lr}; AdamW (the rest), {adam_lr} |
| precision | {precision} |
| machine | {machine} |
| training time | {training_minutes:.0f} minutes, evaluation and pauses not counted |

{remark}{curve}
## Perplexity

Of the exported bfloat16 weights, computed in float32. Every token is scored once. The text follows one `</s>`; windows are
{context_length} tokens long and overlap, so that every token sees at least {overlap} tokens before it (fewer only at the
text's very beginning). Per word: the same total, divided by blank-separated words plus one end of line per line.

| split | tokens | perplexity per token | words | perplexity per word |
|---|---|---|---|---|
{rows}

Share of FFN neurons above zero after ReLU, layer by layer, on validation text: {activity}.

## Use and limits

For demonstrations and tests of inference software. It writes text that looks like an encyclopaedia and means nothing: names,
dates and claims are made up. Sample from it, as its generation settings do: greedy decoding soon repeats itself. It has
seen one small English corpus and no instructions, code or dialogue; biases of the text are its own. Begin a prompt with a
space and write punctuation as the corpus does (` The ship was built in 1910 , and`).
{unknown}
## Licence

The training text is under {licence}; the weights are offered under the same terms.
"""

CURVE = "![Loss over tokens](loss.png)\n"
UNKNOWN = """The corpus' unknown-word mark `<unk>` is a single token; `generation_config.json` keeps it from being generated.
"""
COMMAND = "python recipes/demo_lm/train.py --data DIR --out DIR"


def write_card(record: dict[str, Any]) -> str:
    """Return the model card for what `export` recorded, as Markdown with front matter."""
    rows = [
        f"| {split} | {record[split]['num_tokens']:,} | {record[split]['perplexity_per_token']:.1f} "
        f"| {record[split]['num_words']:,} | {record[split]['perplexity_per_word']:.1f} |"
        for split in ("valid", "test")
    ]
    texts = {
        "millions": record["num_parameters"] / 1e6,
        "rows": "\n".join(rows),
        "activity": ", ".join(f"{fraction:.1%}" for fraction in record["active_neurons"]),
        "remark": f"{record['remark']}\n\n" if record["remark"] else "",
        "curve": CURVE if record["has_loss_curve"] else "",
        "unknown": UNKNOWN if record["suppresses_unknown"] else "",
        "command": COMMAND,
    }
    return CARD.format(**(record["settings"] | record | texts))
