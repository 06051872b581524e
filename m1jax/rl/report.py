"""`report.html`: a run at a glance, in one file that needs no other."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from m1jax.disk import write_atomically
from m1jax.rl.alarms import alarms

Record = Mapping[str, Any]

PANELS: Sequence[tuple[str, Sequence[str]]] = (
    ("reward", ("reward", "heldout_reward")),
    ("right answers", ("accuracy", "heldout_accuracy", "heldout_majority")),
    ("right form", ("format", "heldout_format")),
    ("response length (tokens)", ("length", "length_p50", "length_p99", "window")),
    ("how responses end", ("finish_stop", "finish_length", "finish_repetition")),
    ("perplexity of what was written", ("perplexity",)),
    ("groups of equal rewards", ("zero_variance",)),
    ("problems asked and groups kept", ("asked", "kept", "waited", "retired")),
    ("staleness (versions)", ("staleness",)),
    ("tokens that older versions wrote (share)", ("older_tokens",)),
    ("entropy (nats per token)", ("entropy",)),
    ("largest importance weight", ("ratio_max",)),
    ("log-ratio: quantiles", ("log_ratio_p01", "log_ratio_p50", "log_ratio_p99")),
    ("effective sample size (share)", ("effective",)),
    ("clipped tokens", ("clipped", "clipped_up", "clipped_down")),
    ("clipped mass", ("clipped_mass_up", "clipped_mass_down")),
    ("KL(old, current)", ("kl_k1", "kl_k3", "kl_reference")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("trainer and sampler: correlation", ("pearson",)),
    ("trainer and sampler: largest gap", ("sampler_gap",)),
    ("tokens per second", ("tokens_per_second",)),
    ("seconds of a batch", ("generation_seconds", "waiting_seconds", "sync_seconds")),
    ("peak memory (bytes)", ("memory_bytes",)),
)
BY_UPDATE = ("kl_k3", "clipped", "effective", "entropy")
"""drawn over the updates of the first, the middle and the last generation batch"""


def write_report(directory: Path, records: Sequence[Record]) -> Path:
    """Writes it into a run's directory.

    Args:
        directory: of the run; its samples_before.md and samples_after.md are shown where they are.
        records: of the training, oldest first (`MetricsLog.of`).

    Returns:
        Its path.
    """
    template = jinja2.Environment(autoescape=True).from_string(_TEMPLATE)
    said = [(record["step"], text) for i, record in enumerate(records) for text in alarms(records[: i + 1])]
    page = template.render(
        name=directory.name,
        rows=_before_and_after(records),
        alarms=said,
        curves=[(title, _curve(records, names)) for title, names in PANELS if _known(records, names)],
        by_update=[(name, drawn) for name in BY_UPDATE if (drawn := _over_updates(records, name))],
        samples=[(when, _text(directory / f"samples_{when}.md")) for when in ("before", "after")],
    )
    path = directory / "report.html"
    write_atomically(path, page)
    return path


def _before_and_after(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    measured = [record for record in records if "heldout_reward" in record]
    if not measured:
        return []
    first, last = measured[0], measured[-1]
    names = [name for name, value in last.items() if name.startswith("heldout_") and isinstance(value, int | float)]
    return [(name.removeprefix("heldout_"), _number(first.get(name)), _number(last[name])) for name in names]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else "none was written"


def _known(records: Sequence[Record], names: Sequence[str]) -> bool:
    return any(record.get(name) is not None for record in records for name in names)


def _curve(records: Sequence[Record], names: Sequence[str]) -> str:
    lines = {name: [(r["step"], r[name]) for r in records if r.get(name) is not None] for name in names}
    return _drawn({name: points for name, points in lines.items() if points}, "generation batch")


def _over_updates(records: Sequence[Record], name: str) -> str | None:
    found = [record for record in records if any(v is not None for v in record.get(f"{name}_by_update") or ())]
    if not found:
        return None
    chosen = {record["step"]: record for record in (found[0], found[len(found) // 2], found[-1])}
    lines = {
        f"batch {step}": [(i + 1, v) for i, v in enumerate(record[f"{name}_by_update"]) if v is not None]
        for step, record in chosen.items()
    }
    return _drawn(lines, "update")


def _drawn(lines: Mapping[str, Sequence[tuple[float, float]]], across: str) -> str:
    """A picture as SVG, to stand in the page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for name, points in lines.items():
            axes.plot(*zip(*points), marker="." if len(points) < 30 else "", label=name)
        axes.set_xlabel(across)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize="small")
        picture = io.StringIO()
        FigureCanvasSVG(figure).print_svg(picture, metadata={"Date": None})
    svg = picture.getvalue()
    return svg[svg.index("<svg") :]


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #222;
  background: #fff; overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
.curves, .samples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)) }
figure { margin: 0 } figcaption { font-weight: 600 } svg { width: 100%; height: auto }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 1rem }
.alarm { border-left: 4px solid #c33; padding: .3rem .8rem; margin: .3rem 0; background: #fff4f4 }
</style>
</head>
<body>
<h1>{{ name }}</h1>
{% if alarms %}<h2>Alarms</h2>
{% for step, text in alarms %}<div class="alarm">generation batch {{ step }}: {{ text }}</div>
{% endfor %}{% endif %}
{% if rows %}<h2>Held-out problems</h2>
<table><tr><th></th><th>before</th><th>after</th></tr>
{% for name, before, after in rows %}<tr><td>{{ name }}</td><td>{{ before }}</td><td>{{ after }}</td></tr>
{% endfor %}</table>{% endif %}
<h2>Curves</h2>
<div class="curves">
{% for title, svg in curves %}<figure><figcaption>{{ title }}</figcaption>{{ svg | safe }}</figure>
{% endfor %}</div>
{% if by_update %}<h2>Over the updates of a generation batch</h2>
<div class="curves">
{% for title, svg in by_update %}<figure><figcaption>{{ title }}</figcaption>{{ svg | safe }}</figure>
{% endfor %}</div>{% endif %}
<h2>Samples</h2>
<div class="samples">
{% for when, text in samples %}<section><h3>{{ when }}</h3><pre>{{ text }}</pre></section>
{% endfor %}</div>
</body>
</html>
"""
