"""LoRA on streamed layers is what transformers and peft compute on the checkpoint; what can't be so is refused whole."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import flashlm
from flashlm.calibration.ordering import order_pack
from flashlm.errors import BudgetError, ConfigError
from flashlm.pack.manifest import read_manifest
from tests.engine.calibrations import evaluation, write_calibration
from tests.engine.conftest import TinyPack

Make = Callable[..., TinyPack]
FAMILIES = ["llama", "opt", "gpt2", "gemma2", "phi3", "biogpt", "nemotron"]
GATED = ["gate_proj", "up_proj", "down_proj", "q_proj"]
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
pytestmark = [  # what it says of GPT-2's layout, of names, paths and ranks
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft.*"),
]


def _load(pack: Path, **settings: Any) -> torch.nn.Module:
    return flashlm.load(pack, dram="3GiB", context=320, **{"pin": 0, **settings})


def _tokens(num_sequences: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_sequences * 100 + length)
    return torch.randint(3, 90, (num_sequences, length), generator=generator)


def _logits(model: torch.nn.Module, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **arguments).logits


def _adapted(tiny: TinyPack, folder: Path, config: Any, dtype: str = "float32") -> torch.nn.Module:
    """Give the checkpoint's model a random adapter and save that; return the model."""
    torch.manual_seed(1)
    model = get_peft_model(tiny.reference(dtype), config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return model


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
    """Our error against the same in float64 may not exceed theirs but by what another order of summation makes of it."""
    eps = torch.finfo(theirs.dtype).eps
    error = (ours.double() - truth).abs().max()
    assert error <= 2 * (theirs.double() - truth).abs().max() + eps * truth.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_every_linear_layer_equal_peft(family: str, tiny_pack: Make, tmp_path: Path) -> None:
    tiny = tiny_pack(family, "float32")
    reference = _adapted(tiny, tmp_path, LoraConfig(r=4, lora_alpha=10, lora_dropout=0.2, target_modules="all-linear"))
    plain = _load(tiny.pack)
    shapes = [(1, 1), (2, 6), (2, 40)]
    before = [_logits(plain, _tokens(*shape)) for shape in shapes]
    streamed = PeftModel.from_pretrained(plain, tmp_path)
    names = [{name.rpartition(".")[2] for name in model.targeted_module_names} for model in (reference, streamed)]
    assert names[0] == names[1]
    tokens = _tokens(2, 6)
    assert torch.equal(streamed.generate(input_ids=tokens, **GREEDY), reference.generate(input_ids=tokens, **GREEDY))
    ours = [_logits(streamed, _tokens(*shape)) for shape in shapes]
    theirs = [_logits(reference, _tokens(*shape)) for shape in shapes]
    exact = reference.double()
    for shape, mine, peer, unadapted in zip(shapes, ours, theirs, before, strict=True):
        _assert_close(mine, peer, _logits(exact, _tokens(*shape)))
        assert (mine - unadapted).abs().max() > 0.05  # without the adapter it is another model
    with streamed.disable_adapter():
        assert torch.equal(_logits(streamed, tokens), before[1])
    assert streamed.unload() is plain
    assert torch.equal(_logits(plain, tokens), before[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_in_16_bits_are_within_rounding(family: str, tiny_pack: Make, tmp_path: Path) -> None:
    tiny = tiny_pack(family, "bfloat16")
    config = LoraConfig(r=4, target_modules="all-linear", use_rslora=True)
    reference = _adapted(tiny, tmp_path, config, "bfloat16")
    streamed = PeftModel.from_pretrained(_load(tiny.pack), tmp_path)
    for shape in ((2, 6), (2, 40)):
        ours, theirs = _logits(streamed, _tokens(*shape)), _logits(reference, _tokens(*shape))
        truth = _logits(
            PeftModel.from_pretrained(tiny.reference("bfloat16").double(), tmp_path).double(), _tokens(*shape)
        )
        _assert_close(ours, theirs, truth)


def test_neither_placement_nor_batch_changes_a_bit(tiny_pack: Make, tmp_path: Path) -> None:
    tiny = tiny_pack("llama", "float32")
    _adapted(tiny, tmp_path, LoraConfig(r=4, target_modules=GATED))
    half = read_manifest(tiny.pack).streamed_bytes // 2
    placements: list[dict[str, Any]] = [{"pin": 0}, {"pin": half}, {"pin": None}, {"mode": "naive"}]
    models = [PeftModel.from_pretrained(_load(tiny.pack, **each), tmp_path) for each in placements]
    for shape in ((3, 1), (2, 6), (2, 40)):
        first, *others = [_logits(model, _tokens(*shape)) for model in models]
        assert all(torch.equal(each, first) for each in others), shape
    layer = models[0].get_submodule("base_model.model.model.layers.1.mlp")
    hidden = torch.randn(9, layer.layout.hidden_size)
    with torch.no_grad():
        assert torch.equal(layer(hidden), torch.cat([layer(token[None]) for token in hidden]))


def test_adapters_know_neurons_where_rows_are_reordered(tiny_pack: Make, tmp_path: Path) -> None:
    for family in ("llama", "phi3", "opt"):
        tiny = tiny_pack(family, "float32")
        pack = Path(shutil.copytree(tiny.pack, tmp_path / family))
        write_calibration(pack, evaluation=evaluation(has_passed=True))
        random = np.random.default_rng(3)
        order_pack(pack, [random.permutation(entry.num_rows) for entry in read_manifest(pack).ffns])
        reference = _adapted(tiny, tmp_path / "lora", LoraConfig(r=4, lora_bias=True, target_modules="all-linear"))
        streamed = PeftModel.from_pretrained(_load(pack, mode="hybrid"), tmp_path / "lora")
        shapes = [(2, 6), (2, 40)]
        theirs = [_logits(reference, _tokens(*shape)) for shape in shapes]
        exact = reference.double()
        for shape, peer in zip(shapes, theirs, strict=True):
            _assert_close(_logits(streamed, _tokens(*shape)), peer, _logits(exact, _tokens(*shape)))


def test_several_adapters(tiny_pack: Make, tmp_path: Path) -> None:
    tiny = tiny_pack("llama", "float32")
    torch.manual_seed(2)
    reference = get_peft_model(
        tiny.reference("float32"), LoraConfig(r=4, target_modules=GATED, init_lora_weights=False), "x"
    )
    reference.add_adapter("b", LoraConfig(r=6, lora_alpha=3, target_modules=GATED[:2], init_lora_weights=False))
    reference.add_adapter(
        "c", LoraConfig(r=2, target_modules=GATED[1:], layers_to_transform=[1], init_lora_weights=False)
    )
    reference.eval().save_pretrained(tmp_path)
    streamed = PeftModel.from_pretrained(_load(tiny.pack), tmp_path / "x", "x")
    for name in ("b", "c"):
        streamed.load_adapter(tmp_path / name, name)
    wanted: list[torch.Tensor] = []
    for model in (reference, streamed):
        results = []
        for names in ("x", "b", "c", ["x", "b", "c"]):
            model.base_model.set_adapter(names)
            results += [_logits(model, _tokens(2, 6)), _logits(model, _tokens(2, 40))]
        model.set_adapter("x")
        for names in (["x", "__base__"], ["c", "b"]):
            results += [_logits(model, _tokens(2, 6), adapter_names=names)]
            results += [_logits(model, _tokens(2, 40), adapter_names=names)]
        model.add_weighted_adapter(["x", "b"], [0.3, 1.2], "sum", combination_type="cat")
        model.set_adapter("sum")
        results.append(_logits(model, _tokens(2, 6)))
        model.delete_adapter("b")
        model.set_adapter("x")
        results.append(_logits(model, _tokens(2, 6)))
        if not wanted:
            wanted = results
    eps = torch.finfo(torch.float32).eps
    for mine, peer in zip(results, wanted, strict=True):
        assert (mine - peer).abs().max() <= 32 * eps * peer.abs().max()


def test_transformers_own_adapter_methods(tiny_pack: Make, tmp_path: Path) -> None:
    for family in ("llama", "opt"):
        tiny = tiny_pack(family, "float32")
        reference = _adapted(tiny, tmp_path / family, LoraConfig(r=4, target_modules="all-linear"))
        wanted = _logits(reference, _tokens(2, 6))
        streamed = _load(tiny.pack)
        before = _logits(streamed, _tokens(2, 6))
        streamed.load_adapter(str(tmp_path / family))
        eps = torch.finfo(torch.float32).eps
        assert (_logits(streamed, _tokens(2, 6)) - wanted).abs().max() <= 32 * eps * wanted.abs().max()
        streamed.disable_adapters()
        assert torch.equal(_logits(streamed, _tokens(2, 6)), before)
        streamed.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "adapter_model.safetensors").is_file()


def test_a_folder_with_an_adapter_finds_its_pack(
    tiny_pack: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHLM_DRAM", "3GiB")
    tiny = tiny_pack("llama", "float32")
    reference = _adapted(tiny, tmp_path, LoraConfig(r=4, target_modules=GATED))
    reference.peft_config["default"].base_model_name_or_path = str(tiny.pack)
    reference.save_pretrained(tmp_path)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert streamed.flash.mode == "hybrid"
    tokens = _tokens(2, 6)
    assert torch.equal(streamed.generate(tokens, **GREEDY), reference.generate(input_ids=tokens, **GREEDY))


REFUSED = {
    "dora": ("llama", LoraConfig(r=4, use_dora=True, target_modules=GATED)),
    "pissa": ("llama", LoraConfig(r=4, init_lora_weights="pissa", target_modules=GATED)),
    "olora": ("opt", LoraConfig(r=4, init_lora_weights="olora", target_modules="all-linear")),
    "loha": ("llama", LoHaConfig(r=4, target_modules=GATED)),
    "ia3": ("llama", IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3 in the layer": ("opt", IA3Config(target_modules=["q_proj", "fc2"], feedforward_modules=["fc2"])),
    "a whole layer": ("llama", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["mlp"])),
    "a whole part": ("opt", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["fc2"])),
    "biases": ("opt", LoraConfig(r=4, target_modules="all-linear", bias="all")),
    "parameters": ("llama", LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["up_proj.weight"])),
    "experts": ("mixtral", LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])),
    "every linear layer and expert": ("mixtral", LoraConfig(r=4, target_modules="all-linear")),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_other_adapters_are_refused_whole(case: str, tiny_pack: Make, tmp_path: Path) -> None:
    """Added, loaded by peft or by transformers: a named error, and the model is what it was, to the bit."""
    family, config = REFUSED[case]
    tiny = tiny_pack(family, "float32")
    _adapted(tiny, tmp_path, copy.deepcopy(config))
    model = _load(tiny.pack)
    before = _logits(model, _tokens(2, 6))
    for act in (
        lambda: get_peft_model(model, copy.deepcopy(config)),
        lambda: PeftModel.from_pretrained(model, tmp_path),
        lambda: model.load_adapter(str(tmp_path)),
        lambda: model.add_adapter(copy.deepcopy(config)),
    ):
        with pytest.raises(ConfigError, match="can't be used with this pack"):
            act()
        assert torch.equal(_logits(model, _tokens(2, 6)), before)
    _adapted(tiny, tmp_path / "plain", LoraConfig(r=4, target_modules=["q_proj"]))
    assert not torch.equal(_logits(PeftModel.from_pretrained(model, tmp_path / "plain"), _tokens(2, 6)), before)


def test_a_second_adapter_is_refused_without_harm_to_the_first(tiny_pack: Make, tmp_path: Path) -> None:
    tiny = tiny_pack("llama", "float32")
    _adapted(tiny, tmp_path, LoraConfig(r=4, target_modules=GATED))
    streamed = PeftModel.from_pretrained(_load(tiny.pack), tmp_path)
    before = _logits(streamed, _tokens(2, 6))
    with pytest.raises(ConfigError, match="can't be used"):
        streamed.add_adapter("second", LoraConfig(r=4, use_dora=True, target_modules=GATED))
    assert torch.equal(_logits(streamed, _tokens(2, 6)), before)


def test_weights_for_another_family_are_refused_whole(tiny_pack: Make, tmp_path: Path) -> None:
    """An adapter's file may hold more than its targets: what has no place in a streamed layer was ignored."""
    _adapted(tiny_pack("llama", "float32"), tmp_path, LoraConfig(r=4, target_modules=["o_proj", "gate_proj"]))
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.init_lora_weights = False
    config.save_pretrained(tmp_path)
    model = _load(tiny_pack("phi3", "float32").pack)
    before = _logits(model, _tokens(2, 6))
    for act in (lambda: PeftModel.from_pretrained(model, tmp_path), lambda: model.load_adapter(str(tmp_path))):
        with pytest.raises(ConfigError, match=r"gate_proj.* would go into a streamed layer, which takes plain LoRA"):
            act()
        assert torch.equal(_logits(model, _tokens(2, 6)), before)


def test_merging_is_refused_before_anything_is_merged(tiny_pack: Make, tmp_path: Path) -> None:
    tiny = tiny_pack("llama", "float32")
    _adapted(tiny, tmp_path / "all", LoraConfig(r=4, target_modules=GATED))
    streamed = PeftModel.from_pretrained(_load(tiny.pack), tmp_path / "all")
    before = _logits(streamed, _tokens(2, 6))
    for act in (streamed.merge_and_unload, streamed.merge_adapter, lambda: streamed.merge_and_unload(safe_merge=True)):
        with pytest.raises(ConfigError, match=r"can't be merged: model.layers.0.mlp.gate_proj is streamed"):
            act()
        assert torch.equal(_logits(streamed, _tokens(2, 6)), before)
    reference = _adapted(tiny, tmp_path / "attention", LoraConfig(r=4, target_modules=["q_proj"])).merge_and_unload()
    merged = PeftModel.from_pretrained(_load(tiny.pack), tmp_path / "attention").merge_and_unload()
    assert torch.equal(merged.generate(_tokens(2, 6), **GREEDY), reference.generate(_tokens(2, 6), **GREEDY))


def test_streamed_attention_takes_adapters_unmerged(whole_pack: Make, tmp_path: Path) -> None:
    tiny = whole_pack("llama", "float32")
    attention = ["q_proj", "o_proj"]
    reference = _adapted(tiny, tmp_path / "attention", LoraConfig(r=4, target_modules=attention))
    models = [
        PeftModel.from_pretrained(_load(tiny.pack, **each), tmp_path / "attention")
        for each in ({"pin": None}, {"pin": 0}, {"mode": "naive"})
    ]
    for shape in ((1, 1), (2, 6), (2, 40)):
        first, *others = [_logits(model, _tokens(*shape)) for model in models]
        assert torch.allclose(first, _logits(reference, _tokens(*shape)), atol=1e-5)
        assert all(torch.equal(each, first) for each in others), shape
    with pytest.raises(ConfigError, match=r"can't be merged: .*q_proj is streamed"):
        models[1].merge_and_unload()
    assert torch.equal(_logits(models[1], _tokens(2, 6)), _logits(models[0], _tokens(2, 6)))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # two tables, one that scales
def test_embeddings_and_the_output_layer_take_adapters(family: str, whole_pack: Make, tmp_path: Path) -> None:
    tiny, tokens = whole_pack(family, "float32"), _tokens(2, 9)
    reference = _adapted(
        tiny, tmp_path / "whole", LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])
    )
    reference.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    theirs = _logits(reference, tokens)
    for name, settings in (("plain", {}), ("plain", {"pin": None}), ("whole", {"pin": None})):
        streamed = PeftModel.from_pretrained(_load(tiny.pack, **settings), tmp_path / name)
        _assert_close(_logits(streamed, tokens), theirs, _logits(reference.double(), tokens))
        reference.float()
    streamed = PeftModel.from_pretrained(_load(tiny.pack), tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"can't be merged: model.embed_tokens is streamed"):
        streamed.merge_adapter()


def test_an_adapter_with_embeddings_of_its_own_leaves_streamed_ones_as_they_were(
    whole_pack: Make, tmp_path: Path
) -> None:
    tiny, tokens = whole_pack("llama", "float32"), _tokens(2, 9)
    _adapted(tiny, tmp_path, LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]))
    plain = _load(tiny.pack)
    before = _logits(plain, tokens)
    names = [name for name, _ in plain.named_parameters()]
    for load in (plain.load_adapter, lambda path: PeftModel.from_pretrained(plain, path)):
        with pytest.raises(ConfigError, match="save_embedding_layers=False"):
            load(str(tmp_path))
        assert torch.equal(_logits(plain, tokens), before)
        assert [name for name, _ in plain.named_parameters()] == names
        with pytest.raises(ValueError, match="No adapter loaded"):
            plain.active_adapters()


def test_an_output_layer_of_the_adapters_own(whole_pack: Make, tmp_path: Path) -> None:
    tiny, tokens = whole_pack("llama", "float32"), _tokens(2, 9)
    reference = _adapted(tiny, tmp_path, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    theirs = _logits(reference, tokens)
    ours = _logits(PeftModel.from_pretrained(_load(tiny.pack, pin=None), tmp_path), tokens)
    _assert_close(ours, theirs, _logits(reference.double(), tokens))
    with pytest.raises(ConfigError, match="weights are on flash"):
        PeftModel.from_pretrained(_load(tiny.pack), tmp_path)


def test_sparse_takes_adapters_on_attention_only(tiny_pack: Make, tmp_path: Path) -> None:
    tiny = tiny_pack("llama", "float32")
    pack = Path(shutil.copytree(tiny.pack, tmp_path / "pack"))
    write_calibration(pack, predicts_all=True, evaluation=evaluation(has_passed=True))
    reference = _adapted(tiny, tmp_path / "attention", LoraConfig(r=4, target_modules=["q_proj"]))
    sparse = PeftModel.from_pretrained(_load(pack, mode="sparse"), tmp_path / "attention")
    assert torch.equal(
        sparse.generate(input_ids=_tokens(1, 6), **GREEDY), reference.generate(input_ids=_tokens(1, 6), **GREEDY)
    )
    _adapted(tiny, tmp_path / "all", LoraConfig(r=4, target_modules=GATED))
    sparse = PeftModel.from_pretrained(_load(pack, mode="sparse"), tmp_path / "all")
    for shape in ((1, 1), (1, 40)):
        with pytest.raises(ConfigError, match=r"mode sparse predicts rows.*mode='hybrid'"):
            _logits(sparse, _tokens(*shape))


def test_dropout_of_an_adapter_in_training_is_refused(tiny_pack: Make) -> None:
    model = get_peft_model(
        _load(tiny_pack("llama", "float32").pack), LoraConfig(target_modules=GATED, lora_dropout=0.5)
    )
    with pytest.raises(ConfigError, match=r"training mode: call model.eval\(\)"):
        _logits(model, _tokens(1, 4))
    _logits(model.eval(), _tokens(1, 4))


def test_memory_beyond_the_budget_is_announced(tiny_pack: Make, caplog: pytest.LogCaptureFixture) -> None:
    pack = tiny_pack("llama", "float32").pack
    with pytest.raises(BudgetError) as refused:
        flashlm.load(pack, dram="1MiB", context=320)
    roomy, tight = _load(pack, pin=None), flashlm.load(pack, dram=refused.value.needed_bytes + (2 << 20), context=320)
    config = LoraConfig(r=20000, target_modules=["q_proj"])  # 31 MB
    get_peft_model(roomy, copy.deepcopy(config))
    assert not caplog.records
    get_peft_model(tight, config)
    assert any("to stay within it load the pack with pin" in record.getMessage() for record in caplog.records)
