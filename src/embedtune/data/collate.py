"""Turn examples into a batch: texts tokenised once, sorted by length, cut into chunks."""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedtune.data.batch import Batch, query_hashes, text_ids
from embedtune.data.chunks import PROBE, Text, make_chunks, tokenise
from embedtune.data.examples import Example
from embedtune.models.encoder import Encoder
from embedtune.models.spec import ROLES, Features, Role

PLAIN_FEATURES = {"input_ids", "attention_mask", "token_type_ids"}
"""Of these, token ids tell all of a single text."""
TOKENIZERS = ("sentence-transformers", "transformers", "tokenizers")
"""Packages whose releases may make other ids of the same text."""


class Collator:
    """Collate examples into a :class:`Batch`."""

    def __init__(
        self,
        encoder: Encoder,
        query_max_len: int,
        passage_max_len: int,
        tokens_per_chunk: int,
        prompts: Mapping[Role, str | None] | None = None,
    ) -> None:
        """Take the encoder's own tokenisation.

        Args:
            encoder: Tokenises and pads; its weights are not touched.
            query_max_len: Longest query in tokens.
            passage_max_len: Longest positive or negative in tokens.
            tokens_per_chunk: Largest number of tokens, padding included, that are encoded at once.
            prompts: Those of queries whose row brings none, and of documents; the default is the
                encoder's own.
        """
        self.encoder = encoder
        self.prompts = prompts or {role: encoder.default_prompt(role) for role in ROLES}
        self.query_max_len = encoder.cap(query_max_len, "query")
        self.passage_max_len = encoder.cap(passage_max_len, "document")
        self.tokens_per_chunk = tokens_per_chunk

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return the batch of ``examples``."""
        queries: list[Text] = []
        positives: list[Text] = []
        negatives: list[Text] = []
        known: dict[Text, np.ndarray] = {}
        for example in examples:
            query, *documents = texts = self.texts(example)
            queries.append(query)
            positives += documents[: len(example.positives)]
            negatives += documents[len(example.positives) :]
            for text in texts:
                ids = (example.tokens or {}).get((text.role, text.text))
                if ids is not None:
                    known[text] = ids
        distinct = dict.fromkeys((*queries, *positives, *negatives))
        rows = {text: row for row, text in enumerate(distinct)}
        chunks, order = make_chunks(self.encoder, list(rows), self.tokens_per_chunk, known)
        lists = [i for i, example in enumerate(examples) for _ in example.positives]
        scores = [score for example in examples for score in example.scores]
        teachers = [example.teacher for example in examples if example.teacher is not None]
        return Batch(
            example_id=torch.tensor(
                [example.example_id for example in examples if not example.spare],
                dtype=torch.int64,
            ),
            chunks=chunks,
            query=order[[rows[text] for text in queries]],
            positive=order[[rows[text] for text in positives]],
            negative=order[[rows[text] for text in negatives]],
            list_index=torch.tensor(lists, dtype=torch.int64),
            scores=torch.tensor(scores, dtype=torch.float32) if scores else None,
            teacher=torch.from_numpy(np.stack(teachers)) if teachers else None,
            query_id=_query_id(queries),
            query_text_id=text_ids(text.text for text in queries),
            positive_id=text_ids(text.text for text in positives),
            negative_id=text_ids(text.text for text in negatives),
            known_positive_id=torch.nn.utils.rnn.pad_sequence(
                [_known_positive_id(example) for example in examples], batch_first=True
            ),
            tokens=(sum(map(_real_tokens, chunks)), sum(c["input_ids"].numel() for c in chunks)),
        )

    def texts(self, example: Example) -> list[Text]:
        """Return what is encoded of an example."""
        documents = (*example.positives, *example.negatives)
        return [self.query(example), *map(self.document, documents)]

    def token_ids(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """Return the ids of each text as it is encoded, cut and with special tokens, int32 ``[t]``.

        They tell all of a text where :attr:`tokens_key` is not None.
        """
        groups: dict[Any, list[int]] = {}
        for i, text in enumerate(texts):
            groups.setdefault(text[1:], []).append(i)
        ids: dict[int, np.ndarray] = {}
        for members in groups.values():
            rows, _ = tokenise(self.encoder, [texts[i] for i in members], {})
            assert rows is not None, "checked by tokens_key"
            found = (row["input_ids"].astype(np.int32) for row in rows)
            ids |= dict(zip(members, found, strict=True))
        return [ids[i] for i in range(len(texts))]

    @property
    def tokens_key(self) -> str | None:
        """Digest of all that :meth:`token_ids` depends on beside the texts.

        None where ids do not tell all of a text, or where no digest can tell the tokenizer.
        """
        if self.encoder.routes:  # each route has a tokenizer of its own
            return None
        backend = getattr(self.encoder.model.tokenizer, "backend_tokenizer", None)
        features = self.encoder.tokenize([PROBE], "document", None, self.passage_max_len)
        tensors = {k: v for k, v in features.items() if isinstance(v, Tensor)}
        if backend is None or not {"input_ids", "attention_mask"} <= set(tensors) <= PLAIN_FEATURES:
            return None
        if "token_type_ids" in tensors and tensors["token_type_ids"].any():
            return None
        tokenizer = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # left over from the last call
            tokenizer.pop(state, None)
        model: Any = self.encoder.model
        rules = [
            tokenizer,
            model.tokenizer.truncation_side,
            model.tokenizer.split_special_tokens,  # the backend does not write it down
            model.tokenizer.chat_template,
            model[0].get_config_dict() if hasattr(model[0], "get_config_dict") else None,
            [self.prompts[role] for role in ROLES],
            self.query_max_len,
            self.passage_max_len,
            _releases(),
        ]
        return hashlib.blake2b(json.dumps(rules, default=str).encode(), digest_size=16).hexdigest()

    def query(self, example: Example) -> Text:
        """Return a query with its row's prompt, or else that of all queries."""
        prompt = example.prompt or self.prompts["query"]
        return Text(example.query, "query", prompt, self.query_max_len)

    def document(self, text: str) -> Text:
        """Return a positive or a negative with the prompt of all documents."""
        return Text(text, "document", self.prompts["document"], self.passage_max_len)


def _releases() -> list[str]:
    found = []
    for package in TOKENIZERS:
        with contextlib.suppress(PackageNotFoundError):  # a source folder on the path
            found.append(f"{package} {version(package)}")
    return found


def _query_id(queries: Sequence[Text]) -> Tensor:
    asked = query_hashes((text.text for text in queries), (text.prompt for text in queries))
    return torch.from_numpy(asked)


def _known_positive_id(example: Example) -> Tensor:
    if example.known_positive_id is None:
        return text_ids(example.known_positives)
    return torch.from_numpy(example.known_positive_id)


def _real_tokens(features: Features) -> int:
    mask = features.get("attention_mask")
    return int(features["input_ids"].numel() if mask is None else mask.sum())
