"""The page: clips from a file or the microphone, a task or a question, and the answer while it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio
import pandas

from ..data.tasks import get_task, list_tasks
from ..tasks_listen import TASK_ALIASES
from .answers import Answers, Example, Question

OWN_QUESTION = "your own question"
"""Entry of the drop-down, in place of a task."""
MAX_UPLOAD = "100mb"
_ERRORS = (ValueError, TypeError, OSError, RuntimeError)  # of input, of files, of a server, of memory
# run in the browser: a click that follows at once finds the button as it is now
_DISABLE, _ENABLE = (f"() => ({{__type__: 'update', interactive: {value}}})" for value in ("false", "true"))
# calls remove what is not speech from recordings; gradio leaves the browser's default, which is that of calls.
# gradio has no event for a recording that cannot be decoded or uploaded: it writes the error to the console alone
_RECORDINGS = """<script>
(() => {
    const report = console.error;
    console.error = (...given) => {
        report(...given);
        if (given[0] instanceof Error) document.querySelector("#recording-failed")?.click();
    };
    const devices = navigator.mediaDevices;
    if (!devices) return;  // addresses other than https and this machine have no microphone
    const open = devices.getUserMedia.bind(devices);
    const unprocessed = {echoCancellation: false, noiseSuppression: false, autoGainControl: false};
    devices.getUserMedia = (wanted) => {
        const audio = wanted?.audio && {...unprocessed, ...(wanted.audio === true ? {} : wanted.audio)};
        return open({...wanted, audio});
    };
})();
</script>"""
_CSS = """
.gradio-container { max-width: 1100px !important; margin: auto !important; }
#answer textarea { font-size: 1.15rem; }
#prompts { overflow: hidden; }
#prompts canvas, #prompts svg { max-width: 100% !important; height: auto !important; }
"""


def build_page(answers: Answers, tasks: Sequence[str] | None = None) -> gradio.Blocks:
    """The page over a model; `launch` shows it.

    Args:
        answers: Where the answers come from.
        tasks: Names of the tasks to offer; all of the model's by default.

    Raises:
        ValueError: the model does not know one of the tasks.
    """
    choices = task_choices(answers.instructions, tasks)
    with gradio.Blocks(title=f"LiSTEN: {answers.title}", analytics_enabled=False) as page:
        gradio.Markdown(
            f"## LiSTEN: ask about audio\nModel `{answers.title}`. Record or upload a clip, choose a task, and ask."
        )
        with gradio.Row():
            with gradio.Column(min_width=320):
                *clips, more = _clip_inputs()
                task = gradio.Dropdown([*choices], value=choices[0][1], label="Task", elem_id="task")
                question = gradio.Textbox(
                    label="Question",
                    placeholder="What is being said?",
                    visible=_takes_question(choices[0][1], answers.instructions),
                    elem_id="question",
                )
                with gradio.Row():
                    ask = gradio.Button("Ask", variant="primary", min_width=120, elem_id="ask")
                    stop = gradio.Button("Stop", min_width=120, elem_id="stop")
                settings = _settings(answers)
            with gradio.Column(min_width=320):
                answer = gradio.Textbox(label="Answer", lines=3, buttons=["copy"], interactive=False, elem_id="answer")
                prompts = _prompt_chart()
                if not answers.reports_prompts:
                    gradio.Markdown("The server does not report which prompts it selected.", elem_id="no-prompts")
                _examples(answers.examples, choices, [*clips, task])
        task.change(
            lambda name: (
                gradio.Textbox(visible=_takes_question(name, answers.instructions)),
                gradio.Accordion(open=_clips_of(name) > 1),
            ),
            task,
            [question, more],
            api_name=False,
        )
        _connect(answers, [*clips, task, question, *settings], [answer, prompts], (ask, question), stop)
    return page


def launch(page: gradio.Blocks, **options: Any) -> Any:
    """Serve a page of `build_page` until it is interrupted.

    Args:
        page: The page.
        **options: Arguments of `gradio.Blocks.launch`.

    Returns:
        What `gradio.Blocks.launch` returns.
    """
    # fonts of the system: the page needs no other server
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options = {"theme": theme, "css": _CSS, "head": _RECORDINGS, "footer_links": [], **options}
    return page.launch(max_file_size=MAX_UPLOAD, **options)


def task_choices(instructions: Mapping[str, str], tasks: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Readable name and value of each entry of the drop-down; a free question comes last.

    Raises:
        ValueError: `tasks` names one that has no instruction.
    """
    tasks = dict.fromkeys(name if name in instructions else TASK_ALIASES.get(name, name) for name in tasks or ())
    unknown = [name for name in tasks if name not in instructions]
    if unknown:
        raise ValueError(f"the model has no task {', '.join(unknown)}; it has {', '.join(instructions)}")
    # a task that is nothing but its question is the free question
    names = [name for name in (tasks or instructions) if instructions[name] != "{question}"]
    titles = [get_task(name).title if name in list_tasks() else name for name in names]
    return [*zip(titles, names, strict=True), ("Your own question", OWN_QUESTION)]


def check_question(
    clips: list[str], task: str, question: str, instructions: Mapping[str, str]
) -> tuple[str | None, str | None]:
    """The text and the task to ask with, of what is filled in.

    Args:
        clips: Paths of the clips that are given.
        task: Value of the drop-down.
        question: Text of the field.
        instructions: Wording of each task.

    Raises:
        ValueError: a clip or the question is missing.
    """
    needed = _clips_of(task)
    if not clips:
        raise ValueError("There is no clip. Record one, or upload a file.")
    if len(clips) < needed:
        raise ValueError(f"{get_task(task).title} compares {needed} clips. Add a second clip.")
    takes_question = _takes_question(task, instructions)
    if takes_question and not question.strip():
        raise ValueError("The question is empty. Type one, or choose a task.")
    return (question.strip() if takes_question else None), (None if task == OWN_QUESTION else task)


def _clips_of(task: str) -> int:
    return get_task(task).clips if task in list_tasks() else 1


def _takes_question(task: str, instructions: Mapping[str, str]) -> bool:
    return task == OWN_QUESTION or "{question}" in instructions[task]


# ---------------------------------------------------------------------- parts of the page


def _clip_inputs() -> tuple[gradio.Audio, gradio.Audio, gradio.Accordion]:
    """The two clips, and what the second one is folded into."""
    waveform = gradio.WaveformOptions(waveform_color="#94a3b8", waveform_progress_color="#f97316")
    options = {
        "sources": ["upload", "microphone"],
        "type": "filepath",
        "waveform_options": waveform,
        "buttons": ["download"],
    }
    first = gradio.Audio(label="Clip", elem_id="clip", **options)
    with gradio.Accordion("Second clip, for questions that compare", open=False, elem_id="more") as more:
        second = gradio.Audio(label="Second clip", elem_id="second-clip", **options)
    return first, second, more


def _settings(answers: Answers) -> list[gradio.components.Component]:
    """Adapter, k and length of the answer."""
    first = answers.adapters[0]
    with gradio.Accordion("Settings", open=False, elem_id="settings"):
        adapter = gradio.Dropdown(answers.adapters, value=first, label="Adapter", elem_id="adapter")
        most = answers.most_prompts(first)
        k = gradio.Slider(
            0, max(most, 1), answers.num_prompts, step=1, label="Prompts (k)", elem_id="k", visible=most > 0
        )
        length = gradio.Slider(1, 512, 128, step=1, label="Max new tokens")

    def fit(name: str, chosen: int) -> gradio.Slider:
        most = answers.most_prompts(name)
        over = {"value": most} if chosen > most else {}  # a value sent back would undo a change made meanwhile
        return gradio.Slider(maximum=max(most, 1), visible=most > 0, **over)

    adapter.change(fit, [adapter, k], k, api_name=False)
    return [adapter, k, length]


def _prompt_chart() -> gradio.BarPlot:
    return gradio.BarPlot(
        x="prompt", y="score", sort="-y", height=200, label="Selected prompts", visible=False, elem_id="prompts"
    )


def _examples(
    examples: list[Example], choices: list[tuple[str, str]], inputs: list[gradio.components.Component]
) -> None:
    """Clips of the model's folder with a task; those of tasks that are not offered are left out."""
    titles = {name: title for title, name in choices}
    rows = [Example(one.clips, one.task or choices[0][1]) for one in examples]
    rows = [one for one in rows if one.task in titles]
    if rows:
        labels = [f"{titles[one.task]}: {' and '.join(Path(clip).name for clip in one.clips)}" for one in rows]
        values = [[*(one.clips + [None])[:2], one.task] for one in rows]
        gradio.Examples(values, inputs, example_labels=labels, label="Examples")


def _connect(
    answers: Answers,
    inputs: list[gradio.components.Component],
    outputs: list[gradio.components.Component],
    asking: tuple[gradio.Button, gradio.Textbox],
    stop: gradio.Button,
) -> None:
    """What the buttons do."""

    def ask(
        first: str | None, second: str | None, task: str, question: str, adapter: str, k: float, length: float
    ) -> Iterator[tuple[str, gradio.BarPlot]]:
        clips = [clip for clip in (first, second) if clip]
        try:
            text, name = check_question(clips, task, question or "", answers.instructions)
            yield "", gradio.BarPlot(visible=False)
            for answer in answers.stream(Question(clips, text, name, adapter, int(k), int(length))):
                yield answer["generated_text"], chart_of(answer.get("prompts", []))
        except _ERRORS as error:
            raise gradio.Error(_message(error, clips), duration=None, print_exception=False) from error

    button, field = asking
    asked = [button.click, field.submit]
    gradio.on(asked, None, None, button, js=_DISABLE)
    running = gradio.on(asked, ask, inputs, outputs, api_name="ask", concurrency_limit=answers.at_once)
    stop.click(None, None, button, js=_ENABLE, cancels=[running])
    failed = gradio.Button(visible="hidden", elem_id="recording-failed")
    failed.click(None, None, button, js=_ENABLE)
    for clip in inputs[:2]:  # a recording is uploaded some time after its end
        clip.start_recording(None, None, button, js=_DISABLE)
        gradio.on([clip.stop_recording, clip.clear], None, None, button, js=_ENABLE)
    for end in (running.then, running.failure):  # `then` does not follow an error
        end(None, None, button, js=_ENABLE)


def chart_of(prompts: list[dict[str, Any]]) -> gradio.BarPlot:
    """The chart of selected prompts, `[{"index": position in the pool, "score": float}, ...]`; hidden for none."""
    rows = {"prompt": [f"#{one['index']}" for one in prompts], "score": [one["score"] for one in prompts]}
    lowest = min([0.0, *rows["score"]])  # bars start at 0
    return gradio.BarPlot(pandas.DataFrame(rows), y_lim=[lowest, None], visible=bool(prompts))


def _message(error: Exception, clips: list[str]) -> str:
    """The text of an error, with files named as the user knows them and not by their copies here."""
    text = str(error) or type(error).__name__
    for clip in clips:
        text = text.replace(clip, Path(clip).name)
    return text


__all__ = ["OWN_QUESTION", "build_page", "chart_of", "check_question", "launch", "task_choices"]
