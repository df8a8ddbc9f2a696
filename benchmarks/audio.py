"""The front end and the encoders against their public counterparts."""

from __future__ import annotations

import numpy as np
import torch
from transformers import ASTFeatureExtractor, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from listen.configuration_beats import BeatsConfig
from listen.feature_extraction_listen import ListenFeatureExtractor
from listen.modeling_beats import BeatsModel
from listen.modeling_speech_encoder import ListenWhisperEncoder

from .harness import Figure, both_figures
from .models import Setting

SAMPLING_RATE = 16000
FRAMES_PER_SECOND = 100


def front_end(setting: Setting) -> list[Figure]:
    """Log-mel and filter bank at the true length of clips of 2 to 10 s, against two public extractors.

    Those are `WhisperFeatureExtractor`, which pads to 30 s, and the Kaldi filter bank of `ASTFeatureExtractor`, which
    uses torchaudio where it is installed, else numpy.
    """
    random = np.random.default_rng(setting.options.seed)
    lengths = np.linspace(2, 10, setting.options.batch)
    clips = [0.1 * random.standard_normal(round(n * SAMPLING_RATE)).astype(np.float32) for n in lengths]
    call = {"sampling_rate": SAMPLING_RATE, "return_tensors": "pt"}
    whisper, kaldi, both = WhisperFeatureExtractor(), ASTFeatureExtractor(), ListenFeatureExtractor()
    mel = ListenFeatureExtractor(num_fbank_bins=None)
    ours, mel_alone, public, whisper_alone = setting.compare(
        ours=lambda: both(clips, **call),
        mel_alone=lambda: mel(clips, **call),
        public=lambda: (whisper(clips, **call), kaldi(clips, **call)),
        whisper_alone=lambda: whisper(clips, **call),
    )
    return [
        *both_figures("front_end", ours, public, 1 / 8),
        *both_figures("front_end.log_mel", mel_alone, whisper_alone),
        *both_figures("front_end.against_whisper_alone", ours, whisper_alone),
    ]


def encoder_length(setting: Setting) -> list[Figure]:
    """The speech encoder of Whisper base on the true length of clips, against transformers' on 30 s of padding."""
    options, device = setting.options, setting.device
    config = WhisperConfig(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048)
    stock = WhisperEncoder._from_config(config, attn_implementation="sdpa").to(device).eval()
    ours = ListenWhisperEncoder._from_config(config, attn_implementation="sdpa").to(device).eval()
    ours.load_state_dict(stock.state_dict())
    padded = torch.randn(options.batch, config.num_mel_bins, 30 * FRAMES_PER_SECOND, device=device)
    features = padded[..., : round(options.seconds * FRAMES_PER_SECOND)].contiguous()  # (batch, bins, frames)
    mask = torch.ones(options.batch, features.shape[-1], dtype=torch.long, device=device)
    own, theirs = setting.compare(
        own=torch.no_grad()(lambda: ours(features, mask)), theirs=torch.no_grad()(lambda: stock(padded))
    )
    return both_figures("encoder_length", own, theirs)


def beats_attention(setting: Setting) -> list[Figure]:
    """BEATs with fused attention (sdpa) against plain attention, without gradients."""
    options, variants, weights = setting.options, {}, None
    config = BeatsConfig()
    frames = round(options.seconds * FRAMES_PER_SECOND)
    features = torch.randn(options.batch, frames, config.num_mel_bins, device=setting.device)
    for attention in ("sdpa", "eager"):
        model = BeatsModel._from_config(config, attn_implementation=attention).to(setting.device).eval()
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        variants[attention] = torch.no_grad()(lambda model=model: model(features))
    fused, plain = setting.compare(**variants)
    return both_figures("beats_attention", fused, plain)
