"""Of a repository on the hub the shards of its index and the small files are fetched, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flashlm.conversion.hub import named_files, wanted_files, weight_files
from flashlm.conversion.verify import verify
from flashlm.errors import ConfigError, PackError
from flashlm.pack.manifest import read_manifest
from tests.gguf_files import save_gguf
from tests.models import save_checkpoint

REPO, COMMIT = "someone/tiny", "0" * 40
SMALL = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tekken.json",
    "additional_chat_templates/tool.jinja",
}
# What real repositories hold beside: the same weights again, in other forms.
AGAIN = {
    "pytorch_model-00001-of-00002.bin", "original/consolidated.00.pth", "consolidated.safetensors", "tf_model.h5",
    "model.fp16-00001-of-00002.safetensors", "onnx/model.onnx", "onnx/model.onnx_data", "model-Q8_0.gguf",
    "model-00003-of-00003.safetensors",
}  # fmt: skip


class Hub:
    """What the fake hub holds and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.fetched: list[str] = []

    def info(self) -> dict[str, object]:
        siblings = [{"rfilename": name, "size": len(content)} for name, content in sorted(self.files.items())]
        return {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in sorted(self.files.items())
        ]


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def do_GET(self) -> None:
            self._answer(has_body=True)

        def _answer(self, *, has_body: bool) -> None:
            path = self.path.partition("?")[0]
            path = path.replace("/resolve/main/", f"/resolve/{COMMIT}/")
            prefix = f"/{REPO}/resolve/{COMMIT}/"
            if path.startswith(f"/api/models/{REPO}/tree/"):
                self._send(200, json.dumps(hub.tree()).encode(), has_body=has_body)
            elif path.startswith(f"/api/models/{REPO}"):
                self._send(200, json.dumps(hub.info()).encode(), has_body=has_body)
            elif path.startswith(prefix) and path.removeprefix(prefix) in hub.files:
                name = path.removeprefix(prefix)
                if has_body:
                    hub.fetched.append(name)
                self._send(200, hub.files[name], has_body=has_body)
            else:
                self._send(404, b"{}", has_body=has_body)

        def _send(self, code: int, content: bytes, *, has_body: bool) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if has_body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


FETCH = """
import sys
from flashlm.conversion.hub import download
print(download(sys.argv[1], with_code=False, announce=print))
"""


def run(endpoint: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: the hub's library reads its settings once."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | settings
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_a_conversion_fetches_what_it_needs_once(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    save_checkpoint(folder, "llama", max_shard_size="60KB")
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 1
    for name in AGAIN - shards | SMALL - {"config.json", "generation_config.json"}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{{}} {name}")
    (folder / "modeling_custom.py").write_text("raise SystemExit")
    hub = Hub(folder)
    with serving(hub) as endpoint:
        command = ("-m", "flashlm", "convert", REPO, str(tmp_path / "pack"), "--dtype", "fp32", "--json")
        done = run(endpoint, tmp_path / "cache", *command)
    assert done.returncode == 0, done.stderr
    assert sorted(hub.fetched) == sorted(shards | SMALL | {"model.safetensors.index.json"})
    assert f"fetching {len(hub.fetched)} of {len(hub.files)} files of {REPO}" in done.stderr
    assert "left out, code (.py is copied with --trust-remote-code): modeling_custom.py" in done.stderr
    assert json.loads(done.stdout)["source"] == REPO
    assert set(read_manifest(tmp_path / "pack").small_files) >= SMALL
    verify(tmp_path / "pack").raise_for_problems()
    # The hub is gone: what was fetched before is enough.
    again = run(endpoint, tmp_path / "cache", "-c", FETCH, REPO)
    assert again.returncode == 0, again.stderr
    assert "the hub does not answer" in again.stdout
    assert shards <= {path.name for path in Path(again.stdout.splitlines()[-1]).iterdir()}


def test_a_repository_of_pickles_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(PackError, match=r"pickles \(pytorch_model.bin\)"):
        weight_files({"config.json": 1, "pytorch_model.bin": 1}, Path.resolve)
    with pytest.raises(PackError, match="the repository has no weights"):
        weight_files({"config.json": 1, "model.onnx": 1}, Path.resolve)


GGUFS = {"x-Q4_0.gguf", "q8/x-00001-of-00002.gguf", "q8/x-00002-of-00002.gguf", "mmproj-x.gguf"}


def test_of_several_gguf_files_one_is_named() -> None:
    names = dict.fromkeys(GGUFS, 10)
    with pytest.raises(
        ConfigError, match=r"2 GGUF models, name one as REPOSITORY:FILE: q8/x-00001-of-00002\.gguf, x-Q4"
    ):
        weight_files(names, Path.resolve)
    assert named_files(names, "q8/x-00002-of-00002.gguf") == ["q8/x-00001-of-00002.gguf", "q8/x-00002-of-00002.gguf"]
    with pytest.raises(
        ConfigError, match=r"holds no y\.gguf; its GGUF models are: q8/x-00001-of-00002\.gguf, x-Q4_0\.gguf"
    ):
        named_files(names, "y.gguf")
    del names["q8/x-00001-of-00002.gguf"]
    assert weight_files(names, Path.resolve) == ["x-Q4_0.gguf"]


def test_a_gguf_file_is_fetched_alone(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    save_gguf(folder / "x-Q4_0.gguf", "llama")
    for name in GGUFS - {"x-Q4_0.gguf"} | {"README.md"}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("nothing")
    hub = Hub(folder)
    with serving(hub) as endpoint:
        command = ("-m", "flashlm", "convert", f"{REPO}:x-Q4_0.gguf", str(tmp_path / "pack"), "--json")
        done = run(endpoint, tmp_path / "cache", *command)
    assert done.returncode == 0, done.stderr
    assert hub.fetched == ["x-Q4_0.gguf"]
    assert json.loads(done.stdout)["source"] == f"{REPO}:x-Q4_0.gguf"


def test_files_are_chosen_from_the_list_alone(tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    sizes = dict.fromkeys(AGAIN | SMALL | {"model.safetensors.index.json", "model-00001-of-00002.safetensors"}, 10)
    shards = weight_files(sizes, lambda name: index)
    assert shards == ["model-00001-of-00002.safetensors"]
    wanted, _ = wanted_files(sizes, shards, with_code=False)
    assert set(wanted) == SMALL | {"model.safetensors.index.json", *shards}
    # One file wins over an index, as on disk.
    sizes["model.safetensors"] = 10
    wanted, _ = wanted_files(sizes, weight_files(sizes, lambda name: index), with_code=False)
    assert set(wanted) == SMALL | {"model.safetensors"}
    del sizes["model.safetensors"], sizes["model-00001-of-00002.safetensors"]
    with pytest.raises(PackError, match=r"names model-00001-of-00002\.safetensors, which the repository does not hold"):
        wanted_files(sizes, weight_files(sizes, lambda name: index), with_code=False)
