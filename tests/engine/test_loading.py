"""Packs inside transformers: plain from_pretrained, its generation modes, refusals, faults and telemetry."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import flashlm
from flashlm.engine.ffn import FlashFFN
from flashlm.errors import BudgetError, ConfigError, PackError, StorageError
from flashlm.pack.manifest import RESIDENT_NAME


@pytest.fixture
def copied_pack(tiny_pack, tmp_path):
    """A pack of its own, to be damaged."""
    return shutil.copytree(tiny_pack("llama").pack, tmp_path / "pack")


def ids(batch_size=1, num_tokens=5):
    return torch.randint(3, 96, (batch_size, num_tokens), generator=torch.Generator().manual_seed(0))


def greedy(model, **kwargs):
    return model.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=8, do_sample=False, **kwargs)


def test_plain_from_pretrained_works_and_reads_the_environment(tiny_pack, monkeypatch):
    tiny = tiny_pack("llama")
    expected = greedy(tiny.reference("float32"))
    plain = AutoModelForCausalLM.from_pretrained(tiny.pack)
    assert torch.equal(greedy(plain), expected)
    monkeypatch.setenv("FLASHLM_MODE", "naive")
    monkeypatch.setenv("FLASHLM_CONTEXT", "13")
    by_environment = AutoModelForCausalLM.from_pretrained(tiny.pack)
    assert (by_environment.flash.mode, by_environment.flash.context) == ("naive", 13)
    assert torch.equal(greedy(by_environment), expected)
    monkeypatch.setenv("FLASHLM_DRAM", "1MiB")
    with pytest.raises(BudgetError, match="below the"):
        AutoModelForCausalLM.from_pretrained(tiny.pack)


@pytest.mark.parametrize(
    "imports",
    [
        "import flashlm; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import flashlm",
        "import flashlm.engine.quantizer; from transformers import AutoModelForCausalLM",
        "import flashlm; flashlm.FlashConfig; from transformers import AutoModelForCausalLM",
    ],
)
def test_packs_are_known_whatever_is_imported_first(imports, tiny_pack):
    code = f"{imports}; AutoModelForCausalLM.from_pretrained({str(tiny_pack('llama').pack)!r}).flash"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_quantization_config_argument_is_taken_over(tiny_pack):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers announces that the pack's own config is completed
        model = AutoModelForCausalLM.from_pretrained(
            tiny_pack("llama").pack, quantization_config=flashlm.FlashConfig(mode="naive", context=64)
        )
    assert (model.flash.mode, model.flash.context) == ("naive", 64)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
        {"use_cache": False},
    ],
)
def test_generation_modes_equal_transformers(kwargs, tiny_pack):
    tiny = tiny_pack("llama")
    streamed = flashlm.load(tiny.pack, pin=0)
    assert torch.equal(greedy(streamed, **kwargs), greedy(tiny.reference("float32"), **kwargs))


def test_sampling_equals_transformers_for_the_same_seed(tiny_pack):
    tiny = tiny_pack("opt")
    texts = []
    for model in (tiny.reference("float32"), flashlm.load(tiny.pack, pin=0)):
        torch.manual_seed(3)
        texts.append(model.generate(ids(2), attention_mask=torch.ones_like(ids(2)), max_new_tokens=16, do_sample=True))
    assert torch.equal(*texts)


def test_context_is_a_bound_that_the_caller_sees(tiny_pack):
    model = flashlm.load(tiny_pack("llama").pack, context=16)
    inputs = ids(num_tokens=10)
    with pytest.raises(BudgetError, match=r"1 sequences of 29 tokens .* context=16"):
        model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=20, do_sample=False)
    with pytest.raises(BudgetError, match="3 sequences of 6 tokens"):
        model(ids(3, 6))
    assert model(ids(2, 8)).logits.shape[:2] == (2, 8)


def test_telemetry_counts_every_byte(tiny_pack):
    pack = tiny_pack("llama").pack
    half = flashlm.pack.manifest.read_manifest(pack).streamed_bytes // 2
    model = flashlm.load(pack, pin=half)
    greedy(model)
    placement, telemetry = model.flash.placement, model.flash.telemetry
    assert len(telemetry.records) == 8
    for record in telemetry.records:
        assert record.bytes_read == placement.streamed_bytes
        assert record.pinned_bytes == placement.pinned_bytes
        assert record.num_reads == sum(each.num_streamed for each in placement.dense)
        assert 0 <= record.wait_s <= record.wall_s
    assert telemetry.prefill().num_tokens == 5
    assert telemetry.decode().num_tokens == 7


def test_resident_weights_are_anonymous_memory(tiny_pack):
    pack = tiny_pack("llama").pack
    model = flashlm.load(pack)
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line for line in maps if RESIDENT_NAME in line and str(pack) in line]
    assert not mapped
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_an_aborted_forward_pass_leaves_the_stream_usable(tiny_pack):
    tiny = tiny_pack("llama")
    model = flashlm.load(tiny.pack, pin=0)
    expected = greedy(model)
    last = [module for module in model.modules() if isinstance(module, FlashFFN)][-1]

    class Interrupt(torch.nn.Module):
        def forward(self, *_):
            raise KeyboardInterrupt

    handle = last.register_forward_pre_hook(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        greedy(model)
    handle.remove()
    activation, last.activation = last.activation, Interrupt()
    with pytest.raises(KeyboardInterrupt):
        greedy(model)
    last.activation = activation
    assert torch.equal(greedy(model), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dram": "1MiB"}, BudgetError, "below the .* that this model needs at least"),
        ({"dram": "much"}, ConfigError, "'much' is not a size"),
        ({"mode": "fast"}, ConfigError, "mode='fast' is unknown"),
        ({"context": 0}, ConfigError, "context=0 must be"),
        ({"dtype": torch.bfloat16}, ConfigError, "holds float32"),
        ({"device_map": {"": "disk"}}, ConfigError, "leave device_map out"),
    ],
)
def test_bad_settings_are_refused_by_name(arguments, error, message, tiny_pack):
    with pytest.raises(error, match=message):
        flashlm.load(tiny_pack("llama").pack, **arguments)


def test_a_budget_below_the_floor_reads_no_weight(copied_pack):
    for file in (copied_pack / "flash").glob("layer-*"):
        file.unlink()
    with pytest.raises(BudgetError):
        flashlm.load(copied_pack, dram="1MiB")


def test_missing_layer_file_is_an_error(copied_pack):
    next((copied_pack / "flash").glob("layer-*")).unlink()
    with pytest.raises(StorageError, match=r"layer-0000\d\.rows"):
        flashlm.load(copied_pack)


def test_truncated_layer_file_is_an_error(copied_pack):
    layer = next((copied_pack / "flash").glob("layer-*"))
    with layer.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(StorageError, match=r"layer-0000\d\.rows"):
        flashlm.load(copied_pack)


def test_truncated_resident_file_is_an_error(copied_pack):
    with (copied_pack / RESIDENT_NAME).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises((StorageError, PackError), match=RESIDENT_NAME):
        flashlm.load(copied_pack)


def test_a_file_that_shrinks_while_in_use_is_an_error_not_stale_bytes(copied_pack):
    model = flashlm.load(copied_pack, pin=0)
    greedy(model)
    for layer in (copied_pack / "flash").glob("layer-*"):
        with layer.open("r+b") as file:
            file.truncate(0)
    with pytest.raises(StorageError, match=r"layer-0000\d\.rows"):
        # What has been read ahead is still good; eight more tokens are more than that.
        greedy(model)


def test_unknown_manifest_version_is_refused_by_name(copied_pack):
    manifest = copied_pack / "flash" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version":', '"format_version": 7, "old":', 1))
    with pytest.raises(PackError, match="format version 7"):
        flashlm.load(copied_pack)


def test_gradients_are_refused(tiny_pack):
    model = flashlm.load(tiny_pack("llama").pack)
    embeddings = torch.randn(1, 3, model.config.hidden_size, requires_grad=True)
    with pytest.raises(ConfigError, match=r"torch\.no_grad"):
        model(inputs_embeds=embeddings)


def test_a_layer_without_weights_says_so(tiny_pack):
    layer = next(m for m in flashlm.load(tiny_pack("llama").pack).modules() if isinstance(m, FlashFFN))
    bare = FlashFFN(
        layer=0,
        layout=layer.layout,
        activation=layer.activation,
        dtype=torch.float32,
        has_up_bias=False,
        has_gate_bias=False,
        has_down_bias=False,
    )
    with pytest.raises(ConfigError, match="no weights yet"):
        bare(torch.zeros(1, layer.layout.hidden_size))
