"""The loop: what it does to the learning rate, when it averages, and that no kill changes the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from flashlm.errors import ConfigError, PackError, StorageError, TrainingError
from flashlm.pru import PRUForCausalLM
from flashlm.pru.training.corpus import Corpus, read_corpus
from flashlm.pru.training.trainer import Trainer
from tests.pru.training.conftest import small_recipe


class KilledError(Exception):
    """Stands for a kill: nothing is saved on the way out."""


def killed_after(num_calls: int) -> Any:
    left = [num_calls]

    def progress(done: int, total: int, what: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KilledError

    return progress


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


@pytest.mark.parametrize(("preset", "arch"), [("standard", "pru"), ("awd", "pru"), ("awd", "lstm")])
def test_a_run_killed_many_times_equals_one_in_one_go_to_the_bit(
    corpus: Corpus, tmp_path: Path, preset: str, arch: str
) -> None:
    recipe = small_recipe(preset, arch, nonmono=0, lr=30.0, epochs=4)
    whole = Trainer(corpus, recipe, tmp_path / "whole", log_every=5)
    whole.run()
    assert whole.optimiser.is_averaging  # so that the mean was in the checkpoints too
    for every in range(5, 60):
        torch.manual_seed(every)  # what another process would start from
        try:
            part = Trainer(
                corpus, recipe, tmp_path / "part", log_every=5, checkpoint_every_s=0, on_progress=killed_after(every)
            )
            part.run()
            break
        except KilledError:
            continue
    assert part.progress.epoch == 5
    assert every > 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name]), name
    assert whole.optimiser.averages is not None
    assert part.optimiser.averages is not None
    assert all(torch.equal(a, b) for a, b in zip(whole.optimiser.averages, part.optimiser.averages, strict=True))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "part")
    best = [load_file(tmp_path / name / "best" / "model.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(value, best[1][name]) for name, value in best[0].items())


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_the_metrics_of_a_killed_run(corpus: Corpus, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = small_recipe(epochs=2)
    options = {"log_every": 1, "checkpoint_every_s": 0, "has_tensorboard": True}
    for num_steps in (7, 12):  # killed between a report and its checkpoint, so that the report is made again
        with pytest.raises(KilledError):
            Trainer(corpus, recipe, tmp_path, on_progress=killed_after(num_steps), **options).run()
    Trainer(corpus, recipe, tmp_path, **options).run()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for kind, name in (("train", "loss"), ("train", "lr"), ("valid", "perplexity")):
        shown = [(event.step, event.value) for event in board.Scalars(f"{kind}/{name}")]
        assert shown == [(row["step"], pytest.approx(row[name])) for row in rows if row["kind"] == kind]


def test_training_learns(corpus: Corpus, tmp_path: Path) -> None:
    recipe = small_recipe(dropout=0.0, dropouth=0.0, dropouti=0.0, alpha=0.0, beta=0.0, clip=1.0, lr=5.0, epochs=8)
    recipe = replace(recipe, model={**recipe.model, "num_layers": 1, "embedding_size": 16})
    Trainer(corpus, recipe, tmp_path).run()
    valid = [row["perplexity"] for row in metrics(tmp_path) if row["kind"] == "valid"]
    assert valid[0] > 15  # of 21 words
    assert min(valid) < 6  # each word has two successors, and lines end at random


def test_bf16_products_leave_the_weights_in_fp32(corpus: Corpus, tmp_path: Path) -> None:
    trainer = Trainer(corpus, small_recipe("awd", precision="bf16", epochs=1), tmp_path, device="cpu")
    trainer.run()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    whole = Trainer(corpus, small_recipe("awd", epochs=1), tmp_path / "fp32", device="cpu")
    whole.run()
    losses = [run.progress.valid_losses[0] for run in (trainer, whole)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


def test_a_text_too_short_to_train_on_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each column needs at least 3"):
        Trainer(corpus, small_recipe(batch_size=len(corpus.ids["train"]) // 2), tmp_path)


def test_the_best_model_is_a_transformers_model_that_generates(corpus: Corpus, tmp_path: Path) -> None:
    Trainer(corpus, small_recipe(epochs=1), tmp_path).run()
    model = PRUForCausalLM.from_pretrained(tmp_path / "best")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "best")
    tokens = torch.tensor([tokenizer("w1 w4").input_ids])
    assert model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 2
    assert model.decoder.weight is model.embedding.weight


def test_the_learning_rate_follows_the_windows_length(corpus: Corpus, tmp_path: Path) -> None:
    Trainer(corpus, small_recipe(epochs=1), tmp_path, log_every=1).run()
    rows = [row for row in metrics(tmp_path) if row["kind"] == "train"]
    assert len({row["window"] for row in rows}) > 3
    assert all(row["lr"] == pytest.approx(10.0 * row["window"] / 12) for row in rows)


@pytest.mark.parametrize(
    ("before", "loss", "starts"),
    [
        ([5.0, 4.0], 6.0, False),  # not more than nonmono epochs yet
        ([4.0, 5.0, 5.0], 4.5, True),  # above the best but for the last two
        ([5.0, 4.0, 4.0], 4.5, False),  # the last two do not count
        ([5.0, 4.0, 4.0], 5.5, True),
    ],
)
def test_averaging_starts_by_the_history_without_its_end(
    corpus: Corpus, tmp_path: Path, before: list[float], loss: float, starts: bool
) -> None:
    trainer = Trainer(corpus, small_recipe(nonmono=2), tmp_path)
    trainer.progress.valid_losses = before
    trainer._decide(loss)
    assert trainer.optimiser.is_averaging is starts


def test_fine_tuning_starts_from_the_best_and_keeps_it_until_beaten(corpus: Corpus, tmp_path: Path) -> None:
    first = Trainer(corpus, small_recipe("awd"), tmp_path / "first").run()
    recipe = small_recipe("awd-finetune", epochs=40, nonmono=1, lr=1e-9)
    tuning = Trainer(corpus, recipe, tmp_path / "tuned", start=tmp_path / "first")
    assert tuning.optimiser.is_averaging
    assert tuning.progress.best_loss == pytest.approx(first.best_loss, rel=1e-6)
    began = load_file(tmp_path / "tuned" / "best" / "model.safetensors")
    for name, value in load_file(tmp_path / "first" / "best" / "model.safetensors").items():
        assert torch.equal(value, began[name])
    hurting = small_recipe("awd-finetune", epochs=40, nonmono=1, lr=300.0)
    reached = Trainer(corpus, hurting, tmp_path / "hurt", start=tmp_path / "first").run()
    assert reached.is_done
    assert reached.epoch < 41
    with pytest.raises(ConfigError, match="training start is"):
        Trainer(
            corpus,
            recipe,
            tmp_path / "tuned",
            start=tmp_path / "hurt" if reached.best_loss != first.best_loss else None,
        )
    with pytest.raises(ConfigError, match=r"model to start from is another one: setting arch is 'pru' there"):
        Trainer(corpus, small_recipe("awd-finetune", "lstm"), tmp_path / "other", start=tmp_path / "first")


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    trainer = Trainer(corpus, small_recipe(epochs=2), tmp_path)
    trainer.run(until_epoch=1)
    with torch.no_grad():
        trainer.model.decoder.bias[3] = float("nan")
    steps = trainer.progress.step
    with pytest.raises(
        TrainingError, match=rf"step {steps + 1} \(epoch 2\): the loss is nan; the last good checkpoint"
    ):
        trainer.run()
    again = Trainer(corpus, small_recipe(epochs=2), tmp_path)
    assert again.progress.step == steps
    assert all(torch.isfinite(parameter).all() for parameter in again.model.parameters())
    assert again.run().epoch == 3


def test_a_folder_of_another_configuration_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    Trainer(corpus, small_recipe(), tmp_path).run(until_epoch=1)
    with pytest.raises(ConfigError, match=r"training dropout is 0.4 there and 0.5 here"):
        Trainer(corpus, small_recipe(dropout=0.5), tmp_path)
    with pytest.raises(ConfigError, match=r"model arch is 'pru' there and 'lstm' here"):
        Trainer(corpus, small_recipe(arch="lstm"), tmp_path)
    assert Trainer(corpus, small_recipe(epochs=9), tmp_path).progress.epoch == 2  # longer is no other run


def test_resuming_with_other_data_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    Trainer(corpus, small_recipe(), tmp_path / "run").run(until_epoch=1)
    other = tmp_path / "text"
    other.mkdir()
    for split in ("train", "valid", "test"):
        text = (corpus.folder / f"{split}.txt").read_text()
        (other / f"{split}.txt").write_text(text if split != "valid" else text + "w1\n")
    with pytest.raises(ConfigError, match="corpus fingerprint is"):
        Trainer(read_corpus(other), small_recipe(), tmp_path / "run")


def test_the_same_data_elsewhere_is_accepted(corpus: Corpus, tmp_path: Path) -> None:
    Trainer(corpus, small_recipe(), tmp_path / "run").run(until_epoch=1)
    moved = tmp_path / "text"
    moved.mkdir()
    for split in ("train", "valid", "test"):
        (moved / f"{split}.txt").write_bytes((corpus.folder / f"{split}.txt").read_bytes())
    assert Trainer(read_corpus(moved), small_recipe(), tmp_path / "run").progress.epoch == 2


@pytest.mark.parametrize("name", ["progress.json", "weights.safetensors", "rank-0.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 40, None])
def test_a_damaged_checkpoint_is_refused(corpus: Corpus, tmp_path: Path, name: str, content: bytes | None) -> None:
    trainer = Trainer(corpus, small_recipe(), tmp_path)
    file = trainer.save() / name
    if content is None:
        file.write_bytes(file.read_bytes()[:-3])
    else:
        file.write_bytes(content)
    with pytest.raises(PackError, match="damaged"):
        Trainer(corpus, small_recipe(), tmp_path)


def test_a_draft_of_a_checkpoint_is_not_taken(corpus: Corpus, tmp_path: Path) -> None:
    place = Trainer(corpus, small_recipe(), tmp_path).save()
    (place.parent / "step-999999999-00001-000000000.tmp").mkdir()
    trainer = Trainer(corpus, small_recipe(), tmp_path)
    assert trainer.progress.step == 0
    trainer.save()
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(corpus: Corpus, tmp_path: Path) -> None:
    trainer = Trainer(corpus, small_recipe(), tmp_path)
    place = trainer.save()
    trainer.progress.step = 1
    (place.parent / "step-000000001-00001-000000000.tmp").write_text("in the way")
    with pytest.raises(StorageError, match="can't be written"):
        trainer.save()
    assert place.is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_a_good_checkpoint(text_folder: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    options = ["epochs=100000", "hidden_size=16", "embedding_size=8", "groups=2", "bptt=12", "batch_size=4"]
    command = [
        sys.executable,
        "-m",
        "flashlm",
        "pru",
        "train",
        "--data",
        str(text_folder),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    command += ["--log-every", "1", "--checkpoint-every-s", "0.01"] + [
        part for option in options for part in ("--set", option)
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    lines = []
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if line.startswith("epoch 2:"):
                process.send_signal(number)
        code = process.wait(timeout=60)
    assert code == (130 if number == signal.SIGINT else -number), "".join(lines)
    if number != signal.SIGKILL:
        assert any("interrupted at step" in line for line in lines)
    corpus = read_corpus(text_folder)
    recipe = small_recipe()
    from flashlm.pru.training.settings import assigned, make_recipe

    recipe = make_recipe(None, None, *assigned(options))
    trainer = Trainer(corpus, recipe, out)
    assert trainer.progress.epoch >= 2
    assert trainer.progress.step > 20
    trainer.run(until_epoch=trainer.progress.epoch)
