"""Convert a published SALMONN checkpoint into an adapter folder that `ListenForConditionalGeneration` loads.

    listen convert-salmonn salmonn_v1.pth salmonn-13b
    listen convert-beats BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt salmonn-13b/beats

The checkpoint is the `.pth` file of https://github.com/bytedance/SALMONN (arXiv 2310.13289), or one that its training
code wrote. It is read with `weights_only=True`, so nothing in it is executed. It holds what SALMONN learned: the
window-level Q-Former with its LayerNorms and projection, and a LoRA on Vicuna. The folder holds the same, the names of
the frozen backbones, a model card and, where the LLM's tokenizer lies on this machine, the processor. Backbones are
not read, and nothing is downloaded without `--download`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..configuration_beats import BeatsConfig
from ..configuration_listen import BACKBONES, ListenConfig
from ..modeling_listen import ListenForConditionalGeneration
from ..presets_listen import PRESETS
from ..processing_listen import ListenProcessor
from .help import ArgumentFormatter
from .published_checkpoint import ConversionError, check_tensors, read_checkpoint

# What SALMONN-13B v1 was trained over, and what transformers needs to know of it; its code takes BEATs from a file.
SPEECH_ENCODER = "openai/whisper-large-v2"
AUDIO_ENCODER = "./beats"  # inside the folder that is written
LANGUAGE_MODEL = "lmsys/vicuna-13b-v1.1"
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    SPEECH_ENCODER: PRESETS["listen-llama3-8b"]()["speech_config"],
    LANGUAGE_MODEL: {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "dtype": "float16",
    },
}
# Each backbone with the tensor that tells its width, that tensor's dimensions, and the default.
PLACES: dict[str, tuple[str, int, str]] = {
    "speech_encoder": ("ln_speech.weight", 1, SPEECH_ENCODER),
    "audio_encoder": ("ln_audio.weight", 1, AUDIO_ENCODER),
    "language_model": ("speech_llama_proj.weight", 2, LANGUAGE_MODEL),
}
# Settings of the published model, for files that do not tell theirs in `config.model`.
SETTINGS: dict[str, Any] = {
    "use_speech_Qformer": True,
    "window_level_Qformer": True,
    "second_per_window": 0.333333,
    "second_stride": 0.333333,
    "lora": True,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
}
NUM_ATTENTION_HEADS = 12  # of bert-base, which the published code always takes

CONNECTOR = "adapters.default.connector."
# How our names begin -> how the published ones do.
PUBLISHED_NAMES = {
    f"{CONNECTOR}speech_norm.": "ln_speech.",
    f"{CONNECTOR}audio_norm.": "ln_audio.",
    f"{CONNECTOR}query_tokens": "speech_query_tokens",
    f"{CONNECTOR}qformer.layernorm.": "speech_Qformer.bert.embeddings.LayerNorm.",
    f"{CONNECTOR}qformer.encoder.": "speech_Qformer.bert.encoder.",
    f"{CONNECTOR}projection.": "speech_llama_proj.",
    "language_model.": "llama_model.base_model.model.",
}
# Constants that some releases of transformers saved, and the text branch of BERT, which the queries never pass.
WITHOUT_EFFECT = re.compile(
    r"speech_Qformer\.bert\.embeddings\.(position_ids|word_embeddings\.weight|position_embeddings\.weight)"
    r"|speech_Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..+"
    r"|speech_Qformer\.cls\..+"
    r"|llama_model\..+\.rotary_emb\.inv_freq"
)

# The space behind `<|audio|>` makes `</Speech>` the beginning of a word, as it is where SALMONN tokenises it: alone.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set bare = message['content'] | replace('<|audio|> ', '<|audio|>') -%}"
    "{%- set marked = bare | replace('<|audio|>', '<Speech><|audio|> </Speech> ') -%}"
    "{{ 'USER: ' + marked | trim + '\n' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ 'ASSISTANT: ' }}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{{ '\n' }}"
    "{%- else -%}{{ message['content'] + '\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
# The wordings that SALMONN is tested with.
TASK_INSTRUCTIONS = {
    "asr": "Recognize the speech and give me the transcription.",
    "en2zh": "Listen to the speech and translate it into Chinese.",
    "er": "Describe the emotion of the speaker in one word.",
    "sv": "Do you only hear the same person talking? Answer yes or no.",
    "sqa": "{question}",
    "acap": "Please describe the audio.",
}

CARD = """---
{metadata}
---

# {name}

SALMONN (Tang et al., ICLR 2024, [arXiv 2310.13289](https://arxiv.org/abs/2310.13289)), converted from the published
checkpoint `{source}` by LiSTEN's `examples/convert_salmonn.py`. The weights are unchanged.

{parameters:,} parameters that SALMONN learned: the window-level Q-Former{lora}.
The frozen backbones are loaded from where `config.json` names them:

{backbones}

```python
from listen import ListenForConditionalGeneration, ListenProcessor

model = ListenForConditionalGeneration.from_pretrained("{name}")  # backbones={{...}} where they have moved
{processor}
question = {{"type": "text", "text": "{question}"}}
chat = [{{"role": "user", "content": [{{"type": "audio", "path": "clip.wav"}}, question]}}]
inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
answer = model.generate(**inputs, num_beams=4, max_new_tokens=200)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True))
```

Input: 16 kHz audio, padded to 30 s as in training; each 30 s give {embeddings} audio embeddings. Prompt:
`USER: <Speech>`, the audio, `</Speech> ` and the instruction, then `ASSISTANT:` on a new line.
"""
WITH_PROCESSOR = 'processor = ListenProcessor.from_pretrained("{name}")'
WITHOUT_PROCESSOR = """template = open("{name}/chat_template.jinja").read()
processor = ListenProcessor.from_backbones(model.config, chat_template=template)"""


@dataclass(frozen=True)
class Backbones:
    """Where the frozen backbones come from: Hub id or folder, `None` for those of SALMONN-13B.

    Attributes:
        speech_encoder: the Whisper that the checkpoint was trained over.
        audio_encoder: its BEATs, in the format of `convert_beats.py`; by default `beats` inside the written folder.
        language_model: its Vicuna.
        download: whether configs and tokenizer may be fetched from the Hub.
    """

    speech_encoder: str | None = None
    audio_encoder: str | None = None
    language_model: str | None = None
    download: bool = False


# ---------------------------------------------------------------------- what the checkpoint says


def published_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that have an effect, LoRA's under the names of today's PEFT.

    Raises:
        ConversionError: an entry is no tensor, or a backbone was trained along.
    """
    weights = {}
    for name, tensor in checkpoint["model"].items():
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"model[{name!r}] is a {type(tensor).__name__}, a tensor is needed.")
        if not WITHOUT_EFFECT.fullmatch(name):
            weights[re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name)] = tensor
    trained = [name for name in weights if re.match(r"speech_encoder\.|beats\.|llama_model\.(?!.*\.lora_)", name)]
    if trained:
        raise ConversionError(
            f"The checkpoint holds {len(trained)} tensors of backbones, such as {trained[0]}; only what SALMONN learns "
            "over frozen backbones can be converted."
        )
    return weights


def published_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """`SETTINGS`, replaced by what the checkpoint's own `config.model` says.

    Raises:
        ConversionError: it asks for a model without the window-level Q-Former.
    """
    stated = (checkpoint.get("config") or {}).get("model") or {}
    settings = {name: stated.get(name, default) for name, default in SETTINGS.items()}
    for name in ("use_speech_Qformer", "window_level_Qformer"):
        if not settings[name]:
            raise ConversionError(f"config.model.{name}={settings[name]!r} is not supported, True is needed.")
    return settings


def connector_settings(weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ListenConnectorConfig`, by the shapes of the tensors."""
    layers = [int(i) for name in weights for i in re.findall(r"^speech_Qformer\.bert\.encoder\.layer\.(\d+)\.", name)]
    num_queries, hidden = _shape(weights, "speech_query_tokens", 3)[1:]
    inner, _ = _shape(weights, "speech_Qformer.bert.encoder.layer.0.intermediate_query.dense.weight", 2)
    stride = settings["second_stride"]
    return {
        "salmonn_compat": True,
        "window_seconds": settings["second_per_window"],
        "stride_seconds": stride if stride != settings["second_per_window"] else None,
        "num_queries": num_queries,
        "hidden_size": hidden,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": NUM_ATTENTION_HEADS,
        "intermediate_size": inner,
    }


def lora_settings(weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of `peft.LoraConfig`; `None` where the model was trained without.

    Raises:
        ConversionError: the settings and the tensors disagree about LoRA.
    """
    names = [name for name in weights if name.endswith(".lora_A.default.weight")]
    if bool(names) != bool(settings["lora"]):
        found = f"holds {len(names)} lora_A tensors"
        hint = "it is incomplete, or trained without: then pass --no-lora" if not names else "leave out --no-lora"
        raise ConversionError(f"lora={settings['lora']!r}, but the checkpoint {found}; {hint}.")
    if not names:
        return None
    return {
        "r": _shape(weights, names[0], 2)[0],
        "lora_alpha": settings["lora_alpha"],
        "lora_dropout": settings["lora_dropout"],
        "target_modules": sorted({name.split(".")[-4] for name in names}),
    }


def _shape(weights: Mapping[str, torch.Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in weights:
        raise ConversionError(f"The checkpoint lacks {name}; it is truncated or no SALMONN checkpoint.")
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions:
        raise ConversionError(f"{name} has shape {shape}, {dimensions} dimensions are needed.")
    return shape


# ---------------------------------------------------------------------- what the backbones say


def backbone_configs(
    weights: Mapping[str, torch.Tensor], backbones: Backbones, folder: Path
) -> tuple[dict[str, PreTrainedConfig], dict[str, dict[str, str]]]:
    """Config of each backbone by its field in `ListenConfig`, and `base_models`.

    Raises:
        ConversionError: a config is not on this machine, or a backbone has not the width that SALMONN was trained for,
            or is given to a checkpoint that was trained without.
    """
    if backbones.audio_encoder and "ln_audio.weight" not in weights:
        raise ConversionError(f"The checkpoint has no ln_audio.weight, hence no place for {backbones.audio_encoder}.")
    configs, base_models = {}, {}
    for name, (tensor, dimensions, default) in PLACES.items():
        if name == "audio_encoder" and tensor not in weights:
            continue
        source, width = getattr(backbones, name) or default, _shape(weights, tensor, dimensions)[0]
        config = _read_config(name, source, folder, backbones.download)
        if config.hidden_size != width:
            raise ConversionError(
                f"{tensor} is made for a width of {width}, but {source} has {config.hidden_size}; name the backbone "
                f"that the checkpoint was trained over with --{name.replace('_', '-')}."
            )
        configs[BACKBONES[name]] = config
        base_models[name] = {"base_model_name_or_path": _place(source, folder), "revision": "main"}
    return configs, base_models


def _read_config(name: str, source: str, folder: Path, download: bool) -> PreTrainedConfig:
    config_class = BeatsConfig if name == "audio_encoder" else AutoConfig
    if source == AUDIO_ENCODER:
        source = str(folder / AUDIO_ENCODER)
        if not Path(source).is_dir():
            return BeatsConfig()  # that of the published file, which may be converted later
    if source in KNOWN_CONFIGS:
        return AutoConfig.for_model(**KNOWN_CONFIGS[source])
    try:
        return config_class.from_pretrained(source, local_files_only=not download)
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"The config of {source!r} is not on this machine; give a folder as --{name.replace('_', '-')}, or "
            "--download to fetch it from the Hub."
        ) from error


def _place(source: str, folder: Path) -> str:
    """A folder's name for `base_models`: `./` is inside the checkpoint, all else absolute. Hub ids stay."""
    path = Path(source).resolve()
    if source == AUDIO_ENCODER or not path.is_dir():
        return source
    return f"./{path.relative_to(folder.resolve())}" if path.is_relative_to(folder.resolve()) else str(path)


def load_tokenizer(source: str, download: bool) -> PreTrainedTokenizerBase | None:
    """The LLM's tokenizer, `None` where it does not lie on this machine and may not be downloaded."""
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=not download)
    except (OSError, ValueError):
        return None


# ---------------------------------------------------------------------- writing


def skeleton(config: ListenConfig, lora: Mapping[str, Any] | None) -> ListenForConditionalGeneration:
    """The model without memory for weights: it knows all their names and shapes."""
    with torch.device("meta"):
        model = ListenForConditionalGeneration(config)
        if lora is not None:
            from peft import LoraConfig

            model.add_adapter(LoraConfig(**lora))
    return model


def convert_weights(
    published: Mapping[str, torch.Tensor], model: ListenForConditionalGeneration
) -> dict[str, torch.Tensor]:
    """The same tensors under the names of the model, in float32.

    Raises:
        ConversionError: a tensor is missing, superfluous, of another shape, or not finite.
    """
    learned = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name or CONNECTOR in name}
    names = {name: published_name(name) for name in learned}
    check_tensors(published, {names[name]: tensor for name, tensor in learned.items()})
    return {name: published[names[name]].float().contiguous() for name in learned}


def published_name(name: str) -> str:
    """What SALMONN calls one of our tensors."""
    ours, theirs = next((ours, theirs) for ours, theirs in PUBLISHED_NAMES.items() if name.startswith(ours))
    return theirs + name.removeprefix(ours).replace("attention.attention.", "attention.self.")


def write_card(folder: Path, source: Path, model: ListenForConditionalGeneration, has_processor: bool) -> None:
    """Short model card that names the source of the weights and how to use them."""
    places = {name: spec["base_model_name_or_path"] for name, spec in model.config.base_models.items()}
    lora = model.config.lora_config
    targets = f" and a LoRA (r = {lora['r']}) on {', '.join(lora['target_modules'])}" if lora else ""
    hub_ids = [place for place in places.values() if place.count("/") == 1 and not place.startswith((".", "/"))]
    connector = model.config.connector_config
    card = CARD.format(
        metadata=ModelCardData(
            license="apache-2.0", library_name="transformers", base_model=hub_ids or None, tags=["salmonn", "audio"]
        ).to_yaml(),
        name=folder.name,
        source=source.name,
        parameters=sum(p.numel() for name, p in model.named_parameters() if p.requires_grad),
        lora=targets,
        backbones="\n".join(f"- {name.replace('_', ' ')}: `{place}`" for name, place in places.items()),
        processor=(WITH_PROCESSOR if has_processor else WITHOUT_PROCESSOR).format(name=folder.name),
        question=TASK_INSTRUCTIONS["acap"],
        embeddings=connector.num_embeddings(round(30 / model.config.frame_seconds), model.config.frame_seconds),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def convert(
    source: Path, folder: Path, backbones: Backbones | None = None, with_lora: bool | None = None
) -> ListenConfig:
    """Read the published file `source`, write `folder`, return the config.

    Args:
        source: Checkpoint with the entry `model`.
        folder: Folder to write.
        backbones: Where the frozen parts come from.
        with_lora: Whether it was trained with LoRA; by default as its own settings say, else yes.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file is no SALMONN checkpoint, or was trained over other backbones.
    """
    backbones = backbones or Backbones()
    checkpoint = read_checkpoint(source, ("model",))
    weights, settings = published_weights(checkpoint), published_settings(checkpoint)
    settings["lora"] = settings["lora"] if with_lora is None else with_lora
    connector, lora = connector_settings(weights, settings), lora_settings(weights, settings)
    configs, base_models = backbone_configs(weights, backbones, folder)
    try:
        config = ListenConfig(**configs, connector_config=connector, base_models=base_models, pad_to_30s=True)
    except ValueError as error:
        raise ConversionError(f"The checkpoint is inconsistent: {error}") from error
    tokenizer = load_tokenizer(base_models["language_model"]["base_model_name_or_path"], backbones.download)
    options = {"chat_template": CHAT_TEMPLATE, "task_instructions": TASK_INSTRUCTIONS}
    processor = ListenProcessor.from_backbones(config, tokenizer, **options) if tokenizer is not None else None
    model = skeleton(config, lora)
    converted = convert_weights(weights, model)
    model.save_pretrained(folder, state_dict=converted)
    config.save_pretrained(folder)  # once more: backbones that were not read have no fingerprint
    if processor is not None:
        processor.save_pretrained(folder)
    else:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_card(folder, source, model, processor is not None)
    return config


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ArgumentFormatter)
    parser.add_argument("source", type=Path, help="published checkpoint, e.g. salmonn_v1.pth")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--speech-encoder", help=f"Whisper: Hub id or folder (default: {SPEECH_ENCODER})")
    parser.add_argument("--audio-encoder", help="BEATs: folder written by convert-beats (`beats` inside the output)")
    parser.add_argument("--language-model", help=f"Vicuna: Hub id or folder (default: {LANGUAGE_MODEL})")
    parser.add_argument("--no-lora", action="store_true", help="the checkpoint was trained without LoRA")
    parser.add_argument("--download", action="store_true", help="fetch configs and tokenizer from the Hub")
    given = parser.parse_args()
    backbones = Backbones(given.speech_encoder, given.audio_encoder, given.language_model, given.download)
    try:
        config = convert(given.source, given.output, backbones, with_lora=False if given.no_lora else None)
    except (ConversionError, OSError) as error:
        parser.exit(1, f"{error}\n")
    places = ", ".join(spec["base_model_name_or_path"] for spec in config.base_models.values())
    print(f"SALMONN adapter over {places} written to {given.output}")
