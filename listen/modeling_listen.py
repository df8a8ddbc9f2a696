"""LiSTEN (arXiv 2505.18517): frozen encoders and a learned adapter that give a frozen causal LLM ears."""

import warnings
from collections.abc import Collection, Iterator
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput, TransformersKwargs

from .adapter_listen import AdapterMixin
from .checkpoint_listen import additive_attention
from .configuration_listen import BACKBONES, ListenConfig
from .context_listen import check_context, context_limit
from .feature_extraction_listen import ListenFeatureExtractor
from .generation_listen import PlaceholderBlindProcessors, PlaceholderFreeCandidates, ordinary_ids
from .geometry_listen import num_resampled
from .language_models_listen import (
    check_cache,
    check_language_model,
    check_padded,
    embedded_inputs,
    is_outdated,
    train_frozen,
)
from .modeling_beats import BeatsModel
from .modeling_connector import WindowQFormer
from .modeling_conv_rotary import ConvRotary
from .modeling_prompt_pool import ListenPromptPool, PromptSelection
from .modeling_speech_encoder import build_speech_encoder
from .outputs_listen import AudioEmbeddings, EncodedAudio, ListenModelOutput, ListenOutput, PromptOutput
from .pipeline_listen import ListenPipeline  # noqa: F401 (checkpoints carry the files that are imported here)

BASE_ADAPTER = "__base__"
_CONNECTORS = {"window_qformer": WindowQFormer, "conv_rotary": ConvRotary}
_ENCODED = tuple(EncodedAudio.__annotations__)
_AUDIO_INPUTS = (*ListenFeatureExtractor.model_input_names, *_ENCODED)
_CHOICES = ("query_mask", "task_ids", "adapter_names")
_PREFILL_ONLY = (*_ENCODED, *_CHOICES)
_NOT_FORWARDED = ("tokenizer", "assistant_tokenizer")  # of stop strings and assistants; `generate` hands them on
# what `_merge` turns into embeddings, beside `input_ids` and `labels`
_MERGED = (*_AUDIO_INPUTS, *_CHOICES, "attention_mask", "position_ids", "inputs_embeds")
_FORWARDED = frozenset(TransformersKwargs.__annotations__) | {"return_dict"}


class ListenAdapter(nn.Module):
    """All that learns: the connector and the prompt pool."""

    def __init__(self, config: PreTrainedConfig, connector: PreTrainedConfig, pool: PreTrainedConfig | None) -> None:
        super().__init__()
        audio_width = config.audio_config.hidden_size if config.audio_config is not None else 0
        self.connector = _CONNECTORS[connector.type](
            connector, config.speech_width, audio_width, config.text_width, config.frame_seconds
        )
        self.prompt_pool = ListenPromptPool(pool, config.text_width) if pool is not None else None


class ListenPreTrainedModel(AdapterMixin, PreTrainedModel):
    """What all LiSTEN models share: capabilities, initialisation, and frozen parts that stay frozen."""

    config: ListenConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["adapters"]

    @property
    def dtype(self) -> torch.dtype:
        """That of the LLM: what learns is in fp32, whatever the backbones are in."""
        language_model = getattr(self, "language_model", None)
        return language_model.dtype if language_model is not None else super().dtype

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: of custom code, transformers skips modules without weights, where Falcon-H1 fills its layers' buffers."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, WindowQFormer):
            init.normal_(module.query_tokens, mean=0.0, std=0.02)
        elif isinstance(module, ListenPromptPool):
            init.normal_(module.values, mean=0.0, std=0.02)
            if module.keys is not None:
                init.normal_(module.keys, mean=0.0, std=0.01)
            if module.config.center_query:
                init.zeros_(module.query_mean)

    def train(self, mode: bool = True) -> "ListenPreTrainedModel":
        """Put what learns into training mode; frozen backbones stay in eval mode, without dropout."""
        super().train(mode)
        for _, backbone in self.frozen_backbones():
            backbone.eval()
        if getattr(self, "language_model", None) is not None:
            train_frozen(self.language_model, mode)
        return self

    def frozen_backbones(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the backbones that do not learn."""
        for name in BACKBONES:
            backbone = getattr(self, name, None)
            if backbone is not None and name not in self.config.trainable:
                yield name, backbone

    def freeze(self) -> None:
        """Let exactly `config.trainable`, and LoRA weights on the LLM, require gradients."""
        constant = self._constant_parameters()
        for name, parameter in self.named_parameters():
            root, *rest = name.split(".")
            group = rest[1] if root == "adapters" else root  # adapters.<name>.<connector or prompt_pool>
            learns = group in self.config.trainable or (root == "adapters" and "adapter" in self.config.trainable)
            learns = learns and parameter.is_floating_point() and name not in constant
            parameter.requires_grad_("lora_" in name or learns)

    def _constant_parameters(self) -> set[str]:
        """Parameters of learned encoders that nothing trains: sinusoids, and the mask of a SpecAugment that is off.

        Whisper's family keeps its sinusoidal positions as a parameter that it excludes itself; loading forgets that.
        """
        constant = set()
        for name, _ in self.named_parameters():
            backbone, *path = name.split(".")
            if backbone in self.config.learned_backbones:
                masks = getattr(getattr(self, backbone).config, "apply_spec_augment", True)
                if "embed_positions" in path or ("masked_spec_embed" in path and not masks):
                    constant.add(name)
        return constant


class ListenModel(ListenPreTrainedModel):
    """Speech encoder, audio encoder, adapters and LLM; the forward pass ends before the LLM's head.

    Args:
        config: A `ListenConfig`.
        init_backbones: Backbones to build; the others are attached later by `load_backbones`.
    """

    def __init__(self, config: ListenConfig, init_backbones: Collection[str] = tuple(BACKBONES)) -> None:
        super().__init__(config)
        check_language_model(config.text_config)
        # an instance's own: which encoders learn is a matter of the config
        self._keep_in_fp32_modules_strict = [*type(self)._keep_in_fp32_modules_strict, *config.learned_backbones]
        if config.lora_config:  # read once the LLM is there, by `_load_lora`, which holds it against the config
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
        self.adapters = nn.ModuleDict()
        for name, (connector, pool) in self.adapter_configs().items():
            self.adapters[name] = ListenAdapter(config, connector, pool)
        self.active_adapter: str | None = "default"
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

    # ------------------------------------------------------------------ hearing

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
        _check_streams(self.config.audio_config is not None, input_values is not None, "input_values")
        if input_features_mask is None:
            input_features_mask = self.speech_encoder.full_mask(input_features)
        speech = self._encode("speech_encoder", input_features, None if self.config.pad_to_30s else input_features_mask)
        encoded = EncodedAudio(
            speech_hidden_states=speech, speech_hidden_states_mask=self.speech_encoder.output_mask(input_features_mask)
        )
        if input_values is not None:
            if input_values_mask is None:
                input_values_mask = torch.ones_like(input_values[..., 0], dtype=torch.long)
            encoded.audio_hidden_states, encoded.audio_hidden_states_mask = resample_frames(
                self._encode("audio_encoder", input_values, input_values_mask),
                self.audio_encoder.output_mask(input_values_mask),
                self.config.audio_step,
            )
        return encoded

    def _encode(self, name: str, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        encoder, inputs = getattr(self, name), inputs.to(getattr(self, name).dtype)
        if name in self.config.trainable and torch.is_grad_enabled():  # autograd keeps all activations anyway
            return encoder(inputs, mask).last_hidden_state
        size = self.config.chunks_at_once
        masks = [None] * len(inputs) if mask is None else mask.split(size)
        with torch.no_grad():
            pieces = [encoder(*piece).last_hidden_state for piece in zip(inputs.split(size), masks, strict=False)]
        return torch.cat(pieces)  # (chunks, frames, width)

    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        encoded: EncodedAudio | None = None,
        adapter_name: str | None = None,
    ) -> AudioEmbeddings:
        """Audio embeddings in the LLM's space, from features or from `encoded` frames.

        Args:
            input_features: See `encode_audio`.
            input_features_mask: See `encode_audio`.
            input_values: See `encode_audio`.
            input_values_mask: See `encode_audio`.
            encoded: Frames of an earlier `encode_audio`, in place of the features.
            adapter_name: Adapter whose connector listens; the active one by default.

        Returns:
            `pooler_output` `(total, text width)`, the chunks one after the other, and `lengths` `(chunks,)`.

        Raises:
            ValueError: no adapter is active, or a stream is missing.
        """
        if encoded is None:
            encoded = self.encode_audio(input_features, input_features_mask, input_values, input_values_mask)
        embeddings, lengths = self._adapter(adapter_name or self.active_adapter).connector(
            encoded.speech_hidden_states,
            encoded.speech_hidden_states_mask,
            encoded.audio_hidden_states,
            encoded.audio_hidden_states_mask,
        )
        return AudioEmbeddings(pooler_output=embeddings, lengths=lengths)

    def _adapter(self, name: str | None) -> ListenAdapter:
        if name is None or name == BASE_ADAPTER:
            raise ValueError(
                "the input holds audio or prompts but no adapter is active for it; enable one with set_adapter(name), "
                "or give text alone with num_prompts=0"
            )
        if name not in self.adapters:
            raise ValueError(f"adapter {name!r} is unknown; loaded adapters: {', '.join(self.adapters)}")
        return self.adapters[name]

    # ------------------------------------------------------------------ filling the placeholders

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoded: EncodedAudio | None = None,
        query_mask: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        adapter_names: list[str] | None = None,
    ) -> tuple[torch.Tensor, PromptOutput | None]:
        """The LLM's input embeddings with audio and prompts in their places.

        Args:
            input_ids: `(batch, sequence)` with placeholder ids.
            attention_mask: `(batch, sequence)`, 1 on real positions.
            encoded: Encoder frames of all chunks of the batch, in order.
            query_mask: `(batch, length)` positions, from the first on, that the query averages; all by default.
            task_ids: `(batch,)`, for pools of strategy `"task"`.
            adapter_names: Adapter of each row; the active one by default, `"__base__"` for none.

        Returns:
            `(batch, sequence, text width)` and the prompts that were picked, `None` where no row asks for any.

        Raises:
            ValueError: placeholders and audio do not match.
        """
        is_audio = input_ids == self._placeholder("audio_token_id")
        is_prompt = input_ids == self._placeholder("prompt_token_id")
        # placeholder ids may lie above the vocabulary
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_audio | is_prompt, 0))  # (batch, seq, width)
        names = adapter_names or [self.active_adapter] * len(input_ids)
        if len(names) != len(input_ids):
            raise ValueError(f"adapter_names names {len(names)} rows but the batch has {len(input_ids)}")
        embeds = self._place_audio(embeds, is_audio, encoded, names)
        if not is_prompt.any():
            return embeds, None
        query = self._query(embeds, is_prompt, attention_mask, query_mask)  # (batch, width)
        return self._place_prompts(embeds, is_prompt, query, task_ids, names)

    def select_prompts(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_mask: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        adapter_names: list[str] | None = None,
        **audio: torch.Tensor | None,
    ) -> PromptOutput:
        """The prompts that the pool picks for model inputs, without running the LLM.

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
        _, prompts = self.embed(input_ids, attention_mask, self._encoded(**audio), query_mask, task_ids, adapter_names)
        if prompts is None:
            raise ValueError("the input asks for no prompts; process it with num_prompts of at least 1")
        return prompts

    def _without_waste(self, use_cache: bool | None, **kwargs: Any) -> dict[str, Any]:
        """Keywords of the LLM's forward that switch off what it would do to no use, unless they ask for it.

        The routers of its experts are frozen, so no loss balances them; training reads no cache, and some LLMs fail
        with one: they write it in place, or again when gradient checkpointing recomputes a layer.
        """
        if use_cache is None and self.training:
            use_cache = False
        silent = getattr(self.config.get_text_config(), "output_router_logits", False)
        return {**({"output_router_logits": False} if silent else {}), "use_cache": use_cache, **kwargs}

    @property
    def _placeholder_ids(self) -> list[int]:
        ids = self.config.audio_token_id, self.config.prompt_token_id
        return [token_id for token_id in ids if token_id is not None]

    def _is_placeholder(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(batch, sequence)`, true where audio or a prompt stands."""
        placeholders = torch.tensor(self._placeholder_ids, dtype=torch.long, device=input_ids.device)
        return torch.isin(input_ids, placeholders)

    def _placeholder(self, name: str) -> int:
        token_id = getattr(self.config, name)
        if token_id is None:
            raise ValueError(f"config.{name} is None; build the processor first, it chooses the id, or set it")
        return token_id

    def _encoded(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        **hidden_states: torch.Tensor | None,
    ) -> EncodedAudio | None:
        encoded = EncodedAudio(**hidden_states)
        if encoded.speech_hidden_states is None:
            if input_features is None:
                return None
            return self.encode_audio(input_features, input_features_mask, input_values, input_values_mask)
        if input_features is not None:
            raise ValueError("give input_features or speech_hidden_states, not both")
        has_audio = encoded.audio_hidden_states is not None
        _check_streams(self.config.audio_config is not None, has_audio, "audio_hidden_states")
        for stream in ("speech_hidden_states", "audio_hidden_states"):
            states, mask = getattr(encoded, stream), getattr(encoded, f"{stream}_mask")
            if states is not None and mask is None:
                setattr(encoded, f"{stream}_mask", torch.ones_like(states[..., 0], dtype=torch.long))
        return encoded

    def _place_audio(
        self, embeds: torch.Tensor, is_audio: torch.Tensor, encoded: EncodedAudio | None, names: list[str | None]
    ) -> torch.Tensor:
        if encoded is None:
            if is_audio.any():
                raise ValueError(
                    f"the text holds {int(is_audio.sum())} audio placeholders but no audio was given; "
                    "pass input_features, or take them out"
                )
            return embeds
        audio = self._hear(encoded, is_audio, names).to(embeds.dtype)  # (total, width)
        return embeds.masked_scatter(is_audio[..., None], audio)

    def _hear(self, encoded: EncodedAudio, is_audio: torch.Tensor, names: list[str | None]) -> torch.Tensor:
        if len(set(names)) == 1:
            heard = self.get_audio_features(encoded=encoded, adapter_name=names[0])
            chunk_rows(heard.lengths, is_audio)  # raises where clips and texts do not match
            return heard.pooler_output
        lengths = self._adapter_lengths(encoded, names)
        rows = chunk_rows(lengths, is_audio).tolist()
        heard_chunks: list[torch.Tensor] = [encoded.speech_hidden_states.new_empty(0)] * len(rows)
        for name in dict.fromkeys(names[row] for row in rows):
            chunks = [i for i, row in enumerate(rows) if names[row] == name]
            heard = self.get_audio_features(encoded=_take(encoded, chunks), adapter_name=name)
            for chunk, part in zip(chunks, heard.pooler_output.split(heard.lengths.tolist()), strict=True):
                heard_chunks[chunk] = part
        return torch.cat(heard_chunks)

    def _adapter_lengths(self, encoded: EncodedAudio, names: list[str | None]) -> torch.Tensor:
        """Embeddings of each chunk, which adapters of one batch must agree upon."""
        frames = encoded.speech_hidden_states_mask.sum(-1)
        if encoded.audio_hidden_states_mask is not None:
            frames = torch.maximum(frames, encoded.audio_hidden_states_mask.sum(-1))
        streams = (encoded.speech_hidden_states, encoded.audio_hidden_states)
        padded = torch.full_like(frames, max(states.shape[1] for states in streams if states is not None))
        connectors = {n: self._adapter(n).connector for n in dict.fromkeys(names) if n not in (None, BASE_ADAPTER)}
        counts = {name: c.lengths(padded if c.config.salmonn_compat else frames) for name, c in connectors.items()}
        if not counts:
            self._adapter(None)
        first, *others = counts.values()
        if any(not torch.equal(first, other) for other in others):
            raise ValueError(
                f"adapters {', '.join(counts)} cut audio into windows of different length; run them in separate batches"
            )
        return first

    def _query(
        self,
        embeds: torch.Tensor,
        is_prompt: torch.Tensor,
        attention_mask: torch.Tensor | None,
        query_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        mask = ~is_prompt  # (batch, seq)
        if attention_mask is not None:
            mask = mask & attention_mask.bool()
        if query_mask is not None and query_mask.shape[1] > mask.shape[1]:
            raise ValueError(
                f"the whole input of {query_mask.shape[1]} positions picks the prompts, but this pass reads "
                f"{mask.shape[1]} of them; generate without prefill_chunk_size"
            )
        if query_mask is not None:  # generation appends positions that the query must not see
            mask = mask & F.pad(query_mask.bool(), (0, mask.shape[1] - query_mask.shape[1]))
        weights = mask[..., None].float()  # (batch, seq, 1)
        return (embeds.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)

    def _place_prompts(
        self,
        embeds: torch.Tensor,
        is_prompt: torch.Tensor,
        query: torch.Tensor,
        task_ids: torch.Tensor | None,
        names: list[str | None],
    ) -> tuple[torch.Tensor, PromptOutput]:
        counts = is_prompt.sum(-1)  # (batch,)
        k = int(counts.max())
        picked = PromptOutput(
            indices=torch.full((len(query), k), -1, dtype=torch.long, device=query.device),
            scores=query.new_zeros(len(query), k),
            key_loss=query.new_zeros(len(query)),
            key_loss_weight=query.new_zeros(len(query)),
            query=query,
        )
        for name in dict.fromkeys(names):
            rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=query.device)
            if not counts[rows].any():
                continue
            pool = self._adapter(name).prompt_pool
            if pool is None:
                raise ValueError(f"adapter {name!r} has no prompt pool; process the input with num_prompts=0")
            tasks = task_ids[rows] if task_ids is not None else None
            prompts, selection = pool(query[rows], counts[rows], tasks)
            holes = torch.zeros_like(is_prompt).index_copy(0, rows, is_prompt[rows])  # (batch, seq)
            embeds = embeds.masked_scatter(holes[..., None], prompts.to(embeds.dtype))
            _record(picked, rows, counts[rows], selection)
            picked.key_loss_weight[rows] = pool.config.key_loss_weight
        return embeds, picked

    def _merge(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        query_mask: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        adapter_names: list[str] | None = None,
        **audio: torch.Tensor | None,
    ) -> tuple[dict[str, torch.Tensor | None], PromptOutput | None]:
        """What the LLM reads in a forward pass, and the prompts that were picked."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        # generation with static caches gives masks of four axes, or one for each kind of attention
        is_flat = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        flat_mask = attention_mask if is_flat else None
        if input_ids is not None:
            self._check_context(input_ids, flat_mask)
        check_padded(self.config.text_config, flat_mask)
        encoded = self._encoded(**audio)
        if inputs_embeds is not None:
            if encoded is not None:
                raise ValueError("audio needs input_ids: inputs_embeds do not tell where its placeholders stand")
            return {"inputs_embeds": inputs_embeds, "position_ids": position_ids}, None
        is_placeholder = self._is_placeholder(input_ids)  # (batch, seq)
        if encoded is None and not is_placeholder.any():  # nothing to place: the LLM reads ids, as it does alone
            return {"input_ids": input_ids, "position_ids": position_ids}, None
        if labels is not None and query_mask is None:
            query_mask = (labels != -100).cumsum(-1) == 0  # the query sees no answer
        covers_input = flat_mask is not None and flat_mask.shape == input_ids.shape  # and not the cache too
        own_mask = flat_mask if covers_input else None
        embeds, prompts = self.embed(input_ids, own_mask, encoded, query_mask, task_ids, adapter_names)
        if position_ids is None and own_mask is not None:
            position_ids = (own_mask.long().cumsum(-1) - 1).clamp_min(0)  # a padded row counts as it does alone
        inputs = embedded_inputs(self.language_model, input_ids, is_placeholder, embeds)
        return {**inputs, "position_ids": position_ids}, prompts

    def _check_context(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Audio and prompts fit into the LLM's context; text alone is left to the LLM."""
        limit = context_limit(self.config.text_config)
        counted = attention_mask is not None  # over the cache too
        width = max(input_ids.shape[1], attention_mask.shape[1] if counted else 0)
        if limit is None or width <= limit:
            return
        numbers = [(input_ids == self._placeholder(name)).sum(-1) for name in ("prompt_token_id", "audio_token_id")]
        lengths = attention_mask.sum(-1) if counted else torch.full_like(numbers[0], width)  # (batch,)
        row = int(lengths.argmax())
        check_context(limit, int(lengths[row]), *(int(number[row]) for number in numbers))

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **inputs: Any,
    ) -> ListenModelOutput:
        """Hidden states of the LLM for text, audio and prompts; the arguments are those of
        `ListenForConditionalGeneration.forward`."""
        kwargs = {name: value for name, value in inputs.items() if name not in _MERGED}
        _check_kwargs(kwargs)
        merged = {name: value for name, value in inputs.items() if name in _MERGED}
        read, prompts = self._merge(input_ids, **merged)
        outputs = self.language_model.base_model(
            **read,
            attention_mask=merged.get("attention_mask"),
            past_key_values=past_key_values,
            **self._without_waste(use_cache, **kwargs),
        )
        picked = prompts or PromptOutput()
        return ListenModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),
            prompt_indices=picked.indices,
            prompt_scores=picked.scores,
            query=picked.query,
        )


class ListenForConditionalGeneration(ListenModel, GenerationMixin):
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
            labels: `(batch, sequence)` ids to predict, -100 to ignore.
            use_cache: Whether to return the cache.
            logits_to_keep: Number of last positions that pass the head; 0 for all. With `labels`, the loss too is
                taken there, exact when no label stands before them.
            query_mask: `(batch, length)` positions that the query may average; by default those before the first
                label, or all.
            task_ids: `(batch,)`, for pools of strategy `"task"`.
            adapter_names: Adapter of each row; the active one by default, `"__base__"` for none.
            num_items_in_batch: Labels of the whole accumulated batch, given by the Trainer.
            **kwargs: What the LLM's forward takes besides, such as `output_hidden_states`.

        Raises:
            ValueError: placeholders and audio do not match, they exceed the LLM's context, or arguments exclude each
                other.
            TypeError: an unknown argument.
        """
        _check_kwargs(kwargs)
        read, prompts = self._merge(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            query_mask=query_mask,
            task_ids=task_ids,
            adapter_names=adapter_names,
            input_features=input_features,
            input_features_mask=input_features_mask,
            input_values=input_values,
            input_values_mask=input_values_mask,
            speech_hidden_states=speech_hidden_states,
            speech_hidden_states_mask=speech_hidden_states_mask,
            audio_hidden_states=audio_hidden_states,
            audio_hidden_states_mask=audio_hidden_states_mask,
        )
        outputs = self.language_model(
            **read,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            past_key_values=past_key_values,
            **self._without_waste(use_cache, **kwargs),
        )
        return self._output(outputs, prompts, labels, logits_to_keep, num_items_in_batch)

    def _output(
        self,
        outputs: ModelOutput,
        prompts: PromptOutput | None,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> ListenOutput:
        picked = prompts or PromptOutput()
        result = ListenOutput(
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),
            router_logits=outputs.get("router_logits"),
            prompt_indices=picked.indices,
            prompt_scores=picked.scores,
            query=picked.query,
        )
        if labels is not None:
            self._add_losses(result, prompts, labels, logits_to_keep, num_items_in_batch)
        return result

    def _add_losses(
        self,
        result: ListenOutput,
        prompts: PromptOutput | None,
        labels: torch.Tensor,
        logits_to_keep: int | torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> None:
        """Fill in the losses. A sample's key loss counts as often as it has labels, so that the sum over any split of
        a batch into micro-batches and processes is the same."""
        targets = (labels[:, 1:] != -100).sum(-1)  # (batch,)
        kept = labels[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else labels[:, logits_to_keep]
        vocabulary = self.config.get_text_config().vocab_size
        result.lm_loss = self.loss_function(
            result.logits, kept, vocab_size=vocabulary, num_items_in_batch=num_items_in_batch
        )
        result.loss = result.lm_loss.clone()  # its own tensor: the Trainer scales the loss in place
        if prompts is not None:
            share = targets / (targets.sum() if num_items_in_batch is None else num_items_in_batch)  # (batch,)
            result.key_loss = (prompts.key_loss * share).sum()
            result.loss = result.loss + (prompts.key_loss * prompts.key_loss_weight * share).sum()

    # ------------------------------------------------------------------ generation

    @property
    def _is_stateful(self) -> bool:
        """Whether the LLM cannot take back a token, as assisted decoding does."""
        return self.language_model._is_stateful

    def _supports_default_dynamic_cache(self) -> bool:
        """Whether the LLM takes the cache that transformers makes; MiniMax makes its own."""
        return self.language_model._supports_default_dynamic_cache()

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        """As upstream, but an LLM without an attention cache is refused rather than fed its last token alone."""
        if generation_config.use_cache is not False:
            check_cache(self.language_model)
        super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """Masks for static caches, as the LLM makes them: Bloom counts positions by flat ones."""
        create = getattr(self.language_model, "create_masks_for_generate", create_masks_for_generate)
        return create(**{**kwargs, "config": self.language_model.config})

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As upstream; encoder frames and what picks the prompts reach the first forward pass alone.

        An empty cache too means the first pass: an assistant's passes are never called so, yet it must hear.
        """
        cache = kwargs.get("past_key_values")
        if is_outdated(cache, input_ids.shape[1], self.language_model.config):
            cache = kwargs["past_key_values"] = kwargs["next_sequence_length"] = None
            is_first_iteration = True
        whole = kwargs.get("next_sequence_length") in (None, input_ids.shape[1])
        first = is_first_iteration or (whole and cache is not None and cache.get_seq_length() == 0)
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=first, **kwargs)
        inputs = {name: value for name, value in inputs.items() if name not in _NOT_FORWARDED}
        if not first and kwargs.get("use_cache", True):
            for name in _PREFILL_ONLY:
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """As upstream, but clips follow their samples: A, B becomes A, A, B, B by sample, not by clip.

        The encoders run once, before the expansion. The query is fixed here: candidates of assisted decoding,
        generated tokens and padding are not part of it.
        """
        if input_ids is not None and model_kwargs.get("query_mask") is None:
            mask = model_kwargs.get("attention_mask")
            model_kwargs["query_mask"] = mask.clone() if mask is not None else torch.ones_like(input_ids)
        if expand_size == 1:
            return input_ids, model_kwargs
        if input_ids is not None:
            self._check_context(input_ids, model_kwargs.get("attention_mask"))
        audio = {name: model_kwargs.pop(name) for name in _AUDIO_INPUTS if name in model_kwargs}
        names = model_kwargs.pop("adapter_names", None)
        encoded = self._encoded(**audio)
        if encoded is not None:
            lengths = self._adapter_lengths(encoded, names or [self.active_adapter])
            rows = chunk_rows(lengths, input_ids == self.config.audio_token_id).tolist()
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if names is not None:
            model_kwargs["adapter_names"] = [name for name in names for _ in range(expand_size)]
        if encoded is not None:
            by_row = [[i for i, owner in enumerate(rows) if owner == row] for row in range(max(rows) + 1)]
            model_kwargs.update(_take(encoded, [i for chunks in by_row for _ in range(expand_size) for i in chunks]))
        return input_ids, model_kwargs

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        """As upstream, and a warning where the answer may run out of the LLM's context."""
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        limit = context_limit(self.config.text_config)
        if limit is not None and generation_config.max_length > limit:
            warnings.warn(
                f"{input_ids_length} positions and {generation_config.max_length - input_ids_length} new tokens exceed "
                f"the LLM's context of {limit}: answers degrade, or fail, after {max(limit - input_ids_length, 0)} new "
                "tokens; lower max_new_tokens, or shorten the input",
                UserWarning,
                stacklevel=2,
            )

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        encoder_input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, but processors never see placeholders, and answers never hold them."""
        placeholders = self._placeholder_ids
        mask = (kwargs.get("model_kwargs") or {}).get("attention_mask")
        padding = mask == 0 if mask is not None and mask.dim() == 2 else None  # (rows, prompt length)
        if encoder_input_ids is not None and encoder_input_ids.dim() == 2:  # ids, no embeddings
            rows = padding[:: len(padding) // len(encoder_input_ids)] if padding is not None else None
            encoder_input_ids = ordinary_ids(encoder_input_ids, placeholders, rows)
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, encoder_input_ids, **kwargs)
        above = all(token_id >= self.config.get_text_config().vocab_size for token_id in placeholders)
        if not processors and above:
            return processors
        return PlaceholderBlindProcessors(processors, placeholders, padding)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream, but prompt look-up does not copy placeholders."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        if not isinstance(generator, PromptLookupCandidateGenerator):
            return generator
        generator.logits_processor = None
        return PlaceholderFreeCandidates(generator, self._placeholder_ids)


def chunk_rows(lengths: torch.Tensor, is_audio: torch.Tensor) -> torch.Tensor:
    """Row of the batch that each chunk of audio belongs to, `(chunks,)`.

    Args:
        lengths: `(chunks,)` embeddings of each chunk, in order.
        is_audio: `(batch, sequence)` audio placeholders.

    Raises:
        ValueError: the placeholders of a row are not filled by whole chunks.
    """
    chunk_ends, row_ends = lengths.cumsum(0), is_audio.sum(-1).cumsum(0)
    ends = [0, *chunk_ends.tolist()]
    if not set(row_ends.tolist()) <= set(ends) or ends[-1] != int(row_ends[-1]):
        raise ValueError(
            f"the rows hold {is_audio.sum(-1).tolist()} audio placeholders but the chunks of audio give "
            f"{lengths.tolist()} embeddings, in order; process text and audio together with ListenProcessor"
        )
    return torch.searchsorted(row_ends, chunk_ends)


def resample_frames(states: torch.Tensor, mask: torch.Tensor, step: Fraction) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames of one encoder at the rate of another: each new one is the mean over its time of those that it covers.

    Args:
        states: `(chunks, frames, width)`.
        mask: `(chunks, frames)`, real frames first.
        step: Old frames that go by during a new one.

    Returns:
        `(chunks, new frames, width)` and its mask; what was given where `step` is 1.
    """
    if step == 1:
        return states, mask
    counts = mask.sum(-1)  # (chunks,)
    length = num_resampled(states.shape[1], step)
    edges = torch.arange(length + 1, device=states.device, dtype=torch.float64) * float(step)  # (new frames + 1,)
    edges = torch.minimum(edges[None], counts[:, None].double())  # (chunks, new frames + 1)
    whole = edges.floor().long().clamp_max(states.shape[1] - 1)[..., None].expand(-1, -1, states.shape[2])
    real = states.double() * mask[..., None]  # (chunks, frames, width)
    area = F.pad(real.cumsum(1), (0, 0, 1, 0)).gather(1, whole) + (edges[..., None] - whole) * real.gather(1, whole)
    real_counts = [num_resampled(count, step) for count in counts.tolist()]
    new_mask = torch.arange(length, device=states.device) < torch.tensor(real_counts, device=states.device)[:, None]
    span = edges.diff(dim=1).masked_fill(~new_mask, 1.0)  # (chunks, new frames)
    return (area.diff(dim=1) / span[..., None]).to(states.dtype), new_mask


def _take(encoded: EncodedAudio, chunks: list[int]) -> EncodedAudio:
    return EncodedAudio(**{name: states[chunks] for name, states in encoded.items()})


def _record(picked: PromptOutput, rows: torch.Tensor, counts: torch.Tensor, selection: PromptSelection) -> None:
    k = selection.indices.shape[1]
    valid = torch.arange(k, device=counts.device) < counts[:, None]  # (rows, k)
    picked.indices[rows, :k] = selection.indices.masked_fill(~valid, -1)
    picked.scores[rows, :k] = selection.scores.detach().masked_fill(~valid, 0.0)
    picked.key_loss = picked.key_loss.index_add(0, rows, selection.key_loss)


def _check_streams(wanted: bool, given: bool, name: str) -> None:
    if wanted and not given:
        raise ValueError(f"the model has an audio encoder but {name} is missing; use the model's own processor")
    if given and not wanted:
        raise ValueError(f"{name} was given but the model has no audio encoder; use the model's own processor")


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    unknown = [name for name in kwargs if name not in _FORWARDED]
    if unknown:
        raise TypeError(f"forward() got unknown arguments {unknown}; nothing is dropped in silence, take them out")


ListenForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["ListenForConditionalGeneration", "ListenModel", "ListenOutput", "ListenPreTrainedModel"]
