"""What a folder says beside its weights: prompts, lengths, padding, types, and older layouts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from zoo_models import (
    SIZES,
    WORDS,
    Build,
    check,
    configured,
    decoder,
    decoder_tokenizer,
    edit,
    left_tokenizer,
    named,
    save,
    small_bert,
    tokenizer,
    transformer,
)

PROMPTS = {"query": "find this: ", "document": "d "}


def prompted(include_prompt: bool = True, **settings) -> Build:
    def build(folder: Path) -> None:
        pooling = Pooling(16, "mean", include_prompt=include_prompt)
        save([small_bert(folder), pooling, Normalize()], folder, **settings)

    return build


def changed(change, build: Build | None = None) -> Build:
    """Return how the folder of another model is changed."""

    def built(folder: Path) -> None:
        (build or prompted())(folder)
        change(folder)

    return built


def in_half(kind: torch.dtype):
    def change(folder: Path) -> None:
        model = SentenceTransformer(str(folder), device="cpu").to(kind)
        model.save_pretrained(str(folder), create_model_card=False)

    return change


def bare_alone(folder: Path) -> None:
    """Leave what transformers alone writes."""
    bare = folder / "bare"
    for path in [path for path in folder.iterdir() if path != bare]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in bare.iterdir():
        path.rename(folder / path.name)
    bare.rmdir()


def old_layout(folder: Path) -> None:
    """Write the files of sentence-transformers 0.x and 1.x, and weights as torch saved them."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    model = SentenceTransformer(str(folder), device="cpu")
    for path in folder.iterdir():
        if path.is_file() and path.name != "modules.json":
            path.unlink() if "sentence" in path.name else path.rename(inner / path.name)
    torch.save(model[0].auto_model.state_dict(), inner / "pytorch_model.bin")
    (inner / "model.safetensors").unlink()
    edit(inner, "sentence_bert_config.json", max_seq_length=40, do_lower_case=False)
    kinds = [
        ("0_Transformer", "Transformer"),
        ("1_Pooling", "Pooling"),
        ("2_Normalize", "Normalize"),
    ]
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    modes = {
        f"pooling_mode_{m}": m == "max_tokens" for m in ("cls_token", "mean_tokens", "max_tokens")
    }
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps(
            {"word_embedding_dimension": 16, **modes, "pooling_mode_mean_sqrt_len_tokens": False}
        )
    )


def added_tokens(folder: Path) -> None:
    known = tokenizer()
    known.add_tokens(["doggy", "[QUERY]"])
    config = configured(transformers.BertConfig, SIZES, vocab_size=len(WORDS) + 2)
    bare = transformer(config, folder / "bare", known)
    save([bare, Pooling(16)], folder, prompts={"query": "[QUERY] "})


def cased_vocabulary(folder: Path) -> None:
    bare = transformer(
        configured(transformers.BertConfig, SIZES), folder / "bare", tokenizer(do_lower_case=False)
    )
    save([bare, Pooling(16)], folder)
    edit(folder, "sentence_bert_config.json", do_lower_case=True)


def no_limit(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", model_max_length=int(1e30))


def no_padding(build: Build) -> Build:
    """Return how a model is built whose tokenizer names no token to pad with."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        known = json.loads(path.read_text())
        del known["pad_token"]
        path.write_text(json.dumps(known))

    return changed(change, build)


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}

MODELS = {
    "prompts": prompted(prompts=PROMPTS),
    "prompt-not-pooled": prompted(False, prompts=PROMPTS),
    "default-prompt": prompted(prompts={"task": "classify: "}, default_prompt_name="task"),
    "passage-prompt": changed(
        lambda folder: edit(
            folder,
            "config_sentence_transformers.json",
            prompts={"query": "q: ", "passage": "p: ", "document": "p: "},
        )
    ),
    "truncated-width": prompted(truncate_dim=12),
    "dot": prompted(similarity_fn_name="dot"),
    "short-limit": changed(
        lambda folder: edit(folder, "sentence_bert_config.json", max_seq_length=24)
    ),
    "limits-by-role": changed(
        lambda folder: edit(
            folder, "sentence_bert_config.json", query_length=24, document_length=30
        )
    ),
    "no-limit": changed(no_limit),
    "fp16": changed(in_half(torch.float16)),
    "bf16": changed(in_half(torch.bfloat16)),
    "bare": changed(bare_alone),
    "bare-decoder": changed(bare_alone, decoder("Qwen3Config")),
    "old-layout": changed(old_layout),
    "lower-case": cased_vocabulary,
    "added-tokens": added_tokens,
    "no-end": decoder("Qwen3Config", tokens=lambda: decoder_tokenizer(ends=False)),
    "left-and-not-pooled-prompt": changed(
        lambda folder: (
            edit(folder, "1_Pooling/config.json", include_prompt=False),
            edit(folder, "config_sentence_transformers.json", prompts=PROMPTS),
        ),
        decoder("Qwen3Config", "mean", tokens=left_tokenizer),
    ),
    "no-padding": no_padding(decoder("LlamaConfig")),
    "no-padding-left": no_padding(decoder("Qwen3Config", tokens=left_tokenizer)),
    "gpt2-no-padding": no_padding(decoder("GPT2Config", "mean", GPT2)),
}


@pytest.mark.parametrize("name", named(MODELS))
def test_a_folder_is_trained_and_exported_as_what_it_is(name, tmp_path):
    check(MODELS[name], tmp_path, packs=True)
