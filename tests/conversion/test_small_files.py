"""Whatever a model folder holds beside its weights comes along, but what can do harm; what stays behind is named."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm.conversion import small_files
from flashlm.conversion.convert import convert
from flashlm.conversion.small_files import choose, choose_from_folder
from flashlm.conversion.verify import verify
from flashlm.errors import PackError
from tests.models import save_checkpoint
from tests.pack.packs import all_bytes

KEPT = {
    "tokenizer.json", "tokenizer.model", "tekken.json", "chat_template.jinja", "chat_template.json", "vocab.json",
    "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja", "special_tokens_map.json",
    "preprocessor_config.json", "processor_config.json", "README.md", "LICENSE", "Notice.txt", "qwen.tiktoken",
    "spiece.model", "sentencepiece.bpe.model", "1_Pooling/config.json", "modules.json", "figures/curve.png",
    "prompts/system.txt", "a file with blanks.txt", "Modell-für-alle.md",
    "README.pt.md", "spm.pt.model", "v1.5.2-notes.txt", "README.so-far.md",
}  # fmt: skip
LEFT_OUT = {
    "pytorch_model.bin": "pickles", "training_args.bin": "pickles", "optimizer.pt": "pickles", "x.ckpt": "pickles",
    "original/consolidated.00.pth": "pickles", "state.pkl": "pickles", "consolidated.safetensors": "weights",
    "model.fp16.safetensors": "weights", "onnx/model.onnx": "weights", "onnx/model.onnx_data": "weights",
    "model-Q4_K_M.gguf": "weights", "tf_model.h5": "weights", "flax_model.msgpack": "weights", "rust_model.ot": "weights",
    "pytorch_model.bin.index.json": "weights", "adapter_config.json": "weights", "modeling_custom.py": "code",
    "custom_generate/generate.py": "code", "run.sh": "code", "kernels/fast.so": "code", "weights.zip": "archives",
    "flash/manifest.json": "a pack's own", "setup.pyw": "code", "lib/libfast.so.1": "code", "libfast.so.1.2.txt": "code",
    "fast.dylib.old": "code", "state.dill": "pickles", "weights.pkl.txt": "pickles", "Weights.PKL.Txt": "pickles",
    "model.torchscript": "pickles", "model.pt.txt": "pickles", "model.bin.1": "pickles", "x.pickle.json": "pickles",
    "state.pkl ": "pickles", "module.py.": "code", "best.pth.tar": "pickles",
}  # fmt: skip


def fill(folder: Path, names: set[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{{}} {name}")


def test_everything_comes_along_and_what_stays_is_told(tmp_path: Path) -> None:
    source, pack = tmp_path / "source", tmp_path / "pack"
    save_checkpoint(source, "llama")
    fill(source, KEPT | set(LEFT_OUT) | {".git/config", ".gitattributes", ".cache/x"})
    lines: list[str] = []
    manifest = convert(source, pack, announce=lines.append)
    files = {name for name in all_bytes(pack) if not name.startswith("flash/") and not name.endswith(".safetensors")}
    assert files == set(manifest.small_files)
    assert files >= KEPT | {"config.json", "generation_config.json"}
    assert not files & set(LEFT_OUT)
    assert all((pack / name).read_bytes() == (source / name).read_bytes() for name in KEPT)
    told = "\n".join(line for line in lines if line.startswith("left out"))
    assert told.splitlines() == list(manifest.source.notes)
    for reason in set(LEFT_OUT.values()):
        assert reason in told
    assert "code (.py is copied with --trust-remote-code): custom_generate/generate.py, fast.dylib.old, " in told
    verify(pack).raise_for_problems()
    (pack / "additional_chat_templates" / "tool_use.jinja").write_text("changed")
    (problem,) = verify(pack).problems
    assert "additional_chat_templates/tool_use.jinja is not as it was converted" in problem


@pytest.mark.parametrize(("name", "reason"), LEFT_OUT.items())
def test_what_is_left_out_has_its_reason(name: str, reason: str) -> None:
    found = choose({name: 10, "tokenizer.json": 10}, ["model.safetensors"], with_code=False)
    assert found.kept == ("tokenizer.json",)
    assert reason in found.left_out[name]


def test_code_comes_along_where_it_is_asked_for() -> None:
    sizes = {"modeling_custom.py": 10, "kernels/fast.so": 10, "tools/parse.py": 10}
    found = choose(sizes, [], with_code=True)
    assert found.kept == ("modeling_custom.py", "tools/parse.py")
    assert list(found.left_out) == ["kernels/fast.so"]


def test_limits_leave_the_tokenizer_in() -> None:
    sizes = {f"a/{number:05}.txt": 1000 for number in range(small_files.MAX_FILES + 5)} | {
        "tokenizer.json": 200 << 20, "large.csv": small_files.MAX_FILE_BYTES + 1, "README.md": 10,
    }  # fmt: skip
    found = choose(sizes, [], with_code=False)
    assert {"tokenizer.json", "README.md"} <= set(found.kept)
    assert len(found.kept) == small_files.MAX_FILES
    assert "larger than" in found.left_out["large.csv"]
    assert sum("more than" in reason for reason in found.left_out.values()) == 7
    sizes = {f"{number}.txt": 30 << 20 for number in range(40)}
    assert sum(sizes[name] for name in choose(sizes, [], with_code=False).kept) <= small_files.MAX_TOTAL_BYTES
    with pytest.raises(PackError, match="not a tokenizer"):
        choose({"tokenizer.json": small_files.MAX_TOKENIZER_BYTES + 1}, [], with_code=False)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300), max_size=6, unique=True))
def test_any_name_is_kept_only_where_the_manifest_can_say_it(names: list[str]) -> None:
    from pydantic import TypeAdapter

    from flashlm.pack.manifest import SmallFileName

    for name in choose(dict.fromkeys(names, 1), [], with_code=False).kept:
        assert TypeAdapter(SmallFileName).validate_python(name) == name
        assert not {"", ".", ".."} & set(name.split("/"))


def test_links_out_of_the_folder_pipes_and_devices_are_left_out_unopened(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_checkpoint(source, "llama")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("mine alone")
    (source / "docs").mkdir()
    (source / "docs" / "a.txt").write_text("a")
    (source / "LICENSE").symlink_to(secret / "key")
    (source / "more").symlink_to(secret, target_is_directory=True)
    (source / "docs" / "gone.txt").symlink_to(source / "nowhere")
    (source / "docs" / "loop.txt").symlink_to(source / "docs" / "loop.txt")
    (source / "docs" / "zero.txt").symlink_to("/dev/zero")
    (source / "inside.txt").symlink_to(source / "docs" / "a.txt")
    os.mkfifo(source / "docs" / "notes.txt")
    manifest = convert(source, tmp_path / "pack")
    assert set(manifest.small_files) >= {"config.json", "generation_config.json", "docs/a.txt", "inside.txt"}
    assert not any("secret" in name or "more/" in name for name in manifest.small_files)
    told = " ".join(choose_from_folder(source, [], with_code=False).left_out)
    assert all("left out" in note for note in manifest.source.notes)
    for name in ("LICENSE", "more", "gone.txt", "loop.txt", "zero.txt", "notes.txt"):
        assert name in told
        assert not any(name in kept for kept in manifest.small_files)
    assert b"mine alone" not in b"".join(all_bytes(tmp_path / "pack").values())


@pytest.mark.parametrize("kind", ["nowhere", "loop", "pipe", "large"])
@pytest.mark.parametrize("name", ["x.json", "notes.txt", "module.py"])
def test_one_odd_file_in_the_folder_is_left_out_and_told(kind: str, name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_checkpoint(source, "llama")
    _make_odd(source / name, kind)
    manifest = convert(source, tmp_path / "pack")
    assert name not in manifest.small_files
    assert any(name in note and note.startswith("left out, ") for note in manifest.source.notes)
    verify(tmp_path / "pack").raise_for_problems()


@pytest.mark.parametrize("kind", ["nowhere", "loop", "pipe", "large"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "generation_config.json", "modeling_x.py"])
def test_an_odd_file_that_is_needed_is_an_error(kind: str, name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_checkpoint(source, "llama")
    _make_odd(source / name, kind)
    with pytest.raises(PackError, match=name):
        convert(source, tmp_path / "pack", trust_remote_code=name.endswith(".py"))


def _make_odd(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":  # and empty: nothing is written
        with path.open("wb") as file:
            file.truncate(300 << 20)
    else:
        path.symlink_to("nowhere" if kind == "nowhere" else path.name)


def test_links_of_the_hubs_cache_are_inside(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    assert choose_from_folder(snapshot, [], with_code=False).kept == ("tokenizer.json",)


def test_a_pickle_by_an_innocent_name_is_never_opened(tmp_path: Path) -> None:
    """It is copied as bytes: what it would do when unpickled does not happen."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    save_checkpoint(tmp_path / "source", "llama")
    (tmp_path / "source" / "notes.dat").write_bytes(pickle.dumps(Bomb()))
    convert(tmp_path / "source", tmp_path / "pack")
    assert not (tmp_path / "exploded").exists()
