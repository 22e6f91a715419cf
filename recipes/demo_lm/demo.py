"""The main job on real input: convert the demo model and generate from it under a cap that holds half of its FFN.

    python recipes/demo_lm/demo.py [--prompt TEXT] [--work DIR]

The cap is what a process like this one needs at least, plus half of the streamed bytes: the other half is read from flash
for every token (pinning is bounded too: what a process weighs varies by more than this small model).
What `flashlm convert` and `flashlm generate --stats` do, in one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from flashlm.cli import console
from flashlm.conversion.convert import convert
from flashlm.engine.generate import Sampling, generate
from flashlm.errors import FlashError
from flashlm.memory.smallest import smallest_dram_bytes
from flashlm.pack.manifest import read_manifest
from flashlm.sizes import format_size

MODEL = Path(__file__).parent / "model"
PROMPT = " The ship was built in"
CONTEXT = 256
NUM_NEW_TOKENS = 96


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--work", type=Path, help="folder for the pack (default: a temporary one, removed at the end)")
    return parser.parse_args()


def run(prompt: str, work: Path) -> None:
    """Convert, plan a cap, generate, and print text and statistics."""
    pack = work / "demo-pack"
    console.note(f"converting {MODEL.relative_to(Path.cwd()) if MODEL.is_relative_to(Path.cwd()) else MODEL} to {pack}")
    with console.progress_bar() as progress:
        convert(MODEL, pack, progress=progress)
    streamed_bytes = read_manifest(pack).streamed_bytes
    half_bytes = streamed_bytes // 2
    dram_bytes = smallest_dram_bytes(pack, CONTEXT) + half_bytes
    console.note(f"FFN {format_size(streamed_bytes)}; half of it may be pinned under dram {format_size(dram_bytes)}")
    sys.stdout.write(prompt)
    sys.stdout.flush()
    result = generate(
        pack,
        prompt,
        dram=dram_bytes,
        context=CONTEXT,
        pin=half_bytes,  # what a process weighs differs by more than this model's FFN
        sampling=Sampling(max_new_tokens=NUM_NEW_TOKENS, temperature=0.8, top_k=50, seed=1),
        on_loaded=lambda flash: console.note(flash.describe()),
        on_text=lambda text: print(text, end="", flush=True),
    )
    print("\n")
    console.print_table(console.stats_rows(result.stats), title="statistics")


def main() -> int:
    """Run the demo in the asked or a temporary folder."""
    options = arguments()
    try:
        if options.work is not None:
            run(options.prompt, options.work)
        else:
            with tempfile.TemporaryDirectory(prefix="flashlm-demo-") as folder:
                run(options.prompt, Path(folder))
    except FlashError as error:
        console.note(f"flashlm: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
