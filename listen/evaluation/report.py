"""A readable report of an evaluation: `report.md`, which links to its plots, and `report.html`, which contains them."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from ..analysis.escape import markdown
from ..data.files import write_text
from ..data.tasks import get_task
from .result import EvaluationResult
from .scoring import LOWER_IS_BETTER

_SHOWN_EXAMPLES = 5
_CAPTIONS = {
    "prompt_usage": "How often the examples of each task selected each prompt of the pool.",
    "prompt_overlap": "How much the tasks share their prompts: 1 for the same prompts equally often, 0 for none.",
    "query_keys": "Mean cosine between the queries of a task and the keys of the pool.",
    "query_map": "The queries, one point per example. Tasks that form separate clusters can get separate prompts.",
}
_SCALES = {"bleu": 100, "chrf": 100, "cider": 10}  # all other metrics are fractions

_MARKDOWN = """\
# Evaluation of {{ settings.model }}

{{ total }} examples of {{ tasks | length }} tasks{% if settings.num_prompts %}, {{ settings.num_prompts }} prompts \
each from a pool of {{ settings.pool_size }}{% endif %}.

| task | metric | value |{% if bare %} k = 0 |{% endif %} 95 % interval | n |
|---|---|---:|{% if bare %}---:|{% endif %}---:|---:|
{% for row in rows -%}
| {{ row.title }} | {{ row.label }} | {{ row.value }} |{% if bare %} {{ row.bare }} |{% endif %} {{ row.interval }} \
| {{ row.n }} |
{% endfor %}
Intervals: percentile bootstrap over examples. An arrow shows the better direction. BLEU and chrF run from 0 to 100, \
CIDEr from 0 to 10, all else from 0 to 1.{% if bare %} k = 0: the same model without prompts.{% endif %}
{% if pool %}
## The prompt pool

{{ pool }}
{% for plot in plots %}
![{{ plot.caption }}]({{ plot.link }})

{{ plot.caption }}
{% endfor %}{% endif %}
## Examples
{% for task in tasks %}
### {{ task.title }}

| expected | answered |
|---|---|
{% for example in task.examples -%}
| {{ example.expected }} | {{ example.answered }} |
{% endfor %}{% endfor %}
## Settings

{% for name, value in settings.items() -%}
- {{ name }}: {{ value }}
{% endfor %}"""

_HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation of {{ settings.model }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
  table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
  th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #ddd; vertical-align: top }
  th { border-bottom: 2px solid #888 }
  td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
  tr.lead td { font-weight: 600 }
  img { max-width: 100% }
  figure { margin: 1.5rem 0 }
  figcaption, .note { color: #555; font-size: .9rem }
  .wrong { background: #fff4ec }
</style>
<h1>Evaluation of {{ settings.model }}</h1>
<p>{{ total }} examples of {{ tasks | length }} tasks{% if settings.num_prompts %}, {{ settings.num_prompts }} prompts
each from a pool of {{ settings.pool_size }}{% endif %}.</p>
<table>
<tr><th>task<th>metric<th class="number">value{% if bare %}<th class="number">k = 0{% endif %}\
<th class="number">95 % interval<th class="number">n</tr>
{% for row in rows -%}
<tr{% if row.lead %} class="lead"{% endif %}><td>{{ row.title }}<td>{{ row.label }}<td class="number">{{ row.value }}\
{% if bare %}<td class="number">{{ row.bare }}{% endif %}\
<td class="number">{{ row.interval }}<td class="number">{{ row.n }}</tr>
{% endfor -%}
</table>
<p class="note">Intervals: percentile bootstrap over examples. An arrow shows the better direction. BLEU and chrF run
from 0 to 100, CIDEr from 0 to 10, all else from 0 to 1.{% if bare %}
k = 0: the same model without prompts.{% endif %}</p>
{% if pool %}
<h2>The prompt pool</h2>
<p>{{ pool }}</p>
{% for plot in plots -%}
<figure><img alt="" src="data:image/png;base64,{{ plot.data }}"><figcaption>{{ plot.caption }}</figcaption></figure>
{% endfor %}{% endif %}
<h2>Examples</h2>
{% for task in tasks %}
<h3>{{ task.title }}</h3>
<table>
<tr><th>expected<th>answered<th class="number">{{ task.metric }}</tr>
{% for example in task.examples -%}
<tr{% if example.wrong %} class="wrong"{% endif %}><td>{{ example.expected }}<td>{{ example.answered }}\
<td class="number">{{ example.score }}</tr>
{% endfor -%}
</table>
{% endfor %}
<h2>Settings</h2>
<table>
{% for name, value in settings.items() -%}
<tr><td>{{ name }}<td>{{ value }}</tr>
{% endfor -%}
</table>
</html>
"""


@dataclass(frozen=True)
class _Row:
    """A row of the table of results."""

    title: str
    label: str
    value: str
    bare: str
    interval: str
    n: int
    lead: bool


def write_report(result: EvaluationResult, folder: str | Path, plots: Sequence[Path] = ()) -> None:
    """Write `report.md` and `report.html` into `folder`.

    Args:
        result: what to report.
        folder: must exist.
        plots: PNG files of the pool inside `folder`. The Markdown file links to them, the HTML file contains them.
    """
    folder = Path(folder)
    content = {
        "settings": result.settings,
        "total": len(result.predictions),
        "tasks": [_task(name, result) for name in result.metrics],
        "rows": [row for name in result.metrics for row in _rows(name, result)],
        "bare": bool(result.without_prompts),
        "pool": _describe_pool(result),
        "plots": [_plot(path, folder) for path in plots],
    }
    text = Environment(keep_trailing_newline=True, finalize=markdown)
    write_text(folder / "report.md", text.from_string(_MARKDOWN).render(content))
    page = Environment(autoescape=True).from_string(_HTML).render(content)
    write_text(folder / "report.html", page)


def _rows(task: str, result: EvaluationResult) -> list[_Row]:
    values = {name: value for name, value in result.metrics[task].items() if name != "n"}
    bare = result.without_prompts.get(task, {})
    return [
        _Row(
            title=get_task(task).title,
            label=f"{name} {'↓' if name in LOWER_IS_BETTER else '↑'}",
            value=_number(name, value),
            bare=_number(name, bare[name]) if name in bare else "",
            interval=" – ".join(_number(name, end) for end in result.intervals[task].get(name, ())),
            n=int(result.metrics[task]["n"]),
            lead=place == 0,
        )
        for place, (name, value) in enumerate(values.items())
    ]


def _task(name: str, result: EvaluationResult) -> dict[str, Any]:
    """Title of a task and some of its examples, drawn with a fixed seed."""
    metric = next(iter(result.metrics[name]))
    records = [record for record in result.predictions if record["task"] == name]
    drawn = np.random.default_rng(0).permutation(len(records))[:_SHOWN_EXAMPLES]
    examples = [_example(records[i], metric) for i in sorted(drawn)]
    return {"title": get_task(name).title, "metric": metric, "examples": examples}


def _example(record: Mapping[str, Any], metric: str) -> dict[str, Any]:
    score = record["scores"].get(metric, math.nan)
    best = 0.0 if metric in LOWER_IS_BETTER else _SCALES.get(metric, 1)
    question = f"{record['question']} " if record.get("question") else ""
    return {
        "expected": question + " / ".join(record["references"]),
        "answered": record["prediction"] or "(nothing)",
        "score": _number(metric, score),
        "wrong": abs(score - best) > 1e-6,
    }


def _describe_pool(result: EvaluationResult) -> str:
    if result.pool is None:
        return ""
    usage, clusters = result.pool.usage, result.pool.clusters
    pool_size = usage.shares.shape[1]
    text = (
        f"The examples used {round(usage.share_used * pool_size)} of {pool_size} prompts; the entropy of selections is "
        f"{usage.entropy():.2f}, where 1 is uniform use of the whole pool."
    )
    if clusters is None:
        return text
    return text + (
        f" Two queries have a mean cosine of {clusters.mean_cosine:.2f}; the nearest neighbour of a query belongs to "
        f"the same task in {clusters.neighbour_accuracy:.0%} of cases (chance {clusters.chance:.0%}), and the "
        f"silhouette of the tasks is {clusters.silhouette:.2f}."
    )


def _plot(path: Path, folder: Path) -> dict[str, str]:
    return {
        "caption": _CAPTIONS[path.stem],
        "link": path.relative_to(folder).as_posix(),
        "data": base64.b64encode(path.read_bytes()).decode("ascii"),
    }


def _number(metric: str, value: float) -> str:
    if math.isnan(value):
        return "undefined"
    return f"{value:.1f}" if _SCALES.get(metric, 1) == 100 else f"{value:.3f}"


def metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> list[Sequence[str]]:
    """Rows `(task, metric, value, n)` of an evaluation, as text, for printing."""
    return [
        (task, name, _number(name, value), str(int(values["n"])) if "n" in values else "")
        for task, values in metrics.items()
        for name, value in values.items()
        if name != "n"
    ]
