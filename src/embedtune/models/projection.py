"""The Matryoshka projection: how wide it is, and how it starts."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from embedtune.errors import InputError
from embedtune.models.encoder import Encoder

ProjectionInit = Literal["none", "identity", "orthogonal", "random", "pca", "teacher"]

SHRINKAGES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Of a regression towards a rotation, in mean squared lengths of a coordinate."""
BEYOND = 0.1
"""Length of a projection's rows beyond the encoder's width, whose other rows have length 1."""
HELD_OUT_EVERY = 5
"""Of the examples of a regression, to choose among these."""


def parse_dims(dims: Sequence[int] | str, key: str = "model.mrl_dims") -> list[int]:
    """Return Matryoshka widths from a list, or from numbers with commas between.

    >>> parse_dims("64, 128")
    [64, 128]

    Raises:
        InputError: Not a list of different positive numbers.
    """
    parts = dims.split(",") if isinstance(dims, str) else dims
    try:
        widths = [int(part) for part in parts]
        is_whole = isinstance(dims, str) or widths == list(dims)
    except (ValueError, TypeError):
        widths, is_whole = [], False
    if not is_whole or not widths or min(widths) < 1 or len(set(widths)) < len(widths):
        raise InputError(f"{key}: expected different widths such as 64,128,256, found {dims!r}")
    return widths


def projection_dim(
    encoder: Encoder, init: ProjectionInit, mrl_dims: list[int] | None, teacher_dim: int | None
) -> int | None:
    """Return the width of the projection that a run appends to its encoder, None for none.

    A model that already ends in a Dense keeps it; distillation appends one, where the encoder is as
    wide as the teacher only one that starts from the teacher.

    Args:
        encoder: The encoder as loaded.
        init: ``none`` forbids a projection, ``teacher`` asks for one and for a teacher.
        mrl_dims: Widths to train, None without MRL.
        teacher_dim: Width of the teacher, None outside distillation.

    Raises:
        InputError: A width is asked for that cannot be had.
    """
    own, widest = encoder.width, max(mrl_dims or [0])
    if teacher_dim is not None:
        if widest > teacher_dim:
            raise InputError(
                f"model.mrl_dims: expected widths up to the teacher's {teacher_dim}, found {widest}"
            )
        if teacher_dim != own and init == "none":
            raise InputError(
                f"model.projection_init: none keeps the encoder's width {own}, "
                f"but the teacher's is {teacher_dim}"
            )
        is_needed = teacher_dim != own or (init == "teacher" and encoder.dense is None)
        return teacher_dim if is_needed else None
    if init == "teacher":
        raise InputError(
            "model.projection_init: teacher needs rows with a teacher's embeddings, "
            "data.teacher_path"
        )
    if mrl_dims is None:
        return None
    if encoder.dense is None and init != "none":
        return widest
    if widest > own:
        reason = "projection_init is none" if encoder.dense is None else "it ends in a Dense"
        raise InputError(
            f"model.mrl_dims: expected widths up to the model's {own} ({reason}), found {widest}"
        )
    return None


def init_projection(
    linear: nn.Linear,
    init: ProjectionInit,
    sample: Tensor | None = None,
    teacher: Tensor | None = None,
) -> None:
    """Initialise a projection so that it keeps what the encoder knows.

    Rows beyond the encoder's width are short and random. Where there are as many again, they are a
    multiple of a rotation together, and every full-width cosine stays as it is.

    Args:
        linear: Its weight is ``[out, hidden]``; its bias is zeroed unless ``init`` is ``random`` or
            ``teacher``.
        init: ``identity`` copies the coordinates, ``orthogonal`` is a random rotation, ``pca`` the
            principal axes of the sample, strongest first, so that a prefix keeps as much of what
            tells texts apart as a prefix can; ``teacher`` maps the sample to its teacher's
            embeddings; ``random`` leaves torch's weights.
        sample: Embeddings ``[n, hidden]`` for ``pca`` and ``teacher``.
        teacher: The teacher's of the same texts, ``[n, out]``.
    """
    weight = linear.weight
    kept = min(weight.shape)
    if init == "random":
        return
    with torch.no_grad():
        nn.init.zeros_(linear.bias)
        if init == "identity":
            weight[:kept] = torch.eye(weight.shape[1])[:kept]
        elif init == "orthogonal":
            weight[:kept] = nn.init.orthogonal_(torch.empty(weight.shape[1], weight.shape[1]))[
                :kept
            ]
        elif init == "pca":
            assert sample is not None, "pca needs a sample of embeddings"
            weight[:kept] = principal_axes(sample)[:kept]
        elif init == "teacher":
            assert sample is not None, "teacher needs a sample of embeddings"
            assert teacher is not None, "teacher needs the teacher's"
            weight[:], linear.bias[:] = map_to_teacher(sample, teacher)
            return
        beyond = weight[kept:]
        if len(beyond):
            nn.init.orthogonal_(beyond, gain=BEYOND * max(1.0, len(beyond) / kept) ** 0.5)


def principal_axes(sample: Tensor) -> Tensor:
    """Return the principal axes of a sample ``[n, d]``, strongest first, ``[d, d]``.

    The rows are orthonormal: applying them is a rotation, which leaves every cosine as it is. They
    are of the sample as it is, not of the centred one: what all embeddings share, in a model like
    E5 four fifths of their squared length, comes first, so that the cosines of every prefix have
    the range of the full width's, and one temperature fits them all (docs/quality.md).
    """
    unit = nn.functional.normalize(sample.double(), dim=-1)
    _, axes = torch.linalg.eigh(unit.T @ unit)  # ascending eigenvalues, axes in columns
    axes = axes.flip(-1).T
    # An eigenvector's sign is arbitrary: fix it, so that every machine starts alike.
    signs = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    return (axes * signs).float()


def map_to_teacher(sample: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight ``[D, d]`` and bias ``[D]`` that take a student's embeddings to its teacher's.

    From the nearest rotation (Schönemann 1966), which keeps the student's distances but for their
    scale, as far towards the least squares as held-out texts gain by it: a ridge regression (Hoerl
    and Kennard 1970) that shrinks towards the rotation in place of 0. Both sides are centred: what
    all embeddings of a side share tells no text from another.

    Args:
        sample: The student's embeddings of some texts, ``[n, d]``.
        teacher: The teacher's of the same texts, ``[n, D]``; their lengths do not count.
    """
    x, y = sample.double(), nn.functional.normalize(teacher.double(), dim=-1)
    is_held_out = torch.arange(len(x)) % HELD_OUT_EVERY == 0
    best = max(SHRINKAGES)
    if is_held_out.sum() > 1:
        unseen = y[is_held_out]
        maps = _shrunk_regressions(x[~is_held_out], y[~is_held_out], SHRINKAGES)
        mapped = [x[is_held_out] @ weight.T + bias for weight, bias in maps]
        alike = [nn.functional.cosine_similarity(side, unseen).mean() for side in mapped]
        best = SHRINKAGES[int(torch.stack(alike).argmax())]
    weight, bias = next(_shrunk_regressions(x, y, [best]))
    return weight.float(), bias.float()


def _shrunk_regressions(
    x: Tensor, y: Tensor, shrinkages: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    x, y, size = x - mean_x, y - mean_y, x.square().sum()
    gram, cross = x.T @ x, y.T @ x
    left, strengths, right = torch.linalg.svd(cross, full_matrices=False)
    rotation, spread = left @ right, gram.trace()
    if spread > 1e-12 * size:  # else all texts are alike, which tells no scale
        rotation *= strengths.sum() / spread
    for shrinkage in shrinkages:
        added = shrinkage * (spread + 1e-12) / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram + added, (cross + rotation @ added).T).T
        yield weight, mean_y - weight @ mean_x
