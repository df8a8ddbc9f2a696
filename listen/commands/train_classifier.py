"""Train a classifier of speech over a frozen encoder, such as the emotion classifier of a cascade.

    listen train-classifier --config examples/configs/speech_emotion/classifier.yaml
    listen train-classifier ... --data.train my.jsonl --data.label_field label --training.seed 1

Arguments are those of `listen.training.classifier_arguments`. The run's folder (`--training.output_dir`) gets the
logs, what is needed to repeat the run, and the classifier under `model/`, ready for `pipeline("audio-classification")`
and for `listen eval --cascade`.
"""

from __future__ import annotations

import signal
import sys

from transformers.utils import logging

from ..data import ManifestError
from ..data.files import FolderInUseError
from ..training import ArgumentError, TrainingStopped, parse_arguments
from ..training.classifier import train_classifier
from ..training.classifier_arguments import CLASSIFIER_SECTIONS
from ..training.help import answer_questions


def main() -> None:
    """Parse the command line, train, and print the scores on held-out rows."""
    logging.set_verbosity_info()
    try:
        answer_questions(sys.argv[1:], __doc__, CLASSIFIER_SECTIONS)
        run = parse_arguments(sys.argv[1:], CLASSIFIER_SECTIONS)
        result = train_classifier(run.model, run.data, run.training, raw=run.raw)
    except (ArgumentError, ManifestError, FolderInUseError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except TrainingStopped as stop:
        print(stop)
        sys.exit(128 + signal.SIGTERM)
    for name in ("accuracy", "uar"):
        if f"eval_{name}" in result.eval_metrics:
            print(f"{name}: {result.eval_metrics[f'eval_{name}']:.3f}")
    if run.training.should_save:
        print(f"model saved to {result.model_folder}")
