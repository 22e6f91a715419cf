"""What `flashlm pru eval` reports: a saved model on a split of a folder of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashlm.errors import ConfigError, PackError
from flashlm.pru.language_model import PRUForCausalLM
from flashlm.pru.training.corpus import SPLITS, split_file
from flashlm.pru.training.encoding import UNKNOWN, WordEncoding, read_lines
from flashlm.pru.training.evaluate import score
from flashlm.pru.training.processes import Processes


def evaluate_folder(
    folder: Path, data: Path, *, split: str = "test", batch_size: int = 1, device: str = "auto"
) -> dict[str, Any]:
    """Score a split with a saved model.

    Args:
        folder: A run's folder, whose best model is taken, or a saved model's.
        data: Folder of text.
        split: train, valid or test.
        batch_size: Columns.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: The text can't be read or encoded.
        PackError: The folder has no model.
    """
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    model, encoding = load_model(folder)
    path = split_file(data, split)
    lines = read_lines(path)
    ids = encoding.encode(lines, str(path))
    num_unknown = encoding.count_unknown(lines)
    result = score(model.to(Processes(device).device), ids, batch_size=batch_size)
    return {
        "text": str(path),
        "num_tokens": result.num_tokens,
        "batch_size": batch_size,
        "perplexity": result.perplexity,
        "loss": result.loss,
        "published_perplexity": result.published_perplexity,
        f"words_read_as_{UNKNOWN}": num_unknown,
    }


def load_model(folder: Path) -> tuple[PRUForCausalLM, WordEncoding]:
    """Load a run's best model, or a saved model, with its vocabulary.

    Raises:
        PackError: There is none, or it is damaged.
    """
    place = folder / "best" if (folder / "best").is_dir() else folder
    if not (place / "model.safetensors").is_file():
        raise PackError(f"{folder} has no model: expected model.safetensors or a run's best/ with one")
    encoding = WordEncoding.load(place)
    try:
        model = PRUForCausalLM.from_pretrained(place)
    except (OSError, ValueError, RuntimeError) as error:
        raise PackError(f"the model in {place} can't be loaded: {error}") from error
    return model.eval(), encoding
