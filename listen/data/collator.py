"""From rows of data to model inputs: wording, chat template, audio or stored features, prompts and labels.

Everything random (the wording, the reference, k) is drawn from the seed, the epoch and the ids of the batch's rows and
from nothing else. So it does not depend on workers or on where a run was interrupted: resuming equals a straight run.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..audio_listen import cut_waveform
from ..chat_listen import place_audio, place_input
from .audio import read_clips
from .features import EncodedRecording, FeatureStore, collate_features, recordings_of
from .manifest import extra_fields
from .tasks import get_task
from .utterances import text_input

logger = logging.get_logger(__name__)

IGNORED = -100
_FRAME_MULTIPLE = 32  # frames of 10 ms that audio features are rounded up to; few shapes are faster


@dataclass(frozen=True)
class Example:
    """One row, worded.

    Attributes:
        prompt: rendered chat up to where the answer begins, with one `<|audio|>` a recording.
        answer: what follows, up to the token that ends the turn.
        instruction: wording of the task that was used.
        response: answer in plain text.
    """

    prompt: str
    answer: str
    instruction: str
    response: str


class ListenCollator:
    """Turns rows of the manifest schema into inputs of `ListenForConditionalGeneration`.

    Args:
        processor: a `ListenProcessor`; any chat template will do.
        train: whether wordings and references are drawn, instead of the test wording and the first reference.
        for_generation: give prompts only, to be continued by `generate`, and the rows beside them.
        teacher: give beside the inputs what a text LLM reads in their stead, to learn from its distribution: the words
            of the recording, with the emotion named where the task wants it, under the instruction by which targets
            are made, and the same response.
        num_prompts: k; the processor's by default.
        min_prompts: least k; with it, training draws k uniformly from `min_prompts` to `num_prompts` for each batch.
        features: store of encoder features, used in place of audio.
        join_silence_seconds: silence between the clips of rows that join them.
        seed: fixes what is drawn.
        pad_to_multiple_of: sequence lengths are rounded up to a multiple of it.

    Raises:
        ValueError: `min_prompts` outside 1..`num_prompts`, or options that exclude each other.
    """

    def __init__(
        self,
        processor: Any,
        train: bool = False,
        for_generation: bool = False,
        teacher: bool = False,
        num_prompts: int | None = None,
        min_prompts: int | None = None,
        features: FeatureStore | None = None,
        join_silence_seconds: float = 0.0,
        seed: int = 0,
        pad_to_multiple_of: int = 8,
    ) -> None:
        if (train or teacher) and for_generation:
            raise ValueError("train and teacher need answers, and for_generation=True leaves them out; choose one")
        self.processor = processor
        self.train = train
        self.for_generation = for_generation
        self.teacher = teacher
        self.num_prompts = processor.num_prompts if num_prompts is None else num_prompts
        self.min_prompts = min_prompts
        self.features = features
        self.join_silence_seconds = join_silence_seconds
        self.seed = seed
        self.pad_to_multiple_of = pad_to_multiple_of
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it change
        if min_prompts is not None and not 1 <= min_prompts <= self.num_prompts:
            raise ValueError(f"min_prompts={min_prompts} must lie in 1..num_prompts={self.num_prompts}")

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, so that the same rows are worded otherwise in the next one."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Model inputs for a batch.

        Args:
            rows: rows with the columns of `listen.data.manifest.FEATURES`.

        Returns:
            `input_ids`, `attention_mask` `(batch, sequence)`, padded on the left; the audio inputs of all recordings
            in order; `task_ids` `(batch,)` for pools divided among tasks. For training and loss also `labels`
            `(batch, sequence)`, -100 before the answers, and `logits_to_keep`, the number of last positions that hold
            all of them; with `teacher` `teacher_input_ids` and `teacher_attention_mask`, which end in the same
            answers. For generation also `rows`, a list of mappings that describe the samples.

        Raises:
            ValueError: a row that cannot be worded or read; the message names it.
        """
        rng = random.Random("|".join([str(self.seed), str(int(self._epoch)), *(str(row["id"]) for row in rows)]))
        num_prompts = self.draw_num_prompts(rng)
        examples = [self.word(row, rng) for row in rows]
        inputs = self._prompt_inputs(rows, examples, num_prompts)
        if self.for_generation:
            return {**inputs, "rows": [_describe(row, item) for row, item in zip(rows, examples, strict=True)]}
        batch = self._with_answers(inputs, examples)
        return {**batch, **self._teacher_inputs(rows, examples)} if self.teacher else batch

    def draw_num_prompts(self, rng: random.Random) -> int:
        """k of one batch."""
        if not self.train or self.min_prompts is None:
            return self.num_prompts
        return rng.randint(self.min_prompts, self.num_prompts)

    def word(self, row: Mapping[str, Any], rng: random.Random) -> Example:
        """Choose instruction and response of a row and render them in the LLM's chat format.

        Raises:
            ValueError: no response, or a chat template that does not keep it.
        """
        draw = rng if self.train else None
        responses = [response.strip() for response in row["response"]]
        response = draw.choice(responses) if draw else responses[0]
        if not response:
            raise ValueError(f"row {row['id']!r} has an empty response; take it out or give it one")
        for token in (self.processor.audio_token, self.processor.prompt_token):
            if token in response:
                raise ValueError(f"row {row['id']!r}: the response holds {token!r}, a placeholder; take it out")
        instruction = row.get("instruction") or get_task(row["task"]).instruction(
            row.get("question"), draw, extra_fields(row).get("options")
        )
        user = {"role": "user", "content": place_audio(instruction, len(recordings_of(row)))}
        prompt, answer = self.render(user, response)
        return Example(prompt, answer, instruction, response)

    def render(self, user: Mapping[str, Any], response: str) -> tuple[str, str]:
        """Write a user's message and the response as the LLM's chat template does.

        Returns:
            The prompt, up to where the assistant begins, and what follows, up to the token that ends the turn.

        Raises:
            ValueError: the template does not write the response as it is.
        """
        prompt = self.processor.apply_chat_template([user], add_generation_prompt=True)
        full = self.processor.apply_chat_template([user, {"role": "assistant", "content": response}])
        # some templates write the turn of an assistant in another way than they begin one for generation
        answer = full[len(prompt) :] if full.startswith(prompt) else full[full.rfind(response) :]
        start = answer.find(response)
        if start < 0:
            raise ValueError(f"the chat template does not write the response {response!r} as it is; set another one")
        end = start + len(response)
        return prompt, answer[:end] + end_of_turn(self.processor.tokenizer, answer[end:])

    def _prompt_inputs(
        self, rows: Sequence[Mapping[str, Any]], examples: Sequence[Example], num_prompts: int
    ) -> dict[str, Any]:
        texts = [example.prompt for example in examples]
        options = {
            "num_prompts": num_prompts,
            "task": [row["task"] for row in rows],
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }
        if self.features is not None:
            stored: list[EncodedRecording] = [item for row in rows for item in self.features.recordings(row)]
            inputs = self.processor(texts, num_samples=[item.num_samples for item in stored], **options)
            return {**inputs, **collate_features(stored)}
        rate = self.processor.feature_extractor.sampling_rate
        waves = [self._read(row, rate) for row in rows]
        inputs = dict(self.processor(texts, audio=waves, sampling_rate=rate, **options))
        extractor = self.processor.feature_extractor
        time_axes = {"input_features": extractor.time_axis, "input_values": 1}
        if extractor.is_fixed_length:
            del time_axes["input_features"]
        return {**inputs, **_round_frames(inputs, time_axes)}

    def _read(self, row: Mapping[str, Any], sampling_rate: int) -> list[np.ndarray]:
        try:
            waves = read_clips(row["audio"], sampling_rate, bool(row.get("join")), self.join_silence_seconds)
        except (OSError, ValueError) as error:
            raise ValueError(f"row {row['id']!r}: {error}") from error
        limit = getattr(self.processor, "max_audio_seconds", None)
        cut = [cut_waveform(wave, limit, sampling_rate) for wave in waves]
        if sum(map(len, cut)) < sum(map(len, waves)):  # once: the processor would say it of every batch
            logger.warning_once(f"recordings of the data are cut to max_audio_seconds={limit:g}")
        return cut

    def _with_answers(self, inputs: dict[str, Any], examples: Sequence[Example]) -> dict[str, Any]:
        answers = self._answer_ids(examples)
        ids, mask = self._followed_by(inputs, answers)
        length = ids.shape[1]
        labels = torch.tensor([[IGNORED] * (length - len(answer)) + answer for answer in answers])  # (batch, sequence)
        # one more than the longest answer: the position before it predicts its first token
        kept = min(length, self._rounded(max(map(len, answers)) + 1))
        return {**inputs, "input_ids": ids, "attention_mask": mask, "labels": labels, "logits_to_keep": kept}

    def _teacher_inputs(self, rows: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> dict[str, Any]:
        prompts = []
        for row, example in zip(rows, examples, strict=True):
            task = get_task(row["task"])
            wording = example.instruction if row.get("instruction") else task.target_instruction or example.instruction
            text = place_input(wording, text_input(row, task.tagged), separator="\n")
            prompts.append(self.render({"role": "user", "content": text}, example.response)[0])
        ids, mask = self._followed_by(self.processor(prompts, num_prompts=0), self._answer_ids(examples))
        return {"teacher_input_ids": ids, "teacher_attention_mask": mask}

    def _answer_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        return self.processor.tokenizer([item.answer for item in examples], add_special_tokens=False)["input_ids"]

    def _followed_by(
        self, prompts: Mapping[str, torch.Tensor], answers: Sequence[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `(batch, sequence)` of prompts with their answers behind them, padded on the left."""
        rows = zip(prompts["input_ids"], prompts["attention_mask"], answers, strict=True)
        full = [ids[mask.bool()].tolist() + answer for ids, mask, answer in rows]
        length, pad = self._rounded(max(map(len, full))), self.processor.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in full])
        return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in full])

    def _rounded(self, length: int) -> int:
        return -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of


def end_of_turn(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """What a chat template writes behind a response, `tail`, up to the first special token; EOS where there is none."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [(tail.index(token), token) for token in special if token in tail]
    if not found:
        return tokenizer.eos_token
    position, token = min(found)
    return tail[:position] + token


def _round_frames(inputs: Mapping[str, Any], time_axes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Audio features padded along time to few lengths; their masks tell what is real."""
    rounded: dict[str, torch.Tensor] = {}
    for name, axis in time_axes.items():
        if name not in inputs:
            continue
        missing = -inputs[f"{name}_mask"].shape[1] % _FRAME_MULTIPLE
        padding = (0, 0) * (inputs[name].dim() - 1 - axis) + (0, missing)
        rounded[name] = torch.nn.functional.pad(inputs[name], padding)
        rounded[f"{name}_mask"] = torch.nn.functional.pad(inputs[f"{name}_mask"], (0, missing))  # (chunks, frames)
    return rounded


def _describe(row: Mapping[str, Any], example: Example) -> dict[str, Any]:
    return {
        "id": row["id"],
        "task": row["task"],
        "instruction": example.instruction,
        "question": row.get("question"),
        "references": list(row["response"]),
        "extra": extra_fields(row),
    }
