"""Train a small OPT language model on a folder of text, on a CPU, in under two hours.

    python recipes/demo_lm/train.py --data DIR --out DIR

The data folder holds train.txt, valid.txt and test.txt. Progress is kept in the out folder: stop it with Ctrl-C or SIGTERM,
run the same command again, and it goes on. At the end OUT/model is a Hugging Face model folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from demo_training.corpus import SPLITS
from demo_training.export import Provenance, export
from demo_training.gradients import has_fast_bf16, keep_freed_memory
from demo_training.progress import Progress
from demo_training.run import Process, Run, StopRequest
from demo_training.settings import Settings

EXIT_INTERRUPTED = 130


def make_parser() -> argparse.ArgumentParser:
    """Build the command line: paths, limits, and one option per field of `Settings`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.txt, valid.txt and test.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, metrics and model")
    parser.add_argument("--data-name", default="a text without a name", help="for the model card")
    parser.add_argument("--licence", default="other", help="the text's licence, for the model card (cc-by-sa-3.0, ...)")
    parser.add_argument("--remark", default="", help="a sentence on how the training went, for the model card")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bf16 where the CPU multiplies it natively (AVX-512-BF16, AMX), else fp32",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; they divide the batch (default: 2)")
    parser.add_argument(
        "--max-minutes", type=float, help="training time by which the decay has ended (default: no limit)"
    )
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0, help="time between checkpoints (default: 3)")
    parser.add_argument(
        "--log-steps", type=int, default=10, help="steps between log lines off a terminal (default: 10)"
    )
    parser.add_argument("--eval-steps", type=int, default=200, help="steps between validations (default: 200)")
    group = parser.add_argument_group("what is learned (demo_training/settings.py explains each)")
    for field in fields(Settings):
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"default: {field.default}",
        )
    return parser


def read_settings(options: argparse.Namespace) -> Settings:
    """Return the settings that the options ask for; ValueError names what is wrong with them."""
    missing = [f"{split}.txt" for split in SPLITS if not (options.data / f"{split}.txt").is_file()]
    if missing:
        raise ValueError(f"{options.data} lacks {', '.join(missing)}")
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    if options.threads < 1 or settings.batch_size % options.threads:
        raise ValueError(f"--threads is {options.threads}; it must divide the batch of {settings.batch_size}")
    return settings


def train(options: argparse.Namespace, settings: Settings) -> int:
    """Train to the end of the schedule and export; return the exit code."""
    bf16 = options.precision == "bf16" or (options.precision == "auto" and has_fast_bf16())
    process = Process(
        data=options.data,
        out=options.out,
        threads=options.threads,
        bf16=bf16,
        max_minutes=options.max_minutes,
        checkpoint_minutes=options.checkpoint_minutes,
        eval_steps=options.eval_steps,
    )
    progress = Progress(options.log_steps)
    progress.note(f"writing checkpoints (80 MB at the default size) and the model to {options.out}")
    with StopRequest() as should_stop:
        run = Run(settings, process, progress)
        if not run.train(should_stop):
            progress.note(f"stopped at step {run.step}; the same command goes on from there")
            return EXIT_INTERRUPTED
    progress.note("exporting, and measuring perplexity")
    folder = options.out / "model"
    provenance = Provenance(data_name=options.data_name, licence=options.licence, remark=options.remark)
    precision = "bf16 autocast" if bf16 else "fp32"
    record = export(run, folder, options.data, precision=precision, threads=options.threads, provenance=provenance)
    print(json.dumps(record))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 done, 2 wrong usage, 130 interrupted."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        return train(options, read_settings(options))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    # For the whole process, so not in `main`, which tests call.
    keep_freed_memory()
    torch.set_flush_denormal(True)
    sys.exit(main())
