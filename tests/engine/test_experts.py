"""Mode experts is the checkpoint's model, and what its cache holds changes no bit of what it computes."""

from __future__ import annotations

import shutil

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import flashlm
from flashlm.engine import experts as experts_module
from flashlm.engine.experts import BoundExperts
from flashlm.errors import BudgetError, ConfigError, PackError, StorageError
from flashlm.pack.manifest import RESIDENT_NAME, read_manifest, unit_path, write_manifest
from tests.models import EXPERT_FAMILIES
from tests.pack.packs import change_manifest

NUM_NEW_TOKENS = 32
SHAPES = [(1, 1), (3, 1), (1, 40), (3, 40)]
CLOSE = "ignore:the expert cache"


def prompt(batch_size, num_tokens):
    generator = torch.Generator().manual_seed(batch_size * 100 + num_tokens)
    ids = torch.randint(3, 96, (batch_size, num_tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def greedy(model, inputs, num_new_tokens=NUM_NEW_TOKENS):
    return model.generate(**inputs, max_new_tokens=num_new_tokens, min_new_tokens=num_new_tokens, do_sample=False)


def cache_sizes(pack):
    """Bounds on the cache, by name: one token's experts, half of all, all."""
    return {"floor": 0, "half": read_manifest(pack).streamed_bytes // 2, "all": None}


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_greedy_tokens_equal_transformers_in_fp32(family, tiny_pack):
    tiny = tiny_pack(family, "float32")
    reference = tiny.reference("float32")
    for name, bound in cache_sizes(tiny.pack).items():
        streamed = flashlm.load(tiny.pack, pin=bound)
        assert streamed.flash.mode == "experts"
        for shape in SHAPES:
            inputs = prompt(*shape)
            assert torch.equal(greedy(streamed, inputs), greedy(reference, inputs)), (name, shape)
        summary = streamed.flash.telemetry.decode()
        assert summary.hit_experts + summary.miss_experts > 0
        assert (summary.miss_experts == 0) == (name == "all")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_the_cache_changes_no_bit(family, dtype, tiny_pack):
    pack = tiny_pack(family, dtype).pack
    outputs = []
    for bound in cache_sizes(pack).values():
        model = flashlm.load(pack, pin=bound)
        logits = []
        for shape in ((1, 1), (3, 1), (3, 40), (1, 40)):  # the cache is another one every time
            out = model.generate(
                **prompt(*shape),
                max_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            logits.append(torch.stack(out.logits))
        outputs.append((model.flash.placement.cache_bytes, logits))
    sizes = [size for size, _ in outputs]
    assert sizes[0] < sizes[1] < sizes[2]
    for _, logits in outputs[1:]:
        for mine, first in zip(logits, outputs[0][1], strict=True):
            assert torch.equal(mine, first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_logits_are_within_rounding_of_transformers_in_16_bits(family, dtype, tiny_pack, monkeypatch):
    """torch rounds after every step; our error against fp32 on the same weights may not exceed its error.

    Rounding can send a token to another expert, which no bound covers; so all three models take the exact one's routes.
    """
    tiny = tiny_pack(family, dtype)
    exact = tiny.reference(dtype).to(torch.float32)
    rounded = tiny.reference(dtype)
    streamed = flashlm.load(tiny.pack, pin=0)
    for shape in SHAPES:
        inputs = prompt(*shape)
        with torch.no_grad():
            routes = Routes(exact)
            truth = exact(**inputs).logits
            routes.impose(rounded)
            theirs = (rounded(**inputs).logits.float() - truth).abs().max()
            routes.impose(streamed)
            ours = (streamed(**inputs).logits.float() - truth).abs().max()
            routes.release()
        eps = torch.finfo(getattr(torch, dtype)).eps
        assert ours <= 1.5 * theirs + eps * truth.abs().max(), shape


class Routes:
    """Records which experts a model's tokens go to, with which weights, and makes other models take the same."""

    def __init__(self, model):
        self._taken = []
        self._hooks = [
            module.register_forward_pre_hook(lambda module, args: self._taken.append(args[1:]))
            for module in experts_of(model)
        ]

    def impose(self, model):
        self.release()
        taken = iter(self._taken)

        def replace(module, args):
            index, weights = next(taken)
            return args[0], index, weights.to(args[2].dtype)

        self._hooks = [module.register_forward_pre_hook(replace) for module in experts_of(model)]

    def release(self):
        for hook in self._hooks:
            hook.remove()


def experts_of(model):
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]


def test_a_prompt_reads_each_needed_expert_once(tiny_pack):
    pack = tiny_pack("olmoe").pack
    model = flashlm.load(pack, pin=0)
    with torch.no_grad():
        model(**prompt(3, 40))
    (record,) = model.flash.telemetry.records
    num_experts = sum(entry.num_experts for entry in model.flash.manifest.experts)
    assert record.hit_experts + record.miss_experts == num_experts  # 120 tokens need them all
    assert record.num_reads == record.miss_experts
    assert record.bytes_read == record.miss_experts * model.flash.placement.expert_bytes
    assert sum(each.num_misses for each in model.flash.experts.traffic) == record.miss_experts


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_failed_read_leaves_no_expert_behind(num_tokens, tiny_pack, tmp_path):
    tiny = tiny_pack("qwen3_moe")
    expected = greedy(flashlm.load(tiny.pack), prompt(1, num_tokens), 4)
    pack = shutil.copytree(tiny.pack, tmp_path / "pack")
    model = flashlm.load(pack, pin=0)
    path = unit_path(pack, model.flash.manifest.experts[1])
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(StorageError, match=r"experts-00001\.rows"):
        greedy(model, prompt(1, num_tokens), 4)
    path.write_bytes(content)
    store = model.flash.experts
    for layer, capacity in enumerate(model.flash.placement.experts):
        assert len(store.cache.held(layer)) <= capacity
    assert torch.equal(greedy(model, prompt(1, num_tokens), 4), expected)


def test_numbers_that_are_no_experts_count_for_nothing(tiny_pack):
    model = flashlm.load(tiny_pack("mixtral").pack)
    module = model.get_submodule(model.flash.manifest.experts[0].module)
    assert isinstance(module.flash_experts, BoundExperts)
    tokens = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 8], [8, 8], [3, 1], [9, 2], [7, 8]])
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    valid = index < 8
    output = module(tokens, index, weights)
    assert torch.equal(output, module(tokens, index.clamp(max=7), weights * valid))
    assert not output[1].any()


def test_a_gradient_is_refused(tiny_pack):
    model = flashlm.load(tiny_pack("mixtral").pack)
    module = model.get_submodule(model.flash.manifest.experts[0].module)
    with pytest.raises(ConfigError, match="for inference"):
        module(torch.randn(1, 48, requires_grad=True), torch.tensor([[0]]), torch.ones(1, 1))


def test_plain_from_pretrained_works(tiny_pack):
    tiny = tiny_pack("deepseek_v3")
    expected = greedy(tiny.reference("float32"), prompt(1, 5), 8)
    assert torch.equal(greedy(AutoModelForCausalLM.from_pretrained(tiny.pack), prompt(1, 5), 8), expected)


def test_modes_and_packs_that_do_not_go_together_are_refused(tiny_pack):
    with pytest.raises(ConfigError, match="this pack streams experts"):
        flashlm.load(tiny_pack("mixtral").pack, mode="hybrid")
    with pytest.raises(ConfigError, match="has no experts"):
        flashlm.load(tiny_pack("llama").pack, mode="experts")
    assert flashlm.load(tiny_pack("mixtral").pack, mode="experts").flash.mode == "experts"


def test_a_budget_below_one_tokens_experts_is_refused(tiny_pack):
    with pytest.raises(BudgetError, match="one token's experts"):
        flashlm.load(tiny_pack("mixtral").pack, dram="1MiB")


def test_a_small_cache_is_announced(tiny_pack, caplog):
    flashlm.load(tiny_pack("olmoe").pack, pin=0)
    assert "the expert cache holds 6 experts, a token uses 6" in caplog.text


def test_a_pack_of_another_model_is_refused(tiny_pack, tmp_path):
    pack = shutil.copytree(tiny_pack("mixtral").pack, tmp_path / "pack")
    change_manifest(pack, lambda content: content["units"][1].update(module="model.layers.7.mlp.experts"))
    with pytest.raises(PackError, match=r"module of streamed unit 1 is 'model\.layers\.7\.mlp\.experts'"):
        flashlm.load(pack)


def test_a_missing_router_is_refused(tiny_pack, tmp_path):
    """transformers alone would fill it with random numbers and go on."""
    pack = shutil.copytree(tiny_pack("mixtral").pack, tmp_path / "pack")
    path = pack / RESIDENT_NAME
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    manifest = read_manifest(pack)
    checksums = (xxhash.xxh3_64_hexdigest(path.read_bytes()),)
    changed = {"num_bytes": path.stat().st_size, "checksums": checksums}
    resident = manifest.resident.model_copy(update=changed)
    write_manifest(pack, manifest.model_copy(update={"resident": resident}))
    with pytest.raises(PackError, match=r"resident\.safetensors lacks model\.layers\.1\.mlp\.gate\.weight") as error:
        flashlm.load(pack)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_products_in_pieces_are_those_of_whole_experts(family, tiny_pack, monkeypatch):
    """Large experts are multiplied some rows at a time; biases, gates and alternating parts must follow."""
    pack = tiny_pack(family).pack
    outputs = []
    for rows in (16, 1 << 20):
        monkeypatch.setattr(experts_module, "rows_per_product", lambda layout, rows=rows: min(rows, layout.block_rows))
        with torch.no_grad():
            outputs.append(flashlm.load(pack)(**prompt(3, 40)).logits)
    eps = torch.finfo(torch.float32).eps
    assert (outputs[0] - outputs[1]).abs().max() <= 64 * eps * outputs[1].abs().max()
