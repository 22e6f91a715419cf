"""What transformers' programs hand to a causal model: served as they mean it, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from flashlm.errors import ConfigError, PackError
from flashlm.pru import PRUConfig, PRUForCausalLM
from flashlm.pru.training.encoding import WordEncoding
from flashlm.pru.training.saved import load_model

SMALL = {"vocab_size": 50, "embedding_size": 16, "hidden_size": 24, "num_layers": 2, "groups": 2}
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["pru", "lstm"])
def model(request: pytest.FixtureRequest) -> PRUForCausalLM:
    return made(request.param)


def made(arch: str = "pru", **more: Any) -> PRUForCausalLM:
    torch.manual_seed(0)
    model = PRUForCausalLM(PRUConfig(**SMALL, arch=arch, init="per_group", **more)).eval()
    with torch.no_grad():  # far from uniform, so that a token more or less in the state changes what is generated
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("split", [1, 4, 8])
def test_generate_goes_on_from_a_state_with_all_new_tokens(model: PRUForCausalLM, split: int, use_cache: bool) -> None:
    tokens = torch.randint(1, 50, (2, 9))
    whole = model.generate(tokens, max_new_tokens=8, **GREEDY)
    state = model(tokens[:, :split]).state
    rest = model.generate(tokens[:, split:], state=state, max_new_tokens=8, use_cache=use_cache, **GREEDY)
    assert torch.equal(rest, whole[:, split:])


def test_generate_goes_on_from_what_generate_returned(model: PRUForCausalLM) -> None:
    tokens, turn = torch.randint(1, 50, (2, 5)), torch.randint(1, 50, (2, 3))
    first = model.generate(tokens, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, turn], dim=1)
    new = text[:, first.sequences.shape[1] - 1 :]  # the state has not seen the last token
    second = model.generate(new, state=first.past_key_values, max_new_tokens=4, **GREEDY)
    assert torch.equal(second[:, -4:], model.generate(text, max_new_tokens=4, **GREEDY)[:, -4:])


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_nothing(model: PRUForCausalLM, side: str) -> None:
    texts = [torch.randint(1, 50, (length,)) for length in (3, 7, 1)]
    mask = torch.zeros(3, 7, dtype=torch.long)
    ids = torch.full((3, 7), 9)
    for row, text in enumerate(texts):
        spread = len(text) if side != "holes" else 7
        places = torch.linspace(0, spread - 1, len(text)).long() + (7 - len(text) if side == "left" else 0)
        mask[row, places], ids[row, places] = 1, text
    output = model(ids, attention_mask=mask)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, **GREEDY)
    for row, text in enumerate(texts):
        alone = model(text[None])
        torch.testing.assert_close(output.logits[row, mask[row] == 1], alone.logits[0], rtol=0, atol=1e-5)
        for got, wanted in zip(output.state, alone.state, strict=True):
            torch.testing.assert_close(got[0][:, row], wanted[0][:, 0], rtol=0, atol=1e-5)
            torch.testing.assert_close(got[1][:, row], wanted[1][:, 0], rtol=0, atol=1e-5)
        expected = model.generate(text[None], max_new_tokens=5, **GREEDY)[0, len(text) :]
        assert torch.equal(generated[row, 7:], expected)


def test_padding_after_a_state_counts_for_the_new_tokens_only(model: PRUForCausalLM) -> None:
    tokens = torch.randint(1, 50, (2, 8))
    state = model(tokens[:, :3]).state
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 3] = 0
    output = model(tokens[:, 3:], state=state, attention_mask=mask)
    skipped = torch.cat([tokens[:1, :3], tokens[:1, 4:]], dim=1)
    torch.testing.assert_close(output.logits[:1, 1:], model(skipped).logits[:, 3:], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.logits[1:], model(tokens[1:]).logits[:, 3:], rtol=0, atol=1e-5)


def test_a_pipeline_of_saved_words_serves_batches(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    WordEncoding(["<eos>", *(f"w{number}" for number in range(49))]).save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left", pad_token="<eos>")
    run = pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer, device="cpu")
    texts = ["w3 w4 w5 w6", "w7", "w8 w9"]
    options = {"max_new_tokens": 4, "do_sample": False}
    alone = [run(text, **options) for text in texts]
    assert run(texts, batch_size=3, **options) == alone


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"past_key_values": ()}, r"'past_key_values': the recurrent state is the cache: pass `state`"),
        ({"inputs_embeds": torch.zeros(1, 3, 16)}, "'inputs_embeds': this model takes input_ids only"),
        ({"output_attentions": True}, "'output_attentions': a recurrent model has no attentions"),
        ({"position_ids": torch.arange(3)[None]}, "'position_ids': a recurrent model has no positions"),
        ({"token_type_ids": torch.zeros(1, 3)}, "'token_type_ids': this model has no token types"),
        ({"stat": None}, "'stat': known are those of its forward"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask must be \(1, 3\) like input_ids, got \(1, 4\)"),
        ({"attention_mask": torch.tensor([[1, 2, 2]])}, "attention_mask must be of ones and zeros"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask must be"),
        ({"logits_to_keep": -1}, "logits_to_keep must be at least 0, got -1"),
        ({"labels": torch.ones(1, 3, dtype=torch.long), "logits_to_keep": 1}, "labels need the logits of all tokens"),
        ({"labels": torch.ones(1, 2, dtype=torch.long)}, r"labels must be \(1, 3\) like input_ids, got \(1, 2\)"),
        ({"labels": torch.full((1, 3), -100)}, "labels have nothing to predict"),
        ({"input_ids": None}, "got none: this model takes token ids only"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, r"input_ids must be \(batch, tokens\), got \(3,\)"),
    ],
)
def test_what_is_not_served_is_refused_by_name(model: PRUForCausalLM, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(**({"input_ids": torch.tensor([[1, 2, 3]])} | given))


def test_what_asks_for_nothing_is_taken(model: PRUForCausalLM) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    asked = model(tokens, past_key_values=None, output_attentions=False, inputs_embeds=None, output_hidden_states=False)
    assert torch.equal(asked.logits, model(tokens).logits)
    assert asked.hidden_states is None


def test_hidden_states_are_the_embeddings_and_each_layers_output(model: PRUForCausalLM) -> None:
    tokens = torch.randint(1, 50, (2, 6))
    output = model(tokens, output_hidden_states=True)
    assert [tuple(each.shape) for each in output.hidden_states] == [(2, 6, 16), (2, 6, 24), (2, 6, 16)]
    assert torch.equal(output.hidden_states[0], model.embedding(tokens))
    torch.testing.assert_close(model.decoder(output.hidden_states[-1]), output.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.hidden_states[1][:, -1], output.state[0][0][0], rtol=0, atol=1e-6)
    made = model.generate(
        tokens, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True, output_logits=True, **GREEDY
    )
    torch.testing.assert_close(model.decoder(made.hidden_states[1][-1][:, -1]), made.logits[1], rtol=0, atol=1e-5)


def test_positions_are_kept_by_count_or_by_index(model: PRUForCausalLM) -> None:
    tokens = torch.randint(1, 50, (2, 6))
    whole = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, whole[:, -2:], rtol=0, atol=1e-6)
    chosen = torch.tensor([0, 4])
    torch.testing.assert_close(model(tokens, logits_to_keep=chosen).logits, whole[:, chosen], rtol=0, atol=1e-6)


def test_assisting_and_foreign_caches_are_refused_by_name(model: PRUForCausalLM) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    llama = LlamaForCausalLM(config).eval()
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(ConfigError, match="can't be an assistant_model"):
        llama.generate(tokens, assistant_model=model, max_new_tokens=3, **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens, assistant_model=llama, max_new_tokens=3, **GREEDY)
    with pytest.raises(ConfigError, match="'past_key_values': the recurrent state is the cache"):
        model.generate(tokens, past_key_values=model(tokens).state, max_new_tokens=3, **GREEDY)
    with pytest.raises(ConfigError, match="'inputs_embeds'"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 16), max_new_tokens=3, **GREEDY)
    with pytest.raises(ConfigError, match="'output_attentions'"):
        model.generate(tokens, output_attentions=True, return_dict_in_generate=True, max_new_tokens=3, **GREEDY)


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens, whose labels are ignored in different numbers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(1, 50, (16, 7), generator=generator)
        self.labels = self.ids.clone()
        for row in range(16):
            self.labels[row, : row % 6] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_trainer_takes_the_same_step_in_one_batch_and_accumulated(tmp_path: Path, label_smoothing: float) -> None:
    steps = []
    for batch, accumulated in ((16, 1), (4, 4)):
        model = made(dropout=0.0).double()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            label_smoothing_factor=label_smoothing,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
        trainer.train()
        pairs = zip(model.parameters(), before, strict=True)
        steps.append([(parameter.detach() - old) for parameter, old in pairs])
        predictions = trainer.predict(Texts()).predictions  # 16 rows in batches of 8: logits alone, not the states
        assert predictions.shape == (16, 7, 50)
    for one, other in zip(*steps, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)  # fp64, some hundred roundings of sums below 10
    if not label_smoothing:  # and it is the step along the mean over all labels that count
        model, texts = made(dropout=0.0).double(), Texts()
        model(texts.ids, labels=texts.labels).loss.backward()
        for step, parameter in zip(steps[0], model.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(step, -parameter.grad, rtol=0, atol=1e-12)


def test_ignored_labels_do_not_count(model: PRUForCausalLM) -> None:
    tokens = torch.randint(1, 50, (2, 6))
    labels = tokens.clone()
    labels[0, :4] = labels[1, 5] = -100
    output = model(tokens, labels=labels)
    negative = -output.logits.log_softmax(-1)
    counted = [negative[row, position - 1, labels[row, position]] for row, position in torch.nonzero(labels != -100)]
    counted = [each for each, (_, at) in zip(counted, torch.nonzero(labels != -100), strict=True) if at > 0]
    torch.testing.assert_close(output.loss, torch.stack(counted).mean())
    scaled = model(tokens, labels=labels, num_items_in_batch=torch.tensor(5)).loss
    torch.testing.assert_close(scaled, torch.stack(counted).sum() / 5)
    nothing = model(tokens, labels=torch.full_like(tokens, -100), num_items_in_batch=5).loss
    assert nothing.item() == 0.0


def test_a_model_from_the_meta_device_is_initialised(model: PRUForCausalLM) -> None:
    with torch.device("meta"):
        empty = PRUForCausalLM(model.config)
    filled = empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in filled.parameters():
            parameter.fill_(float("nan"))
    filled.init_weights()
    fresh = PRUForCausalLM(model.config)
    for (name, got), wanted in zip(filled.named_parameters(), fresh.parameters(), strict=True):
        assert got.std(unbiased=False).item() == pytest.approx(wanted.std(unbiased=False).item(), rel=0.3), name


@pytest.mark.parametrize("arch", ["pru", "lstm"])
def test_weights_that_a_file_lacks_are_initialised_or_refused(tmp_path: Path, arch: str) -> None:
    model = made(arch)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    lacking = next(name for name in weights if "layers.0" in name and ("context" in name or "weight_hh" in name))
    wanted = weights.pop(lacking)
    save_file(weights, path, {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    given = dict(loaded.named_parameters())
    assert given[lacking].std().item() == pytest.approx(wanted.std().item() / 4, rel=0.3)  # `made` has scaled it
    for name, value in weights.items():
        assert torch.equal(given[name], value), name
    with pytest.raises(PackError, match=f"has no {lacking}"):
        load_model(tmp_path)


def test_several_sequences_of_each_go_on_from_a_state(model: PRUForCausalLM) -> None:
    tokens = torch.randint(1, 50, (3, 6))
    with torch.no_grad():
        state = model(tokens[:, :4]).state
    asked = {"max_new_tokens": 5, "do_sample": True, "top_k": 20, "pad_token_id": 0, "num_return_sequences": 2}
    torch.manual_seed(1)
    whole = model.generate(tokens, **asked)
    torch.manual_seed(1)
    rest = model.generate(tokens[:, 4:], state=state, **asked)
    assert torch.equal(rest, whole[:, 4:])
    with pytest.raises(ConfigError, match="for 2 sequences, got"):
        model.generate(tokens[:2, 4:], state=state, **asked)
