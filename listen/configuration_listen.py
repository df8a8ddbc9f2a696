"""Configuration of LiSTEN: the frozen backbones, the connector and the prompt pool."""

import difflib
import os
from fractions import Fraction
from pathlib import PureWindowsPath
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.generation import GenerationConfig

from .configuration_beats import BeatsConfig
from .geometry_listen import audio_step, speech_geometry, speech_width

STRATEGIES = ("similarity", "attention", "residual", "fixed", "random", "task")
QUERY_STRATEGIES = ("similarity", "attention", "residual")
PROMPT_FORMS = ("input", "layers")
KEY_LOSSES = ("relative", "distance", "similarity")
QUERY_SOURCES = ("all", "text")
VALUE_STARTS = ("mean", "vocabulary")
CONNECTORS = ("window_qformer", "conv_rotary")
BACKBONES = {"speech_encoder": "speech_config", "audio_encoder": "audio_config", "language_model": "text_config"}
TRAINABLE = ("adapter", "connector", "prompt_pool", "speech_encoder", "audio_encoder")

# the only type of connector that uses a field
_FIELDS_OF_CONNECTORS = {
    "window_seconds": "window_qformer",
    "num_queries": "window_qformer",
    "salmonn_compat": "window_qformer",
    "stride_seconds": "window_qformer",
    "embedding_seconds": "conv_rotary",
    "kernel_size": "conv_rotary",
}
_LAYERS_OF_CONNECTORS = {"window_qformer": 2, "conv_rotary": 1}
_MODEL_FILE = "modeling_listen.ListenForConditionalGeneration"
_AUTO_MAP = {
    "AutoConfig": "configuration_listen.ListenConfig",
    **dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM"), _MODEL_FILE),
    "AutoProcessor": "processing_listen.ListenProcessor",
    "AutoFeatureExtractor": "feature_extraction_listen.ListenFeatureExtractor",
}
_CUSTOM_PIPELINES = {"audio-llm": {"impl": "pipeline_listen.ListenPipeline", "pt": ["AutoModel"]}}


class BackbonesConfigMixin:
    """For configs with `base_models`, which name the checkpoints of backbones."""

    def check_publishable(self) -> None:
        """Refuse a config that names folders of this machine: nobody else could load it, and the folders would be seen.

        Raises:
            ValueError: a backbone is in such a folder.
        """
        specs = self.base_models or {}
        local = {name: spec["base_model_name_or_path"] for name, spec in specs.items()}
        local = {name: path for name, path in local.items() if is_local_path(path)}
        if local:
            ids = ", ".join(f"{name!r}: 'owner/name'" for name in local)
            raise ValueError(
                f"backbones in folders of this machine ({local}) are not published: nobody else could load the model. "
                f"Name them on the Hub, model.push_to_hub(repo_id, backbones={{{ids}}}), or publish everything: "
                "model.save_pretrained(folder, save_full=True, push_to_hub=True, repo_id=repo_id)"
            )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream, but a config that names folders of this machine is refused."""
        self.check_publishable()
        return super().push_to_hub(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As upstream, but a config that names folders of this machine is not pushed."""
        if push_to_hub:
            self.check_publishable()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def backbone_place(
        self, name: str, checkpoint: str | None = None, revision: str | None = None
    ) -> tuple[str, dict[str, str]] | None:
        """Folder or Hub id of a backbone's checkpoint and the options to load it with; `None` if it is not named.

        Args:
            name: Key of `base_models`.
            checkpoint: Folder or Hub id of the config, in which a path that begins with `./` lies; `name_or_path` by
                default. For a config of no checkpoint, such a path is relative to the working directory.
            revision: Revision of that Hub id; `"main"` by default.
        """
        spec = (self.base_models or {}).get(name)
        if not spec:
            return None
        path, options = spec["base_model_name_or_path"], {"revision": spec.get("revision") or "main"}
        checkpoint = checkpoint or self.name_or_path
        if path.startswith("./") and os.path.isdir(checkpoint):
            return os.path.normpath(os.path.join(checkpoint, path)), options
        if path.startswith("./") and checkpoint:
            return checkpoint, {"revision": revision or "main", "subfolder": path[2:]}
        return path, options | ({"subfolder": spec["subfolder"]} if spec.get("subfolder") else {})


class _StrictConfig(PreTrainedConfig):
    """A config that refuses unknown fields: a misspelt setting must not be ignored in silence."""

    def __post_init__(self, **kwargs: Any) -> None:
        known = {"name_or_path", "torch_dtype", "num_labels", "attn_implementation", "output_attentions", "model_type"}
        known |= set(GenerationConfig._get_default_generation_params())
        unknown = [name for name in kwargs if name not in known and not name.startswith("_")]
        if unknown:
            fields = sorted(self.__dataclass_fields__)
            close = difflib.get_close_matches(unknown[0], fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(type(self).__annotations__)}"
            raise ValueError(f"{type(self).__name__} has no field {unknown[0]!r}; {hint}")
        super().__post_init__(**kwargs)


class ListenConnectorConfig(_StrictConfig):
    """The connector, which turns encoder frames into audio embeddings.

    Args:
        type: `"window_qformer"`, a window-level Q-Former (SALMONN, arXiv 2310.13289, sec. 3), or `"conv_rotary"`, a
            convolution and rotary Transformer layers (SpeechEmotionLlama, arXiv 2410.01162).
        window_seconds: For `window_qformer`: length of one window, rounded to whole frames of the speech encoder. A
            third of a second is 17 frames of 20 ms, SALMONN's `round(1500 * 0.333333 / 30)`.
        num_queries: For `window_qformer`: learned queries, hence audio embeddings, per window.
        salmonn_compat: For `window_qformer`: whether clips are encoded exactly as in SALMONN, for its checkpoints:
            padded to 30 s with the padding attended to, and without the last partial window. Every 30 s give 88
            embeddings, silent or not. Needs `ListenConfig.pad_to_30s`.
        stride_seconds: For `window_qformer` with `salmonn_compat`: time from one window to the next, where windows may
            overlap; `window_seconds` by default.
        embedding_seconds: For `conv_rotary`: time from one audio embedding to the next, a whole number of encoder
            frames. The paper's 80 ms are a stride of 2 over its frames of 40 ms, and of 4 over frames of 20 ms.
        kernel_size: For `conv_rotary`: kernel of the convolution, in encoder frames; `2 * stride - 1` by default, which
            covers half of each neighbouring stride.
        hidden_size: Width of its layers.
        num_hidden_layers: Transformer layers; by default 2 in `window_qformer`, each with cross-attention to the frames
            of a window, and 1 in `conv_rotary`.
        num_attention_heads: Attention heads; must divide `hidden_size`.
        intermediate_size: Width of its feed-forward layers.
        dropout: Dropout on its hidden states and attention weights while training.

    Raises:
        ValueError: an unknown field, an unknown `type`, a field that the type does not use, a size below 1, heads
            that do not divide the width, or a stride without `salmonn_compat`.
    """

    model_type = "listen_connector"

    type: str = "window_qformer"
    window_seconds: float = 1 / 3
    num_queries: int = 1
    salmonn_compat: bool = False
    stride_seconds: float | None = None
    embedding_seconds: float = 0.08
    kernel_size: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int | None = None
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    dropout: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.type not in CONNECTORS:
            raise ValueError(f"connector type={self.type!r} is unknown; choose one of {', '.join(CONNECTORS)}")
        self._check_fields()
        for name in ("window_seconds", "embedding_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"connector {name}={getattr(self, name)} must be above 0")
        if self.num_hidden_layers is None:
            self.num_hidden_layers = _LAYERS_OF_CONNECTORS[self.type]
        for name in ("num_queries", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"connector {name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"connector hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}; change one of them"
            )
        self._check_stride()

    def _check_stride(self) -> None:
        if self.stride_seconds is not None and not self.salmonn_compat:
            raise ValueError(
                f"connector stride_seconds={self.stride_seconds} needs salmonn_compat=True; otherwise windows "
                "do not overlap"
            )
        if self.stride_seconds is not None and self.stride_seconds <= 0:
            raise ValueError(f"connector stride_seconds={self.stride_seconds} must be above 0")

    def settings(self) -> dict[str, Any]:
        """The fields above, without those that transformers adds to every config."""
        return {name: getattr(self, name) for name in type(self).__annotations__ if name != "model_type"}

    def window_frames(self, frame_seconds: float) -> int:
        """Encoder frames of `frame_seconds` per window, at least 1."""
        return self._frames(self.window_seconds, frame_seconds)

    def stride_frames(self, frame_seconds: float) -> int:
        """Encoder frames of `frame_seconds` from one window to the next, at least 1."""
        return self._frames(self.stride_seconds or self.window_seconds, frame_seconds)

    def _frames(self, seconds: float, frame_seconds: float) -> int:
        if self.salmonn_compat:  # in SALMONN's order of operations, so that halves round alike
            return max(1, round(round(30.0 / frame_seconds) * seconds / 30.0))
        return max(1, round(seconds / frame_seconds))

    def embedding_frames(self, frame_seconds: float) -> int:
        """Encoder frames of `frame_seconds` per embedding of `conv_rotary`: the stride of its convolution.

        Raises:
            ValueError: `embedding_seconds` is no whole number of frames.
        """
        frames = self.embedding_seconds / frame_seconds
        if round(frames) < 1 or abs(frames - round(frames)) > 1e-3:
            raise ValueError(
                f"connector embedding_seconds={self.embedding_seconds} is {frames:.3f} frames of the speech encoder, "
                f"which come every {frame_seconds} s; choose a multiple of that"
            )
        return round(frames)

    def num_embeddings(self, frames: int, frame_seconds: float) -> int:
        """Number of audio embeddings of one chunk.

        Args:
            frames: Real encoder frames of the chunk; with `salmonn_compat`, padded ones too.
            frame_seconds: Seconds from one frame to the next.
        """
        if self.type == "conv_rotary":
            return -(-frames // self.embedding_frames(frame_seconds))
        size = self.window_frames(frame_seconds)
        if not self.salmonn_compat:  # windows follow each other, the last one may be short
            return -(-frames // size) * self.num_queries
        return max(0, (frames - size) // self.stride_frames(frame_seconds) + 1) * self.num_queries

    def _check_fields(self) -> None:
        for name, reader in _FIELDS_OF_CONNECTORS.items():
            value = getattr(self, name)
            if reader != self.type and value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"connector {name}={value} is only used by type={reader!r}, not by {self.type!r}")


class ListenPromptPoolConfig(_StrictConfig):
    """The pool of learned key-value prompts (LiSTEN, arXiv 2505.18517).

    Args:
        pool_size: P, the number of key-value pairs.
        num_prompts: K, the prompts selected at inference.
        train_prompts: Largest k drawn in training, with `stochastic`; `num_prompts` by default.
        form: What a prompt is: `"input"`, one embedding before the input (the paper), or `"layers"`, one hidden unit
            beside every layer of the LLM (beyond the paper, see `layer_prompts_listen`), which the LLM does not read.
        strategy: How prompts are selected: `"similarity"`, `"attention"`, `"residual"`, or the controls `"fixed"`
            (a classic soft prompt), `"random"` and `"task"`.
        key_loss_type: `"relative"`, the mean of ||q - k_i|| / ||q|| over the selected keys, with q detached: it moves
            the keys alone, and its size does not depend on k or on the LLM's width. `"distance"`, the sum of
            ||q - k_i|| (the paper), or `"similarity"`, minus the sum of the selected softmax similarities (the authors'
            code): both move queries too, hence the connector.
        key_loss_weight: alpha, the weight of the key loss beside the next-token loss.
        stochastic: Whether training draws k uniformly from 1..`train_prompts` for each batch.
        score_dropout: Share of the keys, drawn at random, that a training batch cannot select.
        gate_temperature: With `strategy="similarity"`, weights prompts by `k softmax(cosines / gate_temperature)`,
            so that the next-token loss trains the keys; `None` takes them as they are (the paper).
        center_query: Whether a running mean is subtracted from the query before it is compared with the keys; off in
            the paper. It keeps all keys in use when the queries of all tasks are similar.
        query_momentum: Momentum of that running mean, with `center_query`.
        tasks: Names of the tasks that own a part of the pool, with `strategy="task"`.
        shared_fraction: Fraction of the pool that all tasks share, with `strategy="task"`.
        query_source: The embeddings whose mean is the query: `"all"`, audio and text (the paper), or `"text"` alone. In
            a mean of all, many audio embeddings outweigh a short instruction, and the query hardly depends on the task.
        value_start: Where new values start: at the `"mean"` of the LLM's input embeddings, plus small noise (the
            authors' code), or at those of random tokens, `"vocabulary"` (Lester et al., arXiv 2104.08691).

    Raises:
        ValueError: an unknown field, strategy, source, start or key loss, or values that cannot work together.
    """

    model_type = "listen_prompt_pool"

    pool_size: int = 400
    num_prompts: int = 160
    train_prompts: int | None = None
    form: str = "input"
    strategy: str = "similarity"
    key_loss_type: str = "relative"
    key_loss_weight: float = 1.0
    stochastic: bool = True
    score_dropout: float = 0.0
    gate_temperature: float | None = None
    center_query: bool = False
    query_momentum: float = 0.99
    tasks: list[str] | None = None
    shared_fraction: float = 0.4
    query_source: str = "all"
    value_start: str = "mean"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check_choice("prompt pool form", self.form, PROMPT_FORMS)
        _check_choice("prompt pool strategy", self.strategy, STRATEGIES)
        _check_choice("prompt pool key_loss_type", self.key_loss_type, KEY_LOSSES)
        _check_choice("prompt pool query_source", self.query_source, QUERY_SOURCES)
        _check_choice("prompt pool value_start", self.value_start, VALUE_STARTS)
        if self.form == "layers" and self.value_start != "mean":
            raise ValueError(f"value_start={self.value_start!r} has no effect with form='layers'; leave it out")
        if not 1 <= self.num_prompts <= self.pool_size:
            raise ValueError(
                f"num_prompts={self.num_prompts} must lie in 1..pool_size={self.pool_size}; "
                "lower num_prompts or enlarge the pool"
            )
        for name in ("score_dropout", "shared_fraction", "query_momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"prompt pool {name}={getattr(self, name)} must lie in [0, 1)")
        if self.gate_temperature is not None and (self.strategy != "similarity" or self.gate_temperature <= 0.0):
            raise ValueError(
                f"gate_temperature={self.gate_temperature} must be above 0 and needs strategy='similarity'"
            )
        if self.strategy == "task":
            self._check_tasks()
        if self.train_prompts is not None:
            self._check_train_prompts(self.train_prompts)

    @property
    def uses_query(self) -> bool:
        """Whether the strategy compares a query with keys."""
        return self.strategy in QUERY_STRATEGIES

    @property
    def most_prompts(self) -> int:
        """Largest k that a row can ask for."""
        return self.num_per_task + self.num_shared if self.strategy == "task" else self.pool_size

    @property
    def num_shared(self) -> int:
        """Prompts that all tasks share, with `strategy="task"`."""
        return round(self.pool_size * self.shared_fraction)

    @property
    def num_per_task(self) -> int:
        """Prompts of each task alone, with `strategy="task"`."""
        return (self.pool_size - self.num_shared) // len(self.tasks or [None])

    def _check_tasks(self) -> None:
        if not self.tasks:
            raise ValueError("strategy='task' needs `tasks`, the names of the tasks that own a part of the pool")
        if self.num_per_task < 1 or self.num_prompts > self.most_prompts:
            raise ValueError(
                f"num_prompts={self.num_prompts}, but each of {len(self.tasks)} tasks reaches {self.most_prompts} of "
                f"pool_size={self.pool_size} prompts ({self.num_per_task} of its own); lower num_prompts"
            )

    def _check_train_prompts(self, train_prompts: int) -> None:
        if not self.stochastic:
            raise ValueError(f"train_prompts={train_prompts} has no effect with stochastic=False; leave it out")
        if not 1 <= train_prompts <= self.most_prompts:
            raise ValueError(f"train_prompts={train_prompts} must lie in 1..{self.most_prompts}, the pool's prompts")


class ListenConfig(BackbonesConfigMixin, PreTrainedConfig):
    """A LiSTEN model: two frozen encoders, a connector, a prompt pool and a frozen causal LLM.

    Args:
        speech_config: Config of the speech encoder, Whisper's by default; any other that `geometry_listen`
            supports (Wav2Vec2-BERT, HuBERT, WavLM, AST, Moonshine ...). Only the encoder is built.
        audio_config: Config of the BEATs audio encoder; `None` leaves it out.
        connector_config: Config of the connector, see `ListenConnectorConfig`.
        prompt_pool_config: Config of the pool, see `ListenPromptPoolConfig`; `None` leaves it out.
        text_config: Config of any causal language model of transformers.
        base_models: Where each frozen backbone comes from: `{"speech_encoder": {"base_model_name_or_path": ...,
            "revision": ...}, "audio_encoder": ..., "language_model": ...}`. If set, checkpoints hold the adapter
            only and loading fetches the backbones; if `None`, they hold everything. A path that begins with `./` is a
            folder inside the checkpoint.
        trainable: Trainable parts: `"adapter"` (connector and pool), one of `"connector"`, `"prompt_pool"`, or an
            encoder: `"speech_encoder"`, `"audio_encoder"`. A trainable encoder is in fp32 and part of every
            checkpoint; `base_models` names where it was initialised from.
        lora_config: Settings of a PEFT LoRA on the language model, as written by `add_adapter`.
        extra_adapters: Connector and pool settings of adapters beside the default one, by name.
        audio_token_id: Placeholder id of one audio embedding. May lie above the LLM's vocabulary.
        prompt_token_id: Placeholder id of one prompt. May lie above the LLM's vocabulary.
        pad_to_30s: Whether Whisper encodes every clip padded to 30 s, as in its training, or at its true length.
        chunks_at_once: Chunks of audio (30 s at most) in one batch of a frozen encoder. It limits the encoders' memory
            for audio of any length and changes no result.

    Raises:
        ValueError: values that cannot work together, named with the fix.
    """

    model_type = "listen"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "lm_loss",
        "key_loss",
        "prompt_indices",
        "prompt_scores",
        "query",
    ]
    sub_configs_defaults = {
        "speech_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
        "audio_config": SubConfigSpec(config_class=BeatsConfig, optional=True),
        "connector_config": SubConfigSpec(config_class=ListenConnectorConfig),
        "prompt_pool_config": SubConfigSpec(config_class=ListenPromptPoolConfig, optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    speech_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    connector_config: dict | PreTrainedConfig | None = None
    prompt_pool_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    base_models: dict | None = None
    trainable: list[str] | None = None
    lora_config: dict | None = None
    extra_adapters: dict | None = None
    audio_token_id: int | None = None
    prompt_token_id: int | None = None
    pad_to_30s: bool = False
    chunks_at_once: int = 16
    auto_map: dict | None = None
    custom_pipelines: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.trainable = list(self.trainable or ["adapter"])
        # only when empty: a checkpoint may point to code in another repository
        self.auto_map = self.auto_map or dict(_AUTO_MAP)
        self.custom_pipelines = self.custom_pipelines or {k: dict(v) for k, v in _CUSTOM_PIPELINES.items()}
        self._check()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ListenConfig":
        """The config of a named preset, its fields replaced by `overrides`.

        Raises:
            ValueError: no preset has that name; the message lists them.
        """
        from .presets_listen import PRESETS

        _check_choice("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name](), **overrides})

    @classmethod
    def from_backbones(
        cls,
        speech_encoder: str,
        language_model: str,
        audio_encoder: str | None = None,
        revisions: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> "ListenConfig":
        """A config for backbones named by Hub id or folder; only their `config.json` files are read.

        Args:
            speech_encoder: A checkpoint of Whisper or another supported speech encoder, with or without a head.
            language_model: Any causal language model.
            audio_encoder: A BEATs checkpoint in our format; `None` for no second stream.
            revisions: Revision of each backbone, by the name of its argument; `"main"` where absent.
            **kwargs: Other fields of the config.

        Raises:
            ValueError: `audio_encoder` is not a BEATs checkpoint in our format, or values cannot work together.
        """
        names = {"speech_encoder": speech_encoder, "audio_encoder": audio_encoder, "language_model": language_model}
        configs, base_models = {}, {}
        for backbone, source in names.items():
            if source is None:
                continue
            revision = (revisions or {}).get(backbone, "main")
            read = _beats_config if backbone == "audio_encoder" else AutoConfig.from_pretrained
            configs[BACKBONES[backbone]] = read(source, revision=revision)
            place = str(source).replace(os.sep, "/")  # files hold POSIX paths
            base_models[backbone] = {"base_model_name_or_path": place, "revision": revision}
        return cls(**configs, base_models=base_models, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ListenConfig":
        """As upstream, but refuses the config of another model, or an empty one, which would give a default 7 B model.

        Raises:
            ValueError: `model_type` is not `"listen"`.
        """
        found = config_dict.get("model_type")
        if found != cls.model_type:
            what = f"a config of model_type={found!r}" if found else "no config.json, or one without model_type"
            raise ValueError(f"found {what}, but a LiSTEN model is needed; name its folder or Hub id")
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made)._check()  # fields in kwargs are set afterwards
        return made

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The config with the LLM's width, vocabulary and layers.

        That is `text_config`, or its text part for a composite LLM (Gemma 3 with its vision tower).
        """
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def text_width(self) -> int:
        """Width of the LLM's input embeddings; in some LLMs (OPT 350M) narrower than the layers."""
        config = self.get_text_config()
        return getattr(config, "word_embed_proj_dim", None) or config.hidden_size

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame of the speech encoder to the next."""
        return speech_geometry(self.speech_config).frame_seconds

    @property
    def audio_step(self) -> Fraction:
        """Frames of the audio encoder per frame of the speech encoder; 1 without an audio encoder."""
        if self.audio_config is None:
            return Fraction(1)
        patches = self.audio_config.patch_size, self.audio_config.num_mel_bins
        return audio_step(speech_geometry(self.speech_config), *patches)

    @property
    def speech_width(self) -> int:
        """Width of the speech encoder's frames."""
        return speech_width(self.speech_config)

    @property
    def learned_backbones(self) -> list[str]:
        """Trainable encoders, which are part of every checkpoint."""
        return [name for name in BACKBONES if name in self.trainable]

    @property
    def encoder_width(self) -> int:
        """Width of the fused encoder frames."""
        audio_width = self.audio_config.hidden_size if self.audio_config is not None else 0
        return self.speech_width + audio_width

    def _check(self) -> None:
        self._check_speech()
        unknown = [name for name in self.trainable if name not in TRAINABLE]
        if "language_model" in unknown:
            raise ValueError("trainable=['language_model']: the LLM stays frozen; use add_adapter(LoraConfig(...))")
        if unknown:
            raise ValueError(f"trainable={unknown} is unknown; choose among {', '.join(TRAINABLE)}")
        if "audio_encoder" in self.trainable and self.audio_config is None:
            raise ValueError("trainable holds 'audio_encoder' but audio_config is None; give one or take it out")
        if "prompt_pool" in self.trainable and self.prompt_pool_config is None:
            raise ValueError("trainable holds 'prompt_pool' but prompt_pool_config is None; give one or take it out")
        if self.audio_token_id is not None and self.audio_token_id == self.prompt_token_id:
            raise ValueError(f"audio_token_id and prompt_token_id are both {self.audio_token_id}; they must differ")
        if self.chunks_at_once < 1:
            raise ValueError(f"chunks_at_once={self.chunks_at_once} must be at least 1")
        check_padding(self.connector_config, self.pad_to_30s)
        self._check_base_models()

    def _check_speech(self) -> None:
        speech = self.speech_config
        speech_geometry(speech)  # raises for unsupported encoders
        if self.pad_to_30s and speech.model_type != "whisper":
            raise ValueError(f"pad_to_30s=True is for Whisper only, not for {speech.model_type}; set it to False")
        if "speech_encoder" in self.trainable and getattr(speech, "add_adapter", False) and speech.layerdrop:
            raise ValueError(
                f"a trainable speech encoder with add_adapter and layerdrop={speech.layerdrop} may drop layers that "
                "shorten its output, so its number of frames is unknown; set layerdrop=0 in speech_config"
            )

    def _check_base_models(self) -> None:
        if self.base_models is None:
            return
        needed = {name for name, sub in BACKBONES.items() if getattr(self, sub) is not None}
        if set(self.base_models) != needed:
            raise ValueError(
                f"base_models names {sorted(self.base_models)} but this config needs {sorted(needed)}; "
                "name each backbone once, or set base_models=None for a self-contained checkpoint"
            )
        for name, spec in self.base_models.items():
            if not isinstance(spec, dict) or not spec.get("base_model_name_or_path"):
                raise ValueError(
                    f"base_models[{name!r}]={spec!r} needs 'base_model_name_or_path', a Hub id or a folder"
                )


def is_local_path(path: str) -> bool:
    """Whether it names a folder of some machine and no repository of the Hub or folder inside a checkpoint."""
    if path.startswith("./") or PureWindowsPath(path).is_absolute():
        return not path.startswith("./")
    return path.startswith(("/", "~", "../")) or path.count("/") > 1 or os.path.isdir(path)


def _beats_config(source: str, revision: str) -> BeatsConfig:
    """The config of a converted BEATs."""
    fields = {} if os.path.isfile(source) else BeatsConfig.get_config_dict(source, revision=revision)[0]
    if fields.get("model_type") != BeatsConfig.model_type:
        raise ValueError(
            f"audio_encoder={str(source)!r} is not a BEATs checkpoint in this package's format (model_type="
            f"{fields.get('model_type')!r}); convert a published BEATs_x.pt with examples/convert_beats.py"
        )
    return BeatsConfig.from_pretrained(source, revision=revision)


def check_padding(connector_config: PreTrainedConfig, pad_to_30s: bool) -> None:
    """Refuse a connector that needs padded clips where clips are not padded.

    Raises:
        ValueError: `salmonn_compat` without `pad_to_30s`.
    """
    if connector_config.salmonn_compat and not pad_to_30s:
        raise ValueError(
            "a connector with salmonn_compat=True needs clips padded to 30 s, but pad_to_30s=False; set "
            "pad_to_30s=True, or salmonn_compat=False"
        )


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{what}={value!r} is unknown; choose one of {', '.join(choices)}")


ListenConfig.register_for_auto_class()

__all__ = ["BackbonesConfigMixin", "is_local_path", "ListenConfig", "ListenConnectorConfig", "ListenPromptPoolConfig"]
