"""Write the model card of an exported folder, and keep what it tells in a checkpoint."""

import contextlib
import inspect
import math
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from embedtune.encoder import Encoder
from embedtune.records import Format

LIBRARIES = ("embedtune", "torch", "lightning", "transformers", "sentence-transformers")

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

METRIC = re.compile(r"val/(?P<dataset>[^/]+)/(?P<metric>\w+@\d+|spearman)(?:/(?P<width>\d+))?")
"""Names of the metrics that a card tells: of retrieval, and of the order of scored pairs."""

ROW_OF = {
    Format.PAIR: "a query with texts that answer it",
    Format.TRIPLET: "a query with texts that answer it and texts that do not",
    Format.SCORED: "a query with texts and their scores",
    Format.DISTILL: "a text with the embedding that a teacher gives it",
}


# --- What a fit tells -------------------------------------------------------------------


class TrainingFacts(NamedTuple):
    """What a fit tells of itself in a card: plain values, which a checkpoint and JSON can hold.

    Attributes:
        data: ``files`` (names without folders), ``format``, ``rows``, ``examples`` (of an epoch),
            ``negatives`` (hard ones a query), ``teacher_width``, ``query_prompt`` (that all rows
            share), ``query_max_len`` and ``passage_max_len`` (in tokens); None where there is none.
        configuration: Settings by the label that the card gives them, in its order.
        mrl_dims: The trained widths; None without Matryoshka.
        step: Optimiser steps of these weights.
        epoch: The epoch that they were in, counted from 1.
        base_metrics: ``val/<set>/<metric>`` and ``val/<set>/<metric>/<width>`` of the model that
            training started from.
        metrics: The same of these weights.
    """

    data: dict[str, Any]
    configuration: dict[str, Any]
    mrl_dims: list[int] | None
    step: int | None
    epoch: int | None
    base_metrics: dict[str, float]
    metrics: dict[str, float]


NOTHING_KNOWN = TrainingFacts({}, {}, None, None, None, {}, {})


def training_facts(trainer: Any, module: Any) -> TrainingFacts:
    """Collect the facts of a running fit; each rank can, alone.

    Args:
        trainer: The Trainer.
        module: Its :class:`~embedtune.module.EmbeddingModule`.
    """
    if "train" not in module.data.datasets:  # a checkpoint may be saved without a fit
        return NOTHING_KNOWN
    return TrainingFacts(
        data=_data_facts(module.data, module.encoder),
        configuration=_configuration(trainer, module),
        mrl_dims=list(module.mrl_dims) if module.use_mrl else None,
        step=trainer.global_step,
        # ``current_epoch`` is another at the end of an epoch than at the end of the fit.
        epoch=trainer.fit_loop.epoch_progress.current.ready,
        base_metrics={name: float(value) for name, value in module.base_metrics.items()},
        metrics={name: float(value) for name, value in module.metrics.items()},
    )


def _data_facts(data: Any, encoder: Encoder) -> dict[str, Any]:
    train = data.datasets["train"]
    rows = train.rows
    has_documents = rows.format != Format.DISTILL
    return {
        "files": [path.name for path in rows.paths],
        "format": str(rows.format),
        "rows": len(rows),
        "examples": len(train),
        "negatives": data.neg_nums if rows.format == Format.TRIPLET else None,
        "teacher_width": None if train.teacher is None else train.teacher.width,
        "query_prompt": rows.prompt,
        "query_max_len": encoder.cap(data.query_max_len),
        "passage_max_len": encoder.cap(data.passage_max_len) if has_documents else None,
    }


def _configuration(trainer: Any, module: Any) -> dict[str, Any]:
    accumulated = trainer.accumulate_grad_batches
    values = {
        "loss": describe_loss(module.loss),
        "learning rate": module.lr,
        "schedule": module.lr_schedule,
        "warm-up": f"{module.warmup_proportion:.0%} of the steps",
        "weight decay": module.weight_decay,
        "gradient clipping": trainer.gradient_clip_val,
        "epochs": trainer.max_epochs if (trainer.max_epochs or -1) >= 0 else None,
        "steps": module.num_steps,
        "batch size": module.data.batch_size * trainer.world_size,
        "accumulated batches": accumulated if accumulated > 1 else None,
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__.removesuffix("Strategy"),
        "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
        "seed": module.data.seed,
        "versions": _versions(),
    }
    return {label: value for label, value in values.items() if value is not None}


def _versions() -> str:
    found = []
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # a source folder on the path
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def describe_loss(loss: nn.Module) -> str:
    """Return a loss with its parameters for people to read.

    >>> from embedtune.losses import CoSENT
    >>> describe_loss(CoSENT())
    'CoSENT(scale=20.0)'
    """
    given = inspect.signature(type(loss).__init__).parameters
    values = {k: v for k, v in vars(loss).items() if isinstance(v, bool | int | float | str)}
    shown = ", ".join(f"{k}={v}" for k, v in values.items() if k in given)
    inner = [describe_loss(child) for child in loss.children()]
    return f"{type(loss).__name__}({', '.join(inner + ([shown] if shown else []))})"


# --- What the hub reads -----------------------------------------------------------------


class Measure(NamedTuple):
    """One metric on one set.

    Attributes:
        dataset: Name of the set.
        metric: Such as ``ndcg@10``.
        width: Leading dimensions that were compared; None is all of them.
        value: Of the trained model.
        base: Of the model that training started from, where it is known.
    """

    dataset: str
    metric: str
    width: int | None
    value: float
    base: float | None

    @property
    def title(self) -> str:
        """The metric as people write it."""
        name, at, depth = self.metric.partition("@")
        known = {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP", "spearman": "Spearman correlation"}
        return f"{known.get(name, name.capitalize())}{at}{depth}"

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
    found = []
    for name, value in facts.metrics.items():
        match = METRIC.fullmatch(name)
        width = int(match["width"]) if match and match["width"] else None
        if match and math.isfinite(value) and width != full_width:  # which None stands for
            base = facts.base_metrics.get(name, math.nan)
            known = base if math.isfinite(base) else None
            found.append(Measure(_one_line(match["dataset"]), match["metric"], width, value, known))
    sets, metrics = ([getattr(m, name) for m in found] for name in ("dataset", "metric"))
    return sorted(found, key=lambda m: (sets.index(m.dataset), metrics.index(m.metric)))


def _card_data(name: str, title: str, found: list[Measure], is_matryoshka: bool) -> ModelCardData:
    known = _metadata_of_base(name)
    licence, spoken = known.get("license"), known.get("language")
    languages = [str(code) for code in (spoken if isinstance(spoken, list) else [spoken])]
    tags = ["sentence-transformers", "sentence-similarity", "feature-extraction", "embedtune"]
    return ModelCardData(
        base_model=name if _is_hub_id(name) else None,
        language=[code for code in languages if LANGUAGE.fullmatch(code)] or None,
        license=licence if licence in LICENSES.split() else None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[*tags, "matryoshka"] if is_matryoshka else tags,
        model_name=title if found else None,
        eval_results=[measure.as_result() for measure in found] or None,
    )


def _is_hub_id(name: str) -> bool:
    """Tell whether a model's name is one that the hub takes for a base model: org/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).is_dir()


def _link(name: str) -> str:
    """Return what a card calls a base model; of a folder it does not tell where it is."""
    if _is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    if "/" in name or Path(name).is_dir():
        return f"the local model {as_code(Path(name).resolve().name)}"
    return as_code(name)


def _metadata_of_base(name: str) -> Mapping[str, Any]:
    """Return the metadata of the base model's own card, empty where it cannot be read."""
    folder, card = Path(name), "README.md"
    with contextlib.suppress(ValueError, yaml.YAMLError):  # also of what can be no hub's name
        path = folder / card if folder.is_dir() else try_to_load_from_cache(name, card)
        if isinstance(path, Path | str) and Path(path).is_file():
            return metadata_load(path) or {}
    return {}


# --- What people read -------------------------------------------------------------------


def write_model_card(folder: Path, encoder: Encoder, facts: TrainingFacts | None) -> None:
    """Write ``README.md``, with the metadata that the hub reads and all that is known.

    Args:
        folder: The exported folder.
        encoder: The exported encoder.
        facts: Those of its fit; None, as of checkpoints that have none, leaves their sections out.
    """
    facts = facts or NOTHING_KNOWN
    name, model = encoder.spec.model_name_or_path, encoder.model
    based = f" based on {name.rpartition('/')[2]}" if _is_hub_id(name) else ""
    title = f"Text-embedding model{based}"
    found = measures(facts, encoder.width)
    data = _card_data(name, title, found, facts.mrl_dims is not None)
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"code": as_code, "figure": _figure, "repr": repr}
    template = Path(__file__).with_suffix(".md.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        title=title,
        base=_link(name),
        card=data,
        facts=facts,
        measures=found,
        compares=any(measure.base is not None for measure in found),
        widths=any(measure.width for measure in found),
        row_of=ROW_OF,
        width=encoder.width,
        small_width=max((w for w in facts.mrl_dims or () if w < encoder.width), default=None),
        similarity=model.similarity_fn_name,
        longest=encoder.max_seq_length,
        prompts={role: prompt for role, prompt in model.prompts.items() if prompt},
        default_prompt=model.default_prompt_name,
        trust=", trust_remote_code=True" if encoder.spec.trust_remote_code else "",
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n").save(folder / "README.md")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _one_line(text: str) -> str:
    """Return a text with everything escaped that is not printed, line breaks among it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_code(value: object) -> str:
    """Return a value as code that is safe in a cell of a Markdown table.

    >>> as_code("a <b> c"), as_code("a|b")
    ('`a <b> c`', '<code>a&#124;b</code>')
    """
    text = _one_line(str(value))
    if text == text.strip() and not set("`|\\") & set(text):
        return f"`{text}`"
    # A code span knows no escapes, and a table looks for its bars first.
    return f"<code>{re.sub('[!-/:-@[-`{-~]', lambda found: f'&#{ord(found[0])};', text)}</code>"
