"""Try a model on a few texts: alone, padded with others, and packed with others.

An embedding must not depend on the texts that are encoded at the same time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embedtune.errors import InputError
from embedtune.models.packing import (
    LONGEST_TRIAL,
    TextFeatures,
    join_padded,
    to_device,
    turning_point,
    unscaled,
)
from embedtune.models.spec import ROLES, Features, Role
from embedtune.models.towers import backbones, positions, tower
from embedtune.models.words import known_words

if TYPE_CHECKING:
    from embedtune.models.encoder import Encoder

TOLERANCE = 1e-4
"""Largest difference that is taken for rounding, relative to the largest value."""
HALF_TOLERANCE = 0.1
"""The same in half precision, where it is asked alone whether there is a kernel."""

SHORT, LONGER = "one", "one two three four five six seven eight nine ten, and some words more"

UNMADE = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What models raise that want their inputs padded."""


def prepare_training(encoder: "Encoder") -> None:
    """Refuse a model whose embeddings depend on padding, and freeze what takes no part in them.

    Where processes exchange gradients, they would wait for those of weights that have none.

    Raises:
        InputError: An embedding differs by more than rounding once its text is padded, is of
            another width than the model tells, or there is none.
    """
    used = set()
    with _at_rest(encoder), _plain_attention(encoder):
        for role in ROLES if encoder.routes else ROLES[:1]:
            alone, padded = _embed_alone_and_padded(encoder, role)
            _refuse_width(encoder, alone.shape[-1])
            _refuse_difference(encoder, alone.detach(), padded[:1].detach())
            used |= _leaves(alone)
    for name, weight in encoder.named_parameters():
        # A few tokens do not reach every expert.
        if weight not in used and "expert" not in name:
            weight.requires_grad_(False)


@contextmanager
def _at_rest(encoder: "Encoder") -> Iterator[None]:
    """Drop nothing."""
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)


@contextmanager
def _plain_attention(encoder: "Encoder") -> Iterator[None]:
    """Attend in a way that every device and precision has, where another was asked for."""
    given = encoder.attn_implementation
    inner: list[Any] = list(backbones(encoder.model))
    changed = inner if given not in (None, "eager", "sdpa") else []
    for model in changed:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model in changed:
            model.set_attn_implementation(given)


def _embed_alone_and_padded(encoder: "Encoder", role: Role) -> tuple[Tensor, Tensor]:
    """Return the embedding of a text, and those of it and a longer one."""
    module = tower(encoder.model, role)
    words = known_words(module)
    texts = [words[0], " ".join(words)] if words else [SHORT, LONGER]
    # Beyond that it is the longer text, not padding, that an embedding depends on.
    longest = min(encoder.cap(LONGEST_TRIAL, role), unscaled(module))
    try:
        alone, padded = (
            encoder.tokenize(given, role, None, longest) for given in (texts[:1], texts)
        )
        device = encoder.model.device
        return encoder(to_device(alone, device)), encoder(to_device(padded, device))
    except torch.OutOfMemoryError:
        raise
    except (KeyError, *UNMADE) as error:
        raise InputError(
            f"model_name_or_path: {encoder.spec.model_name_or_path!r}: expected a model that "
            f"embeds a {role}, found {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


def _refuse_width(encoder: "Encoder", width: int) -> None:
    """Refuse embeddings of another width than that which a projection and a card are made for."""
    if width != encoder.width:
        raise InputError(
            f"model_name_or_path: {encoder.spec.model_name_or_path!r}: expected embeddings of "
            f"{encoder.width} numbers, as the model tells, found {width}"
        )


def _refuse_difference(encoder: "Encoder", alone: Tensor, padded: Tensor) -> None:
    difference = float((padded - alone).abs().max() / alone.abs().max())
    is_half = encoder.model.dtype in (torch.float16, torch.bfloat16)
    if difference > (HALF_TOLERANCE if is_half else TOLERANCE):
        raise InputError(
            f"model_name_or_path: {encoder.spec.model_name_or_path!r}: expected embeddings that "
            f"do not depend on padding, found a difference of {difference:.1e} of the largest "
            "value between a text alone and the same text padded to a longer one"
        )


def _leaves(output: Tensor) -> set[Tensor]:
    """Return the weights that an output was computed from, whatever their gradients are."""
    found, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return found


def packs_exactly(encoder: "Encoder", device: torch.device, half: torch.dtype | None) -> bool:
    """Tell whether texts have the same embeddings packed one after another as alone.

    Tried on a text longer than any window and than the length at which rotary positions are
    scaled, and, where that is no more than ``LONGEST_TRIAL``, on more tokens together than a text
    has positions.

    Args:
        encoder: Set up to pack; it is moved to ``device``.
        device: Where it will run.
        half: What it will multiply in under autocast, None for float32.
    """
    with _at_rest(encoder):
        try:
            encoder.to(device)
            rows = _rows(encoder)
            repeats = _repeats(encoder, rows)
            alone = [to_device(join_padded([row], None), device) for row in rows]
            packed = to_device(encoder.join(rows * repeats, "document"), device)
            ways = [packed]
            if "block_text" in packed:  # long texts have other kernels than those that share blocks
                ways.append({k: v for k, v in packed.items() if not k.startswith("block_")})
            with torch.no_grad():
                # On a GPU each precision has kernels of its own.
                return all(
                    _agrees(encoder, alone, features, kind)
                    for features in ways
                    for kind in ((None,) if device.type == "cpu" else {None, half})
                )
        except torch.OutOfMemoryError:
            encoder.to("cpu")  # as a whole it does not fit
            return False
        except UNMADE:
            return False


def _rows(encoder: "Encoder") -> list[TextFeatures]:
    longest = 8 + turning_point(encoder.model[0])
    texts = [SHORT, " ".join(map(str, range(longest))), "one two three"]
    features = encoder.tokenize(texts, "document", None, 4 * longest)
    tensors = {k: v for k, v in features.items() if isinstance(v, Tensor)}
    kept = [mask.bool() for mask in tensors["attention_mask"]]
    return [{k: v[i][m].numpy() for k, v in tensors.items()} for i, m in enumerate(kept)]


def _repeats(encoder: "Encoder", rows: list[TextFeatures]) -> int:
    """Return how often to pack these texts for more tokens than a text has positions."""
    limit, tokens = positions(encoder.model[0]), sum(len(row["input_ids"]) for row in rows)
    return 1 if limit is None or limit > LONGEST_TRIAL else 1 + limit // tokens


def _agrees(
    encoder: "Encoder", alone: list[Features], packed: Features, half: torch.dtype | None
) -> bool:
    with torch.autocast(packed["input_ids"].device.type, half, enabled=half is not None):
        expected = torch.cat([encoder(features) for features in alone])
        found = encoder(packed).unflatten(0, (-1, len(expected)))
    # Isolation shows in float32; in half precision, that there is a kernel.
    tolerance = TOLERANCE if half is None else HALF_TOLERANCE
    return float((found - expected).abs().max() / expected.abs().max()) <= tolerance
