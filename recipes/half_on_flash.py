"""What the demos do: convert a model, and generate from it with half of its streamed weights in memory, half on flash.

The cap is what a process like this one needs at least, plus half of the streamed bytes: the other half is read from flash
for every token (pinning is bounded too: what a process weighs varies by more than a small model).
What `flashlm convert` and `flashlm generate --stats` do, in one process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from flashlm.cli import console
from flashlm.conversion.convert import convert
from flashlm.engine.generate import Sampling, generate
from flashlm.memory.smallest import smallest_dram_bytes
from flashlm.pack.manifest import read_manifest
from flashlm.sizes import format_size

CONTEXT = 256


def run(source: Path, prompt: str, work: Path | None, sampling: Sampling, *, is_chat: bool = False) -> None:
    """Convert, plan a cap, generate, and print text and statistics.

    Args:
        source: A model folder or GGUF file.
        prompt: Text to continue, or with `is_chat` a question.
        work: Folder for the pack; None takes a temporary one, removed at the end.
        sampling: How tokens are chosen.
        is_chat: Put the prompt through the model's chat template.
    """
    if work is None:
        with tempfile.TemporaryDirectory(prefix="flashlm-demo-") as folder:
            run(source, prompt, Path(folder), sampling, is_chat=is_chat)
        return
    pack = work / "demo-pack"
    console.note(
        f"converting {source.relative_to(Path.cwd()) if source.is_relative_to(Path.cwd()) else source} to {pack}"
    )
    with console.progress_bar() as progress:
        convert(source, pack, progress=progress)
    streamed_bytes = read_manifest(pack).streamed_bytes
    half_bytes = streamed_bytes // 2
    dram_bytes = smallest_dram_bytes(pack, CONTEXT) + half_bytes
    console.note(f"half of {format_size(streamed_bytes)} may be pinned under dram {format_size(dram_bytes)}")
    print(f"> {prompt}\n" if is_chat else prompt, end="", flush=True)
    result = generate(
        pack,
        prompt,
        is_chat=is_chat,
        dram=dram_bytes,
        context=CONTEXT,
        pin=half_bytes,
        sampling=sampling,
        on_loaded=lambda flash: console.note(flash.describe()),
        on_text=lambda text: print(text, end="", flush=True),
    )
    print("\n")
    console.print_table(console.stats_rows(result.stats), title="statistics")
