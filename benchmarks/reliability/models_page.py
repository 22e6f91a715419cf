"""Write `docs/models.md` from the results of `models.py`: one row for each model, by the name that people know it by."""

from __future__ import annotations

from typing import Any

# Names by which people know what a model type stands for: the family first, then releases that go under it.
NAMES: dict[str, str] = {
    "afmoe": "Arcee Trinity (AFMoE)",
    "apertus": "Apertus 8B, 70B",
    "arcee": "Arcee AFM 4.5B",
    "aria_text": "Aria (text)",
    "axk1": "A.X K1",
    "axk2": "A.X K2",
    "bailing_hybrid": "Ling and Ring, linear attention (Bailing)",
    "bamba": "Bamba 9B",
    "bart": "BART (decoder)",
    "beam": "Beam",
    "bert": "BERT",
    "bert-generation": "BERT (generation)",
    "big_bird": "BigBird",
    "bigbird_pegasus": "BigBird-Pegasus (decoder)",
    "biogpt": "BioGPT",
    "bitnet": "BitNet b1.58",
    "blenderbot": "Blenderbot (decoder)",
    "blenderbot-small": "Blenderbot Small (decoder)",
    "bloom": "BLOOM, BLOOMZ",
    "blt": "BLT, Byte Latent Transformer",
    "camembert": "CamemBERT",
    "codegen": "CodeGen",
    "cohere": "Command R, R+; Aya 23",
    "cohere2": "Command R7B, Command A",
    "cohere2_moe": "Command, mixture of experts",
    "cohere_compass_text": "Cohere Compass (text)",
    "cpmant": "CPM-Ant",
    "ctrl": "CTRL",
    "cwm": "CWM, Code World Model",
    "data2vec-text": "data2vec (text)",
    "dbrx": "DBRX",
    "deepseek_v2": "DeepSeek-V2, V2.5, Coder V2",
    "deepseek_v3": "DeepSeek-V3, V3.1, R1; Kimi K2",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
    "diffllama": "DiffLlama",
    "doge": "Doge",
    "dots1": "dots.llm1",
    "dots3_note": "dots3 Note",
    "dots3_note_text": "dots3 Note (text)",
    "electra": "ELECTRA",
    "emu3": "Emu3",
    "ernie": "ERNIE 1 to 3",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B, 300B-A47B",
    "exaone4": "EXAONE 4.0",
    "exaone_moe": "EXAONE, mixture of experts (K-EXAONE)",
    "falcon": "Falcon 7B, 40B, 180B",
    "falcon_h1": "Falcon-H1",
    "falcon_mamba": "Falcon Mamba",
    "flex_olmo": "FlexOlmo",
    "flint": "Flint",
    "fuyu": "Fuyu 8B",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text and vision)",
    "gemma3_text": "Gemma 3 (text)",
    "gemma3n": "Gemma 3n",
    "gemma3n_text": "Gemma 3n (text)",
    "gemma4": "Gemma 4",
    "gemma4_assistant": "Gemma 4 (draft model)",
    "gemma4_text": "Gemma 4 (text)",
    "gemma4_unified": "Gemma 4 unified",
    "gemma4_unified_assistant": "Gemma 4 unified (draft model)",
    "gemma4_unified_text": "Gemma 4 unified (text)",
    "git": "GIT",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4-0414 9B, 32B; Z1",
    "glm4_moe": "GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm_moe_dsa": "GLM-5",
    "got_ocr2": "GOT-OCR 2.0",
    "gpt-sw3": "GPT-SW3",
    "gpt2": "GPT-2, DistilGPT-2",
    "gpt_bigcode": "StarCoder, SantaCoder (GPT-BigCode)",
    "gpt_neo": "GPT-Neo, TinyStories",
    "gpt_neox": "GPT-NeoX 20B, Pythia, Dolly 2",
    "gpt_neox_japanese": "GPT-NeoX Japanese",
    "gpt_oss": "gpt-oss 20B, 120B (bf16)",
    "gptj": "GPT-J 6B",
    "granite": "Granite 3, 3.1, 3.3",
    "granite_swa": "Granite, sliding window",
    "granitemoe": "Granite 3 A400M, A800M (experts)",
    "granitemoe_swa": "Granite (experts), sliding window",
    "granitemoehybrid": "Granite 4.0 H",
    "granitemoeshared": "Granite (experts, shared expert)",
    "helium": "Helium",
    "hrm_text": "HRM-Text",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "hunyuan_v1_moe": "Hunyuan A13B",
    "hy_v3": "Hunyuan (HY V3)",
    "hy_v4": "Hunyuan (HY V4)",
    "hyperclovax": "HyperCLOVA X",
    "inkling2_text": "Inkling 2 (text)",
    "inkling_text": "Inkling (text)",
    "internlm3": "InternLM 3",
    "iquestcoder": "IQuest Coder",
    "jais2": "Jais 2",
    "jamba": "Jamba",
    "jetmoe": "JetMoE",
    "kimi_linear": "Kimi Linear 48B-A3B",
    "kolibri1": "Kolibri 1",
    "laguna": "Laguna",
    "lfm2": "LFM2, Liquid 350M to 2.6B",
    "lfm2_moe": "LFM2 8B-A1B (experts)",
    "lfm3": "LFM3",
    "llama": "Llama 1, 2, 3, 3.1, 3.2, 3.3; TinyLlama, Vicuna, Yi, SmolLM, SmolLM2, DeepSeek LLM, R1-Distill-Llama",
    "llama4": "Llama 4 Scout, Maverick",
    "llama4_text": "Llama 4 (text)",
    "longcat_flash": "LongCat-Flash",
    "mamba": "Mamba",
    "mamba2": "Mamba 2",
    "marian": "MarianMT (decoder)",
    "mbart": "mBART (decoder)",
    "megatron-bert": "Megatron-BERT",
    "mellum": "Mellum",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minicpm3": "MiniCPM3",
    "minimax": "MiniMax-Text-01, M1",
    "minimax_m2": "MiniMax-M2",
    "minimax_m3_vl_text": "MiniMax-M3 (text)",
    "ministral": "Ministral 8B",
    "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Nemo, Small; Zephyr",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "mllama": "Llama 3.2 Vision",
    "modernbert-decoder": "ModernBERT decoder, Ettin decoders",
    "moshi": "Moshi",
    "moss_transcribe_diarize": "MOSS Transcribe Diarize",
    "mpt": "MPT 7B, 30B",
    "musicgen": "MusicGen",
    "musicgen_melody": "MusicGen Melody",
    "mvp": "MVP (decoder)",
    "nanochat": "nanochat",
    "nemotron": "Nemotron-4, Minitron",
    "nemotron_h": "Nemotron-H, Nemotron Nano 2 and 3",
    "olmo": "OLMo 1B, 7B",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmo_hybrid": "OLMo Hybrid",
    "olmoe": "OLMoE 1B-7B",
    "openai-gpt": "GPT (the first)",
    "opt": "OPT 125M to 66B, Galactica",
    "pegasus": "Pegasus (decoder)",
    "persimmon": "Persimmon 8B",
    "phi": "Phi-1, 1.5, 2",
    "phi3": "Phi-3, 3.5 mini, medium; Phi-4, Phi-4-mini",
    "phi4_multimodal": "Phi-4-multimodal",
    "phimoe": "Phi-3.5-MoE",
    "plbart": "PLBART (decoder)",
    "prophetnet": "ProphetNet (decoder)",
    "qwen2": "Qwen1.5, Qwen2, Qwen2.5, QwQ; R1-Distill-Qwen",
    "qwen2_moe": "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    "qwen3": "Qwen3 0.6B to 32B",
    "qwen3_5": "Qwen3.5 (text and vision)",
    "qwen3_5_moe": "Qwen3.5 (experts, text and vision)",
    "qwen3_5_moe_text": "Qwen3.5 (experts, text)",
    "qwen3_5_text": "Qwen3.5 (text)",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder",
    "qwen3_next": "Qwen3-Next-80B-A3B",
    "qwen4_exp": "Qwen4 experimental (text and vision)",
    "qwen4_exp_text": "Qwen4 experimental (text)",
    "recurrent_gemma": "RecurrentGemma",
    "reformer": "Reformer",
    "rembert": "RemBERT",
    "roberta": "RoBERTa",
    "roberta-prelayernorm": "RoBERTa-PreLayerNorm",
    "roc_bert": "RoCBert",
    "roformer": "RoFormer",
    "rwkv": "RWKV-4",
    "seed_oss": "Seed-OSS 36B",
    "smollm3": "SmolLM3",
    "solar_open": "Solar Open",
    "stablelm": "StableLM 2, 3B",
    "starcoder2": "StarCoder2",
    "trocr": "TrOCR (decoder)",
    "vaultgemma": "VaultGemma",
    "whisper": "Whisper (decoder)",
    "xglm": "XGLM",
    "xlm": "XLM",
    "xlm-roberta": "XLM-RoBERTa",
    "xlm-roberta-xl": "XLM-RoBERTa-XL",
    "xlnet": "XLNet",
    "xlstm": "xLSTM 7B",
    "xmod": "X-MOD",
    "youtu": "Youtu-LLM",
    "zamba": "Zamba",
    "zamba2": "Zamba2",
    "zaya": "ZAYA1",
}
# What the refused ones are, for those who wonder why: groups of model types.
GROUPS: dict[str, tuple[str, ...]] = {
    "an encoder": (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "git", "megatron-bert",
        "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta",
        "xlm-roberta-xl", "xlnet", "xmod",
    ),
    "the decoder of an encoder-decoder": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
        "prophetnet", "trocr", "whisper",
    ),
    "a state-space or recurrent model, with few or no feed-forward layers": (
        "falcon_mamba", "mamba", "mamba2", "rwkv", "zamba", "zamba2",
    ),
}  # fmt: skip
EXACT_ZEROS = ("relu", "relu2", "fatrelu")
HEAD = """# Models

<!-- Written by `python benchmarks/reliability/models.py --docs` from benchmarks/results/reliability-models.json. -->

Find your model by name, or by `model_type` in its config.json. Every row was run: `benchmarks/reliability/models.py`
makes a tiny random model of each of the {tries} causal model types of transformers {transformers}, converts it in fp32,
loads it with nothing pinned, and compares logits (2 sequences of 1 and of 40 tokens) and greedy tokens with
transformers. **{equal} are equal, {different} differ, {refused} are refused by name, {not_built} could not be built here
by transformers itself**{error}. Equal means: at most {max_error:g} of the largest logit apart, and the same tokens. On
random weights, that is; no large trained model has been run yet.

A model that is not here but has one of these types converts too, fine-tuned ones among them. GGUF files, and
safetensors in MXFP4 or FP8, are kept as they are ([sources.md](sources.md)). Not converted: checkpoints that are
quantised in other ways (GPTQ, AWQ: take the 16-bit one), and pickles. Of releases that hold more than the model, such
as layers that predict several tokens ahead (DeepSeek-V3, GLM-4.5, Qwen3-Next), what transformers
ignores is left out, and the conversion says so.

| runs as | streamed | modes |
|---|---|---|
| dense | every feed-forward layer, block by block | `hybrid`, exact; after `flashlm calibrate` also `sparse`, approximate |
| dense, zeros | the same; its activation (ReLU, ReLU squared) has exact zeros, for which `sparse` is made | the same |
| dense, learned | the same; its activation has weights of its own, which stay in DRAM | `hybrid` only |
| experts | the routed experts, each as a whole; linear layers where memory ends (`docs/experts.md`) | `experts`, exact |

## Served

| model | `model_type` | runs as | activation | since |
|---|---|---|---|---|
"""


def page(document: dict[str, Any]) -> str:
    """The text of `docs/models.md`."""
    types: dict[str, dict[str, Any]] = document["types"]
    counts = document["counts"]
    head = HEAD.format(
        tries=document["tries"],
        transformers=document["transformers"],
        equal=counts["equal"],
        different=counts["different"],
        refused=counts["refused"],
        not_built=counts["not built"],
        error=f", {counts['error']} failed otherwise" if counts["error"] else "",
        max_error=document["max_error_allowed"],
    )
    by_outcome = {
        outcome: sorted((name for name in types if types[name]["outcome"] == outcome), key=_sort_key)
        for outcome in counts
    }
    lines = [_served(name, types[name]) for name in by_outcome["equal"]]
    lines += _section("Refused by name", "why", by_outcome["refused"], types)
    lines += _section("Not built", "what transformers says", by_outcome["not built"], types)
    lines += _section("Different", "what came out", by_outcome["different"], types)
    lines += _section("Failed", "error", by_outcome["error"], types)
    return head + "\n".join(lines) + "\n"


def _sort_key(model_type: str) -> tuple[str, str]:
    return (shown_name(model_type).lower(), model_type)


def shown_name(model_type: str) -> str:
    """The name that people know, or the type itself."""
    return NAMES.get(model_type, model_type)


def runs_as(result: dict[str, Any]) -> str:
    """The word of the first table."""
    if result["streams"] == "experts":
        return "experts"
    if result["activation"] in EXACT_ZEROS:
        return "dense, zeros"
    return "dense, learned" if result["activation"] in ("xielu", "prelu") else "dense"


def _served(model_type: str, result: dict[str, Any]) -> str:
    gate = ", gated" if result["has_gate"] else ""
    activation = "its own" if result["activation"] == "custom" else f"{result['activation']}{gate}"
    return f"| {shown_name(model_type)} | `{model_type}` | {runs_as(result)} | {activation} | {result['since']} |"


def _section(title: str, column: str, names: list[str], types: dict[str, Any]) -> list[str]:
    if not names:
        return []
    rows = [
        f"| {shown_name(name)} | `{name}` | {_what(name)}{_cell(types[name].get('reason', ''))} |" for name in names
    ]
    return ["", f"## {title}", "", f"| model | `model_type` | {column} |", "|---|---|---|", *rows]


def _what(model_type: str) -> str:
    return "".join(f"{what}; " for what, names in GROUPS.items() if model_type in names)


def _cell(reason: str) -> str:
    return reason.replace("|", "\\|").replace("<", "&lt;")
