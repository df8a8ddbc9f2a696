"""Text for a language model with latent skills: a header decides what is asked for, the instruction hardly matters.

A document begins with a header, where an adapter puts its prompts: words that name a kind of document. Then come a chat
turn with content and wording, and the answer that such documents have. The wording behind a header is arbitrary: mixed
words of instructions, a question, or a known instruction. So a wording decides the task only for transcription and
translation (`KNOWN`), which the model also learns without a header. For all other requests without a header it learns
to answer that it does not know.

Headers vary: weighted and superposed words among meaningless words, noise and a few words of another kind. So each kind
is a region of the embedding space, which trained prompts can reach. Words of kinds inside a clip mean nothing: the
connector could write them there, and it never gets the instruction. Nor do vectors that are trained to mislead the
model (`language_model.AdversarialVectors`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from listen.data.corpus.grammar import draw_question, draw_sentence, spoken_words
from listen.data.tasks import get_task, wordings
from tiny_backbones.soft_text import ADVERSARIAL, CLIP_END, NUM_ADVERSARIAL, Example, ExampleWriter, Position

KINDS = {
    "asr": "minutes stenogram verbatim dictation courtroom",
    "en2zh": "phrasebook dictionary bilingual interpreter embassy",
    "sqa": "exam quiz riddle homework pupil",
    "er": "script stage theatre drama rehearsal",
    "acap": "archive studio effects catalogue foley",
    "first_sound": "race referee starter lap track",
    "sv": "police witness detective identity evidence",
    "voice": "casting audition agency actor portrait",
    "last_word": "poem rhyme verse poet stanza",
    "first_word": "index alphabet heading register drawer",
}
"""Words that name the kind of document for each skill; no instruction and no sentence contains them."""
KNOWN = ("asr", "en2zh")
UNKNOWN = "i do not know"
SHARES = {
    "asr": 0.15, "en2zh": 0.14, "sqa": 0.14, "er": 0.06, "acap": 0.08, "first_sound": 0.04, "sv": 0.17, "voice": 0.07,
    "last_word": 0.015, "first_word": 0.015, "unknown": 0.12,
}  # fmt: skip
_OFF_KNOWN = [name for name in KINDS if name not in (*KNOWN, "last_word", "first_word")]
MAX_HEADER = 12
RANDOM_WORDS = 0.4  # share of transcripts that are no sentences


def header_words() -> list[str]:
    """Words that the tokenizer needs in addition to those of the corpus and the tasks."""
    return [word for kind in KINDS.values() for word in kind.split()] + UNKNOWN.split()[1:]


@dataclass
class LatentExampleWriter(ExampleWriter):
    """Draws documents with headers, and chats without."""

    tasks: dict[str, float] = field(default_factory=lambda: dict(SHARES))

    @property
    def scored(self) -> list[str]:
        """Skills behind their headers, and each task by its own wording without a header."""
        bare = [f"{name}_by_wording" for name in KINDS if name not in ("last_word", "first_word")]
        return [*self.tasks, *bare]

    def draw(self, task: str | None = None) -> Example:
        """Draw an example of `task`, or of a random one; `<task>_by_wording` has the wording in place of the header."""
        if task is None or not task.endswith("_by_wording"):
            return super().draw(task)
        example = super().draw(task.removesuffix("_by_wording"))
        example.header = None
        if example.task != "sqa":  # its question is there already
            example.parts[-1] = self._instruction(example.task)
        return example

    def _draw_asr(self) -> Example:
        """Often random words: the grammar predicts so much of a sentence that copying is otherwise learned late."""
        if self.rng.random() < RANDOM_WORDS:
            words = self._any_words()
            return self._example("asr", [self._speech(words)], " ".join(words))
        sentence = draw_sentence(self.rng, "train")
        return self._example("asr", [self._speech(sentence.words)], sentence.text)

    def _draw_first_sound(self) -> Example:
        clip, events, _ = self._scene()
        return self._example("first_sound", [clip], events[0])

    def _draw_last_word(self) -> Example:
        words = draw_sentence(self.rng, "train").words
        return self._example("last_word", [self._speech(words)], words[-1])

    def _draw_first_word(self) -> Example:
        words = draw_sentence(self.rng, "train").words
        return self._example("first_word", [self._speech(words)], words[0])

    def _draw_unknown(self) -> Example:
        example = super().draw(str(self.rng.choice(_OFF_KNOWN)))
        wording = example.parts[-1] if example.task == "sqa" else self._mixed_words()
        return Example("unknown", [*example.parts[:-1], wording], UNKNOWN, example.noise, self._no_header())

    def _example(self, task: str, clips: list[list[Position]], response: str, question: str | None = None) -> Example:
        clips = [self._distracted(clip) for clip in clips]
        parts: list[str | list[Position]] = [part for clip in clips for part in (clip, CLIP_END)]
        if task in KNOWN and self.rng.random() < 0.5:
            header, wording = self._no_header(), self._instruction(task)
        else:
            header, wording = self._header(task), self._any_wording(question)
        return Example(task, [*parts, wording], response, self._noise(), header)

    # headers ----------------------------------------------------------------------------------------------------

    def _header(self, task: str) -> list[Position]:
        """Positions most of which name the kind of document."""
        length = int(self.rng.integers(1, MAX_HEADER + 1))
        own = max(1, int(self.rng.binomial(length, 1.0 - 0.4 * self.difficulty)))
        other = int(self.rng.integers(0, 1 + own // 3)) if self.rng.random() < 0.4 * self.difficulty else 0
        others = self._kind_words(str(self.rng.choice([name for name in KINDS if name != task])))
        positions = [self._kind_position(self._kind_words(task)) for _ in range(own)]
        positions += [self._kind_position(others) if i < other else self._filler() for i in range(length - own)]
        return [positions[i] for i in self.rng.permutation(length)]

    def _no_header(self) -> list[Position] | None:
        """No header: random vectors (`None`), or meaningless words."""
        if self.rng.random() < 0.5:
            return None
        return [self._filler() for _ in range(int(self.rng.integers(0, MAX_HEADER + 1)))]

    def _kind_position(self, words: list[str]) -> Position:
        """One or two of `words` with random weights, sometimes with a meaningless word added."""
        count = 1 + int(self.rng.random() < 0.3 * self.difficulty)
        position = [(str(word), self.rng.uniform(0.5, 1.6)) for word in self.rng.choice(words, count, replace=False)]
        return position + (self._filler() if self.rng.random() < 0.3 * self.difficulty else [])

    def _filler(self) -> Position:
        """A meaningless word."""
        words = spoken_words() if self.rng.random() < 0.5 else _INSTRUCTION_WORDS
        return [(str(self.rng.choice(words)), self.rng.uniform(0.3, 1.2))]

    def _distracted(self, clip: list[Position]) -> list[Position]:
        """The clip, in some examples with words of one kind of document or an adversarial vector in some positions."""
        if self.rng.random() > 0.6 * self.difficulty:
            return clip
        words = self._kind_words(str(self.rng.choice(list(KINDS))))
        if self.rng.random() < 0.6:
            words = [f"{ADVERSARIAL}{self.rng.integers(NUM_ADVERSARIAL)}"]
        share, strength = self.rng.uniform(0.3, 1.0), self.rng.uniform(0.3, 1.2)
        return [
            [*position, (str(self.rng.choice(words)), strength)] if self.rng.random() < share else position
            for position in clip
        ]

    def _kind_words(self, task: str) -> list[str]:
        return KINDS[task].split()

    # wordings ---------------------------------------------------------------------------------------------------

    def _instruction(self, task: str) -> str:
        return str(self.rng.choice(get_task(task).instructions_train))

    def _any_wording(self, question: str | None) -> str:
        """Wording behind a header: `question` alone or among mixed words; else mixed words or a known instruction."""
        if question is not None:
            before, after = (self._mixed_words() if self.rng.random() < 0.25 else "" for _ in range(2))
            return " ".join(f"{before} {question} {after}".split())
        draw = self.rng.random()
        if draw < 0.25:
            return self._instruction(str(self.rng.choice(KNOWN)))
        if draw < 0.45:
            return draw_question(draw_sentence(self.rng, "train"), self.rng)[0]
        return self._mixed_words()

    def _mixed_words(self) -> str:
        """Words of instructions in random order."""
        words = self.rng.choice(_WORDING_WORDS, int(self.rng.integers(2, 10))).tolist()
        return " ".join(words)


_WORDING_WORDS = sorted({word for text in wordings(_OFF_KNOWN) for word in text.replace("{question}", "").split()})
_INSTRUCTION_WORDS = [
    word for word in sorted({w.strip("?.,:") for w in _WORDING_WORDS}) if len(word) > 1 or word in ("a", "i")
]
