"""Run the frozen encoders over all training and evaluation audio once, and keep their features on disk.

    listen precompute --config examples/configs/listen-llama3-8b.yaml --data.features features/
    accelerate launch --num_processes 8 examples/precompute_features.py ...           # a process for each GPU
    listen precompute ... --verify                               # check a finished store

Training with the same `--data.features` then reads them in place of audio. The LLM is not loaded. An interrupted
run resumes where it stopped, and more data can be added to a store later. Any number of machines that share the folder
may run the same command: each claims one shard after another, without a connection between them. The
features of a recording whose file was replaced are computed again. `--verify` computes nothing: it checks that the
store holds every recording, and compares checksums of all features and digests of all audio files; the exit status is
1 if there is a problem. Takes the arguments of `listen train`: the
sections `model` and `data` are used, and from `training` `per_device_eval_batch_size`, `dataloader_num_workers` and
`num_threads`. Features take 16 bits per value: with Whisper-large and BEATs 0.2 MB per second of audio.
"""

from __future__ import annotations

import sys

import torch

from ..data import FeatureStore, FeatureStoreError, precompute_features
from ..data.features import recording_keys, store_info
from ..training import ArgumentError, RunArguments, build_encoders, parse_arguments
from ..training.datasets import build_eval_dataset, build_train_dataset
from ..training.help import answer_questions


def main() -> None:
    """Parse the command line and encode."""
    arguments = [word for word in sys.argv[1:] if word != "--verify"]
    try:
        answer_questions(arguments, __doc__)
        run = parse_arguments(arguments)
        if run.data.features is None:
            raise ArgumentError("name the folder for the features: --data.features DIR")
        if len(arguments) < len(sys.argv[1:]):
            verify(run)
        else:
            encode(run)
    except (ArgumentError, FeatureStoreError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def verify(run: RunArguments) -> None:
    """Check the store that the arguments name; exit with 1 if anything is wrong with it."""
    model, processor = build_encoders(run.model)
    store = FeatureStore(run.data.features)
    store.check(store_info(model, processor.feature_extractor, run.data.join_silence_seconds))
    seed = run.training.sampling_seed
    datasets = [build_train_dataset(run.data, seed), build_eval_dataset(run.data, seed)]
    rows = (row for dataset in datasets if dataset is not None for row in dataset.select_columns(["audio", "join"]))
    keys = dict.fromkeys(key for row in rows for key in recording_keys(row, store.folder))
    problems = [f"there are no features of {key!r}" for key in keys if key not in store] + store.verify()
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(f"{len(problems)} problems in {store.folder}")
    print(f"{len(store)} recordings in {store.folder} are complete")


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
