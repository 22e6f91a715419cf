"""Whatever stands in the place of a file of a pack or a source: refused at once, by name, without a hang."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import flashlm
from flashlm.conversion.convert import convert
from flashlm.conversion.verify import accept_small_files, verify
from flashlm.documents import read_json
from flashlm.errors import ConfigError, FlashError, PackError
from flashlm.memory.smallest import smallest_dram_bytes
from flashlm.pack.description import describe
from flashlm.planner.plan_document import load_plan
from flashlm.planner.shape import read_shape
from flashlm.probe.device_profile import load_profile
from flashlm.storage.outside import check_regular, read_bounded
from tests.engine.conftest import save_tokenizer
from tests.models import save_checkpoint
from tests.pack.packs import change_config, change_manifest

KINDS = ("folder", "pipe", "device", "socket", "nowhere", "loop")
LIMIT_S = 20


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A read that blocks ends as an error of the test."""

    def give_up(*_: object) -> None:
        raise TimeoutError("blocked")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    save_checkpoint(folder / "source", "llama", max_shard_size="60KB")
    save_tokenizer(folder / "source")
    convert(folder / "source", folder / "pack", dtype="fp32")
    return folder


def _replace(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        monkeypatch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    else:
        path.symlink_to("nothing" if kind == "nowhere" else path.name)


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    _replace(path, kind, monkeypatch)
    for run in (check_regular, lambda path: read_bounded(path, 100), load_plan, load_profile):
        with pytest.raises(FlashError, match=r"x\.json"):
            run(path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"x\.json"):
        read_bounded(path, 100, error=ConfigError)


def test_links_to_files_are_followed_and_sizes_bounded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("file")
    assert read_json(tmp_path / "link", 8) == {"a": 1}
    with pytest.raises(PackError, match="larger than the 7 bytes"):
        read_json(tmp_path / "link", 7)
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "none")


@pytest.mark.parametrize("kind", ["pipe", "device", "nowhere"])
@pytest.mark.parametrize(
    "name",
    ["flash/manifest.json", "config.json", "tokenizer.json", "generation_config.json", "flash/resident.safetensors",
     "flash/layer-00001.rows"],
)  # fmt: skip
def test_every_verb_refuses_what_is_no_file(
    name: str, kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Path(shutil.copytree(good / "pack", tmp_path / "pack"))
    _replace(pack / name, kind, monkeypatch)
    with pytest.raises(FlashError, match=Path(name).name.replace(".", r"\.")):
        flashlm.load(pack)
    with pytest.raises(FlashError, match=Path(name).name.replace(".", r"\.")):
        verify(pack).raise_for_problems()
    if name in ("flash/manifest.json", "config.json", "tokenizer.json"):
        for verb in (smallest_dram_bytes, read_shape):
            with pytest.raises(FlashError, match=Path(name).name.replace(".", r"\.")):
                verb(pack)  # type: ignore[operator]
    if name == "flash/manifest.json":
        with pytest.raises(PackError, match="manifest"):
            describe(pack)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "a shard"])
def test_a_source_with_something_else_is_refused(
    name: str, kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(good / "source", tmp_path / "source"))
    path = next(source.glob("model-*.safetensors")) if name == "a shard" else source / name
    _replace(path, kind, monkeypatch)
    with pytest.raises(PackError, match=path.name.replace(".", r"\.")):
        convert(source, tmp_path / "pack")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**5},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 0},
        {"hidden_size": -1},
        {"hidden_size": "large"},
        {"rope_parameters": {"rope_type": "spiral"}},
        {"vocab_size": 10**12},
        {"hidden_act": "gelu"},
        {"hidden_act": "nothing"},
        {"model_type": "mistral"},
        {"model_type": None},
        {"dtype": "float16"},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": "somebody/something@main"},
        {"_attn_implementation": "flash_attention_2"},
        {"_experts_implementation": "sonicmoe"},
        {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"},
    ],
    ids=lambda settings: "-".join(f"{key}={value}"[:40] for key, value in settings.items()),
)
def test_a_signed_config_that_cannot_be_is_a_named_error(
    settings: dict[str, object], good: Path, tmp_path: Path
) -> None:
    pack = Path(shutil.copytree(good / "pack", tmp_path / "pack"))
    change_config(pack, **settings)
    with pytest.raises(FlashError):
        flashlm.load(pack, dram="4GiB")
    assert verify(pack).problems


def test_code_of_a_source_is_not_taken_into_the_pack(good: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(good / "source", tmp_path / "source"))
    path = source / "config.json"
    lies = {"_attn_implementation": "kernels-community/flash-attn", "attn_implementation": "eager"}
    path.write_text(json.dumps(json.loads(path.read_text()) | lies))
    convert(source, tmp_path / "pack", dtype="fp32")
    written = json.loads((tmp_path / "pack" / "config.json").read_text())
    assert "_attn_implementation" not in written
    assert written["attn_implementation"] == "eager"
    assert flashlm.load(tmp_path / "pack").config._attn_implementation == "eager"


def test_an_implementation_from_the_hub_is_refused_as_an_argument_too(good: Path) -> None:
    with pytest.raises(ConfigError, match="attn_implementation='kernels-community/flash-attn' may fetch code"):
        flashlm.load(good / "pack", attn_implementation="kernels-community/flash-attn")


def test_changed_settings_are_refused_until_they_are_accepted(
    good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack = Path(shutil.copytree(good / "pack", tmp_path / "pack"))
    for name in ("config.json", "generation_config.json"):
        path = pack / name
        path.write_text(path.read_text().replace("{", "{ ", 1))
    with pytest.raises(PackError, match=r"config\.json is not as it was converted.*--accept"):
        flashlm.load(pack)
    assert sorted(accept_small_files(pack)) == ["config.json", "generation_config.json"]
    assert verify(pack).problems == ()
    flashlm.load(pack)
    (pack / "generation_config.json").write_text("{ }")
    flashlm.load(pack)
    assert "generation_config.json is not as it was converted" in caplog.text


def test_packs_of_version_4_are_read(good: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(good / "pack", tmp_path / "pack"))
    change_config(pack, quantization_config={"quant_method": "flashlm", "format_version": 4})
    with pytest.raises(PackError, match="says quantization_config is"):
        flashlm.load(pack)
    change_manifest(pack, lambda content: content.update(format_version=4))
    assert verify(pack).problems == ()
    flashlm.load(pack)


@pytest.mark.parametrize("run", [describe, verify, smallest_dram_bytes, read_shape, flashlm.load])
def test_older_packs_are_refused(run: Callable[[Path], object], good: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(good / "pack", tmp_path / "pack"))
    path = pack / "flash" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 5', '"format_version": 1'))
    (pack / "flash" / "resident.safetensors").rename(pack / "model.safetensors")
    with pytest.raises(
        PackError, match="format version 1, this flashlm reads versions 4 and 5: convert the model again"
    ):
        run(pack)
