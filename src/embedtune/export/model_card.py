"""Write the model card of an exported folder."""

import math
from functools import cache
from pathlib import Path

import jinja2
from huggingface_hub import ModelCard

from embedtune.checkpoints.training_facts import NOTHING_KNOWN, TrainingFacts
from embedtune.data.records import Format
from embedtune.evaluation.intervals import CONFIDENCE, FEWEST, RESAMPLES, decimals, outcome
from embedtune.evaluation.metric_name import parse_name
from embedtune.export.hub_metadata import Measure, card_data, is_hub_id, measures
from embedtune.export.markdown import as_code
from embedtune.models.encoder import Encoder

ROW_OF = {
    Format.PAIR: "a query with texts that answer it",
    Format.TRIPLET: "a query with texts that answer it and texts that do not",
    Format.SCORED: "a query with texts and their scores",
    Format.DISTILL: "a text with the embedding that a teacher gives it",
}


def write_model_card(folder: Path, encoder: Encoder, facts: TrainingFacts | None) -> None:
    """Write ``README.md``, with the metadata that the hub reads and all that is known.

    Args:
        folder: The exported folder.
        encoder: The exported encoder.
        facts: Those of its fit; None, as of checkpoints that have none, leaves their sections out.
    """
    facts = facts or NOTHING_KNOWN
    name, model = encoder.spec.model_name_or_path, encoder.model
    based = f" based on {name.rpartition('/')[2]}" if is_hub_id(name) else ""
    title = f"Text-embedding model{based}"
    found = measures(facts, encoder.width)
    data = card_data(name, title, found, facts.mrl_dims is not None)
    text = _template().render(
        title=title,
        base=_link(name),
        card=data,
        facts=facts,
        measures=found,
        compares=any(measure.base is not None for measure in found),
        fallen=_fallen(facts),
        confidence=f"{CONFIDENCE:.0%}",
        resamples=RESAMPLES,
        fewest=FEWEST,
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


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"code": as_code, "figure": _figure, "change": _change, "repr": repr}
    template = Path(__file__).with_suffix(".md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template)


def _link(name: str) -> str:
    """Return what a card calls a base model; of a folder it does not tell where it is."""
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    if "/" in name or Path(name).is_dir():
        return f"the local model {as_code(Path(name).resolve().name)}"
    return as_code(name)


def _fallen(facts: TrainingFacts) -> tuple[str, float, float] | None:
    """Return the metric by which the checkpoint was chosen, if it is below the base model's."""
    name = facts.monitor or ""
    base, own = (metrics.get(name, math.nan) for metrics in (facts.base_metrics, facts.metrics))
    parsed = parse_name(name)
    has_fallen = parsed is not None and not parsed.is_loss and own < base
    return (name, own, base) if has_fallen else None


def _change(measure: Measure) -> str:
    """Return the difference from the base model, with its interval and what follows from it."""
    if measure.base is None:
        return "-"
    kind = f"+.{decimals(measure.interval, 4)}f"
    ends = " to ".join(f"{end:{kind}}" for end in measure.interval or ())
    between = f" ({ends})" if ends else ""
    return f"{measure.value - measure.base:{kind}}{between}, {outcome(measure.interval)}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
