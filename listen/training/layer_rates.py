"""Learning rates of their own: lower ones for the lower layers of a trainable encoder, and one for the prompt pool."""

from __future__ import annotations

import torch
from torch import nn

from .values import ArgumentError


def layer_rates(model: nn.Module, decay: float) -> dict[str, float]:
    """Share of the learning rate that each trainable parameter gets.

    The connector, the pool and LoRA weights get all of it. Of an encoder with n layers, layer i, counted from 0 at the
    input, gets `decay ** (n - i)`; what comes before the layers, such as the projection of its features, gets
    `decay ** (n + 1)`, the lowest; what comes after them gets the same as the last layer (as in ELECTRA, arXiv
    2003.10555, and BEiT).

    Args:
        model: a `ListenModel` with `config.learned_backbones`, or a wrapper of one.
        decay: factor from one layer to the one below it, in (0, 1].

    Returns:
        Name of each parameter that requires gradients -> its share.

    Raises:
        ArgumentError: no encoder is trainable, so the decay would have no effect.
    """
    owners = [module for module in model.modules() if hasattr(getattr(module, "config", None), "learned_backbones")]
    encoders = [getattr(owners[0], name) for name in owners[0].config.learned_backbones] if owners else []
    if not encoders:
        raise ArgumentError(
            f"training.layerwise_lr_decay={decay} has no layers to act on: no encoder is trainable; leave it at 1, or "
            "put speech_encoder into model.trainable"
        )
    steps = {parameter: depth for encoder in encoders for parameter, depth in _depths(encoder).items()}
    return {name: decay ** steps.get(p, 0) for name, p in model.named_parameters() if p.requires_grad}


def pool_rates(model: nn.Module, factor: float) -> dict[str, float]:
    """Share of the learning rate that each trainable parameter gets: `factor` for prompt pools, 1 for all others.

    Args:
        model: a `ListenModel`, or a wrapper of one.
        factor: learning rate of the pool as a multiple of the usual one.

    Raises:
        ArgumentError: no pool is trainable, so the factor would have no effect.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    rates = {name: factor if is_pool(name) else 1.0 for name in names}
    if factor != 1.0 and not any(map(is_pool, names)):
        raise ArgumentError(
            f"training.pool_lr_factor={factor} has no effect: no prompt pool is trainable; leave it out"
        )
    return rates


def is_pool(name: str) -> bool:
    """Whether this is the name of a parameter of a prompt pool."""
    return "prompt_pool" in name.split(".")


def split_by_rate(optimizer: torch.optim.Optimizer, model: nn.Module, rates: dict[str, float]) -> None:
    """Split every parameter group of a fresh optimiser into one group for each learning rate.

    Args:
        optimizer: one that has not made a step; the groups of share 1 come first, as the rate of the first is logged.
        model: the model whose parameters it holds.
        rates: share of the learning rate of each parameter, see `layer_rates`.
    """
    share = {parameter: rates[name] for name, parameter in model.named_parameters() if name in rates}
    groups, optimizer.param_groups = optimizer.param_groups, []
    for rate in sorted(set(rates.values()), key=lambda rate: (rate != 1.0, -rate)):
        for group in groups:
            chosen = [parameter for parameter in group["params"] if share[parameter] == rate]
            if chosen:
                optimizer.add_param_group({**group, "params": chosen, "lr": group["lr"] * rate})


def _depths(encoder: nn.Module) -> dict[nn.Parameter, int]:
    """Steps of decay of each parameter of an encoder."""
    layers = _layers(encoder)
    depths = {p: len(layers) - i for i, layer in enumerate(layers) for p in layer.parameters()}
    below = len(layers) + 1
    for parameter in encoder.parameters():
        if parameter in depths:
            below = 1  # after the layers: modules are in the order in which they were created
        else:
            depths[parameter] = below
    return depths


def _layers(encoder: nn.Module) -> nn.ModuleList:
    """The list with most parameters (the outer one of nested lists) among those of the length in the config."""
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ArgumentError(
            f"training.layerwise_lr_decay: {type(encoder).__name__} has no list of layers; leave the decay at 1"
        )
    depth = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    fitting = [layers for layers in lists if len(layers) == depth] or lists
    return max(fitting, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))
