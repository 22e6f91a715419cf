"""The model before training: OPT with ReLU, layer norm before each block, tied embeddings, no dropout."""

from __future__ import annotations

import torch
from transformers import OPTConfig, OPTForCausalLM

from demo_training.settings import Settings


def make_model(settings: Settings, mark_id: int) -> OPTForCausalLM:
    """Build the model with weights drawn from the seed; every block begins as the identity."""
    torch.manual_seed(settings.seed)
    config = OPTConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        word_embed_proj_dim=settings.hidden_size,
        ffn_dim=settings.ffn_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        max_position_embeddings=settings.context_length,
        activation_function="relu",
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=mark_id,
        eos_token_id=mark_id,
        pad_token_id=mark_id,
        tie_word_embeddings=True,
    )
    model = OPTForCausalLM(config)
    # nn.Embedding never trains its padding id; ours is the document mark too.
    model.model.decoder.embed_tokens.padding_idx = None
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.self_attn.out_proj.weight.zero_()
            layer.fc2.weight.zero_()
    return model
