"""Adapters over frozen backbones: attach, save, load, name, switch and disable them; a LoRA on the LLM."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .checkpoint_listen import HUB_KWARGS, check_backbone
from .configuration_adapter import ListenConnectorConfig, ListenPromptPoolConfig, check_padding
from .configuration_listen import BACKBONES
from .language_models_listen import check_later, mean_embedding, random_embeddings
from .layer_prompts_listen import LayerPrompts
from .lora_listen import ADAPTERS_OF_THREAD, LoraMixin
from .modeling_connector import ConvRotary, WindowQFormer
from .modeling_prompt_pool import ListenPromptPool
from .outputs_listen import EncodedAudio, PromptOutput
from .weights_listen import check_weights, weight_files

BASE_ADAPTER = "__base__"  # names no adapter: a row of text alone
_CONNECTORS = {"window_qformer": WindowQFormer, "conv_rotary": ConvRotary}


class ListenAdapter(nn.Module):
    """One adapter: a connector and a prompt pool.

    Args:
        config: The model's `ListenConfig`.
        connector: Config of the connector.
        pool: Config of the prompt pool; `None` for none.
    """

    def __init__(self, config: PreTrainedConfig, connector: PreTrainedConfig, pool: PreTrainedConfig | None) -> None:
        super().__init__()
        connector._attn_implementation_internal = config.connector_config._attn_implementation
        audio_width = config.audio_config.hidden_size if config.audio_config is not None else 0
        self.connector = _CONNECTORS[connector.type](
            connector, config.speech_width, audio_width, config.text_width, config.frame_seconds
        )
        layers = (0, 0)
        if pool is not None and pool.form == "layers":
            llm = config.text_config.get_text_config()
            layers = llm.num_hidden_layers, llm.hidden_size
        self.prompt_pool = ListenPromptPool(pool, config.text_width, layers) if pool is not None else None


class Adapters(nn.ModuleDict):
    """The adapters of a model by name. One of them usually serves a whole batch; each row may also name its own.

    `names` below holds the adapter of each row, with `None` or `"__base__"` for a row of text alone.
    """

    def named(self, name: str | None) -> ListenAdapter:
        """The adapter of that name.

        Raises:
            ValueError: there is none, or none is active.
        """
        if name is None or name == BASE_ADAPTER:
            raise ValueError(
                "the input holds audio or prompts but no adapter is active for it; enable one with set_adapter(name), "
                "or give text alone with num_prompts=0"
            )
        if name not in self:
            raise ValueError(f"adapter {name!r} is unknown; loaded adapters: {', '.join(self)}")
        return self[name]

    def connect(
        self, encoded: EncodedAudio, is_audio: torch.Tensor, names: list[str | None], num_audio: int | None = None
    ) -> torch.Tensor:
        """Audio embeddings for the placeholders of a batch.

        Args:
            encoded: Encoder frames of all chunks of the batch, in order.
            is_audio: `(batch, sequence)` audio placeholders.
            names: Adapter of each row.
            num_audio: Audio placeholders of all rows, where it is known: it is then not read from the device.

        Returns:
            `(total, text width)`, the chunks one after the other.

        Raises:
            ValueError: the placeholders of a row are not filled by whole chunks, a row with audio has no adapter, or
                `num_audio` is below the number of chunks.
            RuntimeError: the first of these, or another wrong `num_audio`, where that is given.
        """
        if num_audio is not None and num_audio < len(encoded.speech_hidden_states):
            raise ValueError(
                f"num_audio={num_audio} is below the {len(encoded.speech_hidden_states)} chunks of audio; give "
                "the number of audio placeholders, as ListenCollator does, or leave it out"
            )
        if len(set(names)) > 1:
            return self._connect_by_row(encoded, is_audio, names)
        adapter = self[names[0]] if names[0] in self else self.named(names[0])  # which raises
        embeddings, lengths = adapter.connector(*encoded.to_tuple(), total=num_audio)  # (total, width), (chunks,)
        if num_audio is None:
            chunk_rows(lengths, is_audio)  # raises where audio and text do not match
        else:
            chunk_ends, row_ends = F.pad(lengths.cumsum(0), (1, 0)), is_audio.sum(-1).cumsum(0)
            fits = torch.isin(row_ends, chunk_ends).all() & (row_ends[-1] == num_audio) & (chunk_ends[-1] == num_audio)
            check_later(fits, "the chunks of audio do not fill the audio placeholders of the rows", num_audio=num_audio)
        return embeddings

    def _connect_by_row(self, encoded: EncodedAudio, is_audio: torch.Tensor, names: list[str | None]) -> torch.Tensor:
        rows = chunk_rows(self.lengths(encoded, names), is_audio).tolist()
        pieces: list[torch.Tensor] = [encoded.speech_hidden_states.new_empty(0)] * len(rows)
        for name in dict.fromkeys(names[row] for row in rows):
            chunks = [i for i, row in enumerate(rows) if names[row] == name]
            embeddings, lengths = self.named(name).connector(*encoded.take(chunks).to_tuple())
            for chunk, piece in zip(chunks, embeddings.split(lengths.tolist()), strict=True):
                pieces[chunk] = piece  # (embeddings of the chunk, text width)
        return torch.cat(pieces)

    def lengths(self, encoded: EncodedAudio, names: list[str | None]) -> torch.Tensor:
        """How many embeddings each chunk gives, `(chunks,)`, without running a connector.

        Raises:
            ValueError: the adapters of one batch do not agree, or there is none.
        """
        frames = encoded.speech_hidden_states_mask.sum(-1)  # (chunks,)
        padded = torch.full_like(frames, encoded.speech_hidden_states.shape[1])
        if encoded.audio_hidden_states is not None:
            frames = torch.maximum(frames, encoded.audio_hidden_states_mask.sum(-1))
            padded = padded.clamp_min(encoded.audio_hidden_states.shape[1])
        used = [name for name in dict.fromkeys(names) if name not in (None, BASE_ADAPTER)] or [None]
        connectors = {name: self.named(name).connector for name in used}
        counts = {name: c.lengths(padded if c.config.salmonn_compat else frames) for name, c in connectors.items()}
        first, *others = counts.values()
        if any(not torch.equal(first, other) for other in others):
            raise ValueError(
                f"adapters {', '.join(counts)} cut audio into windows of different length; run them in separate batches"
            )
        return first

    def select(
        self,
        query: torch.Tensor,
        counts: torch.Tensor,
        task_ids: torch.Tensor | None,
        names: list[str | None],
        num_prompts: int | None = None,
    ) -> tuple[torch.Tensor, PromptOutput]:
        """Prompts for the placeholders of a batch.

        Args:
            query: `(batch, text width)`.
            counts: `(batch,)` prompts that each row asks for.
            task_ids: `(batch,)`, for pools of strategy `"task"`.
            names: Adapter of each row.
            num_prompts: The count of every row, where it is known, see `ListenPromptPool.forward`.

        Returns:
            `(counts.sum(), text width)`, the rows one after the other, and what was selected.

        Raises:
            ValueError: a row with prompts has no adapter, its adapter has no pool, or the pool is too small.
        """
        if len(set(names)) > 1:
            return self._pick_by_row(query, counts, task_ids, names)
        pool = (self[names[0]] if names[0] in self else self.named(names[0])).prompt_pool
        if pool is None:
            raise ValueError(f"adapter {names[0]!r} has no prompt pool; process the input with num_prompts=0")
        prompts, selection = pool(query, counts, task_ids, num_prompts)
        layers = None
        if pool.config.form == "layers":
            valid = selection.indices >= 0  # (batch, k)
            weights = valid.float() if selection.weights is None else selection.weights  # (batch, k)
            rows = torch.arange(len(query), device=query.device)
            layers = [LayerPrompts(pool, rows, selection.indices.clamp_min(0), weights)]
        return prompts, PromptOutput(
            indices=selection.indices,
            scores=selection.scores.detach(),
            key_loss=selection.key_loss,
            key_loss_weight=query.new_full((len(query),), pool.config.key_loss_weight),
            query=query,
            layers=layers,
        )

    def _pick_by_row(
        self, query: torch.Tensor, counts: torch.Tensor, task_ids: torch.Tensor | None, names: list[str | None]
    ) -> tuple[torch.Tensor, PromptOutput]:
        k = int(counts.max())
        selected = PromptOutput(
            indices=torch.full((len(query), k), -1, dtype=torch.long, device=query.device),
            scores=query.new_zeros(len(query), k),
            key_loss=query.new_zeros(len(query)),
            key_loss_weight=query.new_zeros(len(query)),
            query=query,
        )
        pieces = [query[:0]] * len(query)  # prompts of each row, (prompts of the row, text width)
        for name in dict.fromkeys(names):
            rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=query.device)
            if not counts[rows].any():
                continue
            tasks = task_ids[rows] if task_ids is not None else None
            prompts, own = self.select(query[rows], counts[rows], tasks, [name])
            width = own.indices.shape[1]
            selected.indices[rows, :width], selected.scores[rows, :width] = own.indices, own.scores
            selected.key_loss = selected.key_loss.index_add(0, rows, own.key_loss)
            selected.key_loss_weight[rows] = own.key_loss_weight
            if own.layers is not None:
                selected.layers = [*(selected.layers or []), *(replace(item, rows=rows) for item in own.layers)]
            for row, piece in zip(rows.tolist(), prompts.split(counts[rows].tolist()), strict=True):
                pieces[row] = piece
        return torch.cat(pieces), selected


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


class AdapterMixin(LoraMixin):
    """Several adapters over the same backbones, LoRA on the LLM, trainable parameters and their counts."""

    def _start_fresh(self) -> None:
        for adapter in self.adapters.values():
            self._start_values(adapter.prompt_pool)

    def _start_values(self, pool: ListenPromptPool | None) -> None:
        """Prompt values start from the LLM's input embeddings, see `ListenPromptPoolConfig.value_start`.

        Prompts in the LLM's layers start without effect and stay so.
        """
        if pool is None or self.language_model is None or pool.config.form == "layers":
            return
        if pool.config.value_start == "vocabulary":
            pool.initialize_values(random_embeddings(self.language_model, len(pool.values)))
        else:
            pool.initialize_values(mean_embedding(self.language_model)[None])

    # ------------------------------------------------------------------ several adapters

    def adapter_configs(self) -> dict[str, tuple[PreTrainedConfig, PreTrainedConfig | None]]:
        """Connector and pool config of each adapter that the config describes."""
        configs = {"default": (self.config.connector_config, self.config.prompt_pool_config)}
        for name, parts in (self.config.extra_adapters or {}).items():
            pool = parts.get("prompt_pool_config")
            connector = ListenConnectorConfig(**parts["connector_config"])
            configs[name] = (connector, ListenPromptPoolConfig(**pool) if pool is not None else None)
        return configs

    def add_adapter(self, adapter_config: Any = None, adapter_name: str = "default") -> None:
        """Add a fresh LiSTEN adapter, or a PEFT LoRA on the LLM.

        Args:
            adapter_config: A PEFT config goes to the LLM; a `ListenPromptPoolConfig` or `None` (the default's settings)
                makes a LiSTEN adapter.
            adapter_name: Its name.

        Raises:
            ValueError: the name is taken, an encoder is trainable, the pool has frozen prompts, or a PEFT config is no
                plain LoRA named `"default"`.
        """
        if hasattr(adapter_config, "peft_type"):
            self._attach_lora(adapter_config, adapter_name)
        else:
            _refuse_learned(f"adapter {adapter_name!r}", "this model", self.config)
            pool = adapter_config if adapter_config is not None else self.config.prompt_pool_config
            if pool is not None and pool.frozen_prompts:
                raise ValueError(f"a fresh adapter has no frozen prompts, found {pool.frozen_prompts}; give 0")
            self._add_listen_adapter(adapter_name, self.config.connector_config, pool)
            self.adapters[adapter_name].apply(self._init_weights)
            self._start_values(self.adapters[adapter_name].prompt_pool)
        self.freeze()

    def grow_pool(self, new_prompts: int) -> None:
        """Append fresh prompts to the pool of the default adapter and make them its only trainable part, to add a task.

        The old keys and values, the running mean of the query and the connector stay as they are. The grown adapter may
        still answer old tasks differently, as an old input may select a new prompt. Saved, and loaded by `load_adapter`
        beside the adapter that it was grown from, it leaves that one's answers exactly as they were.

        Args:
            new_prompts: Number of new pairs.

        Raises:
            ValueError: there is no pool, or one whose strategy has no keys, a LoRA or a trained encoder, or
                `new_prompts` is below 1.
        """
        old = self.adapters["default"].prompt_pool
        if old is None or new_prompts < 1:
            found = "the default adapter has no prompt pool" if old is None else f"new_prompts={new_prompts} is below 1"
            raise ValueError(f"{found}; a pool is grown by at least 1 prompt")
        if self.config.lora_config:
            raise ValueError(
                "a LoRA on the LLM would be trained for the old tasks too; grow the pool of a model without"
            )
        size = old.config.pool_size
        config = ListenPromptPoolConfig(
            **{**old.config.to_dict(), "pool_size": size + new_prompts, "frozen_prompts": size}
        )
        self.set_trainable(["prompt_pool"])  # refuses to freeze a trained encoder
        pool = ListenPromptPool(config, old.width, tuple(old.reads.shape[1:]) if config.form == "layers" else (0, 0))
        pool.to(old.keys.device).train(self.training).apply(self._init_weights)
        self._start_values(pool)
        for name, _ in old.named_parameters():
            pool.get_buffer(f"frozen_{name}").copy_(old.part(name).detach())
        if config.center_query:
            pool.query_mean.copy_(old.query_mean)
        self.adapters["default"].prompt_pool, self.config.prompt_pool_config = pool, config
        self.freeze()

    def load_adapter(self, peft_model_id: Any = None, adapter_name: str = "default", **kwargs: Any) -> Any:
        """Load the adapter of another LiSTEN checkpoint under a name; a PEFT checkpoint goes to the LLM.

        Args:
            peft_model_id: Folder or Hub id.
            adapter_name: Name it gets here.
            **kwargs: Hub arguments and `variant`, or PEFT's for a PEFT checkpoint.

        Raises:
            ValueError: the name is taken, a weight is missing or not finite, the adapter was trained on other backbones
                or with another LoRA, an encoder was trained together with an adapter, its own or this model's, or
                PEFT's is more than a LoRA.
        """
        source = os.fspath(peft_model_id)
        hub = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        if cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **hub):
            return self._load_peft(source, adapter_name, hub, **kwargs)
        config = self.config_class.from_pretrained(source, **hub)
        _refuse_learned(f"adapter {source!r}", "this model", self.config)
        _refuse_learned("this model", f"adapter {source!r}", config)
        self.check_same_backbones(source, config)
        files = weight_files(source, kwargs.get("variant"), **hub)
        weights = {key: value for file in files for key, value in load_file(file).items()}
        self._check_same_lora(source, config, weights)
        prefix = "adapters.default."
        state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        self._add_listen_adapter(adapter_name, config.connector_config, config.prompt_pool_config)
        adapter = self.adapters[adapter_name]
        missing = sorted(set(adapter.state_dict()) - set(state))
        if missing:
            self.delete_adapter(adapter_name)
            raise ValueError(f"{source!r} lacks the adapter weights {missing[:5]}; it is no complete LiSTEN adapter")
        try:
            adapter.load_state_dict(state)
            check_weights(source, {f"{prefix}{key}": value for key, value in adapter.state_dict().items()}, files)
        except (ValueError, RuntimeError) as error:
            self.delete_adapter(adapter_name)
            raise ValueError(f"adapter {source!r} does not load: {error}") from error
        self.freeze()
        return None

    def save_adapter(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Write one adapter as a checkpoint of its own, in which it is the default.

        Args:
            save_directory: Folder to write.
            adapter_name: Which; the active one by default.
        """
        name = adapter_name or self.active_adapter
        chosen = self.adapters.named(name)
        config, extra = self.config, self.config.extra_adapters
        default = config.connector_config, config.prompt_pool_config
        connector, pool = chosen.connector.config, chosen.prompt_pool.config if chosen.prompt_pool is not None else None
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("adapters.")}
        state |= {f"adapters.default.{key}": value for key, value in chosen.state_dict().items()}
        try:
            config.connector_config, config.prompt_pool_config, config.extra_adapters = connector, pool, None
            self.save_pretrained(save_directory, state_dict=state)
        finally:
            (config.connector_config, config.prompt_pool_config), config.extra_adapters = default, extra

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the active one.

        Raises:
            ValueError: no adapter, LiSTEN's or PEFT's, has that name.
        """
        on_llm = getattr(self.language_model, "peft_config", {})
        if adapter_name not in self.adapters and adapter_name not in on_llm:
            raise ValueError(f"adapter {adapter_name!r} is unknown; loaded: {', '.join([*self.adapters, *on_llm])}")
        if self._active_adapter is None:  # `disable_adapters` took the LoRA away too
            self.enable_adapters()
        if adapter_name in self.adapters:
            self.active_adapter = adapter_name
        if adapter_name in on_llm:
            self.language_model.set_adapter(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter other than the default.

        Raises:
            ValueError: it is the default, or unknown.
        """
        if adapter_name == "default" or adapter_name not in self.adapters:
            others = ", ".join(name for name in self.adapters if name != "default") or "none"
            raise ValueError(f"adapter {adapter_name!r} cannot be deleted; those that can: {others}")
        del self.adapters[adapter_name]
        self.config.extra_adapters = {k: v for k, v in self.config.extra_adapters.items() if k != adapter_name} or None
        if self.active_adapter == adapter_name:
            self.active_adapter = "default"

    @property
    def active_adapter(self) -> str | None:
        """Name of the active adapter; `None` where adapters are disabled."""
        return ADAPTERS_OF_THREAD.get().get(self._of_thread, self._active_adapter)

    @active_adapter.setter
    def active_adapter(self, name: str | None) -> None:
        """Make an adapter the active one; `None` disables all."""
        if not self._of_thread.rename(name):
            self._active_adapter = name

    def active_adapters(self) -> list[str]:
        """Names of the active adapters, LiSTEN's and the LLM's LoRA; empty where they are disabled."""
        loras = [] if self.active_adapter is None or not self._lora_layers() else self.language_model.active_adapters()
        return list(dict.fromkeys([*([self.active_adapter] if self.active_adapter else []), *loras]))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is its base LLM: text alone, no prompts, no LoRA. Audio raises an error.

        For the current thread only: others may use the adapters at the same time.
        """
        for layer in self._lora_layers():
            layer._disable_adapters = layer._disable_adapters is True or self._of_thread  # PEFT asks for its truth
        with self._of_thread.disabled():
            yield

    def disable_adapters(self) -> None:
        """As `disable_adapter`, for all threads and until `enable_adapters`."""
        if self._active_adapter is not None:
            self._enabled_adapter, self._active_adapter = self._active_adapter, None
        if self._lora_layers():
            self.language_model.disable_adapters()

    def enable_adapters(self) -> None:
        """Make the adapter active that was so before `disable_adapters`, and the LoRA."""
        before = getattr(self, "_enabled_adapter", "default")  # it may have been deleted since
        self._active_adapter = self._active_adapter or (before if before in self.adapters else "default")
        if self._lora_layers():
            self.language_model.enable_adapters()
            self.freeze()

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Weights of an adapter, and those of a LoRA on the LLM, by their names in a checkpoint.

        Args:
            adapter_name: Which; the active one by default.
            state_dict: Weights of the whole model, to take them from.

        Raises:
            ValueError: it is unknown, or none is active.
        """
        name = adapter_name or self.active_adapter
        self.adapters.named(name)
        state = self.state_dict() if state_dict is None else state_dict
        return {key: value for key, value in state.items() if key.startswith(f"adapters.{name}.") or "lora_" in key}

    def _add_listen_adapter(self, name: str, connector: PreTrainedConfig, pool: PreTrainedConfig | None) -> None:
        if name == BASE_ADAPTER:
            raise ValueError(f"adapter name {name!r} means no adapter at all; choose another name")
        if name in self.adapters:
            raise ValueError(f"adapter {name!r} exists already; choose another name or delete it first")
        check_padding(connector, self.config.pad_to_30s)
        module = ListenAdapter(self.config, connector, pool)
        module.to(self.adapters["default"].connector.projection.weight.device).train(self.training)
        self.adapters[name] = module
        described = {"connector_config": connector.to_dict(), "prompt_pool_config": pool.to_dict() if pool else None}
        self.config.extra_adapters = {**(self.config.extra_adapters or {}), name: described}

    def check_same_backbones(self, source: str, config: PreTrainedConfig) -> None:
        """Refuse the adapter of a checkpoint that was trained over other backbones than this model's.

        Args:
            source: The checkpoint.
            config: Its config.

        Raises:
            ValueError: it was, or has other encoders.
        """
        for name, sub in BACKBONES.items():
            mine, theirs = getattr(self.config, sub), getattr(config, sub)
            if (mine is None) != (theirs is None):
                raise ValueError(f"adapter {source!r} and this model differ in having an {name}")
            if mine is not None:
                spec = (config.base_models or {}).get(name, {})
                check_backbone(name, getattr(self, name), theirs, spec, f"adapter {source!r}", "this model")

    # ------------------------------------------------------------------ trainable parameters

    def set_trainable(self, parts: list[str]) -> None:
        """Change the trainable parts, for instance add the speech encoder after training the connector.

        Args:
            parts: As `ListenConfig.trainable`. An encoder among them goes to fp32 and into the checkpoints from now on.

        Raises:
            ValueError: an unknown part, an encoder that other adapters use, or a trained encoder left out, which
                checkpoints would then load from `base_models`, in its state before training.
        """
        before = self.config.trainable
        lost = [name for name in self.config.learned_backbones if name not in parts]
        if lost and self.config.base_models:
            raise ValueError(
                f"trainable={list(parts)} freezes {lost}, which was trained; save it on its own "
                f"(model.{lost[0]}.save_pretrained(folder)) and name that folder as the frozen encoder of a new model"
            )
        self.config.trainable = list(parts)
        try:
            self.config._check()
            if len(self.adapters) > 1:
                _refuse_learned("another adapter", "this model", self.config)
        except ValueError:
            self.config.trainable = before
            raise
        for name in self.config.learned_backbones:
            getattr(self, name).float()
        if self.config.base_models:
            self._keys_to_ignore_on_save = self._frozen_keys()
        self.freeze()

    def freeze(self) -> None:
        """Let the parts in `config.trainable`, and LoRA weights on the LLM, require gradients; nothing else does."""
        constant = self._constant_parameters()
        for name, parameter in self.named_parameters():
            root, *rest = name.split(".")
            group = rest[1] if root == "adapters" else root  # adapters.<name>.<connector or prompt_pool>
            trainable = group in self.config.trainable or (root == "adapters" and "adapter" in self.config.trainable)
            trainable = trainable and parameter.is_floating_point() and name not in constant
            parameter.requires_grad_("lora_" in name or trainable)

    def _constant_parameters(self) -> set[str]:
        """Parameters of trainable encoders that stay constant: sinusoids, and the mask of a SpecAugment that is off.

        Whisper's family keeps its sinusoidal positions as a parameter without gradient; loading resets that.
        """
        constant = set()
        for name, _ in self.named_parameters():
            backbone, *path = name.split(".")
            if backbone in self.config.learned_backbones:
                masks = getattr(getattr(self, backbone).config, "apply_spec_augment", True)
                if "embed_positions" in path or ("masked_spec_embed" in path and not masks):
                    constant.add(name)
        return constant

    # ------------------------------------------------------------------ counting

    def parameter_counts(self) -> dict[str, tuple[int, int]]:
        """Trainable and all parameters of each module."""
        modules = [(name, getattr(self, name)) for name in BACKBONES if getattr(self, name) is not None]
        modules += [
            (f"{name}.{part}", child) for name, a in self.adapters.items() for part, child in a.named_children()
        ]
        return {name: _count(module) for name, module in modules}

    def print_trainable_parameters(self) -> None:
        """Print trainable and all parameters by module, in PEFT's manner."""
        counts = self.parameter_counts()
        counts["total"] = tuple(sum(column) for column in zip(*counts.values(), strict=True))
        lines = [f"{'module':<28}{'trainable':>16}{'all':>18}{'%':>9}"]
        for name, (trainable, total) in counts.items():
            lines.append(f"{name:<28}{trainable:>16,}{total:>18,}{100 * trainable / max(total, 1):>9.3f}")
        sys.stdout.write("\n".join(lines) + "\n")


def _refuse_learned(guest: str, owner: str, config: PreTrainedConfig) -> None:
    """Refuse to share an encoder that was trained with one adapter: others expect its original weights."""
    if config.learned_backbones:
        raise ValueError(
            f"{guest} cannot share the {' and '.join(config.learned_backbones)} of {owner}, which was trained "
            "together with its adapter; save it on its own (model.speech_encoder.save_pretrained(folder)) and name "
            "that folder as the frozen encoder of models that share it"
        )


def _count(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


__all__ = ["AdapterMixin", "Adapters", "BASE_ADAPTER", "ListenAdapter", "chunk_rows"]
