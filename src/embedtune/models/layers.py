"""The repeated layers of a model: what is compiled, and what FSDP gathers as a whole."""

from sentence_transformers import SentenceTransformer
from torch import nn

from embedtune.models.towers import backbones


def layers(module: nn.Module) -> nn.ModuleList | None:
    """Return the largest list of modules below ``module``, None where there is none."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m)]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)


def block_classes(model: SentenceTransformer) -> set[type[nn.Module]]:
    """Return the classes of the layers of every transformer of a model."""
    found: set[type[nn.Module]] = set()
    for backbone in backbones(model):
        names = getattr(backbone, "_no_split_modules", None) or ()
        declared = {type(m) for m in backbone.modules() if type(m).__name__ in names}
        repeated = layers(backbone)
        # Some architectures declare none.
        found |= declared or ({type(repeated[0])} if repeated is not None else set())
    return found
