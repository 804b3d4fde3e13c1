"""Tiny models built in memory, no network, and a cache of its own for the whole test run."""

import os

# Read when the libraries are imported, hence before them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

SEED = 0
MAX_LENGTH = 64
CJK = "中文本向量模型数据库表格行列天地人你我他大小上下日月水火山"
PUNCTUATION = string.punctuation + "，。！？、；：（）"
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def pytest_addoption(parser):
    parser.addoption("--chains", type=int, default=40, help="chains of stops that are tried")
    parser.addoption("--kills", type=int, default=5, help="processes that are killed")
    parser.addoption("--mutations", type=int, default=132, help="files that are broken")
    parser.addoption("--steps", type=int, default=200, help="steps of a long run")
    parser.addoption("--testsets", type=Path, help="a folder of BEIR sets to score")
    parser.addoption("--write-points", default="1", help="how many fail, 0 for all, or FROM-TO")


def pytest_collection_finish():
    gc.freeze()  # what was imported outlives all tests: no collection need look through it


@pytest.fixture(scope="session")
def arrow_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("arrow_cache")


@pytest.fixture(autouse=True)
def _isolated(arrow_cache, monkeypatch):
    """Keep Arrow tables out of the user's cache and make every test start from one seed."""
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(arrow_cache))
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 -- libraries under test may use the global state


def _save_bert(folder: Path) -> None:
    letters = string.ascii_lowercase + string.digits
    words = [*BERT_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *CJK, *PUNCTUATION]
    vocab = {word: index for index, word in enumerate(words)}
    BertTokenizer(vocab=vocab, model_max_length=MAX_LENGTH).save_pretrained(folder)
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=MAX_LENGTH,
    )
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_transformer(tmp_path_factory) -> Path:
    """Return a bare transformers checkpoint: a BERT of width 32 with its WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_transformer")
    _save_bert(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tiny_transformer, tmp_path_factory) -> Path:
    """Return the same BERT as a sentence-transformers folder: mean pooling, then Normalize."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    folder = tmp_path_factory.mktemp("tiny_bert")
    modules = [Transformer(str(tiny_transformer)), Pooling(32, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory) -> Path:
    """Return a bare decoder checkpoint: a Qwen3 of width 32 with a byte-level BPE tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_qwen")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        model_max_length=MAX_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen3Model(config).save_pretrained(folder)
    return folder
