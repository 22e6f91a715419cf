"""What a loaded pack can't do is refused by name, and leaves the model as it was; what it is asked about itself is true."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline
from transformers.pipelines import base as pipelines_base

import flashlm
from flashlm.engine.standin import StreamedWeight
from flashlm.errors import ConfigError
from flashlm.rows import kernels
from tests.engine.conftest import TinyPack, save_tokenizer

Make = Callable[..., TinyPack]
FAMILIES = ["llama", "opt", "gpt2", "phi3", "mixtral"]
TOKENS = torch.arange(3, 15).view(2, 6)


def _load(tiny: TinyPack) -> Any:
    return flashlm.load(tiny.pack, dram="3GiB", context=160, pin=0)


def _logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


class _Around(nn.Module):
    """Somebody's own module with the model in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def _layer(model: Any) -> Any:
    """The decoder layer around the first streamed one."""
    path = (model.flash.manifest.layers or model.flash.manifest.experts)[0].module
    while (
        "." in path
        and not hasattr(model.get_submodule(path), "self_attn")
        and not hasattr(model.get_submodule(path), "attn")
    ):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)


def _streamed(model: Any) -> Any:
    return model.get_submodule((model.flash.manifest.layers or model.flash.manifest.experts)[0].module)


MOVES: dict[str, Callable[[Any], Any]] = {
    "to a device": lambda model: model.to("meta"),
    "to a tensor's device": lambda model: model.to(torch.empty(1, device="meta")),
    "to a device that is not there": lambda model: model.to("cuda"),
    "cuda": lambda model: model.cuda(),
    "to a dtype": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.float16),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "share_memory": lambda model: model.share_memory(),
    "in another module": lambda model: _Around(model).to("meta"),
    "half in another module": lambda model: _Around(model).half(),
    "the base model": lambda model: model.base_model.to("meta"),
    "a decoder layer": lambda model: _layer(model).to("meta"),
    "a decoder layer emptied": lambda model: _layer(model).to_empty(device="cpu"),
    "a streamed layer": lambda model: _streamed(model).half(),
    "offload": lambda model: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "requires_grad": lambda model: model.requires_grad_(True),
    "requires_grad of a layer": lambda model: _layer(model).requires_grad_(True),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "deepcopy of a layer": lambda model: copy.deepcopy(_layer(model)),
    "pickle": pickle.dumps,
    "pickle of a layer": lambda model: pickle.dumps(_streamed(model)),
    "torch.save": lambda model: torch.save(model, "unused.pt"),
    "torch.save of weights": lambda model: torch.save(model.state_dict(), "unused.pt"),
    "save_pretrained": lambda model: model.save_pretrained("unused"),
    "push_to_hub": lambda model: model.push_to_hub("nobody/unused"),
}


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_moving_and_casting_are_refused_and_harm_nothing(family: str, tiny_pack: Make) -> None:
    model = _load(tiny_pack(family, "float32"))
    before = _logits(model)
    for name, move in MOVES.items():
        with pytest.raises(ConfigError, match=r"pack can't be|can't be moved|is streamed and can't"):
            move(model)
        assert torch.equal(_logits(model), before), name
    assert not any(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_moving_to_where_it_is_changes_nothing(dtype: str, tiny_pack: Make) -> None:
    model = _load(tiny_pack("llama", dtype))
    before = _logits(model)
    for same in (
        lambda: model.to("cpu"),
        lambda: model.to(device="cpu", dtype=getattr(torch, dtype)),
        model.cpu,
        {"float32": model.float, "float16": model.half}[dtype],
        lambda: model.requires_grad_(False),
        lambda: _Around(model).to("cpu"),
        lambda: accelerate.dispatch_model(model, {"": "cpu"}),
        lambda: accelerate.Accelerator(cpu=True).prepare(model),
        lambda: nn.DataParallel(model)(TOKENS),
    ):
        with torch.no_grad():
            same()
        assert torch.equal(_logits(model), before)
        assert model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_copies_say_what_to_do_instead(family: str, tiny_pack: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model = _load(tiny_pack(family, "float32"))
    for copying in COPIES.values():
        with pytest.raises(ConfigError, match=r"on flash|upload its folder"):
            copying(model)
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    _logits(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_counts_as_the_whole_model(family: str, tiny_pack: Make) -> None:
    tiny = tiny_pack(family, "bfloat16")
    model, reference = _load(tiny), tiny.reference("bfloat16")
    assert model.num_parameters() == reference.num_parameters() == sum(each.numel() for each in model.parameters())
    assert model.num_parameters(exclude_embeddings=True) == reference.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0
    assert model.get_memory_footprint(return_buffers=False) == reference.get_memory_footprint(return_buffers=False)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name, weight in reference.state_dict().items():
        if not name.endswith("bias"):
            assert shapes[name] == tuple(weight.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_are_refused_before_any_is_loaded(family: str, tiny_pack: Make) -> None:
    tiny = tiny_pack(family, "float32")
    model = _load(tiny)
    before = _logits(model)
    other = {name: weight + 1 for name, weight in tiny.reference("float32").state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    inner = {name.removeprefix(prefix): weight for name, weight in other.items() if name.startswith(prefix)}
    for strict in (True, False):
        for target, weights in (
            (model, other),
            (model.base_model, inner),
            (_Around(model), {f"model.{n}": w for n, w in other.items()}),
        ):
            with pytest.raises(ConfigError, match=r"would go into a streamed layer, whose .* strict=False") as caught:
                target.load_state_dict(weights, strict=strict)
            assert "LoRA" not in str(caught.value)
            assert torch.equal(_logits(model), before)
    assert model.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(_logits(model), before)
    weights = model.state_dict(keep_vars=True)
    streamed = {name.rpartition(".")[0] for name, weight in weights.items() if isinstance(weight, StreamedWeight)}
    streamed |= {entry.module for entry, _ in model.flash.manifest.files}
    starts = tuple(f"{name}." for name in streamed)
    rest = {n: w for n, w in tiny.reference("float32").state_dict().items() if not n.startswith(starts)}
    assert not model.load_state_dict(rest, strict=False).unexpected_keys  # as the message advises
    assert torch.equal(_logits(model), before)
    layer = model.get_submodule(model.flash.manifest.files[0][0].module)
    with pytest.raises(ConfigError, match="are not loaded from elsewhere"):
        layer.load_state_dict({"weight": torch.zeros(2, 2)}, strict=False)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_streamed_weights_can_be_named_but_not_used(family: str, tiny_pack: Make) -> None:
    model = _load(tiny_pack(family, "float32"))
    before = _logits(model)
    name, weight = next((n, w) for n, w in model.named_parameters() if type(w) not in (nn.Parameter, torch.Tensor))
    path = name.rpartition(".")[0]
    linear = model.get_submodule(path)
    uses: list[Callable[[], Any]] = [
        lambda: weight + 1,
        lambda: weight.data,
        lambda: weight.sum(),
        lambda: weight[0],
        lambda: weight.numpy(),
        lambda: weight.data_ptr(),
        lambda: weight.to(torch.float16),
        lambda: weight.copy_(torch.zeros_like(before)),
        lambda: torch.nn.init.normal_(weight),
        lambda: torch.nn.functional.linear(torch.zeros(1, weight.shape[1]), weight),
        lambda: nn.utils.parameters_to_vector(model.parameters()),
        lambda: setattr(linear, "weight", nn.Parameter(torch.zeros(weight.shape))),
        lambda: setattr(weight, "requires_grad", True),
        lambda: linear.register_forward_hook(print),
        lambda: model.apply(lambda module: getattr(module, "weight", before).data),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match=f"{path}.*streamed"):
            use()
    assert weight.device.type == "cpu"
    assert str(weight.shape) in f"{weight.shape} {weight!r}"
    assert torch.equal(_logits(model), before)


def test_streamed_parts_do_not_run_by_themselves(tiny_pack: Make) -> None:
    llama, opt = (_load(tiny_pack(family, "float32")) for family in ("llama", "opt"))
    for linear, width in (
        (llama.model.layers[0].mlp.gate_proj, 48),
        (llama.model.layers[0].mlp.down_proj, 88),
        (opt.model.decoder.layers[0].fc2, 88),
    ):
        with pytest.raises(ConfigError, match="never runs by itself"):
            linear(torch.zeros(1, width))


def test_parts_put_in_by_hand_are_refused(tiny_pack: Make) -> None:
    """Where the decoder layer holds the parts itself, the next pass says it."""
    llama = _load(tiny_pack("llama", "float32"))
    for name in ("up_proj", "act_fn"):
        with pytest.raises(ConfigError, match=f"mlp.{name} can't be replaced by Tanh"):
            setattr(llama.model.layers[0].mlp, name, nn.Tanh())
    _logits(llama)
    for name in ("fc1", "activation_fn", "fc2"):
        opt = _load(tiny_pack("opt", "float32"))
        setattr(opt.model.decoder.layers[1], name, nn.Tanh())
        with pytest.raises(ConfigError, match=rf"layers\.1\.{name}"):
            _logits(opt)


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_inputs_from_elsewhere_are_refused(family: str, tiny_pack: Make) -> None:
    model = _load(tiny_pack(family, "float32"))
    before = _logits(model)
    hidden = torch.zeros(3, 48)
    routing = () if model.flash.manifest.layers else (torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    calls: list[Callable[[], Any]] = [
        lambda: model(TOKENS.to("meta")),
        lambda: model.base_model(TOKENS.to("meta")),
        lambda: model(inputs_embeds=torch.zeros(1, 3, 48, device="meta")),
        lambda: model(TOKENS, attention_mask=torch.ones(2, 6, device="meta")),
        lambda: _streamed(model)(hidden.to("meta"), *routing),
        lambda: _streamed(model)(hidden.double(), *routing),
        lambda: _streamed(model)(hidden.long(), *routing),
        lambda: model(inputs_embeds=torch.zeros(1, 3, 48, requires_grad=True)),
    ]
    if routing:
        calls.append(lambda: _streamed(model)(hidden, routing[0].to("meta"), routing[1]))
    for call in calls:
        with pytest.raises(ConfigError, match=r"computes on the CPU|streamed layers take|for inference"):
            call()
        assert torch.equal(_logits(model), before)


def test_no_address_of_another_device_reaches_native_code(tiny_pack: Make) -> None:
    model = _load(tiny_pack("llama", "float16"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"), requires_grad=False)
    for tokens in (TOKENS[:1], TOKENS.repeat(6, 1)):
        with pytest.raises(ConfigError, match=r"on the CPU.*meta"):
            _logits(model, tokens)
    x, y = torch.zeros(1, 8), torch.zeros(1, 4)
    weight = torch.zeros(4, 8)
    rows = kernels.RowBlock(weight.data_ptr(), 4, 32, 8, torch.float32, 1)
    for call in (
        lambda: kernels.project(x.to("meta"), rows, 0, y),
        lambda: kernels.project(x, rows, 0, y.to("meta")),
        lambda: kernels.project(x, rows, 0, y, torch.zeros(4, device="meta")),
        lambda: kernels.accumulate(y.to("meta"), rows, x),
        lambda: kernels.accumulate(y, rows, x.to("meta")),
        lambda: kernels.linear(x.to("meta"), weight, None),
        lambda: kernels.linear(x, weight.to("meta"), None),
        lambda: kernels.linear(x, weight, torch.zeros(4, device="meta")),
        lambda: kernels.widen(rows, 0, torch.zeros(4, 8, device="meta")),
        lambda: kernels.project_blocks(x.to("meta"), [rows], 0, y),
        lambda: kernels.accumulate_blocks(y, [rows], x.to("meta")),
        lambda: kernels.ProductTable([weight.to("meta")], [(0, 0)]),
        lambda: kernels.ProductTable([weight], [(0, 0)], [torch.zeros(4, device="meta")]),
        lambda: kernels.ProductTable([weight], [(0, 0)]).project(x.to("meta"), y),
    ):
        with pytest.raises(ConfigError):
            call()


def test_a_pipeline_stays_on_the_cpu_where_there_is_a_gpu(
    tiny_pack: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is none here: transformers is told that there is, and would move the model to cuda:0."""
    model = _load(tiny_pack("llama", "float32"))
    save_tokenizer(tmp_path)
    asked = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False, "pad_token_id": 0}
    wanted = pipeline("text-generation", model=model, tokenizer=str(tmp_path), device="cpu")("w9 w10", **asked)
    monkeypatch.setattr(pipelines_base, "is_torch_cuda_available", lambda: True)
    run = pipeline("text-generation", model=model, tokenizer=str(tmp_path))
    assert run.device.type == "cpu"
    assert run("w9 w10", **asked) == wanted
    monkeypatch.setenv("FLASHLM_DRAM", "3GiB")
    loaded = AutoModelForCausalLM.from_pretrained(model.flash.pack)
    assert pipeline("text-generation", model=loaded, tokenizer=str(tmp_path)).device.type == "cpu"


def test_training_is_refused(tiny_pack: Make, tmp_path: Path) -> None:
    for family in ("llama", "mixtral"):
        model = _load(tiny_pack(family, "float32"))
        before = _logits(model)
        with pytest.raises(ConfigError, match="can't be trained"):
            Trainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True))
        with pytest.raises(ConfigError, match=r"call model\.eval"):
            _logits(model.train())
        assert torch.equal(_logits(model.eval()), before)


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_a_model_that_is_let_go_of_is_gone_at_once(family: str, tiny_pack: Make) -> None:
    """Guards must not tie the model to itself: the next load counts what the process still holds."""
    model = _load(tiny_pack(family, "float32"))
    _logits(model)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_the_vocabulary_can_be_resized(tiny_pack: Make) -> None:
    tiny = tiny_pack("llama", "float32")
    model, reference = _load(tiny), tiny.reference("float32")
    for each in (model, reference):
        each.resize_token_embeddings(100, mean_resizing=False)
    ours, theirs = _logits(model), _logits(reference)
    assert ours.shape == theirs.shape == (2, 6, 100)
    assert torch.equal(ours[..., :96].argmax(-1), theirs[..., :96].argmax(-1))
