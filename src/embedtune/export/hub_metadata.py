"""What the hub reads in a model card."""

import contextlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id

from embedtune.checkpoints.training_facts import TrainingFacts
from embedtune.evaluation.intervals import Interval
from embedtune.evaluation.metric_name import parse_name
from embedtune.evaluation.metrics import TITLES
from embedtune.export.markdown import one_line

LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma
    gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0
    other pddl postgresql unlicense wtfpl zlib
"""
"""Identifiers that the hub takes: https://huggingface.co/docs/hub/repositories-licenses."""

LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
"""Codes of ISO 639, and what the hub takes beside them."""


class Measure(NamedTuple):
    """One metric on one set.

    Attributes:
        dataset: Name of the set.
        metric: Such as ``ndcg@10``.
        width: Leading dimensions that were compared; None is all of them.
        value: Of the trained model.
        base: Of the model that training started from, where it is known.
        interval: In which the difference from it lies, where that is known.
    """

    dataset: str
    metric: str
    width: int | None
    value: float
    base: float | None
    interval: Interval | None = None

    @property
    def title(self) -> str:
        """The metric as people write it."""
        correlation = "" if "@" in self.metric else " correlation"
        return f"{TITLES[self.metric]}{correlation}"

    def as_result(self) -> EvalResult:
        """Return it under the names that sentence-transformers' own cards use."""
        is_retrieval = "@" in self.metric
        task = "Information Retrieval" if is_retrieval else "Semantic Similarity"
        suffix = f", {self.width} dimensions" if self.width else ""
        return EvalResult(
            task_name=task,
            task_type=task.lower().replace(" ", "-"),
            # The hub would link any other type to the data set of that name.
            dataset_type="unknown",
            dataset_name=self.dataset,
            dataset_config=self.dataset,  # huggingface_hub tells sets apart by it, not by the name
            metric_type=f"cosine_{self.metric}" if is_retrieval else f"{self.metric}_cosine",
            metric_name=f"{self.title}, cosine{suffix}",
            metric_args={"truncate_dim": self.width} if self.width else None,
            metric_value=round(self.value, 4),
        )


def measures(facts: TrainingFacts, full_width: int) -> list[Measure]:
    """Return the metrics that a card tells, set by set and metric by metric, full width first."""
    found, intervals = [], facts.intervals or {}
    for name, value in facts.metrics.items():
        parsed = parse_name(name)
        if parsed is None or parsed.is_loss or parsed.stage != "val":
            continue
        if math.isfinite(value) and parsed.width != full_width:  # which None stands for
            base = facts.base_metrics.get(name, math.nan)
            known = base if math.isfinite(base) else None
            between = (intervals[name][0], intervals[name][1]) if name in intervals else None
            _, dataset, metric, width = parsed
            found.append(Measure(one_line(dataset), metric, width, value, known, between))
    sets, metrics = ([getattr(m, name) for m in found] for name in ("dataset", "metric"))
    return sorted(found, key=lambda m: (sets.index(m.dataset), metrics.index(m.metric)))


def card_data(name: str, title: str, found: list[Measure], is_matryoshka: bool) -> ModelCardData:
    """Return the metadata of the card of a model that was trained from ``name``."""
    known = _metadata_of_base(name)
    licence, spoken = known.get("license"), known.get("language")
    languages = [str(code) for code in (spoken if isinstance(spoken, list) else [spoken])]
    tags = ["sentence-transformers", "sentence-similarity", "feature-extraction", "embedtune"]
    return ModelCardData(
        base_model=name if is_hub_id(name) else None,
        language=[code for code in languages if LANGUAGE.fullmatch(code)] or None,
        license=licence if licence in LICENSES.split() else None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[*tags, "matryoshka"] if is_matryoshka else tags,
        model_name=title if found else None,
        eval_results=[measure.as_result() for measure in found] or None,
    )


def is_hub_id(name: str) -> bool:
    """Tell whether a model's name is one that the hub takes for a base model: org/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).is_dir()


def _metadata_of_base(name: str) -> Mapping[str, Any]:
    """Return the metadata of the base model's own card, empty where it cannot be read."""
    folder, card = Path(name), "README.md"
    with contextlib.suppress(ValueError, yaml.YAMLError):  # also of what can be no hub's name
        path = folder / card if folder.is_dir() else try_to_load_from_cache(name, card)
        if isinstance(path, Path | str) and Path(path).is_file():
            return metadata_load(path) or {}
    return {}
