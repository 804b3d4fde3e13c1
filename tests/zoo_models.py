"""Tiny models of real architectures, and what any of them must do from its base to its export."""

import json
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers import processors
from torch import nn
from transformers import AutoModel, BertTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from embedtune import EmbeddingDataModule, EmbeddingModule, ExportModel
from embedtune.callbacks.write_embeddings import WriteEmbeddings
from embedtune.data.chunks import Text, make_chunks
from embedtune.export.folder import is_verified
from embedtune.models import Encoder

ALIKE = {
    *("distilbert", "albert", "deberta", "deberta-v2", "opt-left", "llama-left", "qwen2", "llama"),
    *("mistral-window", "static", "words", "bow", "dense-dense", "fp16", "no-padding-left"),
}
"""Models that go the way of another one: with the slow tests alone."""
LONGEST, SHORT = 64, 24
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = string.ascii_lowercase + string.digits
WORDS = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *string.punctuation]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": LONGEST,
}
DECODER = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
TEXTS = [
    "a",
    "what is it",
    "Two words, and UPPER case",
    "one two three four five six seven eight nine ten eleven twelve",
    "cut " * 40,
]
ROWS = [
    {"query": "what is " + word, "pos": [" ".join([word] * n)]}
    for n, word in enumerate(["this", "a dog", "b", "love", "the number 9", "c d", "x", "z y"], 1)
]

Build = Callable[[Path], None]
"""Writes a model into a folder."""


# --- What a model is made of -----------------------------------------------------------------


def named(models: Iterable[str]) -> list[Any]:
    """Return the names of models as parameters of a test."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=slow) if name in ALIKE else name for name in models]


def tokenizer(**settings: Any) -> BertTokenizer:
    """Return the tokenizer of the whole zoo: letters, as BERT's WordPiece splits what it knows."""
    vocab = {word: index for index, word in enumerate(WORDS)}
    return BertTokenizer(vocab=vocab, **{"model_max_length": LONGEST, **settings})


def decoder_tokenizer(ends: bool = True, **settings: Any) -> PreTrainedTokenizerFast:
    """Return one that marks the end of a text where a model ``ends`` texts, and no beginning."""
    backend = tokenizer().backend_tokenizer
    end = ("[SEP]", WORDS.index("[SEP]"))
    single = "$A [SEP]" if ends else "$A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[end])
    known = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    known |= {"model_max_length": LONGEST, **settings}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **known)


def left_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    return decoder_tokenizer(padding_side="left", **settings)


def enlarge(model: nn.Module) -> nn.Module:
    """Draw weights so large that whatever an embedding depends on shows in it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3, generator=generator)
            else:
                weight.add_(torch.empty_like(weight).normal_(0, 0.1, generator=generator))
    return model


def transformer(config: PretrainedConfig, folder: Path, tokens: Any = None) -> Transformer:
    """Write a bare checkpoint to ``folder``, and return the module that loads it."""
    enlarge(AutoModel.from_config(config)).save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return Transformer(str(folder))


def configured(kind: type[PretrainedConfig], sizes: dict[str, Any], **settings: Any) -> Any:
    """Return a configuration for the zoo's tokenizer."""
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return kind(**{**ids, **sizes, **settings})


def encoder(
    name: str, pooling: str = "mean", sizes: dict[str, Any] = SIZES, **settings: Any
) -> Build:
    """Return how a bidirectional encoder is built: transformer, pooling, Normalize."""

    def build(folder: Path) -> None:
        config = configured(getattr(transformers, name), sizes, **settings)
        bare = transformer(config, folder / "bare")
        save([bare, Pooling(bare.get_embedding_dimension(), pooling), Normalize()], folder)

    return build


def decoder(
    name: str,
    pooling: str = "lasttoken",
    sizes: dict[str, Any] = DECODER,
    tokens: Callable[[], Any] = decoder_tokenizer,
    **settings: Any,
) -> Build:
    """Return how a language model that embeds is built: transformer, last token, Normalize."""

    def build(folder: Path) -> None:
        config = configured(getattr(transformers, name), sizes, **settings)
        bare = transformer(config, folder / "bare", tokens())
        save([bare, Pooling(bare.get_embedding_dimension(), pooling), Normalize()], folder)

    return build


def small_bert(folder: Path, **settings: Any) -> Transformer:
    """Return a BERT, the plainest transformer of the zoo."""
    return transformer(configured(transformers.BertConfig, SIZES, **settings), folder / "bare")


def save(modules: list[nn.Module], folder: Path, **settings: Any) -> None:
    model = SentenceTransformer(modules=modules, device="cpu", **settings)
    model.save_pretrained(str(folder), create_model_card=False)


def edit(folder: Path, name: str, **values: Any) -> None:
    """Change entries of a json file of a folder."""
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}))


# --- What any model must do ------------------------------------------------------------------


def embed(folder: Path, **settings: Any) -> torch.Tensor:
    """Embed the texts as queries and as documents by plain sentence-transformers, one by one."""
    model = SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, **settings
    )
    if getattr(model.tokenizer, "pad_token", "") is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token  # else it encodes nothing
    found = [*model.encode_query(TEXTS, batch_size=1), *model.encode_document(TEXTS, batch_size=1)]
    return torch.as_tensor(np.stack(found)).float()


def embed_in_chunks(encoder: Encoder) -> torch.Tensor:
    """Embed them as a batch of training does."""
    wanted = [
        Text(text, role, encoder.default_prompt(role), encoder.longest(role))
        for role in ("query", "document")
        for text in TEXTS
    ]
    chunks, order = make_chunks(encoder, wanted, 64)
    with torch.no_grad():
        found = torch.cat([encoder(features) for features in chunks])[order]
    return nn.functional.normalize(found, dim=-1) if encoder.normalizes else found


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert expected.std(dim=0).max() > 1e-3, "the texts differ in nothing"
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest)


class Run:
    """Fits of one model, each in a folder of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.rows = folder / "train.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def trainer(self, name: str, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(self.folder / name),
            callbacks=list(callbacks),
            **settings,
        )

    def fit(self, name: str, steps: int, ckpt_path: Path | None = None, **settings: Any) -> Any:
        module = EmbeddingModule(str(self.model), lr_schedule="constant", **settings)
        data = EmbeddingDataModule(
            str(self.rows),
            batch_size=4,
            query_max_len=SHORT,
            passage_max_len=SHORT,
            tokens_per_chunk=64,
        )
        keep = ModelCheckpoint(self.folder / name, "{step}", every_n_train_steps=2, save_top_k=-1)
        export = [] if ckpt_path else [ExportModel(save_on_epoch_end=False)]
        trainer = self.trainer(name, keep, *export, max_steps=steps)
        before = {k: v.clone() for k, v in module.encoder.state_dict().items()}
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        assert ckpt_path or is_verified(self.folder / name / "model")
        return module, before

    def predict(self, name: str) -> np.ndarray:
        module = EmbeddingModule(str(self.folder / name / "model"))
        data = EmbeddingDataModule(predict_path=str(self.rows), batch_size=3)
        self.trainer(name, WriteEmbeddings()).predict(module, data, return_predictions=False)
        return np.load(self.folder / name / "embeddings.npy")


def check(build: Build, folder: Path, packs: bool) -> None:
    """Build a model, and do with it all that can be done; ``packs``: encode without padding."""
    build(folder / "model")
    check_untouched(folder / "model", folder, packs)
    check_trained(folder / "model", folder)


def check_untouched(model: Path, folder: Path, packs: bool) -> None:
    """Step 0 is the base model, and so is what a step at rate 0 exports."""
    expected = embed(model)
    module, before = Run(model, folder).fit("untouched", 1, lr=1e-300)
    assert module.encoder.packs == packs
    after = module.encoder.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    cut = expected.shape[1]  # less than what is trained where the base cuts
    assert_same(embed_in_chunks(module.encoder.eval())[:, :cut], expected)
    assert_same(embed(folder / "untouched" / "model")[:, :cut], expected)


def check_trained(model: Path, folder: Path) -> None:
    """Three steps move every weight; resumed, exported, cut and predicted it is the same model."""
    run = Run(model, folder)
    settings = {"lr": 1e-3, "weight_decay": 0.0, "use_mrl": True, "mrl_dims": "8,4"}
    module, before = run.fit("run", 3, **settings)
    trained = {n: p for n, p in module.encoder.named_parameters() if p.requires_grad}
    still = [n for n, p in trained.items() if n in before and torch.equal(p, before[n])]
    assert trained
    assert still == []

    again, _ = run.fit("again", 3, folder / "run" / "step=2.ckpt", **settings)
    for name, weight in module.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[name], weight), name

    exported = SentenceTransformer(str(folder / "run" / "model"), device="cpu")
    queries = [row["query"] for row in ROWS]
    expected = exported.encode_query(queries)
    np.testing.assert_allclose(run.predict("run"), expected, rtol=0, atol=2e-5)
    cut = exported.encode_query(queries, truncate_dim=4)
    np.testing.assert_allclose(cut, expected[:, :4], rtol=0, atol=2e-5)
