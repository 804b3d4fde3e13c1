"""How the embeddings of a model are compared."""


def compared_by(similarity: str, normalizes: bool) -> str:
    """Return what a model's similarity comes to: cosine for the dot product of unit vectors.

    So it is at every width, as people compare cut embeddings.

    Args:
        similarity: By sentence-transformers' names.
        normalizes: Whether the model's embeddings have length 1.

    >>> compared_by("dot", normalizes=True), compared_by("dot", normalizes=False)
    ('cosine', 'dot')
    """
    return "cosine" if normalizes and similarity in ("dot", "euclidean") else similarity
