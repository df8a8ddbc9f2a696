"""Make the frozen parts of the miniature stack from the built-in corpus alone, in under an hour of CPU time.

    python examples/build_tiny_backbones.py --output model_cards/listen-tiny/backbones

Writes a tokenizer and a Llama whose skills prompts unlock (`language_model`), a Whisper encoder (`speech_encoder`), a
BEATs (`audio_encoder`), and `build.json` with scores and CPU seconds. Only training speakers and
training sentences are used; scores are on dev speakers and sentences. Weights are kept in float16.

The LLM of `model_cards/speech-emotion-miniature`, which knows the tasks by their instructions, is built by:

    python examples/build_tiny_backbones.py --parts aligned_language_model \
        --output model_cards/speech-emotion-miniature/backbones
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_backbones.aligned_text import AlignedExampleWriter
from tiny_backbones.audio_encoder import make_audio_encoder, train_audio_encoder
from tiny_backbones.clips import SceneClips, SpeechClips, make_scene_clips, make_speech_clips
from tiny_backbones.language_model import make_language_model, score_language_model, train_language_model
from tiny_backbones.latent_text import LatentExampleWriter, header_words
from tiny_backbones.soft_text import ExampleWriter, measure_durations
from tiny_backbones.speech_encoder import make_speech_encoder, train_speech_encoder
from tiny_backbones.tokenizer import build_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PARTS = ("language_model", "speech_encoder", "audio_encoder")  # those of model_cards/listen-tiny
DEV_SEED_OFFSET = 1000  # dev clips are drawn from another stream than training clips


def main() -> None:
    """Build the parts that the command line asks for."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    record_path = options.output / "build.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {}
    for part in options.parts:
        started = cpu_seconds()
        scores = BUILDERS[part](options)
        scores = {name: round(score, 4) for name, score in scores.items()}
        record[part] = {"seed": options.seed, "cpu_seconds": round(cpu_seconds() - started), "dev_scores": scores}
        record_path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"{part}: {record[part]}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards/listen-tiny/backbones"))
    parser.add_argument("--parts", nargs="+", choices=list(BUILDERS), default=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; one is best for models of this size")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes that render audio")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies clips and steps; small for a trial run")
    return parser.parse_args()


def build_language_model(options: argparse.Namespace) -> dict[str, float]:
    """Tokenizer and Llama with latent skills."""
    return build_llama(options, LatentExampleWriter, build_tokenizer(header_words()), steps=(2000, 1200))


def build_aligned_language_model(options: argparse.Namespace) -> dict[str, float]:
    """Tokenizer and Llama that knows the tasks, those of behavioural alignment included, by their instructions."""
    return build_llama(options, AlignedExampleWriter, build_tokenizer(), steps=(2400, 1500))


def build_llama(
    options: argparse.Namespace,
    make_writer: type[ExampleWriter],
    tokenizer: PreTrainedTokenizerFast,
    steps: tuple[int, int],
) -> dict[str, float]:
    """Train a Llama on what `make_writer` draws, in two runs of so many steps."""
    torch.manual_seed(options.seed)
    model = eager(make_language_model(tokenizer))
    durations = measure_durations(seed=options.seed, num_workers=options.workers)
    for seed, count, learning_rate in zip((options.seed, options.seed + 100), steps, (2e-3, 1.2e-3), strict=True):
        train_language_model(
            model, tokenizer, durations, seed, scaled(count, options), learning_rate,
            easy_start=seed == options.seed, make_writer=make_writer,
        )  # fmt: skip
    scores = score_language_model(model, tokenizer, durations, seed + 2, examples_per_task=400, make_writer=make_writer)
    save(model, options.output / "language_model")
    tokenizer.save_pretrained(options.output / "language_model")
    return scores


def build_speech_encoder(options: argparse.Namespace) -> dict[str, float]:
    """Whisper's encoder."""
    torch.manual_seed(options.seed)
    encoder = eager(make_speech_encoder())
    clips = speech_clips("train", scaled(14000, options), options)
    held_out = speech_clips("dev", 160, options)
    scores = train_speech_encoder(encoder, clips, held_out, options.seed, steps=scaled(2400, options))
    save(encoder, options.output / "speech_encoder")
    return scores


def build_audio_encoder(options: argparse.Namespace) -> dict[str, float]:
    """BEATs."""
    torch.manual_seed(options.seed)
    encoder = eager(make_audio_encoder())
    speech = speech_clips("train", scaled(9000, options), options), speech_clips("dev", 160, options)
    scenes = scene_clips("train", scaled(5000, options), options), scene_clips("dev", 160, options)
    scores = train_audio_encoder(encoder, speech, scenes, options.seed, steps=scaled(2600, options))
    save(encoder, options.output / "audio_encoder")
    return scores


BUILDERS = {
    "language_model": build_language_model,
    "speech_encoder": build_speech_encoder,
    "audio_encoder": build_audio_encoder,
    "aligned_language_model": build_aligned_language_model,
}


def speech_clips(split: str, count: int, options: argparse.Namespace) -> SpeechClips:
    """`count` utterances of the speakers and sentences of `split`."""
    seed = options.seed + (11 if split == "train" else DEV_SEED_OFFSET)
    return make_speech_clips(split, count, seed, options.workers)


def scene_clips(split: str, count: int, options: argparse.Namespace) -> SceneClips:
    """`count` sound scenes."""
    seed = options.seed + (11 if split == "train" else DEV_SEED_OFFSET)
    return make_scene_clips(count, seed, options.workers)


def scaled(count: int, options: argparse.Namespace) -> int:
    """`count` times the scale of a trial run."""
    return max(8, round(count * options.scale))


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """Use plain attention: on a CPU its bfloat16 backward is much faster than the fused one."""
    model.set_attn_implementation("eager")
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write `model` with float16 weights; its config asks for float32 when it is loaded."""
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {name: tensor.half().contiguous() for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main()
