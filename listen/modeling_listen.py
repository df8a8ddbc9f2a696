"""LiSTEN (arXiv 2505.18517): a frozen causal LLM with audio input, by frozen encoders and a trained adapter.

A forward pass, in the order of this file: the encoders turn audio into frames (`encode_audio`), the adapter's connector
turns frames into audio embeddings, its prompt pool selects prompts for the input, both fill their placeholders
(`embed`), and the LLM reads the result.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import TransformersKwargs, can_return_tuple

from .adapter_listen import Adapters, ListenAdapter
from .attention_listen import additive_attention
from .configuration_listen import BACKBONES, ListenConfig
from .generation_listen import ListenGenerationMixin
from .language_models_listen import (
    PACKING_KWARGS,
    UNPACK,
    check_input,
    check_language_model,
    check_later,
    check_not_packed,
    embedded_inputs,
    frame_mask,
    shape_error,
    unfit_stream,
)
from .layer_prompts_listen import check_prompt_mask, kept_prompts, run_with_layer_prompts
from .lora_listen import ThreadAdapter
from .modeling_beats import BeatsModel
from .modeling_connector import resample_frames
from .modeling_prompt_pool import pool_query
from .modeling_speech_encoder import build_speech_encoder
from .outputs_listen import AudioEmbeddings, EncodedAudio, ListenModelOutput, ListenOutput, PromptOutput
from .pipeline_listen import ListenPipeline  # noqa: F401 (checkpoints carry the files that are imported here)
from .pretrained_listen import ListenPreTrainedModel

_LLM_KWARGS = TransformersKwargs.__annotations__.keys()
_LABELS_TAKEN = (
    "num_items_in_batch was given without labels: the Trainer keeps them to itself with label_smoothing_factor or "
    "compute_loss_func, so the key loss is lost and the query includes the answer; leave label_smoothing_factor at 0, "
    "override compute_loss of the Trainer in place of compute_loss_func"
)


class ListenModel(ListenPreTrainedModel):
    """Speech encoder, audio encoder, adapters and LLM; the forward pass ends before the LLM's head.

    Args:
        config: A `ListenConfig`.
        init_backbones: Backbones to build; the others are attached later by `load_backbones`.
    """

    def __init__(self, config: ListenConfig, init_backbones: Collection[str] = tuple(BACKBONES)) -> None:
        super().__init__(config)
        check_language_model(config.text_config)
        # an instance's own: the config says which encoders are trained
        self._keep_in_fp32_modules_strict = [*type(self)._keep_in_fp32_modules_strict, *config.learned_backbones]
        if config.lora_config:  # read once the LLM is there, by `_load_lora`, which checks it against the config
            self._keys_to_ignore_on_load_unexpected = [r"^language_model\..*\.lora_"]
        self.speech_encoder: nn.Module | None = None
        self.audio_encoder: nn.Module | None = None
        self.language_model: nn.Module | None = None
        if "speech_encoder" in init_backbones:
            self.speech_encoder = build_speech_encoder(config.speech_config)
        if "audio_encoder" in init_backbones and config.audio_config is not None:
            attention = additive_attention(config.audio_config._attn_implementation)
            self.audio_encoder = BeatsModel._from_config(config.audio_config, attn_implementation=attention)
        if "language_model" in init_backbones:
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.audio_step = config.audio_step  # frames of the audio encoder in one of the speech encoder
        self.adapters = Adapters()
        for name, (connector, pool) in self.adapter_configs().items():
            self.adapters[name] = ListenAdapter(config, connector, pool)
        self._active_adapter: str | None = "default"
        self._of_thread = ThreadAdapter()
        self.post_init()
        self.freeze()

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's input embeddings."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The LLM's head."""
        return self.language_model.get_output_embeddings() if self.language_model is not None else None

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: the LLM is frozen, and placeholder ids need no embedding.

        Raises:
            ValueError: always.
        """
        raise ValueError("the LLM of a LiSTEN model is frozen and never resized; placeholder ids need no embedding")

    # ------------------------------------------------------------------ audio to embeddings

    def encode_audio(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
    ) -> EncodedAudio:
        """Run the encoders; frozen ones without autograd, and `config.chunks_at_once` chunks at a time.

        Args:
            input_features: `(chunks, mel bins, frames)` log-mel of Whisper, 100 frames a second; other speech encoders
                take `(chunks, samples)` or `(chunks, frames, bins)` of their own feature extractors.
            input_features_mask: `(chunks, time)`, 1 on real positions.
            input_values: `(chunks, frames, mel bins)` filter-bank of BEATs, 100 frames a second.
            input_values_mask: `(chunks, frames)`.

        Returns:
            Frames of both encoders at the rate of the speech encoder.

        Raises:
            ValueError: the filter-bank is missing, or given to a model without an audio encoder.
        """
        if (self.config.audio_config is None) != (input_values is None):
            raise unfit_stream(self.config, "input_values")
        is_mel = self.config.speech_config.model_type == "whisper"  # (chunks, mel bins, frames), else time comes second
        shape = (len(input_features), input_features.shape[1 + is_mel])
        if input_features_mask is not None and input_features_mask.shape != shape:
            raise shape_error("input_features_mask", input_features_mask, shape)
        if input_values_mask is not None and input_values_mask.shape != input_values.shape[:2]:
            raise shape_error("input_values_mask", input_values_mask, input_values.shape[:2])
        if input_features_mask is None:
            input_features_mask = self.speech_encoder.full_mask(input_features)
        speech_inputs_mask = None if self.config.pad_to_30s else input_features_mask
        speech = self._run_encoder("speech_encoder", input_features, speech_inputs_mask)  # (chunks, frames, width)
        speech_mask = self.speech_encoder.output_mask(input_features_mask)  # (chunks, frames)
        if input_values is None:
            return EncodedAudio(speech, speech_mask)
        if input_values_mask is None:
            input_values_mask = torch.ones_like(input_values[..., 0], dtype=torch.long)  # (chunks, filter-bank frames)
        audio = self._run_encoder("audio_encoder", input_values, input_values_mask)  # (chunks, frames, width)
        audio_mask = self.audio_encoder.output_mask(input_values_mask)  # (chunks, frames)
        return EncodedAudio(speech, speech_mask, *resample_frames(audio, audio_mask, self.audio_step))

    def _run_encoder(self, name: str, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        encoder, size = getattr(self, name), self.config.chunks_at_once
        inputs = inputs.to(encoder.dtype)
        is_trainable = False
        for weight in encoder.parameters() if torch.is_grad_enabled() else ():
            is_trainable |= weight.requires_grad
        if is_trainable:
            # at once: autograd keeps all activations anyway
            return encoder(inputs, mask).last_hidden_state
        pieces = []
        with torch.no_grad():
            for start in range(0, len(inputs), size):
                piece = mask[start : start + size] if mask is not None else None
                pieces.append(encoder(inputs[start : start + size], piece).last_hidden_state)
        return torch.cat(pieces)  # (chunks, frames, width)

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        encoded: EncodedAudio | None = None,
        adapter_name: str | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> AudioEmbeddings:
        """Audio embeddings in the LLM's space, from features or from `encoded` frames.

        Args:
            input_features: See `encode_audio`.
            input_features_mask: See `encode_audio`.
            input_values: See `encode_audio`.
            input_values_mask: See `encode_audio`.
            encoded: Frames of an earlier `encode_audio`, in place of the features.
            adapter_name: Adapter whose connector is used; the active one by default.
            output_hidden_states: Whether to return the states of all layers of the speech encoder, by a second pass.
            output_attentions: Whether to return its attention weights, likewise; with eager attention.

        Returns:
            `pooler_output` `(total, text width)`, the chunks one after the other, `lengths` `(chunks,)`, and of the
            speech encoder `last_hidden_state` `(chunks, frames, width)`, `hidden_states` and `attentions`. A tuple
            with `return_dict=False`.

        Raises:
            ValueError: no adapter is active, a stream is missing, or layers are asked for without features.
        """
        layers = BaseModelOutput()
        if output_hidden_states or output_attentions:
            if input_features is None:
                raise ValueError("output_hidden_states and output_attentions need input_features, not encoded frames")
            speech_mask = None if self.config.pad_to_30s else input_features_mask
            options = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            with torch.no_grad():
                layers = self.speech_encoder(input_features.to(self.speech_encoder.dtype), speech_mask, **options)
        if encoded is None:
            encoded = self.encode_audio(input_features, input_features_mask, input_values, input_values_mask)
        adapter = self.adapters.named(adapter_name or self.active_adapter)
        embeddings, lengths = adapter.connector(*encoded.to_tuple())
        return AudioEmbeddings(
            last_hidden_state=encoded.speech_hidden_states,
            pooler_output=embeddings,
            hidden_states=layers.hidden_states,
            attentions=layers.attentions,
            lengths=lengths,
        )

    def _encoded(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        speech_hidden_states: torch.Tensor | None = None,
        speech_hidden_states_mask: torch.Tensor | None = None,
        audio_hidden_states: torch.Tensor | None = None,
        audio_hidden_states_mask: torch.Tensor | None = None,
    ) -> EncodedAudio | None:
        """The frames of a forward pass: encoded from features, or as they were given; `None` without audio."""
        if speech_hidden_states is None:
            if input_features is None:
                return None
            return self.encode_audio(input_features, input_features_mask, input_values, input_values_mask)
        if input_features is not None:
            raise ValueError("give input_features or speech_hidden_states, not both")
        if self.training and torch.is_grad_enabled():
            self.check_encoders_need_no_features()
        if (self.config.audio_config is None) != (audio_hidden_states is None):
            raise unfit_stream(self.config, "audio_hidden_states")
        speech_mask = frame_mask("speech_hidden_states_mask", speech_hidden_states, speech_hidden_states_mask)
        audio_mask = frame_mask("audio_hidden_states_mask", audio_hidden_states, audio_hidden_states_mask)
        return EncodedAudio(speech_hidden_states, speech_mask, audio_hidden_states, audio_mask)

    # ------------------------------------------------------------------ placeholders

    def placeholder_masks(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where audio and where prompts stand in `input_ids`, both `(batch, sequence)`."""
        # no id is negative: one that the config lacks stands nowhere
        audio_id = -1 if self.config.audio_token_id is None else self.config.audio_token_id
        prompt_id = -1 if self.config.prompt_token_id is None else self.config.prompt_token_id
        return input_ids == audio_id, input_ids == prompt_id

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoded: EncodedAudio | None = None,
        query_mask: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        adapter_names: list[str] | None = None,
        num_audio: int | None = None,
        num_prompts: int | None = None,
        for_layers: bool = False,
    ) -> tuple[torch.Tensor, PromptOutput | None]:
        """The LLM's input embeddings with audio and prompts in their places.

        Args:
            input_ids: `(batch, sequence)` with placeholder ids.
            attention_mask: `(batch, sequence)`, 1 on real positions.
            encoded: Encoder frames of all chunks of the batch, in order.
            query_mask: `(batch, length)` positions, from the first on, that the query averages; all by default.
            task_ids: `(batch,)`, for pools of strategy `"task"`.
            adapter_names: Adapter of each row; the active one by default, `"__base__"` for none.
            num_audio: Audio placeholders of all rows, see `ListenForConditionalGeneration.forward`.
            num_prompts: Prompt placeholders of each row, likewise.
            for_layers: Whether prompts of form `"layers"`, which are no part of the embeddings, are allowed: the caller
                runs the LLM with them by `run_with_layer_prompts`.

        Returns:
            `(batch, sequence, text width)` and the prompts that were selected, `None` where no row asks for any.

        Raises:
            ValueError: placeholders and audio do not match, the mask does not fit the form of the prompts, prompts of
                form `"layers"` would be lost, an adapter is not named for each row, or a placeholder id is not set.
        """
        active = self.active_adapter if self._of_thread.used else self._active_adapter
        names = adapter_names or [active] * len(input_ids)
        if len(names) != len(input_ids):
            raise ValueError(f"adapter_names names {len(names)} rows but the batch has {len(input_ids)}")
        if self.config.audio_token_id is None or self.config.prompt_token_id is None:
            missing = "audio_token_id" if self.config.audio_token_id is None else "prompt_token_id"
            raise ValueError(f"config.{missing} is None; build the processor first, it chooses the id, or set it")
        is_audio, is_prompt = self.placeholder_masks(input_ids)
        # placeholder ids may lie above the vocabulary
        ids = input_ids.masked_fill(is_audio | is_prompt, 0)
        embeds = self.language_model.get_input_embeddings()(ids)  # (batch, sequence, text width)
        if encoded is not None:
            audio = self.adapters.connect(encoded, is_audio, names, num_audio)  # (total, text width)
            embeds = embeds.masked_scatter(is_audio[..., None], audio.to(embeds.dtype))
        elif is_audio.any():
            raise ValueError(
                f"the text holds {int(is_audio.sum())} audio placeholders but no audio was given; "
                "pass input_features, or take them out"
            )
        if not num_prompts and not is_prompt.any():
            return embeds, None
        masks = (is_audio, is_prompt, attention_mask, query_mask)
        query = pool_query(self.adapters, names, embeds, *masks, wait=num_prompts is None)  # (batch, text width)
        counts = is_prompt.sum(-1)  # (batch,)
        prompts, selected = self.adapters.select(query, counts, task_ids, names, num_prompts)  # (total, text width)
        masked = is_prompt & (attention_mask == 0) if attention_mask is not None else is_prompt & False
        if num_prompts is not None and not selected.layers:
            check_later(~masked, "attention_mask is 0 at a prompt placeholder")
        elif selected.layers or masked.any():
            # static caches have masks of four axes, but `generate` gives the flat one as `query_mask` too
            mask = query_mask if attention_mask is None else attention_mask
            check_prompt_mask(selected.layers, is_prompt, mask, wait=num_prompts is None)
        if selected.layers and not for_layers:
            raise ValueError("embeddings do not hold prompts of form='layers'; give the model input_ids")
        return embeds.masked_scatter(is_prompt[..., None], prompts.to(embeds.dtype)), selected

    def select_prompts(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_mask: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        adapter_names: list[str] | None = None,
        **audio: torch.Tensor | None,
    ) -> PromptOutput:
        """The prompts that the pool selects for model inputs, without running the LLM.

        Args:
            input_ids: As in `embed`, with prompt placeholders.
            attention_mask: As in `embed`.
            query_mask: As in `embed`.
            task_ids: As in `embed`.
            adapter_names: As in `embed`.
            **audio: Features or encoder frames, as in `forward`.

        Raises:
            ValueError: the input asks for no prompts.
        """
        encoded, choices = self._encoded(**audio), (query_mask, task_ids, adapter_names)
        _, prompts = self.embed(input_ids, attention_mask, encoded, *choices, for_layers=True)
        if prompts is None:
            raise ValueError("the input asks for no prompts; process it with num_prompts of at least 1")
        return prompts

    # ------------------------------------------------------------------ the LLM

    def _llm_inputs(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        encoded: EncodedAudio | None,
        text_only: bool,
        **choices: Any,
    ) -> tuple[dict[str, torch.Tensor | None], PromptOutput | None]:
        """What the LLM reads in a forward pass, and the prompts that were selected; `choices` are those of `embed`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if inputs_embeds is not None and encoded is not None:
            raise ValueError("audio needs input_ids: inputs_embeds do not tell where its placeholders stand")
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        if inputs_embeds is not None:
            return {**given, "inputs_embeds": inputs_embeds}, None
        if text_only and encoded is None:
            return {**given, "input_ids": input_ids}, None
        is_audio, is_prompt = self.placeholder_masks(input_ids)  # (batch, sequence)
        is_placeholder = is_audio | is_prompt
        if encoded is None and not is_placeholder.any():  # nothing to fill: the LLM reads ids, as it does alone
            return {**given, "input_ids": input_ids}, None
        # static caches come with masks of four axes, or one for each kind of attention; other caches with longer ones
        covers_input = isinstance(attention_mask, torch.Tensor) and attention_mask.shape == input_ids.shape
        own_mask = attention_mask if covers_input else None
        if position_ids is not None:
            check_not_packed(position_ids, own_mask, is_prompt)
        embeds, prompts = self.embed(input_ids, own_mask, encoded, **choices, for_layers=True)
        if position_ids is None and own_mask is not None:  # padding takes no position
            given["position_ids"] = (own_mask.long().cumsum(-1) - 1).clamp_min(0)
        return {**given, **embedded_inputs(self.language_model, input_ids, is_placeholder, embeds)}, prompts

    def _llm_kwargs(self, use_cache: bool | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Kwargs that disable unused work (router logits; the cache while training), unless `kwargs` ask for it.

        The routers of an LLM with experts are frozen, so no loss balances them. Training reads no cache, and some LLMs
        fail with one: they write it in place, or again when gradient checkpointing recomputes a layer.
        """
        if unknown := sorted(kwargs.keys() - _LLM_KWARGS):
            raise TypeError(f"forward() got unknown arguments {unknown}; nothing is dropped in silence, take them out")
        if packed := sorted(kwargs.keys() & PACKING_KWARGS):
            raise ValueError(f"forward() got {packed}, which describe packed rows; {UNPACK}")
        if use_cache is None and self.training:
            use_cache = False
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name, False):
                kwargs = {name: True, **kwargs}
        has_routers = getattr(self.config.text_config.get_text_config(), "output_router_logits", False)
        return {**({"output_router_logits": False} if has_routers else {}), "use_cache": use_cache, **kwargs}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        input_values_mask: torch.LongTensor | None = None,
        speech_hidden_states: torch.FloatTensor | None = None,
        speech_hidden_states_mask: torch.LongTensor | None = None,
        audio_hidden_states: torch.FloatTensor | None = None,
        audio_hidden_states_mask: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        query_mask: torch.LongTensor | None = None,
        task_ids: torch.LongTensor | None = None,
        adapter_names: list[str] | None = None,
        text_only: bool = False,
        num_audio: int | None = None,
        num_prompts: int | None = None,
        **kwargs: Any,
    ) -> ListenModelOutput:
        """Hidden states of the LLM for text, audio and prompts; see `ListenForConditionalGeneration.forward`."""
        llm_kwargs = self._llm_kwargs(use_cache, kwargs)
        check_input(self.config, input_ids, attention_mask, None, query_mask, past_key_values is not None)
        features = (input_features, input_features_mask, input_values, input_values_mask)
        frames = (speech_hidden_states, speech_hidden_states_mask, audio_hidden_states, audio_hidden_states_mask)
        encoded = self._encoded(*features, *frames)
        choices = {"query_mask": query_mask, "task_ids": task_ids, "adapter_names": adapter_names}
        given = (input_ids, inputs_embeds, attention_mask, position_ids, encoded, text_only)
        inputs, prompts = self._llm_inputs(*given, **choices, num_audio=num_audio, num_prompts=num_prompts)
        selected, llm = prompts or PromptOutput(), self.language_model.base_model
        if selected.layers or hasattr(past_key_values, "layer_prompts"):
            llm = partial(run_with_layer_prompts, llm, selected.layers or kept_prompts(past_key_values))
        outputs = llm(**inputs, past_key_values=past_key_values, **llm_kwargs)
        return ListenModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),
            prompt_indices=selected.indices,
            prompt_scores=selected.scores,
            query=selected.query,
        )


class ListenForConditionalGeneration(ListenGenerationMixin, ListenModel):
    """LiSTEN with the LLM's head: answers text about any number of clips.

    Example:

        >>> from transformers import AutoModel, AutoProcessor
        >>> model = AutoModel.from_pretrained("model_cards/listen-tiny", trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained("model_cards/listen-tiny", trust_remote_code=True)
        >>> chat = [{"role": "user", "content": [{"type": "audio", "path": "clip.wav"},
        ...                                      {"type": "text", "text": "What is being said?"}]}]
        >>> inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        >>> answer = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        input_values_mask: torch.LongTensor | None = None,
        speech_hidden_states: torch.FloatTensor | None = None,
        speech_hidden_states_mask: torch.LongTensor | None = None,
        audio_hidden_states: torch.FloatTensor | None = None,
        audio_hidden_states_mask: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        query_mask: torch.LongTensor | None = None,
        task_ids: torch.LongTensor | None = None,
        adapter_names: list[str] | None = None,
        text_only: bool = False,
        num_audio: int | None = None,
        num_prompts: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ListenOutput:
        """Logits, and the loss where `labels` are given.

        Args:
            input_ids: `(batch, sequence)`: k prompt placeholders, then text with audio placeholders.
            input_features: `(chunks, mel bins, frames)` log-mel of all clips of the batch in order, see `encode_audio`.
            input_features_mask: `(chunks, frames)`.
            input_values: `(chunks, frames, mel bins)` filter-bank, likewise.
            input_values_mask: `(chunks, frames)`.
            speech_hidden_states: Encoder frames in place of the features, see `EncodedAudio`.
            speech_hidden_states_mask: Likewise.
            audio_hidden_states: Likewise.
            audio_hidden_states_mask: Likewise.
            attention_mask: `(batch, sequence)`, 1 on real positions.
            position_ids: `(batch, sequence)`; counted from the first real position by default.
            past_key_values: The LLM's cache.
            inputs_embeds: `(batch, sequence, text width)` in place of `input_ids`, for text alone.
            labels: `(batch, sequence)` ids to predict, -100 to ignore; placeholders are ignored too.
            use_cache: Whether to return the cache.
            logits_to_keep: Number of last positions that pass the head; 0 for all. With `labels`, the loss too is
                taken there, exact when no label stands before them.
            query_mask: `(batch, length)` positions that the query may average; by default those before the first
                label, or all.
            task_ids: `(batch,)`, for pools of strategy `"task"`.
            adapter_names: Adapter of each row; the active one by default, `"__base__"` for none.
            text_only: Whether `input_ids` hold no placeholders, as in decoding: nothing is searched, so that no value
                is read from the device.
            num_audio: Audio placeholders of all rows together. With it and `num_prompts`, as `ListenCollator` gives
                them, no value is read from the device; a mismatch raises a `RuntimeError`, on a GPU later on.
            num_prompts: Prompt placeholders of each row, where all have as many.
            num_items_in_batch: Labels of the whole accumulated batch, given by the Trainer. In eval mode it also makes
                logits as long as the labels, zero where `logits_to_keep` leaves them out, for `compute_metrics`.
            **kwargs: Further arguments of the LLM's forward, such as `output_hidden_states`.

        Raises:
            ValueError: placeholders and audio do not match, they exceed the LLM's context, or arguments exclude each
                other.
            TypeError: an unknown argument.
        """
        llm_kwargs = self._llm_kwargs(use_cache, kwargs)
        check_input(self.config, input_ids, attention_mask, labels, query_mask, past_key_values is not None)
        features = (input_features, input_features_mask, input_values, input_values_mask)
        frames = (speech_hidden_states, speech_hidden_states_mask, audio_hidden_states, audio_hidden_states_mask)
        encoded = self._encoded(*features, *frames)
        if labels is None and num_items_in_batch is not None:
            raise ValueError(_LABELS_TAKEN)
        if labels is not None and input_ids is not None:
            placeholders = torch.stack(self.placeholder_masks(input_ids)).any(0)  # (batch, sequence)
            labels = labels.masked_fill(placeholders, -100)
        if labels is not None and query_mask is None:
            query_mask = (labels != -100).cumsum(-1) == 0  # (batch, sequence): the query sees no answer
        choices = {"query_mask": query_mask, "task_ids": task_ids, "adapter_names": adapter_names}
        given = (input_ids, inputs_embeds, attention_mask, position_ids, encoded, text_only)
        inputs, prompts = self._llm_inputs(*given, **choices, num_audio=num_audio, num_prompts=num_prompts)
        selected, llm = prompts or PromptOutput(), self.language_model
        if selected.layers or hasattr(past_key_values, "layer_prompts"):
            llm = partial(run_with_layer_prompts, llm, selected.layers or kept_prompts(past_key_values))
        kept, read = logits_to_keep, inputs_embeds if input_ids is None else input_ids
        # an integer stays where layers that share keys read it, or where the device of the last layer is not known
        numbered = getattr(self.config.text_config.get_text_config(), "num_kv_shared_layers", 0)
        numbered = numbered or len({*getattr(self, "hf_device_map", {}).values()}) > 1
        if isinstance(kept, int) and kept > 1 and not numbered:
            # indices copy the states: a slice meets a frozen head row by row, in bf16 on a CPU with a copy for each
            kept = torch.arange(max(read.shape[1] - kept, 0), read.shape[1], device=read.device)  # (kept,)
        outputs = llm(**inputs, past_key_values=past_key_values, logits_to_keep=kept, **llm_kwargs)
        losses, logits = {}, outputs.logits
        if labels is not None:
            losses = self._losses(logits, labels, logits_to_keep, num_items_in_batch, prompts)
            if not self.training and num_items_in_batch is not None:  # a Trainer evaluates, and compares their shapes
                logits = F.pad(logits, (0, 0, labels.shape[1] - logits.shape[1], 0))  # (batch, sequence, vocabulary)
        return ListenOutput(
            **losses,
            logits=logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),
            router_logits=outputs.get("router_logits"),
            prompt_indices=selected.indices,
            prompt_scores=selected.scores,
            query=selected.query,
        )

    def _losses(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        logits_to_keep: int | torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        prompts: PromptOutput | None,
    ) -> dict[str, torch.Tensor]:
        """The losses of `ListenOutput`. A sample's key loss counts as often as it has labels, so that the sum over any
        split of a batch into micro-batches and processes is the same."""
        kept = labels[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else labels[:, logits_to_keep]
        vocabulary = self.config.text_config.get_text_config().vocab_size
        lm_loss = self.loss_function(logits, kept, vocab_size=vocabulary, num_items_in_batch=num_items_in_batch)
        if prompts is None:
            return {"loss": lm_loss.clone(), "lm_loss": lm_loss}  # its own tensor: the Trainer scales the loss in place
        targets = (labels[:, 1:] != -100).sum(-1)  # (batch,)
        share = targets / (targets.sum() if num_items_in_batch is None else num_items_in_batch)  # (batch,)
        loss = lm_loss + (prompts.key_loss * prompts.key_loss_weight * share).sum()
        return {"loss": loss, "lm_loss": lm_loss, "key_loss": (prompts.key_loss * share).sum()}


ListenForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["ListenForConditionalGeneration", "ListenModel", "ListenOutput", "ListenPreTrainedModel"]
