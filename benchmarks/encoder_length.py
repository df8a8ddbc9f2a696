"""Whisper's encoder on the true length of clips against Whisper's own padding to 30 s.

    python benchmarks/encoder_length.py --seconds 3 6 10 --batch 8 --width 384 --layers 4

The baseline is transformers' WhisperEncoder on 3000 frames; weights are random and the same in both.
"""

import torch
from harness import Measurement, arguments, compare, report
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from listen.modeling_speech_encoder import ListenWhisperEncoder

FRAMES_PER_SECOND = 100
PADDED_FRAMES = 3000


def main(given: list[str] | None = None) -> list[Measurement]:
    """Runs the comparison and prints its table."""
    options = arguments(__doc__, given, seconds=[3.0, 6.0, 10.0], batch=8, width=384, layers=4)
    config = WhisperConfig(
        d_model=options.width,
        encoder_layers=options.layers,
        encoder_attention_heads=options.width // 64,
        encoder_ffn_dim=4 * options.width,
    )
    stock = WhisperEncoder._from_config(config, attn_implementation="sdpa").to(options.device).eval()
    ours = ListenWhisperEncoder._from_config(config, attn_implementation="sdpa").to(options.device).eval()
    ours.load_state_dict(stock.state_dict())
    padded = torch.randn(options.batch, config.num_mel_bins, PADDED_FRAMES, device=options.device)
    variants = {"padded to 30 s": torch.no_grad()(lambda: stock(padded))}
    for seconds in options.seconds:
        frames = round(seconds * FRAMES_PER_SECOND)
        features = padded[..., :frames].contiguous()  # (batch, bins, frames)
        mask = torch.ones(options.batch, frames, dtype=torch.long, device=options.device)
        variants[f"true length, {seconds:g} s"] = torch.no_grad()(lambda f=features, m=mask: ours(f, m))
    rows = compare(variants, options.device, options.repeats)
    report(f"Speech encoder, {options.batch} clips, {options.layers} x {options.width}", rows, options.device)
    return rows


if __name__ == "__main__":
    main()
