"""How much of the device training uses: tokens per second, FLOPs against a matrix product, and where the time goes."""

from __future__ import annotations

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from .harness import Figure, rate_figure
from .models import Setting
from .training import Step, bare_step, listen_step, response_length

LISTED = 10  # operations of a profile
PRODUCTS = 8  # matrix products of a run


def utilisation(setting: Setting) -> list[Figure]:
    """Tokens per second and model FLOPs utilisation of training: 4 * N * T against a matrix product in the same dtype.

    T positions pass N weights of the frozen LLM, with two FLOPs each in the forward pass and two in the backward pass
    through its activations. The head's weights count at the positions of the response alone. Attention scores,
    connector, pool and encoders are not counted.
    """
    options, model = setting.options, setting.model.train()
    audio = setting.audio(options.batch, options.seconds)
    inputs, encoded, kept = setting.inputs(audio), setting.encoded(audio), response_length(setting) + 1
    product, product_flops = matrix_products(setting)
    stored, onthefly, bare, products = setting.compare(
        stored=listen_step(setting, {**inputs, **encoded}, kept),
        onthefly=listen_step(setting, {**inputs, **audio}, kept),
        bare=bare_step(setting, model.language_model, inputs),
        products=product,
    )
    positions = inputs["input_ids"].numel()
    work, most = training_flops(setting, positions, options.batch * kept) / 1e12, product_flops / 1e12
    steps = {"stored": stored, "encoders": onthefly, "bare": bare}
    flops = [rate_figure(f"utilisation.{n}", work, s, most, products, "TFLOP/s", 0.5) for n, s in steps.items()]
    return [*flops, rate_figure("utilisation.tokens", positions, stored, positions, bare, "tokens/s")]


def training_flops(setting: Setting, positions: int, head_positions: int) -> int:
    """4 * N * T of a training step: the layers at all positions, the head at those whose logits are computed."""
    language_model = setting.model.language_model
    embeddings = language_model.get_input_embeddings().weight.numel()
    layers = sum(weight.numel() for weight in language_model.base_model.parameters()) - embeddings
    return 4 * (layers * positions + language_model.get_output_embeddings().weight.numel() * head_positions)


def matrix_products(setting: Setting) -> tuple[Step, int]:
    """Products of square matrices in the LLM's dtype, large enough for the device, and their FLOPs."""
    size = 8192 if setting.device != "cpu" else 1024
    dtype = setting.model.language_model.dtype
    left, right = torch.randn(2, size, size, device=setting.device).to(dtype)  # (size, size) each

    def step() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, right)

    return step, PRODUCTS * 2 * size**3


def profile(setting: Setting) -> list[Figure]:
    """The ten operations that take most of a training step with stored features, as shares of the whole."""
    options = setting.options
    setting.model.train()
    audio = setting.audio(options.batch, options.seconds)
    step = listen_step(setting, {**setting.inputs(audio), **setting.encoded(audio)}, response_length(setting) + 1)
    step()  # sets up kernels
    on_gpu = setting.device != "cpu"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiled:
        step()
        if on_gpu:
            torch.cuda.synchronize(setting.device)
    taken = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # kernels have events of their own too, but count for the operation that started them
    events = [event for event in profiled.key_averages() if event.device_type == DeviceType.CPU]
    seconds = {event.key: getattr(event, taken) / 1e6 for event in events}
    whole, largest = sum(seconds.values()), sorted(seconds, key=seconds.__getitem__, reverse=True)[:LISTED]
    shares = {name: seconds[name] / whole for name in largest if seconds[name]}
    return [Figure(f"profile.{n}", seconds[n], whole, share, share, share) for n, share in shares.items()]
