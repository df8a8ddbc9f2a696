"""Convert a published BEATs checkpoint into a folder that `BeatsModel.from_pretrained` loads.

    listen convert-beats BEATs_iter3_plus_AS2M.pt beats-iter3-plus-as2m

The checkpoint is the `.pt` file of https://github.com/microsoft/unilm/tree/master/beats, pre-trained or fine-tuned. It
is read with `weights_only=True`, so nothing in it is executed. The folder holds `config.json`, `model.safetensors` and
a model card; name it as `model.audio_encoder` of a recipe.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from huggingface_hub import ModelCardData

from ..configuration_beats import BeatsConfig
from ..modeling_beats import BeatsForAudioClassification, BeatsModel
from .help import ArgumentFormatter
from .published_checkpoint import ConversionError, check_tensors, read_checkpoint

# Names of the published configuration -> ours, with the published default where a file leaves the value out.
CONFIG_NAMES: dict[str, tuple[str, object]] = {
    "encoder_embed_dim": ("hidden_size", 768),
    "encoder_layers": ("num_hidden_layers", 12),
    "encoder_attention_heads": ("num_attention_heads", 12),
    "encoder_ffn_embed_dim": ("intermediate_size", 3072),
    "embed_dim": ("patch_embed_dim", 512),
    "input_patch_size": ("patch_size", -1),
    "conv_pos": ("conv_pos", 128),
    "conv_pos_groups": ("conv_pos_groups", 16),
    "num_buckets": ("num_buckets", 320),
    "max_distance": ("max_distance", 1280),
    "deep_norm": ("deep_norm", False),
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "predictor_dropout": ("classifier_dropout", 0.1),
}
# Options of the published code that none of its checkpoints uses otherwise: value needed, default where left out.
REQUIRED: dict[str, tuple[object, object]] = {
    "layer_norm_first": (False, False),
    "conv_bias": (False, False),
    "relative_position_embedding": (True, False),
    "gru_rel_pos": (True, False),
}
ACTIVATIONS = {"gelu": "gelu", "gelu_accurate": "gelu_pytorch_tanh", "relu": "relu", "tanh": "tanh", "linear": "linear"}

WEIGHT_NORM = "position_convolution.convolution.parametrizations.weight"
# Tensor names, tried in order; the first pattern that matches a whole name is applied.
TENSOR_NAMES: tuple[tuple[str, str], ...] = (
    (r"patch_embedding\.(weight)", r"patch_embedding.convolution.\1"),
    (r"layer_norm\.(weight|bias)", r"patch_embedding.layer_norm.\1"),
    (r"post_extract_proj\.(weight|bias)", r"patch_embedding.projection.\1"),
    (r"encoder\.pos_conv\.0\.bias", r"position_convolution.convolution.bias"),
    (r"encoder\.pos_conv\.0\.weight_g", f"{WEIGHT_NORM}.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", f"{WEIGHT_NORM}.original1"),
    (r"encoder\.pos_conv\.0\.parametrizations\.weight\.(original[01])", rf"{WEIGHT_NORM}.\1"),  # saved by new torch
    (r"encoder\.layer_norm\.(weight|bias)", r"layer_norm.\1"),
    (r"encoder\.layers\.\d+\.self_attn\.relative_attention_bias\.weight", r"relative_position_bias.weight"),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_linear\.(weight|bias)", r"layers.\1.attention.gate_proj.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_a", r"layers.\1.attention.gate_scale"),
    (r"encoder\.layers\.(\d+)\.self_attn\.(\w+_proj)\.(weight|bias)", r"layers.\1.attention.\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(weight|bias)", r"layers.\1.intermediate.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(weight|bias)", r"layers.\1.output.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(weight|bias)", r"layers.\1.output_norm.\2"),
    (r"predictor\.(weight|bias)", r"classifier.\1"),
)

CARD = """---
{metadata}
---

# {name}

BEATs audio encoder (Chen et al. 2022, [arXiv 2212.09058](https://arxiv.org/abs/2212.09058)), converted from the
published checkpoint `{source}` by LiSTEN's `examples/convert_beats.py`. The weights are unchanged.

```python
from listen import ListenFeatureExtractor  # LiSTEN registers BEATs with transformers
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}")
features = ListenFeatureExtractor()(waveform, sampling_rate=16000)  # (samples,) floats in [-1, 1], or a list of those
output = model(features["input_values"], features["input_values_mask"])
```

{parameters:,} parameters, {layers} layers, width {width}. Input: Kaldi log-mel filter banks of 16 kHz audio, 128 bins,
normalised, in rows of at most 30 s. Output: {output}.
"""


def convert_config(published: dict, labels: object = None) -> BeatsConfig:
    """`BeatsConfig` for the published configuration, with the labels of a fine-tuned checkpoint.

    Raises:
        ConversionError: the configuration asks for an architecture that no published checkpoint has.
    """
    for name, (needed, default) in REQUIRED.items():
        if bool(published.get(name, default)) != needed:
            raise ConversionError(f"cfg.{name}={published.get(name, default)!r} is not supported, {needed} is needed.")
    activation = published.get("activation_fn", "gelu")
    if activation not in ACTIVATIONS:
        raise ConversionError(f"cfg.activation_fn={activation!r} is not supported; one of {sorted(ACTIVATIONS)} is.")
    values = {ours: published.get(name, default) for name, (ours, default) in CONFIG_NAMES.items()}
    try:
        if published.get("finetuned_model", False):
            values["id2label"] = label_names(published.get("predictor_class", 527), labels)
            values["label2id"] = {name: index for index, name in values["id2label"].items()}
            values["problem_type"] = "multi_label_classification"
        return BeatsConfig(hidden_act=ACTIVATIONS[activation], **values)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"cfg is inconsistent: {error}") from error


def label_names(num_labels: int, labels: object) -> dict[int, str]:
    """The labels of a fine-tuned checkpoint; numbers where they are not one for each class, by its index."""
    indices = [str(index) for index in range(num_labels)]
    if isinstance(labels, dict) and {str(index) for index in labels} == set(indices):
        return {int(index): str(name) for index, name in labels.items()}
    return {int(index): f"LABEL_{index}" for index in indices}


def convert_weights(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names of `BeatsForAudioClassification` without its prefix `beats.`.

    Raises:
        ConversionError: a name is unknown, an entry is no tensor, or layers disagree on the position bias they share.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in published.items():
        ours = rename(str(name))
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"model[{name!r}] is a {type(tensor).__name__}, a tensor is needed.")
        if ours in weights and not torch.equal(weights[ours], tensor):
            raise ConversionError(f"{name} differs from layer 0's, but the layers share one relative position bias.")
        weights[ours] = tensor
    return weights


def rename(name: str) -> str:
    """Our name of a published tensor."""
    for pattern, replacement in TENSOR_NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    hint = " (a BEATs tokenizer is not the encoder)" if "quantize" in name or "embed_ema" in name else ""
    raise ConversionError(f"Tensor {name!r} belongs to no BEATs encoder{hint}.")


def load_weights(model: BeatsModel | BeatsForAudioClassification, weights: dict[str, torch.Tensor]) -> None:
    """Put the tensors into the model.

    Raises:
        ConversionError: a tensor is missing, superfluous, of another shape, or not finite.
    """
    if isinstance(model, BeatsForAudioClassification):
        weights = {name if name.startswith("classifier.") else f"beats.{name}": t for name, t in weights.items()}
    check_tensors(weights, model.state_dict())
    model.load_state_dict(weights)


def write_card(folder: Path, source: Path, model: BeatsModel | BeatsForAudioClassification) -> None:
    """Short model card that names the source of the weights; no pipeline makes the inputs, so it names none."""
    auto_class, output = "AutoModel", "50 tokens a second"
    if isinstance(model, BeatsForAudioClassification):
        auto_class = "AutoModelForAudioClassification"
        output = (
            f"logits of {model.config.num_labels} labels, of which several may hold; their sigmoid is a probability"
        )
    card = CARD.format(
        metadata=ModelCardData(license="mit", tags=["beats", "audio"]).to_yaml(),
        name=folder.name,
        source=source.name,
        auto_class=auto_class,
        output=output,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def convert(source: Path, folder: Path) -> BeatsModel | BeatsForAudioClassification:
    """Read the published file `source`, write `folder`, return the model."""
    checkpoint = read_checkpoint(source, ("cfg", "model"))
    config = convert_config(checkpoint["cfg"], checkpoint.get("label_dict"))
    model_class = BeatsForAudioClassification if checkpoint["cfg"].get("finetuned_model", False) else BeatsModel
    model = model_class(config).eval()
    load_weights(model, convert_weights(checkpoint["model"]))
    model.save_pretrained(folder)
    write_card(folder, source, model)
    return model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ArgumentFormatter)
    parser.add_argument("source", type=Path, help="published checkpoint, e.g. BEATs_iter3_plus_AS2M.pt")
    parser.add_argument("output", type=Path, help="folder to write")
    arguments = parser.parse_args()
    try:
        model = convert(arguments.source, arguments.output)
    except (ConversionError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters written to {arguments.output}")
