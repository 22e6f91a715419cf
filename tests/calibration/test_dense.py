"""`calibrate` end to end on tiny random models: what it writes, refuses, resumes and reports."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flashlm
from flashlm.calibration import dense as module
from flashlm.calibration.capture import MIN_WINDOW_TOKENS, MIN_WINDOWS, CalibrationText, masked, streamed_layers
from flashlm.calibration.dense import calibrate
from flashlm.calibration.error_budget import Rise, largest_passing, search_levels
from flashlm.calibration.store import PARTIAL_NAME
from flashlm.cli.app import main
from flashlm.errors import ConfigError, PackError
from flashlm.pack.manifest import FLASH_DIR, read_manifest
from flashlm.sparsity.calibration_document import document_path, read_sparsity, read_tensors, tensors_path
from flashlm.sparsity.predictor import load_predictor
from tests.engine.conftest import NUM_TEXT_TOKENS as NUM_TOKENS
from tests.engine.conftest import TinyPack, save_tokenizer

DRAM = "3GiB"


@pytest.fixture
def packs(tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> Callable[..., Path]:
    """Copies of tiny packs, with a tokenizer."""

    def make(family: str, name: str = "pack") -> Path:
        pack = tmp_path / f"{family}-{name}"
        shutil.copytree(tiny_pack(family, "float32").pack, pack)
        save_tokenizer(pack)
        return pack

    return make


def _written(pack: Path) -> tuple[bytes, bytes]:
    return document_path(pack).read_bytes(), tensors_path(pack).read_bytes()


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_what_is_stored_is_what_was_measured(family: str, packs: Callable[..., Path], text: Path) -> None:
    pack = packs(family)
    report = calibrate(pack, text, rank=8, dram=DRAM, max_ppl_increase=0.02)
    manifest = read_manifest(pack)
    sparsity = read_sparsity(pack, manifest)
    assert sparsity is not None
    assert sparsity.evaluation == report.evaluation
    assert not (pack / FLASH_DIR / PARTIAL_NAME).exists()
    tensors = read_tensors(pack, sparsity)
    model = flashlm.load(pack, dram=DRAM, mode="hybrid", context=1024)
    layers = streamed_layers(model)
    predictors = [
        load_predictor(
            index,
            layer.predictor,
            tensors,
            hidden_size=manifest.hidden_size,
            num_rows=entry.num_rows,
            activation=layers[index].activation,
        )
        for index, (layer, entry) in enumerate(zip(sparsity.layers, manifest.layers, strict=True))
    ]
    thresholds = [layer.activation_threshold for layer in sparsity.layers]
    assert all(threshold > 0 for threshold in thresholds) == (family == "llama")

    # Perplexity by hand, window by window, with the stored predictors on every token.
    held_out = module.read_text(pack, text, NUM_TOKENS)
    windows = held_out.windows[held_out.held_out.start : held_out.held_out.stop]

    def perplexity() -> float:
        with torch.no_grad():
            losses = [model(window[None], labels=window[None]).loss for window in windows]
        return math.exp(float(torch.stack(losses).mean()))

    assert perplexity() == pytest.approx(report.evaluation.dense_perplexity, rel=1e-4)
    with masked(layers, [predictor.predict for predictor in predictors], thresholds):
        assert perplexity() == pytest.approx(report.evaluation.sparse_perplexity, rel=1e-4)
    assert report.evaluation.has_passed
    assert len(report.layers) == 2
    for layer, stored in zip(report.layers, sparsity.layers, strict=True):
        assert layer.predictor == stored.predictor
        assert layer.use_curve == stored.use_curve == tuple(sorted(stored.use_curve))
        assert layer.use_curve[0] == pytest.approx(layer.predictor.predicted_share, abs=5e-3)
        assert layer.both_share == pytest.approx(layer.predictor.recall * layer.active_share, abs=0.05)
        assert 0.9 < layer.predictor.recall <= 1.0

    # Mode sparse takes the same rows, token by token.
    sparse = flashlm.load(pack, dram=DRAM, mode="sparse", context=160)
    some = windows[0, :8][None]
    with (
        sparse.flash.phase("verify"),
        torch.no_grad(),
        masked(layers, [predictor.predict for predictor in predictors], thresholds),
    ):
        torch.testing.assert_close(sparse(some).logits, model(some).logits, rtol=1e-5, atol=1e-5)


def test_the_preset_is_the_papers(packs: Callable[..., Path], text: Path) -> None:
    pack = packs("opt")
    report = calibrate(pack, text, preset="paper", dram=DRAM, max_ppl_increase=0.5)
    sparsity = read_sparsity(pack, read_manifest(pack))
    assert sparsity is not None
    assert sparsity.window == 4
    for layer in sparsity.layers:
        assert layer.predictor is not None
        assert (layer.predictor.kind, layer.predictor.threshold) == ("trained", pytest.approx(0.5))
    assert report.evaluation.has_passed
    model = flashlm.load(pack, dram=DRAM, mode="sparse", context=160)
    assert model.flash.sparse.cache.window == 4
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_a_threshold_moves_what_is_predicted(packs: Callable[..., Path], text: Path) -> None:
    shares = [
        calibrate(packs("opt", str(threshold)), text, rank=8, threshold=threshold, dram=DRAM).predicted_share
        for threshold in (0.2, 0.8)
    ]
    assert shares[0] > shares[1] > 0


def test_the_report_is_a_table_and_json(packs: Callable[..., Path], text: Path) -> None:
    report = calibrate(packs("opt"), text, rank="auto", dram=DRAM)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["evaluation"]["max_increase"] == 0.01
    assert content["layers"][1]["predictor"]["kind"] in ("trained", "sketch")
    assert {trial["rank"] for trial in content["layers"][0]["trials"]} == {16}
    header, *rows = report.layer_rows()
    assert len(rows) == 2
    assert all(len(row) == len(header) for row in rows)
    assert "% allowed" in dict(report.rows())["error budget"]


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_an_interrupted_calibration_goes_on_and_ends_alike(family: str, packs: Callable[..., Path], text: Path) -> None:
    settings = {"rank": 8, "dram": DRAM, "max_ppl_increase": 0.02}
    whole, stopped = packs(family, "whole"), packs(family, "stopped")
    calibrate(whole, text, **settings)
    steps = 0

    def count(done: int, total: int, what: str) -> None:
        nonlocal steps
        steps += 1

    # Stop ever later: in every stage once or more.
    runs = 0
    while True:
        steps, limit = 0, 6 * runs + 1

        def stop_at(done: int, total: int, what: str, limit: int = limit) -> None:
            nonlocal steps
            steps += 1
            if steps == limit:
                raise KeyboardInterrupt

        try:
            report = calibrate(stopped, text, progress=stop_at, **settings)
            break
        except KeyboardInterrupt:
            assert not document_path(stopped).exists()
            runs += 1
    assert runs > 2
    assert report.was_resumed
    assert _written(stopped) == _written(whole)


def test_work_of_other_settings_is_not_continued(packs: Callable[..., Path], text: Path) -> None:
    pack = packs("opt")

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("layer 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(pack, text, rank=8, dram=DRAM, progress=stop)
    assert (pack / FLASH_DIR / PARTIAL_NAME / "predictor-00000.safetensors").exists()
    report = calibrate(pack, text, rank=4, dram=DRAM)
    assert not report.was_resumed
    assert {layer.predictor.rank for layer in report.layers} == {4}


def test_a_budget_that_cannot_be_met_is_stored_as_not_passed(packs: Callable[..., Path], text: Path) -> None:
    pack = packs("opt")
    report = calibrate(pack, text, rank=4, recall=0.5, dram=DRAM, max_ppl_increase=1e-9)
    if report.evaluation.has_passed:  # chance may make a random model better
        pytest.skip("this random model got no worse")
    assert "NOT passed" in report.verdict()
    sparsity = read_sparsity(pack, read_manifest(pack))
    assert sparsity is not None
    assert sparsity.evaluation is not None
    assert not sparsity.evaluation.has_passed


def test_a_short_text_is_refused_with_what_is_needed(packs: Callable[..., Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w3 w4 w5 " * 10)
    pack = packs("opt")
    needed = MIN_WINDOWS * MIN_WINDOW_TOKENS
    with pytest.raises(ConfigError, match=rf"short.txt has 30 tokens, calibration needs at least {needed}"):
        calibrate(pack, short, dram=DRAM)
    assert not (pack / FLASH_DIR / PARTIAL_NAME).exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": "many"}, "rank='many'"),
        ({"rank": 49}, "rank=49 is above 48"),
        ({"recall": 1.0}, "recall=1.0 must be between"),
        ({"recall": float("nan")}, "recall=nan must be between"),
        ({"max_ppl_increase": 0.0}, "max_ppl_increase=0.0 must be above 0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"threshold": 1.0}, "threshold=1.0 is a probability"),
        ({"threshold": float("nan")}, "threshold=nan is a probability"),
        ({"window": 0}, "window=0 must be between 1 and"),
        ({"device": "tpu"}, "device='tpu' is unknown"),
        ({"preset": "best"}, "preset='best' is unknown"),
    ],
)
def test_settings_out_of_range_are_refused(
    packs: Callable[..., Path], text: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(packs("opt"), text, **settings)  # type: ignore[arg-type]


def test_text_that_is_not_utf8_is_refused(packs: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 " * 1000)
    with pytest.raises(ConfigError, match=r"latin.txt"):
        calibrate(packs("opt"), path)


def test_an_unfinished_pack_is_refused(tmp_path: Path, text: Path) -> None:
    with pytest.raises(PackError, match="not a finished pack"):
        calibrate(tmp_path, text)


@pytest.mark.parametrize(("num_tokens", "positions"), [(256, None), (1000, 64), (20_000, 2048), (9_999, 128)])
def test_parts_share_no_token_and_leave_none_out(num_tokens: int, positions: int | None) -> None:
    ids = torch.arange(num_tokens)
    text = CalibrationText.cut("t", ids, positions)
    assert text.window_tokens >= MIN_WINDOW_TOKENS
    assert text.window_tokens <= (positions or num_tokens)
    parts = [
        text.windows[part.start : part.stop].flatten().tolist() for part in (text.train, text.validation, text.held_out)
    ]
    assert all(parts)
    together = sorted(token for part in parts for token in part)
    assert together == list(range(len(together)))
    assert num_tokens - len(together) < text.window_tokens
    assert len(parts[0]) >= len(parts[1])


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_the_largest_passing_index_is_found(count: int) -> None:
    for border in range(-1, count):
        found = largest_passing(count, lambda index, border=border: index <= border)
        assert found == (None if border < 0 else border)


def test_the_level_search_raises_the_layer_that_hurts() -> None:
    """A model in which only layer 1 matters: its level rises, the others stay."""
    hurts, ratio, calls = (0.0001, 0.05, 0.0001), 0.75, []

    def evaluate(levels: tuple[int, ...]) -> Rise:
        calls.append(levels)
        nll = sum(hurt * ratio**level for hurt, level in zip(hurts, levels, strict=True))
        return Rise(num_tokens=10, dense_nll=2.0, sparse_nll=2.0 + nll, error=0.0)

    rows = [[100.0 + 10 * level for level in range(24)] for _ in hurts]
    found = search_levels(evaluate, rows, ratio, 0.01, lambda layer: hurts[layer])
    assert found.has_passed
    assert found.rise.increase <= 0.01
    assert found.levels[1] == 6  # 0.05 * 0.75^6 is the first below ln 1.01
    assert max(found.levels[0], found.levels[2]) <= 1
    assert len(calls) < 10
    hopeless = search_levels(evaluate, rows, ratio, 1e-9, lambda layer: hurts[layer])
    assert not hopeless.has_passed
    assert hopeless.levels == (23, 23, 23)


def test_the_command_prints_layers_and_a_verdict(
    packs: Callable[..., Path], text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pack = packs("opt")

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        return int(done.value.code or 0)

    asked = ("calibrate", pack, "--text", text, "--rank", 8, "--dram", DRAM)
    assert run(*asked, "--max-ppl-increase", "1.5%", "--plots", tmp_path / "plots") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:4] == ["layer", "active", "predicted", "recall"]
    assert printed[2].split()[0] == "1"
    assert any("of 1.5% allowed" in line for line in printed)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"use-curve.png", "predicted-rows.png"}
    assert run(*asked, "--max-ppl-increase", "a lot") == 2
    assert capsys.readouterr().err == "flashlm: max-ppl-increase='a lot' is not a share: write it like 1% or 0.01\n"
    assert run(*asked, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["predictor"]["rank"] == 8
