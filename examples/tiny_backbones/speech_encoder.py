"""The miniature speech encoder: Whisper's architecture, taught to name word and accent in every frame.

Whisper itself learns by transcribing with a decoder. Word times are free here, and frame labels learn much faster.
"""

from __future__ import annotations

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import trange
from transformers import WhisperConfig

from listen.data.corpus.grammar import spoken_words
from listen.data.corpus.speakers import ACCENTS
from listen.modeling_speech_encoder import ListenWhisperEncoder
from tiny_backbones.clips import FRAME_SECONDS, SpeechClips, length_batches, pad_features
from tiny_backbones.language_model import cosine_schedule

WORDS = ("", *spoken_words())  # the first label is silence
ACCENT_WEIGHT = 0.1


def make_speech_encoder() -> ListenWhisperEncoder:
    """Return an untrained Whisper encoder of about 1.1 M parameters."""
    config = WhisperConfig(
        num_mel_bins=80, d_model=128, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=512,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=128, max_source_positions=1500,
        dropout=0.0, vocab_size=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return ListenWhisperEncoder(config)


def frame_labels(clips: SpeechClips, index: int, length: int) -> torch.Tensor:
    """Word labels (length,) of the 20 ms frames of clip `index`; silence outside words."""
    labels = torch.zeros(length, dtype=torch.long)
    words = clips.plans[index].sentence.words
    for word, (start, end) in zip(words, clips.word_times[index], strict=True):
        labels[round(start / FRAME_SECONDS) : round(end / FRAME_SECONDS)] = WORDS.index(word)
    return labels


def train_speech_encoder(
    encoder: ListenWhisperEncoder, clips: SpeechClips, held_out: SpeechClips, seed: int, steps: int = 2400,
    batch_size: int = 32, learning_rate: float = 1.5e-3, report_every: int = 400,
) -> dict[str, float]:  # fmt: skip
    """Train `encoder` in place and return its word error rate from collapsed frame labels on `held_out`."""
    torch.manual_seed(seed)
    head = nn.Linear(encoder.config.d_model, len(WORDS) + len(ACCENTS))
    parameters = [p for p in [*encoder.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_schedule(step, steps, warmup=200))
    batches = length_batches([len(row) for row in clips.features], batch_size, np.random.default_rng(seed))
    bar = trange(steps, desc="speech encoder")
    encoder.train()
    for step in bar:
        indices = next(batches)
        loss = frame_loss(encoder, head, clips, indices)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % report_every == 0:
            bar.write(
                f"step {step + 1} loss {loss.item():.3f} WER {frame_word_error_rate(encoder, head, held_out):.3f}"
            )
    encoder.eval()
    return {"frame_wer": frame_word_error_rate(encoder, head, held_out)}


def frame_loss(encoder: ListenWhisperEncoder, head: nn.Linear, clips: SpeechClips, indices: np.ndarray) -> torch.Tensor:
    """Cross-entropy of the words, and a little of the speaker's accent, over all real frames."""
    features, mask = pad_features([clips.features[index] for index in indices])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = encoder(features.transpose(1, 2), mask).last_hidden_state  # (batch, frames / 2, dim)
        logits = head(hidden)
    labels = torch.stack([frame_labels(clips, index, hidden.shape[1]) for index in indices])
    accents = torch.tensor([list(ACCENTS).index(clips.plans[index].speaker.accent) for index in indices])
    real = encoder.output_mask(mask)
    words, accent_logits = logits[real].float().split([len(WORDS), len(ACCENTS)], dim=-1)
    accent_labels = accents[:, None].expand(real.shape)[real]
    word_loss = F.cross_entropy(words, labels[real], label_smoothing=0.05)
    return word_loss + ACCENT_WEIGHT * F.cross_entropy(accent_logits, accent_labels)


@torch.no_grad()
def frame_word_error_rate(encoder: ListenWhisperEncoder, head: nn.Linear, clips: SpeechClips) -> float:
    """Word error rate when runs of one label are merged and silence dropped: no language model helps."""
    encoder.eval()
    references, guesses = [], []
    for start in range(0, len(clips.features), 32):
        features, mask = pad_features(clips.features[start : start + 32])
        labels = head(encoder(features.transpose(1, 2), mask).last_hidden_state)[..., : len(WORDS)].argmax(-1)
        for row, real in zip(labels, encoder.output_mask(mask), strict=True):
            merged, runs = torch.unique_consecutive(row[real], return_counts=True)
            guesses.append(" ".join(WORDS[label] for label, run in zip(merged, runs, strict=True) if label and run > 2))
        references += [plan.sentence.text for plan in clips.plans[start : start + 32]]
    encoder.train()
    return jiwer.wer(references, guesses)
