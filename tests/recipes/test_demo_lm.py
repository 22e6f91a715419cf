"""The demo model's recipe on a text of a few hundred lines: resuming, checkpoints, schedule, perplexity, export."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "demo_lm"
sys.path.insert(0, str(RECIPE))

import train  # noqa: E402  (of the recipe, which is no package)
from demo_training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from demo_training.corpus import Windows, encode_documents, read_split  # noqa: E402
from demo_training.optimisers import iterate, iterate_on_gram, orthogonalise  # noqa: E402
from demo_training.perplexity import count_words, score_tokens, windows_over  # noqa: E402
from demo_training.progress import Progress  # noqa: E402
from demo_training.run import Process, Run, StopRequest  # noqa: E402
from demo_training.schedule import RunningClock, Schedule  # noqa: E402
from demo_training.settings import Settings  # noqa: E402

REMARK = "The ship sank twice."
TINY = Settings(
    vocab_size=512,
    hidden_size=32,
    ffn_size=64,
    num_layers=2,
    num_heads=2,
    context_length=32,
    batch_size=4,
    steps=8,
    decay_steps=3,
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["the", "ship", "was", "built", "in", "<unk>", "1910", ",", "and", "sank", "@-@", "é"]
    for split, num_lines in (("train", 300), ("valid", 20), ("test", 20)):
        lines = [" ".join(["", *rng.choices(words, k=12), "\n"]) for _ in range(num_lines)]
        lines[::50] = [f" = Ship {number} = \n" for number, _ in enumerate(lines[::50])]
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def make_run(data: Path, out: Path, settings: Settings = TINY) -> Run:
    process = Process(data=data, out=out, threads=2, bf16=False, max_minutes=None, checkpoint_minutes=60, eval_steps=4)
    return Run(settings, process, Progress(log_steps=100))


def test_run_resumed_after_a_stop_is_bit_identical(data: Path, tmp_path: Path) -> None:
    whole = make_run(data, tmp_path / "whole")
    assert whole.train(lambda: False)

    first = make_run(data, tmp_path / "parts")
    assert not first.train(lambda: first.step == 3)
    second = make_run(data, tmp_path / "parts")
    assert second.step == 3
    assert second.train(lambda: False)

    assert second.step == whole.step == TINY.steps
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name
    losses = [[record["loss"] for record in run.metrics.read()] for run in (whole, second)]
    assert losses[0] == losses[1]


def test_resume_with_fewer_steps_decays_from_where_it_is(data: Path, tmp_path: Path) -> None:
    first = make_run(data, tmp_path, Settings(**{**vars(TINY), "steps": 100}))
    assert not first.train(lambda: first.step == 5)
    second = make_run(data, tmp_path, Settings(**{**vars(TINY), "steps": 6}))
    assert second.train(lambda: False)
    assert [record["lr_factor"] for record in second.metrics.read()][5:] == [1.0, 0.6667, 0.3333]


def test_resume_with_another_model_size_is_refused(data: Path, tmp_path: Path) -> None:
    make_run(data, tmp_path).train(lambda: True)
    wider = Settings(**{**vars(TINY), "ffn_size": 128})
    with pytest.raises(ValueError, match="ffn_size is 128, but the checkpoint has 64"):
        make_run(data, tmp_path, wider)


def test_command_trains_and_exports_a_model_that_transformers_loads(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [word for name, value in vars(TINY).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert (
        train.main(["--data", str(data), "--out", str(tmp_path), "--precision", "fp32", "--remark", REMARK, *sizes])
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    folder = tmp_path / "model"

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    text = read_split(data, "test")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert record["test"]["num_tokens"] == len(tokenizer(text).input_ids)
    assert record["test"]["num_words"] == count_words(text) == len(text.replace("\n", " <eos> ").split())

    prompt = tokenizer(" The ship", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=16)[0]
    assert " <unk>" not in tokenizer.decode(written)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{record['test']['perplexity_per_word']:.1f}" in card
    assert REMARK in card
    assert str(tmp_path) not in "".join(p.read_text(encoding="utf-8") for p in folder.glob("*.[jm]*[nd]"))


def test_command_refuses_a_folder_without_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    assert "lacks train.txt, valid.txt, test.txt" in capsys.readouterr().err


def test_stop_request_remembers_sigterm_and_restores_the_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_checkpoint_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": lambda: 2})
    assert load_checkpoint(path) == {"step": 1}


def test_schedule_warms_up_holds_and_decays_to_zero_in_its_last_steps() -> None:
    schedule = Schedule(steps=10, decay_steps=4, warmup_steps=2)
    factors = [schedule.factor(step, RunningClock()) for step in range(11)]
    assert factors == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


def test_schedule_ends_at_its_time_limit_when_steps_are_slow() -> None:
    schedule = Schedule(steps=1000, decay_steps=10, warmup_steps=1, max_s=100.0)
    clock = RunningClock()
    step = 0
    while schedule.factor(step, clock) > 0:
        clock.add(2.0 if step < 30 else 4.0)
        step += 1
    assert schedule.decay_start is not None
    assert 100.0 <= clock.seconds <= 104.0


def test_clock_counts_a_pause_as_one_ordinary_step() -> None:
    clock = RunningClock()
    for step_s in (1.0, 1.0, 1.0, 1.0, 1.0, 500.0, 1.0):
        clock.add(step_s)
    assert clock.seconds == 7.0


def test_windows_cover_an_epoch_without_repeating() -> None:
    ids = torch.arange(1000)
    windows = Windows(ids, length=10, seed=0)
    inputs, targets = windows.batch(0, windows.num_windows)
    assert torch.equal(inputs + 1, targets)
    assert inputs.unique().numel() == inputs.numel()
    again, _ = windows.batch(windows.num_windows, windows.num_windows)
    assert not torch.equal(inputs, again)


@pytest.mark.parametrize(("num_tokens", "overlap"), [(5, 0), (8, 3), (9, 3), (100, 0), (100, 7)])
def test_windows_over_a_text_score_every_token_once(num_tokens: int, overlap: int) -> None:
    windows = windows_over(num_tokens, length=8, overlap=overlap)
    scored = [token for w in windows for token in range(w.begin + w.num_context, w.end)]
    assert scored == list(range(num_tokens))
    assert all(w.end - w.begin <= 8 for w in windows)


def test_score_of_a_short_text_is_the_loss_of_transformers(data: Path, tmp_path: Path) -> None:
    run = make_run(data, tmp_path)
    ids = encode_documents(run.tokenizer, read_split(data, "valid"))[1:21]
    mark = run.tokenizer.bos_token_id
    labels = torch.cat([torch.tensor([mark]), ids])[None]
    with torch.inference_mode():
        expected = run.model(labels, labels=labels).loss.item() * ids.numel()
    assert score_tokens(run.model, ids, mark, overlap=4) == pytest.approx(expected, rel=1e-5)


def test_orthogonalise_brings_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((16, 16), (16, 64), (64, 16)):
        singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert singular.min() > 0.5
        assert singular.max() < 1.3


def test_iteration_on_gram_agrees_with_the_plain_one() -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    x = x / x.norm()
    # Five products of 16 terms each, every one amplified by at most 3.4 per iteration.
    tolerance = 5 * 16 * torch.finfo(torch.float32).eps * 3.4445
    assert torch.allclose(iterate_on_gram(x), iterate(x), rtol=0, atol=tolerance)
