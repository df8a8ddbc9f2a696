"""Checkpoints of models over frozen backbones: trainable weights alone, or everything; loading, saving and checks."""

import copy
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .attention_listen import additive_attention
from .configuration_listen import BACKBONES, is_local_path
from .fingerprint_listen import Sketch, changed_weights, differing_weights, encode_sketches, sketches
from .model_card_listen import ModelCardMixin, write_model_card
from .modeling_beats import BeatsModel
from .modeling_speech_encoder import load_speech_encoder
from .weights_listen import check_weights, weight_files

logger = logging.get_logger(__name__)

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_OUTDATED_KWARGS = {"safe_serialization"}  # scripts still give it; all is saved so
_BACKBONE_KWARGS = ("attn_implementation", "cache_dir", "token", "local_files_only", "max_memory", "offload_folder")
_LOADERS: dict[str, Callable[..., nn.Module]] = {
    "speech_encoder": load_speech_encoder,
    "audio_encoder": lambda source, **options: _load_whole(BeatsModel, source, **options),
    "language_model": lambda source, **options: _load_whole(AutoModelForCausalLM, source, **options),
}
_SHAPE_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


class FrozenBackbonesMixin(ModelCardMixin):
    """Loading and saving for a `PreTrainedModel` whose frozen backbones have checkpoints of their own.

    With `config.base_models`, checkpoints hold the trainable weights and the names, revisions and fingerprints of the
    backbones; without, they hold everything. Trainable backbones (`config.learned_backbones`, if the config has it) are
    initialised from `base_models` and then part of the checkpoint. The model provides `frozen_backbones()` and
    `freeze()`, and its constructor takes `init_backbones`, the names of the backbones to build.
    """

    # ------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        config: PreTrainedConfig | str | None = None,
        backbones: dict[str, str | dict[str, str]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load an adapter-only or a self-contained checkpoint.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            *args: Passed to `PreTrainedModel.from_pretrained`.
            config: A config in place of the checkpoint's.
            backbones: Folders or Hub ids of backbones by name, to replace those of the checkpoint.
            **kwargs: As `PreTrainedModel.from_pretrained`, fields of the config included; `dtype`, `device_map`,
                `quantization_config` and `attn_implementation` apply to the frozen backbones, trainable weights stay in
                fp32. Only the LLM is quantised, unless `quantization_config` is a dict of configs by backbone.

        Raises:
            ValueError: a trainable weight is missing, no float or not finite, a backbone is missing or not the one that
                the adapter was trained on, or `quantization_config` is given for a checkpoint that holds everything.
            OSError: a backbone is neither on this machine nor reached on the Hub.
        """
        source = os.fspath(pretrained_model_name_or_path)
        _rename_dtype(kwargs)
        hub = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        weights = {**hub, "variant": kwargs.get("variant")}
        if not isinstance(config, PreTrainedConfig):
            fields = {name: kwargs.pop(name) for name in _config_fields(cls.config_class) & kwargs.keys()}
            config = cls.config_class.from_pretrained(config or source, **hub, **fields)
        _locate(config, source, backbones, hub)
        wants_info = kwargs.pop("output_loading_info", False)
        if config.base_models:
            model, info = cls._load_adapter_checkpoint(source, *args, config=config, **kwargs)
        elif kwargs.get("quantization_config") is not None:
            raise ValueError(
                f"quantization_config with {source!r}: it also holds encoders and adapter, which are not quantised; "
                "give a checkpoint whose base_models names the LLM"
            )
        else:
            model, info = super().from_pretrained(source, *args, config=config, output_loading_info=True, **kwargs)
        _refuse_missing(source, info)
        model._load_further(source, weights)
        check_weights(source, model.state_dict(), weight_files(source, **weights))
        model.freeze()
        return (model, info) if wants_info else model

    @classmethod
    def _load_adapter_checkpoint(cls, source: str, *args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
        device_map = kwargs.pop("device_map", None)
        quantization = kwargs.pop("quantization_config", None)
        placed = {} if device_map is None else {"device_map": _main_device(device_map)}
        model, info = super().from_pretrained(
            source, *args, config=config, init_backbones=_learned(config), output_loading_info=True, **placed, **kwargs
        )
        passed = {name: kwargs[name] for name in _BACKBONE_KWARGS if name in kwargs}
        model.load_backbones(
            dtype=kwargs.get("dtype"), device_map=device_map, quantization_config=quantization, **passed
        )
        return model.eval(), info

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """As upstream, but `dtype` and `torch_dtype` may not differ."""
        _rename_dtype(kwargs)
        return super()._from_config(config, **{k: v for k, v in kwargs.items() if (k, v) != ("dtype", "auto")})

    @classmethod
    def from_backbones(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """A model with the backbones in `config.base_models` and freshly initialised trainable modules.

        Args:
            config: A config with `base_models`, see its `from_backbones`.
            **kwargs: `dtype`, `device_map`, `quantization_config`, `attn_implementation` for the backbones, as in
                `from_pretrained`.

        Raises:
            ValueError: `config.base_models` is None.
        """
        if not config.base_models:
            raise ValueError(f"config.base_models is None; make it with {type(config).__name__}.from_backbones(...)")
        config = copy.deepcopy(config)
        if kwargs.get("attn_implementation"):
            config._attn_implementation = kwargs["attn_implementation"]  # the connector reads it
        model = cls(config, init_backbones=())
        model.load_backbones(**kwargs)
        model._start_fresh()
        return model.eval()

    def _start_fresh(self) -> None:
        """Initialise trainable weights that depend on the backbones; none by default."""

    def _load_further(self, source: str, weights: dict[str, Any]) -> None:
        """Load weights of modules that the constructor does not make; `weights` are options of `weight_files`."""

    def load_backbones(
        self, dtype: Any = None, device_map: Any = None, quantization_config: Any = None, **kwargs: Any
    ) -> None:
        """Load each backbone of `config.base_models` with its own `from_pretrained` and attach it.

        Backbones that are attached already, such as trained ones from a checkpoint, are kept. Trainable ones are loaded
        in fp32.

        Raises:
            ValueError: a backbone is not the one that the adapter was trained on, or weights are missing.
        """
        options = {**kwargs, "dtype": dtype, "quantization_config": quantization_config}
        _rename_dtype(options)
        options["dtype"] = options["dtype"] or "auto"
        for name, spec in self.config.base_models.items():
            if getattr(self, name, None) is not None:
                continue
            chosen = _options_of(name, options, device_map, learned=name in _learned(self.config))
            place, location = self.config.backbone_place(name)
            source = f"{spec['base_model_name_or_path']!r} at revision {spec.get('revision') or 'main'!r}"
            try:
                backbone = _LOADERS[name](place, **chosen, **location)
            except OSError as error:
                fix = f"download it, or give its folder: from_pretrained(..., backbones={{{name!r}: ...}})"
                raise OSError(f"the {name} could not be loaded from {source}; {fix}. {error}") from error
            self._attach(name, backbone, source)
            spec["revision"] = _commit(place, {**location, **kwargs}) or spec.get("revision") or "main"
        self._after_attaching(device_map)

    def _attach(self, name: str, backbone: nn.Module, source: str) -> None:
        expected, found = getattr(self.config, BACKBONES[name]), sketches(backbone)
        check_backbone(name, backbone, expected, self.config.base_models[name], "the checkpoint", source, found)
        backbone.config.name_or_path = ""  # only base_models says where it is
        setattr(self, name, backbone)
        setattr(self.config, BACKBONES[name], backbone.config)
        # by which `save_pretrained` sees whether it was changed
        self._attached = {**getattr(self, "_attached", {}), name: (found, backbone.dtype)}

    def _after_attaching(self, device_map: Any) -> None:
        language_model = getattr(self, "language_model", None)
        placed = getattr(language_model, "hf_device_map", None)  # bitsandbytes always makes one
        place = _main_device(placed or device_map)
        if place is not None:
            for name, part in self.named_children():
                if name != "language_model" and not _is_offloaded(part):
                    part.to(place)
        if placed:
            self.hf_device_map = whole_map(placed)
        # read by the Trainer, which would else copy the model to other GPUs
        self.is_loaded_in_4bit = getattr(language_model, "is_loaded_in_4bit", False)
        self.is_loaded_in_8bit = getattr(language_model, "is_loaded_in_8bit", False)
        if self.can_generate() and language_model.generation_config is not None:
            self.generation_config = copy.deepcopy(language_model.generation_config)
        self.post_init()  # collects attributes of the new children
        self._keys_to_ignore_on_save = set(self._keys_to_ignore_on_save or ()) | self._frozen_keys()
        self.freeze()

    def _frozen_keys(self) -> set[str]:
        """Names of the weights that an adapter-only checkpoint leaves out."""
        frozen = {name for name, _ in self.frozen_backbones()}
        return {key for key in self.state_dict() if key.split(".")[0] in frozen and "lora_" not in key}

    # ------------------------------------------------------------------ saving

    def push_to_hub(
        self, repo_id: str, *args: Any, backbones: dict[str, str | dict[str, str]] | None = None, **kwargs: Any
    ) -> Any:
        """As upstream, with a model card, and never with folders of this machine.

        Args:
            repo_id: Repository to push to.
            *args: Passed to `PreTrainedModel.push_to_hub`.
            backbones: Hub ids of backbones by name, in place of the folders that they were loaded from.
            **kwargs: Passed to `PreTrainedModel.push_to_hub`.

        Raises:
            ValueError: a backbone is in a folder of this machine, or unknown.
        """
        with self.published(backbones):
            return super().push_to_hub(repo_id, *args, **kwargs)

    @contextmanager
    def published(self, backbones: dict[str, str | dict[str, str]] | None = None) -> Iterator[None]:
        """Within it the config names backbones by Hub ids; see `push_to_hub`."""
        before = self.config.base_models
        specs = {name: dict(spec) for name, spec in (before or {}).items()}
        _move(specs, {name: {"revision": "main", **_as_spec(place)} for name, place in (backbones or {}).items()})
        self.config.base_models = specs or None
        try:
            self.config.check_publishable()
            yield
        finally:
            self.config.base_models = before

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_full: bool = False, **kwargs: Any
    ) -> None:
        """Write a checkpoint that `from_pretrained` and all Auto classes load.

        Args:
            save_directory: Folder to write.
            *args: Passed to `PreTrainedModel.save_pretrained`.
            save_full: Whether to write the frozen backbones too, for a self-contained folder.
            **kwargs: Passed to `PreTrainedModel.save_pretrained`.

        A frozen backbone that was changed (a LoRA merged into it, weights edited) is written too, with a warning. With
        the backbones, an unmerged LoRA is written as a LoRA, and a merged one as part of the LLM.

        Raises:
            TypeError: an unknown keyword; with `push_to_hub`, unknown ones are passed to the Hub.
            ValueError: `save_full` with a quantised backbone, weights of an adapter that checkpoints cannot hold, or
                `push_to_hub` with backbones in folders of this machine.
        """
        names = list(inspect.signature(PreTrainedModel.save_pretrained).parameters)[2:]
        kwargs |= zip(names, args, strict=False)
        unknown = kwargs.keys() - set(names) - _OUTDATED_KWARGS
        if unknown and not kwargs.get("push_to_hub"):
            raise TypeError(f"save_pretrained() got unknown arguments {sorted(unknown)}; take them out")
        config, ignored = self.config, self._keys_to_ignore_on_save
        before = {name: getattr(config, name, None) for name in ("base_models", "lora_config")}
        self._check_adapters_on_save()
        if save_full or not config.base_models:
            state = self._whole_state(kwargs.get("state_dict"))
            self._keys_to_ignore_on_save, config.base_models = (ignored or set()) - self._frozen_keys(), None
        else:
            if kwargs.get("push_to_hub"):
                config.check_publishable()
            state, writes = kwargs.get("state_dict"), kwargs.get("is_main_process", True)
            config.base_models = {name: self._described(name, save_directory, writes) for name in config.base_models}
        held, kind = self._hide_quantization(), type(self)
        try:
            self.__class__ = _class_before_sharding(kind)
            with self.kept_card(save_directory):
                super().save_pretrained(save_directory, **{**kwargs, "state_dict": state})
            if kwargs.get("is_main_process", True):
                write_model_card(save_directory, self)
        finally:
            self.__class__ = kind
            self._keys_to_ignore_on_save = ignored
            for name, value in before.items():
                if hasattr(config, name):
                    setattr(config, name, value)
            for held_config, quantization in held:
                held_config.quantization_config = quantization

    def _check_adapters_on_save(self) -> None:
        """Refuse weights of PEFT adapters that would be lost."""
        lost = [name for name, _ in self.named_parameters() if "lora_" in name and not self._holds_lora(name)]
        if lost:
            raise ValueError(
                f"{lost[:2]} ({len(lost)} in all) are weights of a LoRA that checkpoints of this model do not hold; "
                "merge it (PEFT's merge_and_unload), or add it to the LLM with model.add_adapter(LoraConfig(...))"
            )

    def _holds_lora(self, name: str) -> bool:
        """Whether a checkpoint keeps the LoRA weight of that name."""
        return False

    def _whole_state(self, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        """The weights of a checkpoint that holds everything; `None` for all of this model.

        Raises:
            ValueError: a backbone is quantised.
        """
        quantised = [name for name in BACKBONES if getattr(getattr(self, name, None), "hf_quantizer", None)]
        if quantised:
            raise ValueError(
                f"save_full=True with a quantised {quantised[0]}: load the model without quantization_config, or save "
                "the adapter only"
            )
        return state_dict

    def _hide_quantization(self) -> list[tuple[PreTrainedConfig, Any]]:
        """Remove quantisation from the configs, since on loading it would apply to the whole model.

        The user gives it again, or the backbone's own checkpoint holds it.
        """
        held = []
        for backbone in (getattr(self, name, None) for name in BACKBONES):
            if getattr(backbone, "hf_quantizer", None) is not None:
                held.append((backbone.config, backbone.config.quantization_config))
                del backbone.config.quantization_config
        return held

    def _described(self, name: str, save_directory: str | os.PathLike, writes: bool) -> dict[str, Any]:
        """The entry of a backbone in `base_models`: its path, relative inside the checkpoint, and its fingerprint.

        A backbone that is not the one that this path names any more is written into the checkpoint.
        """
        spec = dict(self.config.base_models[name])
        path, folder = spec["base_model_name_or_path"], os.path.abspath(save_directory)
        if os.path.isdir(path):
            path = os.path.abspath(path)
            inside = path.startswith(folder + os.sep)
            path = f"./{os.path.relpath(path, folder)}" if inside else path
            spec["base_model_name_or_path"] = Path(path).as_posix() if not inside else path.replace(os.sep, "/")
        backbone = dict(self.frozen_backbones()).get(name)
        if backbone is None:
            spec.pop("fingerprint", None)  # trainable: the checkpoint holds its weights
        elif not is_fsdp_managed_module(backbone):  # whose weights are elsewhere
            found = sketches(backbone)
            changed = self._changed(name, backbone, found)
            if changed:
                logger.warning(
                    f"the frozen {name} is not the one in {path!r} any more ({len(changed)} weights differ, "
                    f"{changed[0]!r} among them); the checkpoint holds the whole {name}, in the folder {name}"
                )
                if writes:
                    self._write_backbone(name, os.path.join(folder, name))
                return {
                    "base_model_name_or_path": f"./{name}",
                    "revision": "main",
                    "fingerprint": encode_sketches(found),
                }
            if not str(spec.get("fingerprint", "")).startswith("v2:"):
                spec["fingerprint"] = encode_sketches(getattr(self, "_attached", {}).get(name, (found,))[0])
        return spec

    def _changed(self, name: str, backbone: nn.Module, found: tuple[Sketch, Sketch]) -> list[str]:
        """Names of the weights that are not those that were loaded, or that the checkpoint was trained on."""
        known, dtype = getattr(self, "_attached", {}).get(name, (None, None))
        try:
            if known is not None:
                return changed_weights(known, found, exact=dtype == backbone.dtype)
            recorded = self.config.base_models[name].get("fingerprint")
            return differing_weights(recorded, backbone, found) if recorded else []
        except ValueError as error:
            raise ValueError(
                f"the frozen {name} cannot be saved: {error}; checkpoints hold plain backbones and a LoRA that was "
                "added with model.add_adapter(LoraConfig(...)), so merge other adapters into it first"
            ) from error

    def _write_backbone(self, name: str, folder: str) -> None:
        getattr(self, name).save_pretrained(folder)


def _rename_dtype(options: dict[str, Any]) -> None:
    """Move `torch_dtype`, the older name, to `dtype`.

    Raises:
        ValueError: both are given and differ.
    """
    older, dtype = options.pop("torch_dtype", None), options.get("dtype")
    named = [getattr(torch, name) if isinstance(name, str) and name != "auto" else name for name in (older, dtype)]
    if older is not None and dtype is not None and named[0] != named[1]:
        raise ValueError(f"torch_dtype={older} and dtype={dtype} differ; give dtype alone")
    if older is not None:
        options["dtype"] = older


def _config_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Fields that `from_pretrained` of a model takes for its config; `dtype` is an argument of loading."""
    return {*config_class.__dataclass_fields__, "num_labels"} - {"dtype"}


def whole_map(placed: dict[str, Any]) -> dict[str, Any]:
    """The device map of a model from its LLM's, with a single entry if all is on one device."""
    place = _main_device(placed)
    if set(placed.values()) == {place}:
        return {"": place}
    return {**{f"language_model.{name}".rstrip("."): where for name, where in placed.items()}, "": place}


def _locate(
    config: PreTrainedConfig, source: str, moved: dict[str, str | dict[str, str]] | None, hub: dict[str, Any]
) -> None:
    """Resolve the paths in `config.base_models`; those in `moved` replace them."""
    specs = {name: dict(spec) for name, spec in (config.base_models or {}).items()}
    for name, spec in specs.items():
        if spec["base_model_name_or_path"].startswith("./"):
            path, options = config.backbone_place(name, source, hub.get("revision"))
            spec.update(base_model_name_or_path=path, **options)
    _move(specs, moved)
    for name, spec in specs.items():
        path = spec["base_model_name_or_path"]
        if os.path.isdir(path):  # the working directory may change before the model is saved
            path = spec["base_model_name_or_path"] = os.path.abspath(path)
        if is_local_path(path) and not os.path.exists(path) and name not in _learned(config):
            raise ValueError(
                f"{source!r} needs the {name} in {path!r}, which does not exist; give its folder or Hub id: "
                f"from_pretrained(..., backbones={{{name!r}: ...}})"
            )
    config.base_models = specs or None


def _move(specs: dict[str, dict[str, Any]], moved: dict[str, str | dict[str, str]] | None) -> None:
    """Replace the places of backbones, in place."""
    for name, place in (moved or {}).items():
        if name not in specs:
            raise ValueError(
                f"backbones names {name!r}, but this checkpoint's backbones are {sorted(specs) or 'inside it'}"
            )
        specs[name].pop("subfolder", None)
        specs[name].update(_as_spec(place))
        if specs[name]["base_model_name_or_path"].startswith("./"):  # of the working directory, not of the checkpoint
            specs[name]["base_model_name_or_path"] = os.path.abspath(specs[name]["base_model_name_or_path"])


def _as_spec(place: str | dict[str, str]) -> dict[str, str]:
    return place if isinstance(place, dict) else {"base_model_name_or_path": str(place)}


def _commit(place: str, options: dict[str, Any]) -> str | None:
    """The commit of a backbone in the Hub's cache; `None` for a folder."""
    if os.path.isdir(place):
        return None
    hub = {name: options[name] for name in HUB_KWARGS if name in options} | {"local_files_only": True}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return extract_commit_hash(cached_file(place, "config.json", **hub, **quiet), None)


def _learned(config: PreTrainedConfig) -> list[str]:
    return getattr(config, "learned_backbones", [])


def _options_of(name: str, options: dict[str, Any], device_map: Any, learned: bool) -> dict[str, Any]:
    """The loading options of one backbone."""
    chosen = {key: value for key, value in options.items() if key != "quantization_config"}
    if device_map is not None:
        chosen["device_map"] = _part_of_map(name, device_map)
    if name == "audio_encoder" and "attn_implementation" in chosen:
        chosen["attn_implementation"] = additive_attention(chosen["attn_implementation"])
    quantization = options["quantization_config"]
    if isinstance(quantization, dict) and quantization and set(quantization) <= set(BACKBONES):
        quantization = quantization.get(name)
    elif name != "language_model":
        quantization = None
    if quantization is not None:
        chosen["quantization_config"] = quantization
    if learned:
        chosen["dtype"] = torch.float32
    return chosen


def check_backbone(
    name: str,
    backbone: PreTrainedModel,
    config: PreTrainedConfig,
    spec: dict[str, Any],
    whose: str,
    source: str,
    found: tuple[Sketch, Sketch] | None = None,
) -> None:
    """Refuse a backbone other than the one that a checkpoint was trained on.

    Args:
        name: Which backbone, a key of `BACKBONES`.
        backbone: What is there.
        config: Its config in the checkpoint.
        spec: Its entry in `base_models`, which may hold a fingerprint.
        whose: Name of the checkpoint in errors.
        source: Name of the backbone in errors.
        found: Sketches of its weights, where they are there already.

    Raises:
        ValueError: sizes or fingerprints differ, or the fingerprint is malformed.
    """
    _check_shape(name, whose, config, source, backbone.config)
    recorded = spec.get("fingerprint")
    override = "drop the fingerprint from base_models in config.json to override"
    try:
        differing = differing_weights(str(recorded), backbone, found) if recorded else []
    except ValueError as error:
        raise ValueError(f"{name}: {whose} names a {error}; restore it, or {override}") from error
    if differing:
        raise ValueError(
            f"{name}: {whose} was trained on weights of another fingerprint than those of {source}: {len(differing)} "
            f"differ ({', '.join(differing[:3])}); give the weights that it was trained on (revision "
            f"{spec.get('revision') or 'main'!r}), or {override}"
        )


def _check_shape(name: str, whose: str, expected: PreTrainedConfig, other: str, found: PreTrainedConfig) -> None:
    for field in _SHAPE_FIELDS:
        want, have = getattr(expected, field, None), getattr(found, field, None)
        if want is None and have is None:  # a composite LLM keeps its sizes in a config inside
            want, have = (getattr(config.get_text_config(), field, None) for config in (expected, found))
        if want is not None and have is not None and want != have:
            raise ValueError(
                f"{name}: {whose} was made for {field}={want}, but {other} has {field}={have}; "
                "give the backbone that it was trained on"
            )


def _load_whole(model_class: Any, source: str, **options: Any) -> nn.Module:
    """Load a backbone and refuse missing weights: a frozen, freshly initialised weight would never be trained."""
    backbone, info = model_class.from_pretrained(source, output_loading_info=True, **options)
    _refuse_missing(source, info)
    return backbone


def _refuse_missing(source: str, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{source!r} lacks the weights {missing[:5]} ({len(missing)} in all); it is incomplete")


def _part_of_map(name: str, device_map: Any) -> Any:
    """Where a backbone goes: what a device map of the whole model says of it, else the LLM is spread by the map."""
    if isinstance(device_map, dict):
        named = {key: place for key, place in device_map.items() if key.split(".")[0] == name}
        if named:
            return {key.removeprefix(name).removeprefix("."): place for key, place in named.items()}
    return device_map if name == "language_model" else _main_device(device_map)


def _is_offloaded(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def _main_device(device_map: Any) -> Any:
    """The device of encoders and adapters under a device map that may split the LLM."""
    if isinstance(device_map, dict):
        usable = [place for place in device_map.values() if place not in ("disk", "cpu")]
        return usable[0] if usable else "cpu"
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        accelerator = torch.accelerator.current_accelerator()
        return str(accelerator) if accelerator is not None else "cpu"
    return device_map


def _class_before_sharding(kind: type) -> type:
    """The class as it is written: `fully_shard` gives a model a class of torch with another name and module."""
    return next(base for base in kind.__mro__ if not base.__module__.startswith("torch."))


__all__ = [
    "HUB_KWARGS",
    "FrozenBackbonesMixin",
    "check_backbone",
    "whole_map",
]
