"""The best model of a run: a transformers folder, whose weights are replaced in one go."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from flashlm.errors import PackError
from flashlm.pru.language_model import PRUForCausalLM
from flashlm.pru.training.encoding import Encoding, load_encoding

BEST = "best"
_WEIGHTS = "model.safetensors"


def save_best(model: PRUForCausalLM, encoding: Encoding, out: Path, metadata: dict[str, str]) -> None:
    """Write the model with its vocabulary into OUT/best; a model that is there is replaced.

    Args:
        model: What to save; the tied softmax is stored once.
        encoding: Its vocabulary.
        out: The run's folder.
        metadata: For the weights file's header.
    """
    folder = out / BEST
    if not (folder / "config.json").exists():
        folder.mkdir(exist_ok=True)
        encoding.save(folder)
        model.config.save_pretrained(folder)
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != "decoder.weight"}
    draft = folder / (_WEIGHTS + ".tmp")
    save_file(weights, draft, {"format": "pt", **metadata})
    draft.replace(folder / _WEIGHTS)


def load_model(folder: Path) -> PRUForCausalLM:
    """Load a run's best model, or a saved model, in eval mode.

    Raises:
        PackError: There is none, or it is damaged.
    """
    place = _place(folder)
    try:
        model, found = PRUForCausalLM.from_pretrained(place, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise PackError(f"the model in {place} can't be loaded: {error}") from error
    for what, names in (("has no", found["missing_keys"]), ("has an unknown", found["unexpected_keys"])):
        for name in sorted(names):  # transformers would draw the one anew, leave the other out, and go on
            raise PackError(f"the model in {place} {what} {name}: the file is not of this configuration, or damaged")
    model.eval()
    loaded: PRUForCausalLM = model
    return loaded


def load_with_encoding(folder: Path) -> tuple[PRUForCausalLM, Encoding]:
    """Load a model as `load_model` does, and its vocabulary.

    Raises:
        PackError: One is missing or damaged, or they do not belong together.
    """
    model, encoding = load_model(folder), load_encoding(_place(folder))
    if model.config.vocab_size != encoding.vocab_size:
        raise PackError(
            f"{folder}: the model has {model.config.vocab_size} words and the vocabulary {encoding.vocab_size};"
            " they are not of one run"
        )
    return model, encoding


def fingerprint(model: PRUForCausalLM) -> str:
    """Return a digest of the weights."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _place(folder: Path) -> Path:
    place = folder / BEST if (folder / BEST).is_dir() else folder
    if not (place / _WEIGHTS).is_file():
        raise PackError(f"{folder} has no model: expected {_WEIGHTS}, or a run's {BEST}/ with one")
    return place
