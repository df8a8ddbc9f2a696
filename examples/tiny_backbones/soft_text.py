"""Text versions of the tasks, as a connector would hand them to a language model.

A clip becomes a row of positions of 0.34 s. Each position is a weighted sum of token embeddings: the words (or sounds)
that the window holds, the words for emotion and voice spread thinly over all of it, and noise. A language model that
learns to read such rows can stay frozen when a connector has to write them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from listen.data.corpus.grammar import draw_question, draw_sentence, spoken_words
from listen.data.corpus.prosody import EMOTIONS
from listen.data.corpus.render import plan_speech, render_speech
from listen.data.corpus.scenes import BACKGROUND_SHARE, write_caption
from listen.data.corpus.sounds import BACKGROUNDS, EVENTS
from listen.data.corpus.speakers import ACCENTS, REGISTERS, SIZES, TIMBRES, make_speakers
from listen.data.tasks import get_task

WINDOW = 0.34  # seconds: 17 frames at 50 Hz
SILENCE = "<|silence|>"
ATTRIBUTES = (tuple(REGISTERS), tuple(TIMBRES), tuple(SIZES), tuple(ACCENTS))
TASK_SHARES = {"asr": 0.17, "sqa": 0.17, "en2zh": 0.17, "er": 0.08, "acap": 0.12, "sv": 0.2, "voice": 0.09}
ADVERSARIAL, FIRST_ADVERSARIAL, NUM_ADVERSARIAL = "<adversarial>", 1_000_000, 16  # trained vectors, not tokens
CLIP_END = "\n"  # what the chat template writes after a clip

Position = list[tuple[str, float]]  # weighted words at one position
Row = list[tuple[list[tuple[int, float]], float, bool]]  # weighted ids, noise level, is response: of every position


@dataclass
class Example:
    """One conversation: `parts` of the user's turn are texts or clips (rows of positions); then the response.

    `noise` is the noise on the clips, relative to the usual size of an embedding. `header` comes first, where an
    adapter puts its prompts; without one, random vectors take that place.
    """

    task: str
    parts: list[str | list[Position]]
    response: str
    noise: float
    header: list[Position] | None = None


@dataclass
class ExampleWriter:
    """Draws examples. `durations` are the seconds that each spoken word takes.

    `difficulty` rises from 0 (one clean word a position) to 1 (what a connector really hands over).
    """

    durations: dict[str, float]
    rng: np.random.Generator
    difficulty: float = 1.0
    tasks: dict[str, float] = field(default_factory=lambda: dict(TASK_SHARES))

    @property
    def scored(self) -> list[str]:
        """Arguments of `draw` that an evaluation scores one by one."""
        return list(self.tasks)

    def draw(self, task: str | None = None) -> Example:
        """Draw an example of `task`, or of a random one."""
        return getattr(self, f"_draw_{task or self._any_task()}")()

    def _any_task(self) -> str:
        return str(self.rng.choice(list(self.tasks), p=np.array([*self.tasks.values()])))

    def _draw_asr(self) -> Example:
        if self.rng.random() < 0.12:  # any words in any order: learn to copy, not only to know the grammar
            words = self._any_words()
            return self._example("asr", [self._speech(words)], " ".join(words))
        sentence = draw_sentence(self.rng, "train")
        return self._example("asr", [self._speech(sentence.words)], sentence.text)

    def _any_words(self) -> list[str]:
        words = self.rng.choice(spoken_words(), size=int(self.rng.integers(1, 9))).tolist()
        return [word for index, word in enumerate(words) if index == 0 or words[index - 1] != word]

    def _draw_en2zh(self) -> Example:
        sentence = draw_sentence(self.rng, "train")
        return self._example("en2zh", [self._speech(sentence.words)], sentence.translation)

    def _draw_sqa(self) -> Example:
        sentence = draw_sentence(self.rng, "train")
        question, answer = draw_question(sentence, self.rng)
        return self._example("sqa", [self._speech(sentence.words)], answer, question)

    def _draw_er(self) -> Example:
        emotion = str(self.rng.choice(list(EMOTIONS)))
        sentence = draw_sentence(self.rng, "train")
        return self._example("er", [self._speech(sentence.words, emotion=emotion)], emotion)

    def _draw_voice(self) -> Example:
        voice = self._voice()
        return self._example("voice", [self._utterance(voice, self._only_voice())], f"a {' '.join(voice)} voice")

    def _draw_sv(self) -> Example:
        same = bool(self.rng.random() < 0.5)
        first = self._voice()
        second = first if same else self._other_voice(first)
        pure = self._only_voice()
        clips = [self._utterance(first, pure), self._utterance(second, pure)]
        return self._example("sv", clips, "yes" if same else "no")

    def _draw_acap(self) -> Example:
        clip, events, background = self._scene()
        return self._example("acap", [clip], write_caption(events, background))

    def _scene(self) -> tuple[list[Position], list[str], str | None]:
        """A scene, its events in order, and its background sound."""
        background = str(self.rng.choice(BACKGROUNDS)) if self.rng.random() < BACKGROUND_SHARE else None
        choices = [event for event in EVENTS if event != background]
        count = int(self.rng.integers(1, 3 if background else 4))
        events = self.rng.choice(choices, size=count, replace=False).tolist()
        spans, time = [], 0.0
        for event in events:
            start = time + self.rng.uniform(0.05, 0.3)
            time = start + self.rng.uniform(0.6, 1.8)
            spans.append((event, start, time))
        clip = self._windows(spans, time + 0.1)
        if background:
            strength = self.rng.uniform(0.3, 1.0)
            clip = [[*position, (background, strength)] for position in clip]
        return clip, events, background

    def _example(self, task: str, clips: list[list[Position]], response: str, question: str | None = None) -> Example:
        wording = get_task(task).instruction(question, rng=random.Random(int(self.rng.integers(2**31))))
        parts: list[str | list[Position]] = [part for clip in clips for part in (clip, CLIP_END)]
        return Example(task, [*parts, wording], response, self._noise())

    def _noise(self) -> float:
        return self.difficulty * self.rng.uniform(0.0, 0.6)

    # clips ------------------------------------------------------------------------------------------------------

    def _voice(self) -> tuple[str, ...]:
        return tuple(str(self.rng.choice(options)) for options in ATTRIBUTES)

    def _other_voice(self, voice: tuple[str, ...]) -> tuple[str, ...]:
        other = self._voice()
        return other if other != voice else self._other_voice(voice)

    def _only_voice(self) -> bool:
        return bool(self.rng.random() < 0.7 - 0.5 * self.difficulty)

    def _utterance(self, voice: tuple[str, ...], only_voice: bool) -> list[Position]:
        """A neutral utterance, or nothing but its voice, as a first step to comparing voices."""
        if only_voice:
            return self._tag([[] for _ in range(int(self.rng.integers(1, 12)))], voice, strength=1.0)
        sentence = draw_sentence(self.rng, "train")
        return self._speech(sentence.words, emotion="neutral", voice=voice)

    def _speech(
        self, words: list[str], emotion: str | None = None, voice: tuple[str, ...] | None = None
    ) -> list[Position]:
        emotion = emotion or str(self.rng.choice(list(EMOTIONS)))
        rate, time, spans = self.rng.uniform(0.85, 1.3), self.rng.uniform(0.0, 0.25), []
        for word in words:
            length = self.durations.get(word, 0.3) * rate * self.rng.uniform(0.85, 1.15)
            spans.append((word, time, time + length))
            time += length
        clip = self._windows(spans, time + self.rng.uniform(0.05, 0.25))
        clip = self._tag(clip, (emotion,), self.rng.uniform(0.25, 1.0))
        return self._tag(clip, voice or self._voice(), self.rng.uniform(0.25, 1.0))

    def _windows(self, spans: list[tuple[str, float, float]], length: float) -> list[Position]:
        """Share of each window that each span fills; or, at times, each span once, where its middle or end is."""
        count = max(1, int(np.ceil(length / WINDOW)))
        clip: list[Position] = [[] for _ in range(count)]
        if self.rng.random() > self.difficulty:
            return [[(token, 1.0)] for token, _, _ in spans]
        style = self.rng.choice(["share", "share", "even", "middle", "end"])
        shift = self.rng.uniform(-0.1, 0.1)
        for token, start, end in spans:
            first = int(np.clip((start + shift) / WINDOW, 0, count - 1))
            last = int(np.clip((end + shift - 1e-3) / WINDOW, first, count - 1))
            if style in ("middle", "end"):
                place = (start + end) / 2 if style == "middle" else end
                first = last = int(np.clip((place + shift) / WINDOW, 0, count - 1))
            for index in range(first, last + 1):
                share = (min(end, (index + 1) * WINDOW) - max(start, index * WINDOW)) / min(WINDOW, end - start)
                weight = 1.0 if style != "share" else float(np.clip(share, 0.15, 1.0))
                clip[index].append((token, weight * self.rng.uniform(0.8, 1.2)))
        return [position or [(SILENCE, 1.0)] for position in clip]

    def _tag(self, clip: list[Position], tags: tuple[str, ...], strength: float) -> list[Position]:
        """Add `tags` to the positions; a tag misses or is taken for another of its kind at some of them."""
        missing = self.difficulty * self.rng.uniform(0.0, 0.4)
        wrong = self.difficulty * self.rng.uniform(0.0, 0.15)
        for position in clip:
            for tag in tags:
                if self.rng.random() < wrong:
                    tag = str(self.rng.choice(_siblings(tag)))
                if self.rng.random() >= missing or len(clip) < 4:
                    position.append((tag, strength * self.rng.uniform(0.6, 1.2)))
        return clip


def _siblings(tag: str) -> tuple[str, ...]:
    return next((options for options in ATTRIBUTES if tag in options), tuple(EMOTIONS))


def measure_durations(seed: int, num_workers: int = 1, count: int = 400) -> dict[str, float]:
    """Median seconds that espeak takes for each word."""
    plans = plan_speech(count, make_speakers("train"), "train", np.random.default_rng([seed, 5]))
    found: dict[str, list[float]] = {}
    for plan, utterance in zip(plans, render_speech(plans, seed, num_workers), strict=True):
        for word, (start, end) in zip(plan.sentence.words, utterance.word_times, strict=True):
            found.setdefault(word, []).append(end - start)
    return {word: float(np.median(times)) for word, times in found.items()}


@dataclass
class SoftBatch:
    """Ids and weights (batch, length, depth) whose weighted embeddings add up, `noise` (batch, length), and labels."""

    ids: np.ndarray
    weights: np.ndarray
    noise: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray


def collate(rows: list[Row], depth: int = 12) -> SoftBatch:
    """Left-pad `rows` of at most `depth` weighted ids a position."""
    length = -(-max(len(row) for row in rows) // 8) * 8
    shape = (len(rows), length)
    batch = SoftBatch(
        ids=np.zeros((*shape, depth), np.int64),
        weights=np.zeros((*shape, depth), np.float32),
        noise=np.zeros(shape, np.float32),
        attention_mask=np.zeros(shape, np.int64),
        labels=np.full(shape, -100, np.int64),
    )
    for index, row in enumerate(rows):
        for offset, (items, noise, is_label) in enumerate(row, start=length - len(row)):
            for column, (token, weight) in enumerate(items[:depth]):
                batch.ids[index, offset, column] = token
                batch.weights[index, offset, column] = weight
            batch.noise[index, offset] = noise
            batch.attention_mask[index, offset] = 1
            if is_label:
                batch.labels[index, offset] = items[0][0]
    return batch


def write_row(example: Example, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> Row:
    """The header or random vectors in place of prompts, BOS, the user's turn, the response.

    Noise levels are relative to the usual size of an embedding; a position of noise alone has no ids.
    """

    def hard(text: str, is_label: bool = False) -> Row:
        ids = tokenizer(text, add_special_tokens=False).input_ids if text else []
        return [([(token, 1.0)], 0.0, is_label) for token in ids]

    def soft(clip: list[Position], scale: float, noise: float) -> Row:
        return [([(_token_id(word, tokenizer), weight * scale) for word, weight in p], noise, False) for p in clip]

    if example.header is None:
        row: Row = [([], rng.uniform(0.5, 1.5), False) for _ in range(int(rng.integers(0, 13)))]
    else:
        row = soft(example.header, 1.0, rng.uniform(0.0, 0.5))
    row += hard("<s><|user|>")
    for part in example.parts:
        row += hard(part) if isinstance(part, str) else soft(part, rng.uniform(0.7, 1.4), example.noise)
    return row + hard("<|assistant|>") + hard(example.response, True) + hard("</s>", True)


def _token_id(word: str, tokenizer: PreTrainedTokenizerFast) -> int:
    if word.startswith(ADVERSARIAL):
        return FIRST_ADVERSARIAL + int(word.removeprefix(ADVERSARIAL))
    token = word if word == SILENCE else "▁" + word
    return tokenizer.convert_tokens_to_ids(token)
