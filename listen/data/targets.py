"""Targets of behavioural alignment: the frozen LLM's answers to transcripts, as responses to the recordings.

The LLM reads `<emotion> transcript` under the instruction of a task, and its answer becomes the response of the
recording (SpeechEmotionLlama, arXiv 2410.01162, section 2). A folder of targets contains

- `settings.json`: the LLM, how it decodes, the seed, the instructions, the versions;
- `answers-*.jsonl`: every answer as soon as it exists, so that an interrupted run resumes without repeated requests;
- `failed-*.jsonl`: the prompts that the last run got no answer for, each with the reason; the next run repeats them;
- `<kind>.jsonl`: manifests for training, one for each of `KINDS`;
- `dataset`: the same rows as a `datasets.DatasetDict`, a split for each kind that has rows, for
  `datasets.load_from_disk`;
- `summary.json`: the number of rows, and of answers that failed, were empty or were truncated.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import soundfile
from datasets import DatasetDict
from tqdm.auto import tqdm
from transformers.utils import logging

from .chat_models import Answer, ChatModel, ChatModelError, Conversation
from .files import hold_folder, json_text, write_bytes, write_json, write_json_lines
from .manifest import load_manifest
from .processes import launched_processes
from .tasks import get_task, tagged_text
from .text_files import is_unicode
from .utterances import Utterance

logger = logging.get_logger(__name__)

SETTINGS_FILE = "settings.json"
SUMMARY_FILE = "summary.json"
DATASET_FOLDER = "dataset"
_MAX_FAILURES = 4
_MAX_ERRORS = 20  # different ones in a summary; failed-*.jsonl has all


class TargetError(ValueError):
    """Targets that cannot be generated, or a folder with other targets; the message says what to do."""


@dataclass(frozen=True)
class TargetKind:
    """A kind of targets.

    Attributes:
        task: task of its rows.
        tagged: whether the LLM gets the emotion.
        source: field of the utterance that is the response; `None` if the LLM generates it.
    """

    task: str
    tagged: bool
    source: str | None = None


KINDS = {
    "response": TargetKind("response", tagged=True),
    "response_untagged": TargetKind("response", tagged=False),
    "speech_caption": TargetKind("speech_caption", tagged=True),
    "repeat": TargetKind("repeat", tagged=False, source="transcript"),
    "ser": TargetKind("ser", tagged=True, source="emotion"),
}
"""Kinds of targets by the name of their manifest; `response_untagged` is that of the paper's second baseline."""


@dataclass
class TargetSummary:
    """Content of a folder of targets.

    Attributes:
        rows: rows of each kind.
        failed: utterances without a row because the request failed; the next run repeats it.
        empty: utterances without a row because the answer was empty.
        unfinished: utterances without a row because the answer was truncated.
        errors: count of each of the most common errors in this run of this process.
    """

    rows: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    empty: dict[str, int] = field(default_factory=dict)
    unfinished: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Request:
    key: str
    prompt: str


def generate_targets(
    utterances: Sequence[Utterance],
    folder: str | os.PathLike[str],
    llm: ChatModel | None = None,
    kinds: Sequence[str] = tuple(KINDS),
    options: Sequence[str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    share_answers: bool = True,
    keep_unfinished: bool = False,
    progress: bool = True,
) -> TargetSummary:
    """Write the targets of utterances into a folder; the LLM generates those that the folder lacks.

    Batches do not depend on the number of processes or on where a run was interrupted. Under `accelerate launch` each
    process takes its share of them.

    Args:
        utterances: see `listen.data.utterances.read_utterances`.
        folder: created, or continued.
        llm: generates the answers; needed for kinds without a `source`.
        kinds: which of `KINDS` to write.
        options: classes that rows of `ser` name; those of the task by default.
        batch_size: conversations of a batch.
        seed: seed of sampling; the seed of each batch is derived from it.
        share_answers: whether utterances of the same words and emotion share an answer. Turn it off when sampling, to
            get an answer per utterance.
        keep_unfinished: whether truncated answers become targets; they teach the model to stop within a sentence.
        progress: whether the main process shows a progress bar.

    Returns:
        What the folder now contains.

    Raises:
        TargetError: an unknown kind, an utterance without the emotion that a kind needs, a folder of another LLM or
            other settings, or an LLM that fails for whole batches of four or more new requests.
        FolderInUseError: another run writes to the folder.
    """
    folder, state = Path(folder), launched_processes()
    _check(utterances, kinds, llm, options)
    settings = _settings(llm, seed, share_answers)
    with hold_folder(folder, "target-generation") if state.is_main_process else nullcontext():
        if state.is_main_process:
            _check_settings(folder, settings)
            # failures of the last run, which are repeated now, and parts of files that it was killed in
            for path in (*folder.glob("failed-*.jsonl"), *folder.glob(".*-*.tmp")):
                path.unlink()
        state.wait_for_everyone()
        requests = _requests(utterances, kinds, share_answers)
        done = _read_answers(folder)
        state.wait_for_everyone()  # no process may write before all have read
        errors: Counter[str] = Counter()
        if llm is not None:
            errors = _ask(llm, _batches(requests, batch_size), done, folder, seed, progress)
        state.wait_for_everyone()
        summary = TargetSummary(errors=dict(errors.most_common(_MAX_ERRORS)))
        answers = _read_answers(folder)
        for kind in kinds:
            rows = _rows(utterances, kind, answers, folder, options, share_answers, keep_unfinished, summary)
            if state.is_main_process:
                write_json_lines(folder / f"{kind}.jsonl", rows)
        if state.is_main_process:
            _finish(folder, summary)
        state.wait_for_everyone()
    return summary


def _check(
    utterances: Sequence[Utterance], kinds: Sequence[str], llm: ChatModel | None, options: Sequence[str] | None
) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise TargetError(f"kinds {unknown or list(kinds)} are unknown; choose some of {', '.join(KINDS)}")
    written = [kind for kind in kinds if KINDS[kind].source is None]
    if written and llm is None:
        raise TargetError(f"the targets {', '.join(written)} need an LLM that generates them; pass llm")
    twice = [name for name, count in Counter(utterance.id for utterance in utterances).items() if count > 1]
    if twice:
        raise TargetError(f"{len(twice)} ids are used twice, such as {twice[0]!r}; make them unique")
    tagged = [kind for kind in kinds if KINDS[kind].tagged]
    allowed = set(options or get_task("ser").labels)
    for utterance in utterances:
        if not is_unicode(utterance.transcript) or not is_unicode(utterance.emotion or ""):
            raise TargetError(
                f"utterance {utterance.id!a}: the transcript {utterance.transcript!a:.80} or emotion is not valid "
                "Unicode (a lone surrogate); correct it or leave the utterance out"
            )
        if tagged and not utterance.emotion:
            raise TargetError(
                f"utterance {utterance.id!r} has no emotion, which {', '.join(tagged)} need; name the field of the "
                f"emotions, or generate only {', '.join(k for k in KINDS if not KINDS[k].tagged)}"
            )
        if "ser" in kinds and utterance.emotion not in allowed:
            raise TargetError(
                f"utterance {utterance.id!r}: the emotion {utterance.emotion!r} is not among the options "
                f"{', '.join(sorted(allowed))}; pass other options, or rename the emotion"
            )


# ---------------------------------------------------------------------- the folder


def _settings(llm: ChatModel | None, seed: int, share_answers: bool) -> dict[str, Any]:
    """Everything that the answers depend on."""
    if llm is None:
        return {}
    tasks = {KINDS[kind].task: get_task(KINDS[kind].task) for kind in KINDS if KINDS[kind].source is None}
    instructions = {name: task.target_instruction or task.instruction() for name, task in tasks.items()}
    return {"llm": llm.describe(), "seed": seed, "share_answers": share_answers, "instructions": instructions}


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or compare them with those of the folder: it never mixes answers of two LLMs."""
    path = folder / SETTINGS_FILE
    if not settings:
        return
    known, wanted = _read_json(path), json.loads(json_text(settings))
    if known is None and path.is_file() and any(folder.glob("answers-*.jsonl")):
        raise TargetError(f"{path} is damaged, so its answers may be of another LLM; restore it, or use another folder")
    if known is None:
        versions = {name: metadata.version(name) for name in ("torch", "transformers")}
        write_json(path, {**settings, "versions": versions})
        return
    for name, value in wanted.items():
        if known.get(name) != value:
            raise TargetError(
                f"the targets in {folder} were made with {name}={known.get(name)!r}, but this run has "
                f"{name}={value!r}; use another folder"
            )


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; `None` where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _read_answers(folder: Path) -> dict[str, dict[str, Any]]:
    """Answers of all runs and processes by key, without lines that an interruption truncated."""
    answers: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            with suppress(ValueError, KeyError, TypeError):  # truncated, with later lines after it
                record = json.loads(line)
                answers[record["key"]] = record
    return answers


def _finish(folder: Path, summary: TargetSummary) -> None:
    """Write the summary, and all manifests of the folder as one data set."""
    manifests = {kind: folder / f"{kind}.jsonl" for kind in KINDS}
    filled = {kind: path for kind, path in manifests.items() if path.is_file() and path.stat().st_size}
    new = folder / f".{DATASET_FOLDER}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    if filled:  # datasets cannot load empty splits
        splits = DatasetDict({kind: load_manifest(path, check_files=False) for kind, path in filled.items()})
        splits.save_to_disk(new)
    shutil.rmtree(folder / DATASET_FOLDER, ignore_errors=True)
    if filled:
        new.rename(folder / DATASET_FOLDER)
    path = folder / SUMMARY_FILE
    known = _read_json(path) or {}
    counts = {name: {**known.get(name, {}), **value} for name, value in vars(summary).items() if name != "errors"}
    write_json(path, {**counts, "errors": summary.errors})
    for reason in ("failed", "empty", "unfinished"):
        missing = {kind: count for kind, count in getattr(summary, reason).items() if count}
        if missing:
            logger.warning(f"{folder}: utterances without a target because the answer was {reason}: {missing}")


# ---------------------------------------------------------------------- asking


def _prompt(utterance: Utterance, kind: str) -> str:
    emotion = utterance.emotion if KINDS[kind].tagged else None
    return get_task(KINDS[kind].task).text_prompt(utterance.transcript, emotion)


def _key(utterance: Utterance, prompt: str, share_answers: bool) -> str:
    text = prompt if share_answers else f"{utterance.id}\n{prompt}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _requests(utterances: Sequence[Utterance], kinds: Sequence[str], share_answers: bool) -> list[_Request]:
    """All prompts for the LLM, each once, the shortest first so that batches hold little padding."""
    found: dict[str, _Request] = {}
    for kind in (kind for kind in kinds if KINDS[kind].source is None):
        for utterance in utterances:
            prompt = _prompt(utterance, kind)
            key = _key(utterance, prompt, share_answers)
            found.setdefault(key, _Request(key, prompt))
    return sorted(found.values(), key=lambda request: (len(request.prompt), request.key))


def _batches(requests: Sequence[_Request], batch_size: int) -> list[list[_Request]]:
    if batch_size < 1:
        raise TargetError(f"batch_size={batch_size} must be at least 1")
    return [list(requests[start : start + batch_size]) for start in range(0, len(requests), batch_size)]


def _ask(
    llm: ChatModel,
    batches: Sequence[Sequence[_Request]],
    done: Mapping[str, Any],
    folder: Path,
    seed: int,
    progress: bool,
) -> Counter[str]:
    """Generate this process's share of the missing answers; returns the count of each error."""
    state = launched_processes()
    mine = list(batches[state.process_index :: state.num_processes])
    errors: Counter[str] = Counter()
    failures = 0  # consecutive failed requests
    bar = tqdm(total=sum(map(len, mine)), desc="targets", disable=not (progress and state.is_main_process))
    store = _AnswerFiles(folder, state.process_index)
    with bar, store:
        todo = [(batch, [request for request in batch if request.key not in done]) for batch in mine]
        bar.update(sum(len(batch) for batch, pending in todo if not pending))
        todo = [(batch, pending) for batch, pending in todo if pending]
        calls = [(pending, _batch_seed(seed, batch)) for batch, pending in todo]
        for (batch, pending), answers in zip(todo, _answers(llm, calls), strict=True):
            store.add(pending, answers)
            errors.update(answer.error for answer in answers if answer.text is None)
            all_failed = all(answer.text is None for answer in answers)
            # the rest of a partly answered batch failed before: the requests are at fault, not the LLM
            failures = failures + len(batch) if all_failed and len(pending) == len(batch) else 0
            if failures >= _MAX_FAILURES:
                raise TargetError(f"every request of a batch failed; check the LLM: {answers[0].error}")
            bar.update(len(batch))
    return errors


def _answers(llm: ChatModel, calls: Sequence[tuple[Sequence[_Request], int]]) -> Iterator[list[Answer]]:
    """The answers to each batch of requests with its seed; those that cannot be stored have failed."""
    batches = [([[{"role": "user", "content": request.prompt}] for request in batch], seed) for batch, seed in calls]
    if hasattr(llm, "answer_batches"):  # workers of a cluster answer several at a time
        found = llm.answer_batches(batches)
    else:
        found = (_answers_or_errors(llm, *batch) for batch in batches)
    for answers in found:
        known = [a.text is None or (isinstance(a.text, str) and is_unicode(a.text)) for a in answers]
        odd = Answer(None, error="the answer is not valid Unicode text")
        yield [answer if is_text else odd for answer, is_text in zip(answers, known, strict=True)]


def _answers_or_errors(llm: ChatModel, conversations: Sequence[Conversation], seed: int) -> list[Answer]:
    try:
        return llm.answer(conversations, seed=seed)
    except ChatModelError as error:
        return [Answer(None, error=str(error))] * len(conversations)


class _AnswerFiles:
    """The files that a process appends its answers and failures to, as they come."""

    def __init__(self, folder: Path, process: int) -> None:
        self._answers = (folder / f"answers-{process:03d}.jsonl").open("a", encoding="utf-8")
        self._failed = folder / f"failed-{process:03d}.jsonl"

    def __enter__(self) -> _AnswerFiles:
        if self._answers.tell():
            self._answers.write("\n")  # a truncated line must not absorb the next one
        return self

    def __exit__(self, *error: object) -> None:
        self._answers.close()

    def add(self, requests: Sequence[_Request], answers: Sequence[Answer]) -> None:
        """Store the answers of requests, and set aside those without one."""
        pairs = list(zip(requests, answers, strict=True))
        self._answers.write("".join(_as_line(r, a) for r, a in pairs if a.text is not None))
        self._answers.flush()
        failed = [{"key": r.key, "reason": a.error, "prompt": r.prompt} for r, a in pairs if a.text is None]
        if failed:
            with self._failed.open("a", encoding="utf-8") as file:
                file.write("".join(json_text(record) + "\n" for record in failed))


def _batch_seed(seed: int, batch: Sequence[_Request]) -> int:
    """Depends on the seed and the batch alone, not on the process or the order of batches."""
    return int(hashlib.sha256(f"{seed}|{batch[0].key}".encode()).hexdigest()[:7], 16)


def _as_line(request: _Request, answer: Answer) -> str:
    record = {"key": request.key, "text": answer.text, "finished": answer.finished, "prompt": request.prompt}
    return json_text(record) + "\n"


# ---------------------------------------------------------------------- rows


def _rows(
    utterances: Sequence[Utterance],
    kind: str,
    answers: Mapping[str, Mapping[str, Any]],
    folder: Path,
    options: Sequence[str] | None,
    share_answers: bool,
    keep_unfinished: bool,
    summary: TargetSummary,
) -> list[dict[str, Any]]:
    """Manifest lines of one kind; utterances without a target are counted in `summary`."""
    rows = []
    for reasons in (summary.failed, summary.empty, summary.unfinished):
        reasons[kind] = 0
    for utterance in utterances:
        if KINDS[kind].source is not None:
            text = getattr(utterance, KINDS[kind].source)
        else:
            answer = answers.get(_key(utterance, _prompt(utterance, kind), share_answers))
            if answer is None or not answer["text"] or not (answer["finished"] or keep_unfinished):
                reasons = summary.failed if answer is None else summary.unfinished if answer["text"] else summary.empty
                reasons[kind] += 1
                continue
            text = answer["text"]
        rows.append(_row(utterance, kind, text, folder, options))
    summary.rows[kind] = len(rows)
    return rows


def _row(utterance: Utterance, kind: str, response: str, folder: Path, options: Sequence[str] | None) -> dict[str, Any]:
    tagged = tagged_text(utterance.transcript, utterance.emotion if KINDS[kind].tagged else None)
    row = {
        **utterance.extra,
        "id": f"{utterance.id}-{kind}",
        "audio": [_place(clip, folder) for clip in utterance.audio],
        "task": KINDS[kind].task,
        "response": response,
        "transcript": utterance.transcript,
        "emotion": utterance.emotion,
        "text_input": tagged,  # the text that a text LLM reads instead of the recording
        "join": "concatenate" if len(utterance.audio) > 1 else None,
        "options": list(options) if options and kind == "ser" else None,
    }
    return {name: value for name, value in row.items() if value is not None}


def _place(clip: Mapping[str, Any], folder: Path) -> str:
    """Path of a clip relative to the folder; clips without a path are written into it."""
    if clip["bytes"] is None:
        return clip["path"] if "://" in clip["path"] else os.path.relpath(clip["path"], folder.resolve())
    try:
        suffix = f".{soundfile.info(BytesIO(clip['bytes'])).format.lower()}"
    except soundfile.LibsndfileError:  # m4a, say: other libraries decode it, by its content
        suffix = Path(clip["path"] or "").suffix.lower()
    path = Path("audio") / f"{hashlib.sha256(clip['bytes']).hexdigest()[:24]}{suffix}"
    if not (folder / path).is_file():
        (folder / "audio").mkdir(exist_ok=True)
        write_bytes(folder / path, clip["bytes"])
    return path.as_posix()
