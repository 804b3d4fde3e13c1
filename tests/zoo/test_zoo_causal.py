"""Language models whose tokens see those before them, and models with a decoder."""

import pytest
from zoo_models import SIZES, check, decoder, encoder, left_tokenizer, named

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
OPT = {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}
QWEN2 = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

MODELS = {
    "gpt2": decoder("GPT2Config", sizes=GPT2),
    "bart": encoder("BartConfig", sizes=BART),
    "xlnet": encoder("XLNetConfig", sizes=XLNET),
    "opt": decoder("OPTConfig", sizes=OPT),
    "opt-left": decoder("OPTConfig", sizes=OPT, tokens=left_tokenizer),
    "qwen2": decoder("Qwen2Config"),
    "qwen2-window": decoder("Qwen2Config", **QWEN2),
    "qwen3": decoder("Qwen3Config"),
    "qwen3-left": decoder("Qwen3Config", tokens=left_tokenizer),
    "mistral-window": decoder("MistralConfig", sliding_window=6),
    "phi3-window": decoder("Phi3Config", sliding_window=6),
    "llama": decoder("LlamaConfig"),
    "llama-left": decoder("LlamaConfig", tokens=left_tokenizer),
    "gemma2": decoder("Gemma2Config", sliding_window=6),
    "gemma3": decoder("Gemma3TextConfig", sliding_window=6),
    "phi3-longrope": decoder(
        "Phi3Config", rope_parameters=LONGROPE, original_max_position_embeddings=32
    ),
    "llama-dynamic": decoder("LlamaConfig", rope_parameters=DYNAMIC),
}

PADDED = {"bart", "xlnet", "gemma2", "phi3-longrope"}
"""Models that are not encoded without padding: attention is not all that mixes their tokens."""


@pytest.mark.parametrize("name", named(MODELS))
def test_a_language_model_is_trained_and_exported_as_what_it_is(name, tmp_path):
    check(MODELS[name], tmp_path, packs=name not in PADDED)
