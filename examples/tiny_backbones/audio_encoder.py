"""The miniature audio encoder: BEATs' architecture, taught to name sounds, emotions and the attributes of voices.

BEATs itself learns without labels. Every token is asked for everything that is true of its clip or its moment, so that
each window of the connector finds it there.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import trange

from listen.configuration_beats import BeatsConfig
from listen.data.corpus.prosody import EMOTIONS
from listen.data.corpus.sounds import EVENTS
from listen.data.corpus.speakers import REGISTERS, SIZES, TIMBRES
from listen.modeling_beats import BeatsModel
from tiny_backbones.clips import FRAME_SECONDS, SceneClips, SpeechClips, emotion_index, length_batches, pad_features
from tiny_backbones.language_model import cosine_schedule

ATTRIBUTES = (tuple(REGISTERS), tuple(TIMBRES), tuple(SIZES))  # accents are left to the speech encoder
EVENT_LABELS = (*EVENTS, "speech")


def make_audio_encoder() -> BeatsModel:
    """Return an untrained BEATs of about 0.8 M parameters."""
    config = BeatsConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, patch_embed_dim=128,
        conv_pos=32, conv_pos_groups=4, num_buckets=64, max_distance=256, hidden_dropout=0.0, attention_dropout=0.0,
        classifier_dropout=0.0,
    )  # fmt: skip
    return BeatsModel(config)


class AudioHeads(nn.Module):
    """Linear classifiers on (..., dim) tokens: sound events (several may hold), emotion and three voice attributes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.events = nn.Linear(dim, len(EVENT_LABELS))
        self.voice = nn.ModuleList(nn.Linear(dim, len(names)) for names in (tuple(EMOTIONS), *ATTRIBUTES))


def voice_labels(clips: SpeechClips, index: int) -> list[int]:
    """Labels of clip `index` for emotion, register, timbre and size."""
    plan = clips.plans[index]
    attributes = zip(ATTRIBUTES, plan.speaker.attributes[:3], strict=True)
    return [emotion_index(plan), *(names.index(name) for names, name in attributes)]


def event_labels(spans: list[tuple[str, float, float]], length: int) -> torch.Tensor:
    """0/1 labels (length, events) of the tokens; eight tokens share a step of 0.16 s."""
    labels = torch.zeros(length, len(EVENT_LABELS))
    step = 8 * FRAME_SECONDS
    for event, start, end in spans:
        first, last = int(start / step + 0.5), max(int(end / step + 0.5), int(start / step + 0.5) + 1)
        labels[first * 8 : last * 8, EVENT_LABELS.index(event)] = 1.0
    return labels


def train_audio_encoder(
    encoder: BeatsModel, speech: tuple[SpeechClips, SpeechClips], scenes: tuple[SceneClips, SceneClips], seed: int,
    steps: int = 2600, batch_size: int = 24, learning_rate: float = 1.5e-3, report_every: int = 200,
) -> dict[str, float]:  # fmt: skip
    """Train `encoder` in place; of `speech` and `scenes` the first part is learned, the second scored and returned."""
    torch.manual_seed(seed)
    heads = AudioHeads(encoder.config.hidden_size)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_schedule(step, steps, warmup=200))
    rng = np.random.default_rng(seed)
    speech_batches = length_batches([len(row) for row in speech[0].fbanks], batch_size, rng)
    scene_batches = length_batches([len(row) for row in scenes[0].fbanks], batch_size, rng)
    bar = trange(steps, desc="audio encoder")
    encoder.train()
    for step in bar:
        if step % 3 < 2:
            loss = speech_loss(encoder, heads, speech[0], next(speech_batches))
        else:
            loss = scene_loss(encoder, heads, scenes[0], next(scene_batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % report_every == 0:
            scores = score_audio_encoder(encoder, heads, speech[1], scenes[1])
            bar.write(f"step {step + 1} loss {loss.item():.3f} " + " ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    encoder.eval()
    return score_audio_encoder(encoder, heads, speech[1], scenes[1])


def encode(encoder: BeatsModel, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (batch, tokens, dim) of filter banks and which of them are real (batch, tokens)."""
    values, mask = pad_features(rows)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = encoder(values, mask).last_hidden_state
    return hidden, encoder.output_mask(mask)


def speech_loss(encoder: BeatsModel, heads: AudioHeads, clips: SpeechClips, indices: np.ndarray) -> torch.Tensor:
    """Emotion and attributes from every token and from their mean; "speech" as the only event."""
    hidden, real = encode(encoder, [clips.fbanks[index] for index in indices])
    hidden = hidden.float()
    weights = real.float() / real.sum(1, keepdim=True)  # (batch, tokens)
    mean = torch.einsum("btd,bt->bd", hidden, weights)
    labels = torch.tensor([voice_labels(clips, index) for index in indices])  # (batch, 4)
    loss = hidden.new_zeros(())
    for head, label in zip(heads.voice, labels.unbind(1), strict=True):
        per_token = F.cross_entropy(head(hidden).transpose(1, 2), label[:, None].expand(real.shape), reduction="none")
        loss = loss + F.cross_entropy(head(mean), label) + (per_token * weights).sum(1).mean()
    target = torch.zeros(*real.shape, len(EVENT_LABELS))
    target[..., -1] = 1.0
    events = F.binary_cross_entropy_with_logits(heads.events(hidden)[real], target[real])
    return 0.5 * loss + 2.0 * events


def scene_loss(encoder: BeatsModel, heads: AudioHeads, clips: SceneClips, indices: np.ndarray) -> torch.Tensor:
    """The events that sound at every token."""
    hidden, real = encode(encoder, [clips.fbanks[index] for index in indices])
    target = torch.stack([event_labels(clips.spans[index], hidden.shape[1]) for index in indices])
    return 10.0 * F.binary_cross_entropy_with_logits(heads.events(hidden.float())[real], target[real])


@torch.no_grad()
def score_audio_encoder(
    encoder: BeatsModel, heads: AudioHeads, speech: SpeechClips, scenes: SceneClips
) -> dict[str, float]:
    """Accuracy of emotion and each attribute from the mean token, and F1 of the tokens' events."""
    encoder.eval()
    right = torch.zeros(4)
    for start in range(0, len(speech.fbanks), 32):
        indices = range(start, min(start + 32, len(speech.fbanks)))
        hidden, real = encode(encoder, [speech.fbanks[index] for index in indices])
        mean = (hidden.float() * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        labels = torch.tensor([voice_labels(speech, index) for index in indices])
        guesses = torch.stack([head(mean).argmax(-1) for head in heads.voice], dim=1)
        right += (guesses == labels).sum(0)
    names = ("emotion", "register", "timbre", "size")
    scores = dict(zip(names, (right / len(speech.fbanks)).tolist(), strict=True))
    hits = torch.zeros(3)
    for start in range(0, len(scenes.fbanks), 32):
        hidden, real = encode(encoder, scenes.fbanks[start : start + 32])
        target = torch.stack([event_labels(spans, hidden.shape[1]) for spans in scenes.spans[start : start + 32]])[real]
        guess = (heads.events(hidden.float())[real] > 0).float()
        hits += torch.stack([(guess * target).sum(), guess.sum(), target.sum()])
    encoder.train()
    return scores | {"event_f1": (2 * hits[0] / (hits[1] + hits[2])).item()}
