"""Run the frozen encoders over all training and evaluation audio once, and keep their features on disk.

    python examples/precompute_features.py --config examples/configs/listen-llama3-8b.yaml --data.features features/
    accelerate launch --num_processes 8 examples/precompute_features.py ...           # each process takes its share

Training with the same `--data.features` then reads them in place of audio. The LLM is not loaded. An interrupted
run resumes where it stopped; more data can be added to a store later. Takes the arguments of `examples/train.py`: the
sections `model` and `data` are used, and from `training` `per_device_eval_batch_size`, `dataloader_num_workers` and
`num_threads`. Features take 16 bits per value: with Whisper-large and BEATs 0.2 MB per second of audio.
"""

from __future__ import annotations

import sys

import torch

from listen.data import precompute_features
from listen.training import ArgumentError, RunArguments, build_encoders, parse_arguments
from listen.training.datasets import build_eval_dataset, build_train_dataset


def main() -> None:
    """Parse the command line and encode."""
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return
    try:
        run = parse_arguments(sys.argv[1:])
        if run.data.features is None:
            raise ArgumentError("name the folder for the features: --data.features DIR")
    except (ArgumentError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    encode(run)


def encode(run: RunArguments) -> None:
    """Encode training and evaluation data into the store that the arguments name."""
    if run.training.num_threads is not None:
        torch.set_num_threads(run.training.num_threads)
    model, processor = build_encoders(run.model)
    model.to(run.training.device)
    seed = run.training.sampling_seed
    datasets = [build_train_dataset(run.data, seed), build_eval_dataset(run.data, seed)]
    for dataset in datasets:
        if dataset is None:
            continue
        store = precompute_features(
            model,
            processor,
            dataset,
            run.data.features,
            batch_size=run.training.per_device_eval_batch_size,
            num_workers=run.training.dataloader_num_workers,
            join_silence_seconds=run.data.join_silence_seconds,
        )
        print(f"{len(store)} recordings in {run.data.features}")


if __name__ == "__main__":
    main()
