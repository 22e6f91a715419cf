"""Bit rot: what is read while loading is checked, streamed blocks, rows and experts where that is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import flashlm
from flashlm.conversion.verify import verify
from flashlm.errors import ConfigError, PackError
from flashlm.pack.manifest import FLASH_DIR, read_manifest, resident_path, unit_path
from flashlm.sparsity.calibration_document import document_path, profile_path, tensors_path, write_profile
from tests.engine.calibrations import write_calibration
from tests.engine.conftest import TinyPack
from tests.pack.packs import change_manifest, replace_sealed

PROMPT = {"input_ids": torch.tensor([[4, 5, 6, 7]])}


@pytest.fixture
def copied(tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> Callable[[str], Path]:
    def copy(family: str) -> Path:
        return Path(shutil.copytree(tiny_pack(family, "float32").pack, tmp_path / family))

    return copy


def _flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def _run(pack: Path, **load: Any) -> torch.Tensor:
    return _answer(flashlm.load(pack, dram="3GiB", context=160, **load))


def _answer(model: Any) -> torch.Tensor:
    with torch.no_grad(), model.flash.phase("verify"):  # rows are read in mode sparse, where a prompt takes blocks
        logits: torch.Tensor = model(**PROMPT).logits
    return logits


@pytest.mark.parametrize("place", [0, 9, 300, 0.5, 0.9, -1])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_flipped_bit_in_resident_weights_never_loads(
    family: str, place: float, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = copied(family)
    path = resident_path(pack)
    _flip(path, int(place * path.stat().st_size) if isinstance(place, float) else int(place))
    for load in (flashlm.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(PackError, match=r"resident\.safetensors: chunk 0 .*is damaged.*convert the model again"):
            load(pack)
    if place in (0.5, 0.9, -1):
        monkeypatch.setenv("FLASHLM_CHECK", "none")
        AutoModelForCausalLM.from_pretrained(pack)


def test_every_chunk_is_checked(copied: Callable[[str], Path]) -> None:
    """Chunks that are no multiple of what is read at once, and a ragged end."""
    import xxhash

    pack = copied("llama")
    content = resident_path(pack).read_bytes()
    size = 5000
    sums = [xxhash.xxh3_64_hexdigest(content[start : start + size]) for start in range(0, len(content), size)]
    change_manifest(pack, lambda document: document["resident"].update(chunk_bytes=size, checksums=sums))
    flashlm.load(pack)
    assert verify(pack).problems == ()
    _flip(resident_path(pack), len(content) - 1)
    with pytest.raises(PackError, match=rf"chunk {len(sums) - 1} \(bytes"):
        flashlm.load(pack)


@pytest.mark.parametrize(("family", "what"), [("llama", "block"), ("qwen3_moe", "expert")])
def test_pinned_blocks_are_checked_and_streamed_ones_where_asked(
    family: str, what: str, copied: Callable[[str], Path]
) -> None:
    pack = copied(family)
    manifest = read_manifest(pack)
    expected = _run(pack, pin=0)
    layer = manifest.units[1]
    layout = layer.layout
    last = layout.num_blocks - 1
    _flip(unit_path(pack, layer), layout.offset_of(last) + 4)
    message = rf"{layer.file}: {what} {last} is damaged: checksum [0-9a-f]{{16}}, [0-9a-f]{{16}} expected"
    with pytest.raises(PackError, match=message):
        _run(pack)
    for _ in range(2):  # the model stays what it is: refused again, not answered
        with pytest.raises(PackError, match=message):
            _run_all_blocks(pack, check="all", pin=0)
    assert torch.equal(_run_all_blocks(pack, check="none", pin=0)[0].isfinite(), expected.isfinite())
    shutil.copy(_good(pack, copied, family) / FLASH_DIR / layer.file, unit_path(pack, layer))
    assert torch.equal(_run(pack, pin=0, check="all"), expected)


def _run_all_blocks(pack: Path, **load: Any) -> list[torch.Tensor]:
    """Several prompts, so that every expert is used."""
    model = flashlm.load(pack, dram="3GiB", context=160, **load)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return [model(torch.randint(3, 96, (1, count), generator=generator)).logits for count in (4, 40, 60)]


def _good(pack: Path, copied: Callable[[str], Path], family: str) -> Path:
    pack.rename(pack.with_name("damaged"))
    good = copied(family)
    good.rename(good.with_name("good"))
    pack.with_name("damaged").rename(pack)
    return good.with_name("good")


def test_exchanged_layer_files_are_noticed_though_nothing_is_pinned(copied: Callable[[str], Path]) -> None:
    pack = copied("llama")
    first, second = sorted((pack / FLASH_DIR).glob("*.rows"))
    spare = pack / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    for mode in ("hybrid", "naive"):
        with pytest.raises(PackError, match=r"layer-00000\.rows: block 0 is damaged"):
            _run(pack, pin=0, mode=mode)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_rows_of_mode_sparse_are_checked(
    family: str, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = copied(family)
    write_calibration(pack, predicts_all=True)
    expected = _run(pack, mode="sparse")
    assert torch.equal(_run(pack, mode="sparse", check="all"), expected)
    model = flashlm.load(pack, dram="3GiB", context=160, mode="sparse", check="all")
    layout = read_manifest(pack).ffns[1].layout
    path = unit_path(pack, read_manifest(pack).ffns[1])
    model.flash.sparse.cache.forget(1, torch.tensor([20, 21], dtype=torch.int32))
    _flip(path, layout.offset_of(1) + 4 * layout.row_stride_bytes + 2)  # row 20, after loading
    for _ in range(2):  # not kept, not used
        with pytest.raises(PackError, match="row 20 is damaged"):
            _answer(model)
    _flip(path, layout.offset_of(1) + 4 * layout.row_stride_bytes + 2)
    assert torch.equal(_answer(model), expected)
    _flip(path, layout.offset_of(1) + 2)
    for check in ("load", "all"):
        with pytest.raises(PackError, match="block 1 is damaged"):
            _run(pack, mode="sparse", check=check)
    _run(pack, mode="sparse", check="none")


def test_verify_covers_the_files_of_a_calibration(copied: Callable[[str], Path]) -> None:
    pack = copied("opt")
    write_profile(pack, {"layers.0.firing_rate": torch.rand(88)})
    write_calibration(pack)
    assert verify(pack).problems == ()
    for path in (document_path(pack), tensors_path(pack), profile_path(pack)):
        before = path.read_bytes()
        for at in range(0, len(before), max(len(before) // 16, 1)):
            _flip(path, at)
            assert [problem for problem in verify(pack).problems if path.name in problem], (path.name, at)
            path.write_bytes(before)
    replace_sealed(document_path(pack), '"fingerprint": "', '"fingerprint": "0')
    assert "other weights" in verify(pack).problems[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["units"][0].update(activation="relu"),
        lambda content: content["units"][0].update(activation="nothing"),
        lambda content: content["units"][0].update(encodings=["fp16"] * len(content["units"][0]["parts"])),
        lambda content: content["units"][0].update(module=content["units"][1]["module"]),
        lambda content: content["units"].reverse(),
        lambda content: content["units"][0].update(identities=["model.layers.0.input_layernorm"]),
        lambda content: content["units"][0].update(identities=["model.layers.0.self_attn"]),
        lambda content: content["units"][0].update(module="model.layers.0.self_attn"),
        lambda content: content["units"][0].update(biases=["up"]),
        lambda content: content["units"].pop(),
        lambda content: content.update(dtype="int4"),
        lambda content: content.update(model_type="mistral"),
        lambda content: content.update(num_hidden_layers=3),
        lambda content: content["small_files"].pop("config.json"),
    ],
)
def test_a_signed_manifest_is_held_against_the_model(
    change: Callable[[dict[str, Any]], Any], copied: Callable[[str], Path]
) -> None:
    pack = copied("llama")
    change_manifest(pack, change)
    with pytest.raises(PackError):
        flashlm.load(pack)
    with pytest.raises(PackError):
        verify(pack).raise_for_problems()


def test_biases_and_identities_are_held_too(copied: Callable[[str], Path]) -> None:
    pack = copied("opt")
    for biases in (["down"], ["up"]):
        change_manifest(pack, lambda content, biases=biases: content["units"][1].update(biases=biases))
        with pytest.raises(
            PackError, match=r"biases of streamed unit 1 is \('.*',\), OPTForCausalLM has \('up', 'down'\)"
        ):
            flashlm.load(pack)
    change_manifest(pack, lambda content: content["units"][1].update(biases=["up", "down"]))
    change_manifest(pack, lambda content: content["units"][0].update(identities=[]))
    with pytest.raises(PackError, match="identities of streamed unit 0"):
        flashlm.load(pack)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "opt"])
@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_another_class_than_the_packs_is_named(family: str, kind: Any, tiny_pack: Callable[..., TinyPack]) -> None:
    with pytest.raises(ConfigError, match=r"opened as \w+ \(.*AutoModelForCausalLM.*\.get_decoder\(\)") as caught:
        kind.from_pretrained(tiny_pack(family, "float32").pack)
    assert "again" not in str(caught.value)
    assert flashlm.load(tiny_pack(family, "float32").pack, dram="3GiB").get_decoder() is not None


@pytest.mark.parametrize(
    ("family", "name", "value", "own"),
    [
        ("llama", "hidden_act", "gelu", "'silu'"),
        ("llama", "intermediate_size", 24, r"\d+"),
        ("opt", "activation_function", "gelu", "'relu'"),
        ("qwen3_moe", "num_experts_per_tok", 1, r"\d+"),
        ("qwen3_moe", "hidden_size", 32, r"\d+"),
    ],
)
def test_a_setting_that_is_not_the_packs_is_named(
    family: str, name: str, value: Any, own: str, tiny_pack: Callable[..., TinyPack]
) -> None:
    pack = tiny_pack(family, "float32").pack
    config = AutoConfig.from_pretrained(pack)
    setattr(config, name, value)
    for asked in ({name: value}, {"config": config}):
        with pytest.raises(ConfigError, match=f"^{name} is {value!r}, {own} in config.json: ") as caught:
            AutoModelForCausalLM.from_pretrained(pack, **asked)
        assert "again" not in str(caught.value)


def test_a_pack_of_another_model_is_converted_again(copied: Callable[[str], Path]) -> None:
    pack = copied("llama")
    change_manifest(pack, lambda content: content["units"][0].update(activation="relu"))
    with pytest.raises(PackError, match="is 'relu', LlamaForCausalLM has 'silu': convert the model again"):
        AutoModelForCausalLM.from_pretrained(pack)


def test_an_unknown_check_is_refused(tiny_pack: Callable[..., TinyPack], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="check='some' is unknown: choose one of load, all, none"):
        flashlm.load(tiny_pack("llama").pack, check="some")
    monkeypatch.setenv("FLASHLM_CHECK", "much")
    with pytest.raises(ConfigError, match="check='much'"):
        flashlm.load(tiny_pack("llama").pack)
