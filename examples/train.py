"""Train a LiSTEN adapter.

One process:    python examples/train.py --config examples/configs/listen-llama3-8b.yaml
Eight GPUs:     accelerate launch --num_processes 8 examples/train.py --config examples/configs/listen-llama3-8b.yaml
Resume:         ... --training.resume
Override:       ... --training.learning_rate 1e-4 --model.prompt_pool.pool_size 200 --data.train my.jsonl

Arguments are those of `listen.training.arguments`. The run's folder (`--training.output_dir`) gets the checkpoints,
TensorBoard logs, what is needed to repeat the run, and the trained adapter under `model/`. A folder with results is
only written to by resuming its run. On SIGTERM the state is saved, and the exit status is 143.
"""

from __future__ import annotations

import signal
import sys

from transformers.utils import logging

from listen.data.files import FolderInUseError
from listen.training import ArgumentError, TrainingStopped, parse_arguments, train


def main() -> None:
    """Parse the command line, train, and print where the model is."""
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return
    logging.set_verbosity_info()
    try:
        run = parse_arguments(sys.argv[1:])
        result = train(run.model, run.data, run.training, raw=run.raw)
    except (ArgumentError, FolderInUseError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except TrainingStopped as stop:
        print(stop)
        sys.exit(128 + signal.SIGTERM)
    if run.training.should_save:
        print(f"model saved to {result.model_folder}")


if __name__ == "__main__":
    main()
