"""A sentence-transformers model as a trainable encoder with an optional Matryoshka projection."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from embedtune.errors import InputError
from embedtune.models.attention import VARLEN
from embedtune.models.dropout import use_fast_dropout
from embedtune.models.gpu_attention import block_bias
from embedtune.models.layers import block_classes, layers
from embedtune.models.loading import (
    DOCUMENT_PROMPTS,
    dropout_settings,
    load_sentence_transformer,
    make_trainable,
)
from embedtune.models.packing import (
    BLOCK_INPUTS,
    CHUNK_COST,
    GPU_CHUNK_COST,
    PACKED_INPUTS,
    TextFeatures,
    has_plain_attention,
    join_packed,
    join_padded,
    lay_in_blocks,
    unpack,
)
from embedtune.models.pooling import set_pooling
from embedtune.models.similarity import compared_by
from embedtune.models.spec import ROLES, EncoderSpec, Features, Role
from embedtune.models.structure import structure_of
from embedtune.models.tokenizer_state import tokenizers_digest
from embedtune.models.towers import (
    UNLIMITED,
    backbones,
    capped,
    cutting_at,
    first_position,
    has_routes,
    limit_of,
    longest_input,
    tower,
    transformers_of,
)
from embedtune.models.trial import packs_exactly
from embedtune.models.unsupported import refuse_unsupported
from embedtune.models.words import as_tokens, no_tokens, with_lengths


class Encoder(nn.Module):
    """Map token features to embeddings ``[b, d]``.

    The modules are those of the sentence-transformers model, in its order, except that a trailing
    ``Normalize`` is taken off (every loss normalises the width that it looks at) and put back on
    export.
    """

    def __init__(self, spec: EncoderSpec, attn_implementation: str | None = None) -> None:
        """Build what ``spec`` describes.

        Args:
            spec: The structure.
            attn_implementation: How attention is computed, by transformers' names.

        Raises:
            InputError: The model cannot be loaded, or does not end in one embedding a text.
        """
        super().__init__()
        self.spec, self.attn_implementation = spec.as_loaded, attn_implementation
        self.model = load_sentence_transformer(
            spec.model_name_or_path,
            trust_remote_code=spec.trust_remote_code,
            device="cpu",
            attn_implementation=attn_implementation,
            config=dropout_settings(spec.dropout, spec.attention_dropout),
        )
        self.spec = self.spec._replace(
            tokenizers=tokenizers_digest(self.model), structure=structure_of(self.model)
        )
        refuse_unsupported(self.model, spec.model_name_or_path)
        make_trainable(self.model)
        # With flash attention sentence-transformers would join the texts as it tokenises.
        self._flash_packs = bool(getattr(self.model[0], "can_flatten_inputs", False))
        for transformer in transformers_of(self.model):
            cast(Any, transformer).can_flatten_inputs = False
        self.packs, self.chunk_cost = False, CHUNK_COST
        self._is_compiled = False
        self._packed_for: tuple[str, torch.dtype | None] | None = None
        if spec.pooling is not None:
            set_pooling(self.model, spec.pooling, spec.model_name_or_path)
        self.normalizes = isinstance(self.model[-1], Normalize)
        if self.normalizes:
            del self.model[-1]
        if self.model.get_embedding_dimension() is None:
            raise InputError(
                f"model_name_or_path: {spec.model_name_or_path!r} does not tell its embedding "
                "width; give model.pooling for a bare transformers checkpoint"
            )
        self.match(spec)

    # --- Structure ----------------------------------------------------------------------

    def match(self, spec: EncoderSpec) -> None:
        """Take over what ``spec`` adds to the model; pooling, prompts and a projection only once.

        Raises:
            InputError: It is that of another base model.
        """
        if spec.tokenizers not in (None, self.spec.tokenizers):
            raise InputError(
                "model_name_or_path: expected the base model of the checkpoint, found "
                f"{self.spec.model_name_or_path!r}, whose tokenizer is another"
            )
        if spec.structure not in (None, self.spec.structure):
            raise InputError(
                f"model_name_or_path: {self.spec.model_name_or_path!r}: expected the base model of "
                f"the checkpoint ({spec.structure}), found another ({self.spec.structure})"
            )
        if spec.pooling is not None and self.spec.pooling is None:
            set_pooling(self.model, spec.pooling, self.spec.model_name_or_path)
            self.spec = self.spec._replace(pooling=spec.pooling)
        if spec.projection_dim is not None and self.spec.projection_dim is None:
            self.append_projection(spec.projection_dim)
        if spec.max_seq_length is not None:
            self.raise_max_seq_length(spec.max_seq_length)
        if spec.similarity is not None:
            self.set_similarity(spec.similarity)
        for role in ROLES:
            prompt = spec.prompt(role)
            # What was set before, by a configuration or by rows, wins.
            if prompt is not None and self.spec.prompt(role) is None:
                self.set_prompt(role, prompt)

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        width = self.model.get_embedding_dimension()
        assert width is not None, "checked when the encoder is built"
        return width

    @property
    def num_parameters(self) -> tuple[int, int]:
        """Numbers that are trained, and that are frozen; of whole weights, before a strategy."""
        sizes = {True: 0, False: 0}
        for parameter in self.parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        return sizes[True], sizes[False]

    @property
    def dense(self) -> Dense | None:
        """The projection, where the model ends in one."""
        last = self.model[-1]
        return last if isinstance(last, Dense) else None

    def append_projection(self, width: int) -> Dense:
        """Append ``Dense(self.width, width)`` with torch's default (random) weights."""
        dense = Dense(self.width, width, bias=True, activation_function=nn.Identity())
        self.model.append(dense)
        self.spec = self.spec._replace(projection_dim=width)
        return dense

    @property
    def max_seq_length(self) -> int | None:
        """Longest input in tokens that ``encode`` takes before it truncates; None is unlimited."""
        known = [length for length in self.longest_inputs if length is not None]
        return max(known) if len(known) == len(self.longest_inputs) else None

    @property
    def longest_inputs(self) -> list[int | None]:
        """The same, once for each limit: queries and documents may have one or a tower each."""
        return [longest_input(module, limit) for module, limit in self._limits()]

    def _limits(self) -> list[tuple[nn.Module, str]]:
        """Return the tower of each role and the name of its limit, each pair once."""
        modules = {role: tower(self.model, role) for role in ROLES}
        pairs = [(module, limit_of(module, role)) for role, module in modules.items()]
        return pairs[:1] if pairs[0] == pairs[1] else pairs

    def longest(self, role: Role) -> int:
        """Return the tokens of a text of a role that ``encode`` takes."""
        module = tower(self.model, role)
        own = longest_input(module, limit_of(module, role))
        return self.cap(UNLIMITED if own is None else own, role)

    def cap(self, max_len: int, role: Role) -> int:
        """Return ``max_len``, or as many tokens as a role has positions if they are fewer."""
        return capped(tower(self.model, role), max_len)

    def raise_max_seq_length(self, length: int) -> None:
        """Let ``encode`` take inputs as long as those trained on; never shortens."""
        for module, limit in self._limits():
            known, raised = longest_input(module, limit), capped(module, length)
            if known is not None and raised > known:
                setattr(module, limit, raised)
        self.spec = self.spec._replace(max_seq_length=max(length, self.spec.max_seq_length or 0))

    def set_prompt(self, role: Role, prompt: str) -> None:
        """Make ``prompt`` the model's own for queries or documents, as exported; empty for none.

        Whatever the model calls it: documents' may have other names beside.
        """
        names = DOCUMENT_PROMPTS if role == "document" else (role,)
        self.model.prompts |= {name: prompt for name in names if name in self.model.prompts}
        self.model.prompts[role] = prompt
        self.spec = self.spec.with_prompt(role, prompt)

    @property
    def similarity(self) -> str:
        """How two embeddings compare, by sentence-transformers' names, as exported."""
        return self.model.similarity_fn_name

    @property
    def compared_by(self) -> str:
        """The same, or cosine where embeddings of length 1 make it so: of any width then."""
        return compared_by(self.similarity, self.normalizes)

    def as_exported(self, embeddings: Tensor) -> Tensor:
        """Return what :meth:`forward` gives, ``[b, width]``, as the exported model gives it."""
        return nn.functional.normalize(embeddings, dim=-1) if self.normalizes else embeddings

    def set_similarity(self, similarity: str) -> None:
        """Make ``similarity`` the model's own, as exported."""
        self.model.similarity_fn_name = cast(Any, similarity)
        self.spec = self.spec._replace(similarity=similarity)

    @property
    def block_classes(self) -> set[type[nn.Module]]:
        """Classes of the transformer's layers: what FSDP gathers and frees as a whole."""
        return block_classes(self.model)

    def compile_layers(self) -> None:
        """Compile the transformer's layers for training; evaluation stays as it is.

        Once for chunks of any size, and for all layers of one kind.

        Raises:
            InputError: The model has no layers.
        """
        repeated = [layers(backbone) for backbone in backbones(self.model)]
        found = [layer for listed in repeated if listed is not None for layer in listed]
        if not found:
            raise InputError(
                "model.compile: expected a model with layers, found none in "
                f"{self.spec.model_name_or_path!r}"
            )
        for layer in found:
            layer.compile(dynamic=True)
        self._is_compiled = True

    @property
    def routes(self) -> bool:
        """Whether queries and documents take different ways through the model."""
        return has_routes(self.model)

    # --- Text to features ---------------------------------------------------------------

    def default_prompt(self, role: Role) -> str | None:
        """Return the model's own prompt for queries or documents, None where it has none."""
        return self.model.prompts.get(role) or None

    def tokenize(
        self, texts: Sequence[str], role: Role, prompt: str | None, max_len: int
    ) -> Features:
        """Tokenise as the model itself does, padded to the longest text.

        Args:
            texts: Texts without their prompt.
            role: Tells an asymmetric model (a Router) which route to take.
            prompt: Prepended to each text; None for none.
            max_len: Longest input in tokens, prompt and special tokens included.
        """
        module = tower(self.model, role)
        settings = {"max_length": max_len, "task": role}
        with cutting_at([module], max_len):
            features = self.model.preprocess(list(texts), prompt=prompt, **settings)
        if self.routes:
            features["task"] = role
        pools = (m for m in self.model.modules() if isinstance(m, Pooling))
        if all(pooling.include_prompt for pooling in pools):
            features.pop("prompt_length", None)
        return as_tokens(module, dict(features), max_len)

    def join(self, rows: Sequence[TextFeatures], role: Role) -> dict[str, Any]:
        """Make one chunk of single texts' features.

        Padded to ``[n, longest]``, or packed one after another as ``[1, tokens]`` where the encoder
        :attr:`packs`. With routes all texts are of one role.
        """
        module: Any = tower(self.model, role)
        if not self.packs:
            return join_padded(rows, module.tokenizer)
        packed = join_packed(rows, first_position(module))
        if self._packed_for is None or self._packed_for[0] == "cpu":
            return packed
        # Kernels for float32 drop nothing of, and know no window in, texts of unequal length.
        lengths = np.array([len(row["input_ids"]) for row in rows])
        return packed | lay_in_blocks(lengths, only_short=self._packed_for[1] is not None)

    def no_tokens(self, tensors: Mapping[str, Tensor], role: Role) -> TextFeatures:
        """Return the features of a text without tokens, each ``[1]``, as those of others."""
        return no_tokens(tower(self.model, role), tensors)

    # --- Without padding ----------------------------------------------------------------

    def pack(self, device: torch.device, half: torch.dtype | None = None) -> None:
        """Encode texts without padding from now on, where the model can on ``device``.

        It can on GPUs with flash attention, and on CPUs and GPUs if attention is all that mixes
        tokens, which is tried on texts of unequal length. A given ``attn_implementation`` is left
        alone. On a CPU dropout draws faster, too.

        Args:
            device: Where the model will run; on a GPU it is moved there for the trial.
            half: What it will multiply in under autocast, None for float32.
        """
        transformer: Any = self.model[0]
        if device.type == "cpu":
            use_fast_dropout(self.model)
        self.chunk_cost = CHUNK_COST if device.type == "cpu" else GPU_CHUNK_COST
        if self.attn_implementation is not None:
            self.packs = self._flash_packs
        elif self._packed_for != (device.type, half):
            self._packed_for = device.type, half
            if self.packs:  # for another device
                transformer.model.set_attn_implementation("sdpa")
            self.packs = has_plain_attention(transformer) and device.type in ("cpu", "cuda")
            if self.packs:
                transformer.model.set_attn_implementation(VARLEN)
                self.packs = packs_exactly(self, device, half)
                if not self.packs:
                    transformer.model.set_attn_implementation("sdpa")
        if self.packs and transformer.model_forward_params is not None:
            transformer.model_forward_params |= {*PACKED_INPUTS, *BLOCK_INPUTS}

    # --- Features to embeddings ---------------------------------------------------------

    def forward(self, features: Features) -> Tensor:
        """Return the embeddings ``[b, width]``, float32, not normalised."""
        features = dict(features)
        layout = features.pop("layout", None)
        if layout is not None and self.attn_implementation is None:
            # In four dimensions transformers takes a mask for complete: it looks for no texts in
            # the positions, which would wait for a GPU, and makes no [tokens, tokens] of them.
            features["attention_mask"] = features["input_ids"].new_ones(1, 1, 1, 1).bool()
        if "block_text" in features:
            kind = cast(torch.dtype, self.model.dtype)
            features["block_bias"] = block_bias(features.pop("block_text"), kind)
        features = with_lengths(tower(self.model, features.get("task") or "query"), features)
        eager = self._is_compiled and not self.training
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            features = self.model[0](features)
        if layout is not None:
            features = unpack(features, layout)
        for name in ("token_embeddings", "sentence_embedding"):
            if name in features:
                features[name] = features[name].float()
        # Pooling and projection are cheap, and lose digits in half precision.
        device_type = features["input_ids"].device.type
        with torch.autocast(device_type, enabled=False):
            for module in list(self.model)[1:]:
                # Sharded strategies hold a projection in half precision. FSDP hides parameters
                # from ``parameters`` when a chunk is computed again in backward.
                weight: Any = next(module.parameters(), None)
                weight = module.linear.weight if isinstance(module, Dense) else weight
                if weight is not None and "sentence_embedding" in features:
                    embedding = features["sentence_embedding"].to(weight.dtype)
                    features["sentence_embedding"] = embedding
                features = module(features)
        return features["sentence_embedding"].float()
