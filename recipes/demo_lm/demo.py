"""The main job on real input: convert the demo model and generate from it under a cap that holds half of its FFN.

    python recipes/demo_lm/demo.py [--prompt TEXT] [--work DIR]

`recipes/half_on_flash.py` says how.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import half_on_flash

from flashlm.cli import console
from flashlm.engine.generate import Sampling
from flashlm.errors import FlashError

MODEL = Path(__file__).parent / "model"
PROMPT = " The ship was built in"
SAMPLING = Sampling(max_new_tokens=96, temperature=0.8, top_k=50, seed=1)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--work", type=Path, help="folder for the pack (default: a temporary one, removed at the end)")
    return parser.parse_args()


def main() -> int:
    """Run the demo in the asked or a temporary folder."""
    options = arguments()
    try:
        half_on_flash.run(MODEL, options.prompt, options.work, SAMPLING)
    except FlashError as error:
        console.note(f"flashlm: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
