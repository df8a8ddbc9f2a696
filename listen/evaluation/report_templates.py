"""Templates of the report: Markdown, and an HTML page that needs no other file and no network."""

MARKDOWN = """\
# {{ title }}

{{ summary }}

| task | score | value |{% if bare %} k = 0 |{% endif %} 95 % interval | examples |
|---|---|---:|{% if bare %}---:|{% endif %}---:|---:|
{% for task in tasks %}{% for row in task.rows -%}
| {{ task.title }} | {{ row.label }} | {{ row.value }} |{% if bare %} {{ row.bare }} |{% endif %} {{ row.interval }} \
| {{ task.n }} |
{% endfor %}{% endfor %}
{{ legend }}
{% if pool %}
## The prompt pool

{{ pool }}
{% for plot in plots %}
![{{ plot.alt }}]({{ plot.link }})

{{ plot.caption }}
{% endfor %}{% endif %}
## Examples, the worst first
{% for task in tasks %}
### {{ task.title }}

|{% if task.asks %} question |{% endif %} expected | answered | {{ task.metric }} |
|{% if task.asks %}---|{% endif %}---|---|---:|
{% for example in task.examples[:5] -%}
|{% if task.asks %} {{ example.question }} |{% endif %} {{ example.expected }} | {{ example.answered or "(nothing)" }} \
| {{ example.score }} |
{% endfor %}{% endfor %}
## Settings

{% for name, value in settings.items() -%}
- {{ name }}: {{ value }}
{% endfor %}"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --soft: #5a5a5a; --line: #d8d8d8; --wrong: #fff1e5;
  --heat: #7db7e8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #121212; --soft: #a8a8a8; --line: #3a3a3a; --wrong: #33230f; --heat: #1f5f97 }
  img { filter: invert(.93) hue-rotate(180deg) brightness(1.2) }
}
* { box-sizing: border-box }
[hidden] { display: none !important }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25 }
h3 { margin: 2rem 0 .3rem }
table { border-collapse: collapse; width: 100%; margin: .7rem 0 }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding-bottom: .3rem }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
.number { text-align: right; overflow-wrap: normal; font-variant-numeric: tabular-nums; white-space: nowrap }
.group th { padding-top: 1rem }
.group small, figcaption, .note, .id { color: var(--soft); font-weight: normal; font-size: .88rem }
.lead td { font-weight: 600 }
.scores { max-width: 46rem }
.scroll { overflow-x: auto }
.confusion { width: auto; min-width: 20rem }
.confusion td { text-align: center; min-width: 3.2rem;
  background: color-mix(in srgb, var(--heat) var(--share), transparent) }
img { max-width: 100%; height: auto; display: block }
figure { margin: 1.5rem 0 }
audio { display: block; width: 15rem; max-width: 100%; height: 2.5rem; margin-bottom: .2rem }
.player { width: 16.2rem }
.wrong > td:first-child { box-shadow: inset 3px 0 #d5762b }
.wrong { background: var(--wrong) }
.empty { color: var(--soft); font-style: italic }
.search { position: sticky; top: 0; background: var(--paper); padding: .5rem 0; z-index: 1 }
.search input { font: inherit; width: min(24rem, 100%); padding: .4rem .6rem; color: inherit; background: transparent;
  border: 1px solid var(--soft); border-radius: .4rem }
@media (max-width: 40rem) {
  body { margin-top: 1rem }
  figure .scroll img { max-width: none; width: 40rem }
  h1 { font-size: 1.25rem }
  .scores th, .scores td { padding: .3rem .25rem }
  .examples thead { position: absolute; left: -999rem }
  .examples tr, .examples td { display: block; width: 100% }
  .examples tr { border-bottom: 1px solid var(--line); padding: .5rem 0 .5rem .6rem }
  .examples td { border: 0; padding: .1rem 0; text-align: left; white-space: normal }
  .examples td[data-name]::before { content: attr(data-name) ": "; color: var(--soft) }
  .examples .wrong { box-shadow: inset 3px 0 #d5762b }
  .wrong > td:first-child { box-shadow: none }
  audio { width: 100% }
}
@media print { .search, audio { display: none } }
"""

SCRIPT = """
const box = document.querySelector("#search"), found = document.querySelector("#found");
const plain = text => text.normalize("NFC").toLowerCase();
const rows = Array.from(document.querySelectorAll("tr.example"), row => [row, plain(row.textContent)]);
box.addEventListener("input", () => {
  const words = plain(box.value).split(/\\s+/).filter(Boolean);
  let count = 0;
  for (const [row, text] of rows) {
    row.hidden = !words.every(word => text.includes(word));
    count += !row.hidden;
  }
  for (const task of document.querySelectorAll("section.task"))
    task.hidden = !task.querySelector("tr.example:not([hidden])");
  found.textContent = words.length ? `${count} of ${rows.length} examples` : "";
});
document.addEventListener("play", event => {  // one recording at a time
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
}, true);
"""

HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; media-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-{{ script_hash }}'">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
<table class="scores">
<thead><tr><th>score<th class="number">value{% if bare %}<th class="number">k = 0{% endif %}\
<th class="number">95 % interval</tr></thead>
{% for task in tasks %}
<tbody><tr class="group"><th colspan="{{ 4 if bare else 3 }}" scope="rowgroup">{{ task.title }} \
<small>{{ task.n }} examples</small></tr>
{% for row in task.rows -%}
<tr{% if loop.first %} class="lead"{% endif %}><td>{{ row.label }}<td class="number">{{ row.value }}\
{% if bare %}<td class="number">{{ row.bare }}{% endif %}<td class="number">{{ row.interval }}</tr>
{% endfor %}</tbody>
{% endfor %}
</table>
<p class="note">{{ legend }}</p>
{% if pool %}
<h2>The prompt pool</h2>
<p>{{ pool }}</p>
{% for plot in plots -%}
<figure><div class="scroll"><img alt="{{ plot.alt }}" src="data:image/png;base64,{{ plot.data }}"></div>\
<figcaption>{{ plot.caption }}</figcaption></figure>
{% endfor %}{% endif %}
<h2>Examples, the worst first</h2>
<p class="note">{{ players }}</p>
<p class="search"><label>Search <input id="search" type="search" autocomplete="off" \
placeholder="words of any column"></label> <span id="found" class="note" aria-live="polite"></span></p>
{% for task in tasks %}
<section class="task">
<h3>{{ task.title }}</h3>
<p class="note">{{ task.note }}</p>
{% if task.confusion %}
<div class="scroll"><table class="confusion">
<caption>Expected class (rows) and answered class (columns), number of examples</caption>
<tr><td>{% for name in task.confusion.columns %}<th scope="col">{{ name }}{% endfor %}</tr>
{% for row in task.confusion.rows -%}
<tr><th scope="row">{{ row.name }}{% for cell in row.cells %}<td style="--share: {{ cell.percent }}%">\
{{ cell.count }}{% endfor %}</tr>
{% endfor %}
</table></div>
{% elif task.confused %}
<table class="confused"><caption>Most frequent confusions</caption>
<tr><th>expected<th>answered<th class="number">examples</tr>
{% for expected, answered, count in task.confused -%}
<tr><td dir="auto">{{ expected }}<td dir="auto">{{ answered or "no class" }}<td class="number">{{ count }}</tr>
{% endfor %}
</table>
{% endif %}
<table class="examples">
<thead><tr>{% if playable %}<th>recording{% endif %}{% if task.asks %}<th>question{% endif %}<th>expected<th>answered\
<th class="number">{{ task.metric }}</tr></thead>
{% for example in task.examples -%}
<tr class="example{% if example.wrong %} wrong{% endif %}">\
{% if playable %}<td class="player">{% for clip in example.clips %}<audio controls preload="metadata" \
aria-label="recording {{ loop.index }} of {{ example.id }}" src="{{ clip }}"></audio>{% endfor %}\
<span class="id">{{ example.id }}</span>{% endif %}\
{% if task.asks %}<td dir="auto" data-name="question">{{ example.question }}{% endif %}\
<td dir="auto" data-name="expected">{{ example.expected }}\
<td dir="auto" data-name="answered">{% if example.answered %}{{ example.answered }}{% else %}\
<span class="empty">(nothing)</span>{% endif %}\
<td class="number" data-name="{{ task.metric }}">{{ example.score }}</tr>
{% endfor %}
</table>
</section>
{% endfor %}
<h2>Settings</h2>
<table>
{% for name, value in settings.items() -%}
<tr><td>{{ name }}<td>{{ value }}</tr>
{% endfor -%}
</table>
<script>{{ script | safe }}</script>
</html>
"""
