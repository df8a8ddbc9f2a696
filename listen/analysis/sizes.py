"""What a model costs before it is built: parameters, memory and FLOPs, by module. `examples/sizes.py` prints them.

Backbones are built of fake tensors, which have shapes and no memory; nothing is downloaded. The adapter, whose shapes
depend on masks, runs on zeros. One sample is run through every part and multiplied by the batch.

Parameters: each counted once, tied ones too; Whisper without its decoder. Trainable ones take float32, frozen ones
`dtype`. While training, each trainable parameter has a gradient and the two moments of AdamW beside it, 12 bytes.

FLOPs: those of matrix products and convolutions as `torch.utils.flop_counter` counts them, 2 for a multiply-add; of a
mixture of experts, those of the experts that a position is routed to.

Cache: for each layer `2 * kv heads * head width * min(positions, window) * bytes of a number`, taken from the cache
that the LLM itself fills, with its states where it has other layers; 0 for an LLM without a cache, which recomputes all
positions for each token.

Activations: bytes of the tensors that autograd keeps for the backward pass from the answer to the adapter, parameters
left out. Attention runs in its plain form; fused kernels keep less, and gradient checkpointing far less.

A LoRA is counted among the parameters, not in FLOPs and activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..adapter_listen import ListenAdapter
from ..configuration_listen import BACKBONES
from ..language_models_listen import embedded_inputs
from ..modeling_listen import ListenForConditionalGeneration
from ..processing_listen import feature_extractor_for

_TRAINING_BYTES = 12  # of a trainable parameter: gradient and two moments of AdamW, float32


@dataclass
class Cost:
    """What one part costs in one pass over one sample.

    Attributes:
        forward_flops: of the forward pass.
        training_flops: of forward and backward pass.
        kept_bytes: what autograd keeps in between.
    """

    forward_flops: int = 0
    training_flops: int = 0
    kept_bytes: int = 0


@dataclass
class ModuleSizes:
    """Parameters of one part of the model.

    Attributes:
        parameters: how many.
        learned: how many of them are trainable.
        bytes: memory of all.
    """

    parameters: int = 0
    learned: int = 0
    bytes: int = 0


@dataclass
class Sizes:
    """Sizes of a model for a batch.

    Attributes:
        modules: parameters of each part.
        batch_size: samples.
        audio_seconds: audio of each.
        positions: of each in the LLM: prompts, audio embeddings and text.
        num_prompts: prompts among them.
        num_audio: audio embeddings among them.
        weight_bytes: parameters of all parts.
        training_state_bytes: gradients and moments of the trainable parameters.
        cache_bytes: the LLM's cache for all positions of the batch.
        activation_bytes: kept for the backward pass of the batch.
        flops_per_audio_second: of each encoder and the adapter, for a second of audio.
        flops_per_position: of the LLM over the whole input, for each of its positions.
        flops_per_new_token: of the LLM for one more token after the input.
        forward_flops: of the batch.
        training_flops: of the batch, forward and backward.
    """

    modules: dict[str, ModuleSizes]
    batch_size: int
    audio_seconds: float
    positions: int
    num_prompts: int
    num_audio: int
    weight_bytes: int = 0
    training_state_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0
    flops_per_audio_second: dict[str, float] = field(default_factory=dict)
    flops_per_position: float = 0.0
    flops_per_new_token: float = 0.0
    forward_flops: int = 0
    training_flops: int = 0


def measure_sizes(
    config: PreTrainedConfig,
    batch_size: int = 1,
    audio_seconds: float = 30.0,
    text_tokens: int = 64,
    dtype: torch.dtype | None = None,
    lora: dict[str, Any] | None = None,
) -> Sizes:
    """Count a model's parameters, memory and FLOPs.

    Args:
        config: a `ListenConfig`.
        batch_size: samples of a batch.
        audio_seconds: audio of each sample, one clip.
        text_tokens: tokens of its text, question and answer.
        dtype: type of the frozen backbones; that of the LLM's config by default.
        lora: arguments of `peft.LoraConfig` for a LoRA on the LLM; the config's by default.

    Raises:
        ValueError: a size that is not positive, or an LLM of experts in another type than bfloat16.
    """
    for name, value in (("batch_size", batch_size), ("audio_seconds", audio_seconds), ("text_tokens", text_tokens)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0")
    dtype = dtype or getattr(config.text_config, "dtype", None) or torch.float32
    fake = FakeTensorMode()
    with fake:
        model = _build(config, dtype)
    chunks, frames = _encode(model, config, audio_seconds, fake)
    adapter, num_audio = _adapt(config, frames)
    num_prompts = config.prompt_pool_config.num_prompts if config.prompt_pool_config is not None else 0
    sizes = Sizes(_modules(model), batch_size, audio_seconds, 0, num_prompts, num_audio)
    if lora or config.lora_config:
        sizes.modules["lora"] = _count_lora(config, lora or config.lora_config)
    sizes.positions = num_prompts + num_audio + text_tokens
    with fake:
        text = _cost(model, lambda: _logits(model, sizes.positions), trainable=True)
        sizes.cache_bytes, sizes.flops_per_new_token = _continue(model, sizes.positions)
    parts = {**chunks, "adapter": adapter, "language_model": text}
    _fill(sizes, parts)
    return sizes


def _modules(model: ListenForConditionalGeneration) -> dict[str, ModuleSizes]:
    """Parameters of the backbones, the connector and the pool of a model with one adapter."""
    modules = {}
    for name, (learned, total) in model.parameter_counts().items():
        module = model.get_submodule(name if name in BACKBONES else f"adapters.{name}")
        size = sum(parameter.nbytes for parameter in module.parameters())
        modules[name.rpartition(".")[2]] = ModuleSizes(total, learned, size)
    return modules


def _count_lora(config: PreTrainedConfig, lora: dict[str, Any]) -> ModuleSizes:
    from peft import LoraConfig, inject_adapter_in_model

    with torch.device("meta"), no_init_weights():
        model = inject_adapter_in_model(LoraConfig(**lora), AutoModelForCausalLM.from_config(config.text_config))
    number = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    return ModuleSizes(number, number, number * torch.float32.itemsize)


# ---------------------------------------------------------------------- running the parts


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> ListenForConditionalGeneration:
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    for name, section in BACKBONES.items():
        backbone = getattr(config, section)
        if backbone is not None:
            backbone.dtype = torch.float32 if name in config.trainable else dtype  # trainable parameters are float32
    with no_init_weights():
        model = ListenForConditionalGeneration(config)
    if dtype != torch.bfloat16 and any(name.endswith(".experts") for name, _ in model.named_modules()):
        raise ValueError(f"an LLM of experts is measured in bfloat16, not {dtype}; pass dtype=torch.bfloat16 (--dtype)")
    model.language_model.tie_weights()  # left out together with the initial values
    return model.eval()


def _encode(
    model: ListenForConditionalGeneration, config: PreTrainedConfig, seconds: float, fake: FakeTensorMode
) -> tuple[dict[str, Cost], list[tuple[int, dict[str, tuple[int, ...]]]]]:
    """Costs of the encoders; how often each length of chunk occurs, and the shapes of its frames."""
    extractor = feature_extractor_for(config)
    lengths = extractor.chunk_lengths(max(round(seconds * extractor.sampling_rate), 1))
    costs = {name: Cost() for name in ("speech_encoder", "audio_encoder") if getattr(model, name) is not None}
    frames = []
    for length in dict.fromkeys(lengths):
        features = extractor(torch.zeros(length).numpy(), sampling_rate=extractor.sampling_rate)
        inputs = dict(zip(costs, (features["input_features"], features.get("input_values")), strict=False))
        shapes = {}
        with fake:
            for name, cost in costs.items():
                encoder = getattr(model, name)
                given = torch.zeros(inputs[name].shape, dtype=encoder.dtype)
                run = partial(_states, encoder, given)
                _add(cost, _cost(model, run, trainable=name in config.trainable), lengths.count(length))
                with torch.no_grad():
                    shapes[name] = tuple(run().shape)
        frames.append((lengths.count(length), shapes))
    return costs, frames


def _states(encoder: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return encoder(inputs, None).last_hidden_state


def _adapt(config: PreTrainedConfig, frames: list[tuple[int, dict[str, tuple[int, ...]]]]) -> tuple[Cost, int]:
    """Cost of connector and pool, and the audio embeddings that come out."""
    total, embeddings = Cost(), 0
    with no_init_weights():
        adapter = ListenAdapter(config, config.connector_config, config.prompt_pool_config).float().eval()
    for part in adapter.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    for parameter in adapter.parameters():
        nn.init.zeros_(parameter)
    for times, shapes in frames:
        streams = [value for shape in shapes.values() for value in (torch.zeros(shape), torch.ones(shape[:2]))]
        with torch.no_grad():
            embeddings += times * len(adapter.connector(*streams)[0])
        _add(total, _cost(adapter, lambda s=streams: adapter.connector(*s)[0], trainable=True), times)
    pool = adapter.prompt_pool
    if pool is not None:
        query = torch.zeros(1, config.text_width)
        counts, tasks = torch.tensor([pool.config.num_prompts]), torch.zeros(1, dtype=torch.long)
        tasks = tasks if pool.config.strategy == "task" else None
        _add(total, _cost(adapter, lambda: pool(query, counts, tasks)[0], trainable=True), 1)
    return total, embeddings


def _logits(model: ListenForConditionalGeneration, positions: int) -> torch.Tensor:
    """Logits of the LLM over embeddings that ask for a gradient, as prompts and audio do."""
    return model.language_model(**_positions(model, positions), use_cache=False).logits


@torch.no_grad()
def _continue(model: ListenForConditionalGeneration, positions: int) -> tuple[int, int]:
    """Bytes of the cache after so many positions, and FLOPs of the token that follows."""
    cache = model.language_model(**_positions(model, positions), use_cache=True).get("past_key_values")
    size, unread = (0, positions + 1) if cache is None else (cache_bytes(cache), 1)
    with _counter() as counter:
        model.language_model(**_positions(model, unread), **({"past_key_values": cache} if cache is not None else {}))
    return size, counter.get_total_flops()


def _positions(model: ListenForConditionalGeneration, number: int) -> dict[str, torch.Tensor]:
    """What the LLM reads where a prompt or audio embedding stands at each of so many positions."""
    width, dtype = model.config.text_width, model.language_model.dtype
    embeds = torch.zeros(1, number, width, dtype=dtype, requires_grad=True)
    ids = torch.zeros(1, number, dtype=torch.long)
    return embedded_inputs(model.language_model, ids, ids == 0, embeds)


def _counter() -> FlopCounterMode:
    """One that knows the products of experts too, of which torch's has no formula."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops})


def _grouped_flops(rows: torch.Size, matrices: torch.Size, *_: Any, **__: Any) -> int:
    """`(rows, in)` with `(experts, in, out)`: each row meets one expert."""
    return 2 * rows[0] * rows[1] * matrices[-1]


def cache_bytes(cache: Any) -> int:
    """Memory of all tensors in the layers of a transformers `Cache`: keys, values, and states of linear attention."""
    fields = [field for layer in cache.layers for field in vars(layer).values()]
    values = [value for field in fields for value in (field.values() if isinstance(field, dict) else [field])]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _cost(module: nn.Module, run: Callable[[], torch.Tensor], trainable: bool) -> Cost:
    """Cost of `run`, whose tensors come from `module`; its backward pass too where a gradient goes through it."""
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = tensor  # held, so that no other storage gets its address
        return tensor

    with _counter() as counter, torch.set_grad_enabled(trainable):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = run()
        forward = counter.get_total_flops()
        if trainable:
            result.float().sum().backward()
    module.zero_grad()
    return Cost(forward, counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def _add(total: Cost, part: Cost, times: int) -> None:
    total.forward_flops += times * part.forward_flops
    total.training_flops += times * part.training_flops
    total.kept_bytes += times * part.kept_bytes


def _fill(sizes: Sizes, parts: dict[str, Cost]) -> None:
    """Sums over modules and parts, for the batch."""
    batch, modules = sizes.batch_size, sizes.modules.values()
    sizes.weight_bytes = sum(entry.bytes for entry in modules)
    sizes.training_state_bytes = _TRAINING_BYTES * sum(entry.learned for entry in modules)
    sizes.cache_bytes *= batch
    sizes.activation_bytes = batch * sum(cost.kept_bytes for cost in parts.values())
    sizes.forward_flops = batch * sum(cost.forward_flops for cost in parts.values())
    sizes.training_flops = batch * sum(cost.training_flops for cost in parts.values())
    sizes.flops_per_position = parts["language_model"].forward_flops / sizes.positions
    audio = {name: cost for name, cost in parts.items() if name != "language_model"}
    sizes.flops_per_audio_second = {n: cost.forward_flops / sizes.audio_seconds for n, cost in audio.items()}
