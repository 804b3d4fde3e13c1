"""Widths of an embedding's prefixes, as losses are given them."""

from collections.abc import Sequence

from embedtune.errors import InputError


def require_widths(name: str, dims: Sequence[int]) -> list[int]:
    """Return ``dims`` as a list.

    Raises:
        InputError: There are none, one is not positive, or is there twice; ``name`` is the
            argument's.
    """
    if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
        raise InputError(f"{name}: expected different widths of at least 1, found {list(dims)}")
    return list(dims)


def refuse_wider(dims: Sequence[int], width: int) -> None:
    """Refuse widths above that of the embeddings.

    Raises:
        InputError: One is.
    """
    if max(dims) > width:
        raise InputError(
            f"mrl_dims: expected widths up to the embedding's {width}, found {max(dims)}"
        )
