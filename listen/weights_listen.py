"""The weight files of a checkpoint: which they are, and whether they hold what can be a weight."""

from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

_FLOATS = {"F64", "F32", "F16", "BF16"}


def check_weights(source: str, state: dict[str, torch.Tensor], files: list[str]) -> None:
    """Refuse weights that are no floats in a checkpoint's files, or not finite once they are loaded.

    Args:
        source: The checkpoint.
        state: Weights of the model, of which those in the files are read.
        files: Its weight files.

    Raises:
        ValueError: such a weight; the message names it.
    """
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                weight = state.get(key)
                if weight is None or not weight.is_floating_point() or weight.element_size() == 1:
                    continue
                dtype = opened.get_slice(key).get_dtype()
                if dtype not in _FLOATS:
                    raise ValueError(f"{source!r}: the weight {key} is of type {dtype}, not a float; save it again")
                if weight.device.type == "meta" or not weight.numel():
                    continue
                if not torch.stack(weight.aminmax()).isfinite().all():  # NaN counts; no tensor of that size is made
                    raise ValueError(
                        f"{source!r}: the weight {key} holds values that are not finite (in {weight.dtype}); take an "
                        "earlier checkpoint, or load it in a wider dtype"
                    )


def weight_files(source: str, variant: str | None = None, **hub: Any) -> list[str]:
    """Paths of a checkpoint's safetensors files: one, or its shards.

    Args:
        source: Folder or Hub id.
        variant: As of `from_pretrained`: the files are named `model.<variant>.safetensors`.
        **hub: As of `cached_file`.

    Raises:
        ValueError: there are none.
    """
    middle = f".{variant}" if variant else ""
    single, index = f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"
    for name in (single, index):
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
        if found is not None:
            return [found] if name == single else get_checkpoint_shard_files(source, found, **hub)[0]
    raise ValueError(f"{source!r} holds neither {single} nor {index}; name a checkpoint, or the variant that it has")


__all__ = ["check_weights", "weight_files"]
