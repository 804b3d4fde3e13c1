"""A sentence-transformers model as a trainable encoder.

Comes in: the name or folder of any model that sentence-transformers loads. Goes out: an
:class:`Encoder` that makes token features of texts and embeddings of token features, with an
optional Matryoshka projection; and :class:`Embedding`, a trained model in use. A new way to
compute attention, to pool or to load goes here.

Read first: ``spec`` (what an encoder is, in a few values), ``encoder``, ``packing`` (no padding),
``trial`` (what is found out before a fit), ``unsupported`` (what is refused).
Imports from no other room.
"""

from embedtune.models.embedding import Embedding
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec, Features, PoolingMode, Role

__all__ = ["Embedding", "Encoder", "EncoderSpec", "Features", "PoolingMode", "Role"]
