"""Packs whose maker can sign what he writes, and documents with random changes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

import flashlm
from flashlm.conversion.sources.safetensors import open_checkpoint
from flashlm.documents import seal
from flashlm.errors import FlashError
from flashlm.pack.checkpoint import read_header
from flashlm.pack.manifest import manifest_path, read_manifest
from flashlm.planner.plan_document import load_plan
from flashlm.probe.device_profile import load_profile
from flashlm.sparsity.calibration_document import document_path, read_sparsity
from flashlm.sparsity.routing import read_routing, routing_path

Change = Callable[[dict[str, Any]], Any]


def sign(pack: Path, change: Change | None = None, **config: Any) -> None:
    """Change manifest and config.json, and make every checksum fit."""
    path = pack / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    content = json.loads(manifest_path(pack).read_text())
    del content["checksum"]
    content["small_files"]["config.json"] = xxhash.xxh3_64_hexdigest(path.read_bytes())
    if change is not None:
        change(content)
    manifest_path(pack).write_bytes(seal(json.dumps(content, indent=1)))


def _swap_modules(content: dict[str, Any]) -> None:
    first, second = content["units"][:2]
    first["module"], second["module"] = second["module"], first["module"]


DENSE: dict[str, tuple[Change | None, dict[str, Any]]] = {
    "activation": (lambda content: content["units"][0].update(activation="gelu"), {}),
    "modules swapped": (_swap_modules, {}),
    "identity of a norm": (lambda content: content["units"][0].update(identities=["model.norm"]), {}),
    "identity of attention": (
        lambda content: content["units"][0].update(identities=["model.layers.0.self_attn"]),
        {},
    ),
    "module of nothing": (lambda content: content["units"][0].update(module=""), {}),
    "bias": (lambda content: content["units"][0].update(biases=["up"]), {}),
    "fewer layers": (lambda content: content["units"].pop(), {}),
    "dtype": (lambda content: content.update(dtype="float16"), {}),
    "model type": (lambda content: content.update(model_type="mistral"), {}),
    "1e5 layers": (None, {"num_hidden_layers": 10**5}),
    "1e9 layers": (None, {"num_hidden_layers": 10**9}),
    "1e9 layers, both": (lambda content: content.update(num_hidden_layers=10**9), {"num_hidden_layers": 10**9}),
    "2,000 layers, both": (lambda content: content.update(num_hidden_layers=2_000), {"num_hidden_layers": 2_000}),
    "no attention heads": (None, {"num_attention_heads": 0}),
    "hidden size -1": (None, {"hidden_size": -1}),
    "hidden size of text": (None, {"hidden_size": "large"}),
    "unknown rope": (None, {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}),
    "unknown activation": (None, {"hidden_act": "nothing"}),
    "another activation": (None, {"hidden_act": "gelu"}),
    "vocabulary 1e12": (None, {"vocab_size": 10**12}),
    "hub kernel": (None, {"_attn_implementation": "kernels-community/flash-attn"}),
    "hub kernel, other key": (None, {"attn_implementation": "somebody/something@main:f"}),
    "flash attention": (None, {"_attn_implementation": "flash_attention_2"}),
    "remote code": (None, {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
    "another pack's quantizer": (None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
}
EXPERTS: dict[str, tuple[Change | None, dict[str, Any]]] = {
    "experts of a token": (lambda content: content["units"][0].update(num_active=8), {}),
    "activation of experts": (lambda content: content["units"][0].update(activation="gelu"), {}),
    "1e9 experts": (None, {"num_experts": 10**9}),
    "experts kernel": (None, {"_experts_implementation": "sonicmoe"}),
}


def signed_lies(
    dense: Path,
    experts: Path,
    folder: Path,
    in_child: Callable[[Callable[[], str]], str],
    guarded: Callable[[Callable[[], str]], str],
    verifying: Callable[[Path], str],
) -> Iterator[tuple[str, str]]:
    """Each lie loaded, and verified. All of them change what is computed, or cannot be."""
    for pack, lies in ((dense, DENSE), (experts, EXPERTS)):
        for name, (change, config) in lies.items():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(pack, folder)
            sign(folder, change, **config)

            def load() -> str:
                flashlm.load(folder, dram="4GiB")
                return "WRONG"

            yield f"{name}/load", in_child(lambda load=load: guarded(load))
            yield f"{name}/verify", verifying(folder)


def fuzz_documents(packs: dict[str, Path], folder: Path, count: int) -> Iterator[tuple[str, str]]:
    """Random changes of every document, signed again where it is signed; anything but a named error is told."""
    generator = random.Random(0)
    for name, (content, read, signed) in _documents(packs, folder).items():
        for _ in range(count):
            body = _mutated(content, generator)
            try:
                read(_signed(body) if signed else body)
                yield name, "accepted"
            except FlashError:
                yield name, "refused"
            except Exception as error:  # what is looked for
                yield name, f"foreign: {type(error).__name__}"


def _signed(body: bytes) -> bytes:
    text = body.decode("utf-8", "replace").rstrip()
    return seal(text if text.endswith("\n}") else text + "\n}")


def _mutated(content: bytes, generator: random.Random) -> bytes:
    raw = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(raw))
        junk = generator.choice(
            (b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"', b"9" * 400, b"true", b"\xff\xfe", b"\\u0000", b"")
        )
        raw[at : at + generator.randint(0, 6)] = junk
    return bytes(raw)


def _documents(packs: dict[str, Path], folder: Path) -> dict[str, tuple[bytes, Callable[[bytes], Any], bool]]:
    """Name, a good document without its checksum, how it is read, and whether it is signed."""
    folder.mkdir()
    places = {name: Path(shutil.copytree(pack, folder / name)) for name, pack in packs.items()}
    manifests = {name: read_manifest(pack) for name, pack in places.items()}

    def writing(path: Path, read: Callable[[], Any]) -> Callable[[bytes], Any]:
        def run(content: bytes) -> Any:
            path.write_bytes(content)
            return read()

        return run

    def unsigned(path: Path) -> bytes:
        content = json.loads(path.read_text())
        content.pop("checksum")
        return json.dumps(content, indent=1).encode()

    llama, opt, experts = places["llama"], places["opt"], places["qwen3_moe"]
    plan, profile, header, index = (folder / name for name in ("plan", "profile", "x.safetensors", "index"))
    index.mkdir()
    weights = (llama.parent.parent / "llama" / "source" / "model.safetensors").read_bytes()
    found = {
        "sparsity": (
            unsigned(document_path(opt)),
            writing(document_path(opt), lambda: read_sparsity(opt, manifests["opt"])),
            True,
        ),
        "routing": (
            unsigned(routing_path(experts)),
            writing(routing_path(experts), lambda: read_routing(experts, manifests["qwen3_moe"])),
            True,
        ),
        "manifest": (unsigned(manifest_path(llama)), writing(manifest_path(llama), lambda: read_manifest(llama)), True),
        "plan": (b'{"plan_version": 3, "source": "x", "dram_bytes": 5}', writing(plan, lambda: load_plan(plan)), False),
        "profile": (b'{\n "profile_version": 3,\n "reads": []\n}', writing(profile, lambda: load_profile(profile)), False),
        "safetensors header": (weights[:2000], writing(header, lambda: read_header(header)), False),
        "index": (
            b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}',
            writing(index / "model.safetensors.index.json", lambda: open_checkpoint(index)),
            False,
        ),
    }  # fmt: skip
    return found
