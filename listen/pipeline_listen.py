"""`pipeline("audio-llm")`: answers to questions about clips."""

import copy
import difflib
import os
from collections.abc import Iterator, Sized
from concurrent.futures import Future
from contextvars import copy_context
from threading import Event, Thread
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import BatchFeature, GenerationConfig, Pipeline, TextIteratorStreamer
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .audio_listen import ROW_KEYS, check_rate, is_one_clip
from .chat_listen import conversation_clips, place_audio
from .model_card_listen import write_model_card
from .processing_listen import ListenProcessor

_INPUT_KEYS = ("audio", "sampling_rate", "text", "task")
_PREPROCESS = ("text", "task", "sampling_rate", "num_prompts", "max_audio_seconds", "number_clips")
_FORWARD = ("return_prompts",)
_COUNTS = {"num_beams", "num_beam_groups", "num_return_sequences", "max_new_tokens", "max_length"}
_POSTPROCESS = ("skip_special_tokens",)
_FLAGS = {"number_clips", "return_prompts", "skip_special_tokens"}
_GENERATE_INPUTS = (
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "streamer",
    "tokenizer",
    "custom_generate",
    "adapter_names",
)
_GENERATE = (*(name for name in vars(GenerationConfig()) if not name.startswith("_")), *_GENERATE_INPUTS)
_WHOLE = "clips of any length are encoded whole, in chunks of 30 s; leave it out, or cut clips with max_audio_seconds="
_WHISPER = "it is an option of Whisper's decoder, which this model does not have; leave it out"
_ADVICE = {  # for keywords of the pipeline of speech recognition
    "chunk_length_s": _WHOLE,
    "stride_length_s": _WHOLE,
    "return_timestamps": "the model writes text without timestamps; leave it out",
    "return_language": "the model does not name the language; ask for it with text=",
    "language": "name the language in the instruction: text='Transcribe the German speech.'",
    "task": "'transcribe' and 'translate' are tasks of Whisper; give task='asr', or another task of the processor, to "
    "the call itself, or write the instruction as text=",
    **dict.fromkeys(
        (
            "condition_on_prev_tokens",
            "compression_ratio_threshold",
            "logprob_threshold",
            "no_speech_threshold",
            "prompt_ids",
            "prompt_condition_type",
            "return_segments",
            "return_token_timestamps",
            "decoder_kwargs",
        ),
        _WHISPER,
    ),
}
_KEYWORDS = (*_PREPROCESS, *_FORWARD, *_POSTPROCESS, "generate_kwargs")


class ListenPipeline(Pipeline):
    """Answers about one clip or many, batched or streamed.

    One input, or a list, data set or generator of inputs:

    - a clip (path, URL, bytes, array), with `text=` or `task=` in the call;
    - `{"audio": clip or list of clips, "sampling_rate": 16000, "text": "What is being said?"}`, or with `"task"`
      instead of `"text"` or with both; other columns are ignored;
    - chat messages with audio content; a last message of the assistant is continued.

    Args of a call, or of the pipeline itself as defaults:
        text: The instruction, or the question of a task that needs one.
        task: Name of a task of the processor's `task_instructions`.
        sampling_rate: Rate of clips given as raw arrays.
        num_prompts: k; the processor's by default.
        max_audio_seconds: Longer clips are cut to it, with a warning; the processor's by default.
        number_clips: Whether to put `Clip 1:`, `Clip 2:` ... before the clips, so that the text can refer to them.
        return_prompts: Whether to return the selected prompts.
        skip_special_tokens: Whether special tokens are left out of the answer, `True` by default.
        generate_kwargs: Arguments of `generate`; they may also be given directly (`max_new_tokens=`, `num_beams=`,
            `streamer=` ...).
        batch_size: Inputs in one batch, 1 by default.

    Returns:
        For each input a list with one dict for each returned sequence: `"generated_text"`, and with `return_prompts`
        `"prompts"`: `[{"index": position in the pool, "score": float}, ...]`, best first.

    Raises:
        TypeError: an unknown keyword.
        ValueError: input that cannot be read, or without an instruction.

    Example:

        >>> from transformers import pipeline
        >>> listen = pipeline("audio-llm", model="model_cards/listen-tiny", trust_remote_code=True)
        >>> listen("clip.wav", "What is being said?")
        [{'generated_text': '...'}]
    """

    processor: ListenProcessor
    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("local_files_only", None)  # used by `pipeline()` already
        _check_counts(kwargs, {"batch_size"})
        super().__init__(*args, **kwargs)
        asked = getattr(torch, str(kwargs.get("torch_dtype")).removeprefix("torch."), None)  # `dtype` has been applied
        if asked not in (None, self.model.dtype):
            raise ValueError(f"torch_dtype={asked}, but the model is in {self.model.dtype}; load it with dtype={asked}")
        if self.processor is None:
            raise ValueError("the pipeline needs the model's processor; pass processor=ListenProcessor...")
        if self.processor.vocab_size is None:
            self.processor.vocab_size = self.model.config.text_config.get_text_config().vocab_size
        self._generation_defaults["pad_token_id"] = self.processor.tokenizer.pad_token_id
        for info in (getattr(self.model.config, "custom_pipelines", None) or {}).values():
            # `pipeline()` replaces names in the config by classes, with which it cannot be saved
            info["pt"] = [entry if isinstance(entry, str) else entry.__name__ for entry in info["pt"]]

    def push_to_hub(self, repo_id: str, *args: Any, backbones: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Push model and processor, see `FrozenBackbonesMixin.push_to_hub`."""
        with self.model.published(backbones):
            return super().push_to_hub(repo_id, *args, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        write_model_card(working_dir, self.model, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def __call__(self, inputs: Any, text: str | None = None, **kwargs: Any) -> Any:
        """Answer one input, or a list, data set or generator of inputs; see the class."""
        _check_counts(kwargs, {"batch_size"})
        if text is not None:
            kwargs["text"] = text
        if is_one_clip(inputs):
            inputs = {"audio": inputs} if isinstance(inputs, (list, tuple)) else inputs
        elif not len(inputs):
            return []
        elif isinstance(inputs, (list, tuple)):
            inputs = [Chat(item) if _is_chat(item) else item for item in inputs]
        if type(inputs).__module__.partition(".")[0] == "datasets":
            inputs = (row for row in inputs)  # the base class treats it as a stream
        return super().__call__(inputs, **kwargs)

    def stream(self, inputs: Any, text: str | None = None, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """The answer to one input while it is generated.

        Generation runs in a thread of its own. It stops after the current token where the iterator is closed early.

        Args:
            inputs: One input; see the class.
            text: As in a call.
            **kwargs: Arguments of a call other than `streamer`; beam search cannot stream.

        Yields:
            `{"generated_text": text so far}` for each new piece of text; at the end the answer that a call returns.

        Raises:
            ValueError: a list of inputs, or what a call refuses.

        Example:

            >>> for answer in listen.stream("clip.wav", "What is being said?"):
            ...     print(answer["generated_text"])
        """
        if not is_one_clip(inputs) and not _is_chat(inputs):
            raise ValueError(f"stream answers one input, got a list of {len(inputs)}; call the pipeline with the list")
        shown = {**self._postprocess_params, **kwargs}.get("skip_special_tokens", True)
        streamer = TextIteratorStreamer(self.processor, skip_prompt=True, skip_special_tokens=shown)
        closed, result = Event(), Future()
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), lambda *_, **__: closed.is_set()]

        def generate() -> None:
            try:
                result.set_result(self(inputs, text, streamer=streamer, **kwargs))
            except BaseException as error:  # raised again for the caller
                result.set_exception(error)
            finally:
                streamer.on_finalized_text("", stream_end=True)

        Thread(target=copy_context().run, args=(generate,), name="listen-stream", daemon=True).start()
        try:
            written = ""
            for piece in streamer:
                written += piece
                if piece.strip():
                    yield {"generated_text": written.strip()}
            yield result.result()[0]
        finally:
            closed.set()

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        generate = kwargs.pop("generate_kwargs", None) or {}
        if not isinstance(generate, dict):
            raise TypeError(f"generate_kwargs={generate!r:.80} must be a dict of arguments of generate")
        if generate.get("task") is not None and generate["task"] not in self.processor.task_instructions:
            raise TypeError(f"keyword 'task' in generate_kwargs: {_ADVICE['task']}")
        twice = generate.keys() & kwargs.keys()
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))}: given twice, as a keyword and in generate_kwargs")
        kwargs |= generate
        for name in kwargs.keys() - {*_PREPROCESS, *_FORWARD, *_POSTPROCESS, *_GENERATE}:
            known, value = (*_KEYWORDS, *_GENERATE), kwargs[name]
            is_off = isinstance(value, (bool, int, float, str, list, tuple, dict)) and not value
            if value is None or (is_off and not difflib.get_close_matches(name, known, n=1, cutoff=0.8)):
                continue  # it asks for nothing, unlike num_prompt=0
            raise TypeError(f"keyword {name!r} is unknown{_suggestion(name, known)}")
        _check_counts(kwargs, _COUNTS)
        for name in kwargs.keys() & _FLAGS:
            if not isinstance(kwargs[name], (bool, type(None))):
                raise ValueError(f"{name}={kwargs[name]!r:.80} must be True or False")
        if kwargs.get("sampling_rate") is not None:
            check_rate(kwargs["sampling_rate"])
        preprocess = {name: value for name, value in kwargs.items() if name in _PREPROCESS}
        postprocess = {name: value for name, value in kwargs.items() if name in _POSTPROCESS}
        forward = {name: value for name, value in kwargs.items() if name in (*_FORWARD, *_GENERATE)}
        return preprocess, forward, postprocess

    # ------------------------------------------------------------------ inputs

    def preprocess(
        self,
        input_: Any,
        text: str | None = None,
        task: str | None = None,
        sampling_rate: int | None = None,
        num_prompts: int | None = None,
        max_audio_seconds: float | None = None,
        number_clips: bool = False,
    ) -> dict[str, Any]:
        """One input as rendered text and clips, which `collate` loads."""
        if isinstance(input_, Chat):
            if text is not None:
                raise ValueError(f"chat messages bring their own text; leave out text={text!r}")
            if task is not None and self.processor.tasks is None:
                raise ValueError(f"chat messages bring their own text; write the wording of task={task!r} into them")
            rendered, clips = self._render_chat(input_.messages, number_clips)
        else:
            sample = self._as_sample(input_, text, task)
            rendered, clips = self._render_question(sample, number_clips)
            task, sampling_rate = sample.get("task"), sample.get("sampling_rate") or sampling_rate
        if sampling_rate is not None:  # inputs of one batch may differ in it
            clips = [{"array": clip, "sampling_rate": sampling_rate} for clip in clips]
        options = {"num_prompts": num_prompts, "max_audio_seconds": max_audio_seconds}
        return {"text": rendered, "audio": clips, "task": task, "options": options}

    def _render_chat(self, messages: list[dict[str, Any]], number_clips: bool) -> tuple[str, list[Any]]:
        unfinished = messages[-1]["role"] == "assistant"
        rendered = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=not unfinished,
            continue_final_message=unfinished,
            number_clips=number_clips,
        )
        return rendered, conversation_clips(messages)

    def _as_sample(self, input_: Any, text: str | None, task: str | None) -> dict[str, Any]:
        """A dict with `audio` and what to do with it, from the input and the keywords."""
        row = {"audio": input_}
        if isinstance(input_, dict):
            row = {name: value for name, value in input_.items() if value is not None}
        if "audio" not in row and set(ROW_KEYS[1:]) & row.keys():  # the clip itself, as datasets write it
            row = {"audio": input_, **{name: row[name] for name in row.keys() - set(ROW_KEYS)}}
        for name in row.keys() - set(_INPUT_KEYS):
            meant = [key for key in difflib.get_close_matches(name, _INPUT_KEYS, n=1, cutoff=0.7) if key not in row]
            if meant:
                raise ValueError(f"the input has a key {name!r}; did you mean {meant[0]!r}?")
        if "audio" not in row:
            raise ValueError(f"the input with the keys {sorted(row)} has no 'audio'; text alone goes in chat messages")
        for name, value in (("text", text), ("task", task)):
            if value is not None and name in row:
                raise ValueError(f"{name} was given twice: {row[name]!r} in the input and {value!r} as a keyword")
            row.setdefault(name, value)
        return row

    def _render_question(self, sample: dict[str, Any], number_clips: bool) -> tuple[str, list[Any]]:
        clips = [sample["audio"]] if is_one_clip(sample["audio"]) else list(sample["audio"])
        if not clips:
            raise ValueError("the input holds no clip: its 'audio' is an empty list; text alone goes in chat messages")
        if not isinstance(sample["text"] or "", str):
            raise ValueError(
                f"text={sample['text']!r:.80} must be a string; give inputs with texts of their own as dicts"
            )
        if sample["task"] is not None:
            question = self.processor.instruction(sample["task"], sample["text"])
        elif sample["text"]:
            question = sample["text"]
        else:
            tasks = ", ".join(self.processor.task_instructions)
            raise ValueError(f"no instruction for the audio; give text='What is being said?', or task= one of {tasks}")
        messages = [{"role": "user", "content": place_audio(question, len(clips))}]
        rendered = self.processor.apply_chat_template(messages, add_generation_prompt=True, number_clips=number_clips)
        return rendered, clips

    def collate(self, samples: list[dict[str, Any]]) -> BatchFeature:
        """Model inputs of a batch of what `preprocess` returns."""
        clips, tasks = [sample["audio"] for sample in samples], [sample["task"] for sample in samples]
        return self.processor(
            [sample["text"] for sample in samples],
            clips if any(clips) else None,
            task=tasks if any(tasks) else None,
            **samples[0]["options"],
        )

    # ------------------------------------------------------------------ running

    def run_single(self, inputs: Any, preprocess_params: dict, forward_params: dict, postprocess_params: dict) -> Any:
        """One input: a batch of one."""
        batch = self.collate([self.preprocess(inputs, **preprocess_params)])
        return self.postprocess(self.forward(batch, **forward_params), **postprocess_params)[0]

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator[list[dict[str, Any]]]:
        """Results in order, computed batch by batch as they are asked for; workers read and prepare the audio."""
        reader = copy.copy(self)
        reader.model = reader.assistant_model = None  # workers that are spawned get a copy of the pipeline
        if isinstance(inputs, Sized):
            data = PipelineDataset(inputs, reader.preprocess, preprocess_params)
        else:
            data, num_workers = PipelineIterator(inputs, reader.preprocess, preprocess_params), min(num_workers, 1)
        for batch in DataLoader(data, batch_size=batch_size, num_workers=num_workers, collate_fn=reader.collate):
            yield from self.postprocess(self.forward(batch, **forward_params), **postprocess_params)

    def _forward(self, input_tensors: Any, return_prompts: bool = False, **generate_kwargs: Any) -> dict[str, Any]:
        inputs = dict(input_tensors)
        selected = None
        if return_prompts:
            if generate_kwargs.get("adapter_names") is None:  # another thread may switch adapters before they answer
                active = self.model.active_adapter or "__base__"
                generate_kwargs["adapter_names"] = [active] * len(inputs["input_ids"])
            inputs, selected = self._selected(inputs, generate_kwargs.get("adapter_names"))
        if self.assistant_model is not None:
            generate_kwargs.setdefault("assistant_model", self.assistant_model)
        if "stop_strings" in generate_kwargs:
            generate_kwargs.setdefault("tokenizer", self.processor.tokenizer)
        output = self.model.generate(**inputs, **self._prepare_generate_kwargs(generate_kwargs))
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        batch_size, length = inputs["input_ids"].shape
        return {"answers": sequences[:, length:], "batch_size": batch_size, "selected": selected}

    def _selected(
        self, inputs: dict[str, Any], adapter_names: list[str] | None
    ) -> tuple[dict[str, Any], list[list[dict]]]:
        """The selected prompts of each row, and the inputs with encoder frames, so that audio is encoded once."""
        audio = {
            name: inputs.pop(name) for name in self.processor.feature_extractor.model_input_names if name in inputs
        }
        if audio:
            inputs.update(
                {name: value for name, value in self.model.encode_audio(**audio).items() if value is not None}
            )
        if not (inputs["input_ids"] == self.processor.prompt_token_id).any():
            return inputs, [[] for _ in inputs["input_ids"]]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # a random pool selects the same prompts again
            selected = self.model.select_prompts(**inputs, adapter_names=adapter_names)
        rows = zip(selected.indices.tolist(), selected.scores.tolist(), strict=True)
        return inputs, [
            [{"index": index, "score": score} for index, score in zip(*row, strict=True) if index >= 0] for row in rows
        ]

    def postprocess(
        self, model_outputs: dict[str, Any], skip_special_tokens: bool = True
    ) -> list[list[dict[str, Any]]]:
        """Answers of each input of a batch."""
        texts = self.processor.batch_decode(model_outputs["answers"], skip_special_tokens=skip_special_tokens)
        answers = [{"generated_text": text.strip()} for text in texts]
        each = len(answers) // model_outputs["batch_size"]
        rows = [answers[start : start + each] for start in range(0, len(answers), each)]
        for row, prompts in zip(rows, model_outputs["selected"] or [], strict=False):
            for answer in row:
                answer["prompts"] = prompts
        return rows

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the model, this pipeline and the processor to a folder that `pipeline(model=folder)` loads.

        Args:
            save_directory: Folder to write.
            **kwargs: As the model's `save_pretrained`, `save_full=True` for instance.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _is_chat(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) > 0 and is_valid_message(item[0])


def _check_counts(kwargs: dict[str, Any], names: set[str]) -> None:
    for name in kwargs.keys() & names:
        value = kwargs[name]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r:.80} must be a whole number above 0")


def _suggestion(name: str, known: tuple[str, ...]) -> str:
    if name in _ADVICE:
        return f": {_ADVICE[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(_KEYWORDS)} and arguments of generate"


__all__ = ["ListenPipeline"]
