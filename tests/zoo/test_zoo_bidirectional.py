"""Encoders whose tokens see both ways."""

import pytest
from zoo_models import DECODER, SIZES, check, decoder, encoder, named

OFFSET = {**SIZES, "max_position_embeddings": 66}
"""Of models that number positions from after the padding on."""
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 64}

MODELS = {
    "bert": encoder("BertConfig"),
    "roberta": encoder("RobertaConfig", sizes=OFFSET),
    "xlm-roberta": encoder("XLMRobertaConfig", "cls", OFFSET),
    "distilbert": encoder("DistilBertConfig", sizes=DISTILBERT),
    "mpnet": encoder("MPNetConfig", sizes=OFFSET),
    "albert": encoder("AlbertConfig", embedding_size=8),
    "electra": encoder("ElectraConfig", "cls", embedding_size=8),
    "deberta": encoder("DebertaConfig", **DEBERTA),
    "deberta-v2": encoder("DebertaV2Config", **DEBERTA, position_buckets=8),
    "deberta-v3": encoder(
        "DebertaV2Config",
        **DEBERTA,
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
        position_biased_input=False,
    ),
    "modernbert": encoder("ModernBertConfig", local_attention=8, global_attn_every_n_layers=2),
    "nomic-bert": encoder("NomicBertConfig"),
    "jina-v3": encoder("JinaEmbeddingsV3Config", sizes=OFFSET),
    "eurobert": encoder("EuroBertConfig", sizes=DECODER),
    "t5": encoder("T5Config", sizes=T5),
    "longformer": encoder("LongformerConfig", sizes=OFFSET, attention_window=8),
    "roformer": encoder("RoFormerConfig", embedding_size=16),
    "gemma3-bidirectional": decoder(
        "Gemma3TextConfig", "mean", sliding_window=8, use_bidirectional_attention=True
    ),
    "llama-bidirectional": decoder("LlamaConfig", "mean", is_causal=False),
}

PADDED = {"mpnet", "deberta", "deberta-v2", "deberta-v3", "t5", "longformer", "roformer"}
"""Models that are not encoded without padding: attention is not all that mixes their tokens."""


@pytest.mark.parametrize("name", named(MODELS))
def test_an_encoder_is_trained_and_exported_as_what_it_is(name, tmp_path):
    check(MODELS[name], tmp_path, packs=name not in PADDED)
