"""Configuration of LiSTEN: the frozen backbones, the connector and the prompt pool."""

import os
from fractions import Fraction
from importlib import import_module
from pathlib import PureWindowsPath
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_adapter import ListenConnectorConfig, ListenPromptPoolConfig, check_choice, check_padding
from .configuration_beats import BeatsConfig
from .geometry_listen import audio_step, speech_geometry, speech_width

BACKBONES = {"speech_encoder": "speech_config", "audio_encoder": "audio_config", "language_model": "text_config"}
TRAINABLE = ("adapter", "connector", "prompt_pool", "speech_encoder", "audio_encoder")

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
            ImportError: the class comes from a checkpoint's code, and the package is not installed.
        """
        try:  # by name, so that checkpoints do not carry a file that answering does not need
            presets = import_module("listen.presets_listen").PRESETS
        except ModuleNotFoundError as error:
            raise ImportError("presets need the package: pip install listen-audio-llm") from error
        check_choice("preset", name, tuple(presets))
        return cls(**{**presets[name](), **overrides})

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


ListenConfig.register_for_auto_class()

__all__ = ["BackbonesConfigMixin", "is_local_path", "ListenConfig", "ListenConnectorConfig", "ListenPromptPoolConfig"]
