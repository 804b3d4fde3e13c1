"""Models that bring code along: of transformers, of a module, and in the place of a transformer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from zoo_models import (
    SIZES,
    Run,
    assert_same,
    configured,
    edit,
    embed,
    embed_in_chunks,
    encoder,
    enlarge,
    tokenizer,
)

from embedtune.errors import InputError
from embedtune.models import Embedding, Encoder
from embedtune.models.spec import EncoderSpec

MODEL = {
    "configuration_own.py": """
from transformers import BertConfig

class OwnConfig(BertConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import BertModel
from .configuration_own import OwnConfig
from .own_doubling import doubled

class OwnModel(BertModel):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output["last_hidden_state"] = doubled(output["last_hidden_state"])
        return output
""",
    "own_doubling.py": "def doubled(values):\n    return 2 * values\n",
}
MODULE = {
    "own_scale.py": """
import torch
from sentence_transformers.base.modules.module import Module
from .own_doubling import doubled

class Scale(Module):
    config_keys = ["width"]

    def __init__(self, width):
        super().__init__()
        self.width, self.weight = width, torch.nn.Parameter(torch.ones(width))

    def forward(self, features, **kwargs):
        scaled = features["sentence_embedding"] * doubled(self.weight)
        return {**features, "sentence_embedding": scaled}

    def save(self, output_path, *args, safe_serialization=True, **kwargs):
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, name, subfolder="", **kwargs):
        module = cls(**cls.load_config(name, subfolder=subfolder))
        return cls.load_torch_weights(name, subfolder=subfolder, model=module)
""",
    "own_doubling.py": MODEL["own_doubling.py"],
}
# As models brought it along before sentence-transformers 5.
TRANSFORMER = {
    "own_transformer.py": """
import json
from pathlib import Path

from torch import nn
from transformers import AutoModel, AutoTokenizer

class Transformer(nn.Module):
    save_in_root = True

    def __init__(
        self, name, max_seq_length, model_args=None, tokenizer_args=None, config_args=None, **kwargs
    ):
        super().__init__()
        self.auto_model = AutoModel.from_pretrained(name, **(model_args or {}))
        self.config, self.max_seq_length = self.auto_model.config, max_seq_length
        self.tokenizer = AutoTokenizer.from_pretrained(name)

    def forward(self, features):
        names = ("input_ids", "attention_mask", "token_type_ids")
        found = self.auto_model(**{name: features[name] for name in names})
        return {**features, "token_embeddings": found.last_hidden_state}

    def get_word_embedding_dimension(self):
        return self.config.hidden_size

    def tokenize(self, texts, padding=True):
        longest = self.max_seq_length
        settings = {"truncation": True, "return_tensors": "pt", "max_length": longest}
        return self.tokenizer(list(texts), padding=padding, **settings)

    def save(self, output_path, safe_serialization=True):
        self.auto_model.save_pretrained(output_path, safe_serialization=safe_serialization)
        self.tokenizer.save_pretrained(output_path)
        settings = json.dumps({"max_seq_length": self.max_seq_length})
        Path(output_path, "sentence_bert_config.json").write_text(settings)

    @staticmethod
    def load(input_path):
        settings = json.loads(Path(input_path, "sentence_bert_config.json").read_text())
        return Transformer(input_path, **settings)
""",
}


def write(files: dict[str, str], folder: Path) -> None:
    for name, code in files.items():
        (folder / name).write_text(code)


def model(folder: Path) -> None:
    folder.mkdir()
    enlarge(transformers.BertModel(configured(transformers.BertConfig, SIZES))).save_pretrained(
        folder
    )
    tokenizer().save_pretrained(folder)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    edit(folder, "config.json", model_type="own", architectures=["OwnModel"], auto_map=classes)
    write(MODEL, folder)


def module(folder: Path) -> None:
    encoder("BertConfig")(folder)
    path = folder / "3_Scale"
    path.mkdir()
    edit(path, "config.json", width=16)
    save_file({"weight": torch.arange(1.0, 17.0)}, path / "model.safetensors")
    rows = json.loads((folder / "modules.json").read_text())
    rows.append({"idx": 3, "name": "3", "path": "3_Scale", "type": "own_scale.Scale"})
    (folder / "modules.json").write_text(json.dumps(rows))
    write(MODULE, folder)


def own_transformer(folder: Path) -> None:
    encoder("BertConfig")(folder)
    rows = json.loads((folder / "modules.json").read_text())
    rows[0]["type"] = "own_transformer.Transformer"
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 30}')
    edit(folder, "config_sentence_transformers.json", prompts=PROMPTS)
    write(TRANSFORMER, folder)


PROMPTS = {"query": "find this: ", "document": "d "}
MODELS = {"model": model, "module": module, "transformer": own_transformer}


@pytest.fixture(scope="module", autouse=True)
def _code_cache(tmp_path_factory):
    """Keep the code out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("code"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_model_that_brings_code_is_trained_and_exported_as_what_it_is(build, tmp_path):
    build(tmp_path / "model")
    expected = embed(tmp_path / "model", trust_remote_code=True)
    run = Run(tmp_path / "model", tmp_path)
    trained, _ = run.fit("run", 1, lr=1e-300, trust_remote_code=True)
    assert_same(embed_in_chunks(trained.encoder.eval()), expected)
    shutil.rmtree(tmp_path / "model")
    assert_same(embed(tmp_path / "run" / "model", trust_remote_code=True), expected)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_its_code_is_run_where_it_is_trusted_alone(build, tmp_path):
    build(tmp_path / "model")
    expected = r"model_name_or_path: cannot load '.*': it brings code along; .* trust_remote_code"
    with pytest.raises(InputError, match=expected):
        Encoder(EncoderSpec(str(tmp_path / "model")))


def test_a_transformer_of_own_code_is_one(tmp_path):
    own_transformer(tmp_path / "model")
    run = Run(tmp_path / "model", tmp_path)
    trained, _ = run.fit("run", 1, trust_remote_code=True)
    assert trained.lr == pytest.approx(2e-5 * 768 / 16)
    encoder = trained.encoder
    assert "BertLayer" in {kind.__name__ for kind in encoder.block_classes}
    features = encoder.tokenize(["a " * 50], "query", None, 7)
    assert features["input_ids"].shape == (1, 7)
    assert encoder.longest("query") == 30
    used = Embedding(tmp_path / "run" / "model", trust_remote_code=True)
    longer, cut = used.encode(["a " * 50], max_len=9), used.encode(["a " * 7], max_len=64)
    torch.testing.assert_close(longer, cut)
