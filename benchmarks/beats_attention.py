"""BEATs with torch's fused attention (sdpa) against plain attention (eager).

    python benchmarks/beats_attention.py --seconds 10 --batch 4 --layers 12

Both add the same gated relative position bias; weights are random and the same. Forward passes without gradients.
"""

import torch
from harness import Measurement, arguments, compare, report

from listen.configuration_beats import BeatsConfig
from listen.modeling_beats import BeatsModel

FRAMES_PER_SECOND = 100


def main(given: list[str] | None = None) -> list[Measurement]:
    """Runs the comparison and prints its table."""
    options = arguments(__doc__, given, seconds=10.0, batch=4, layers=12)
    config = BeatsConfig(num_hidden_layers=options.layers)
    frames = round(options.seconds * FRAMES_PER_SECOND)
    features = torch.randn(options.batch, frames, config.num_mel_bins, device=options.device)
    variants, weights = {}, None
    for attention in ("eager", "sdpa"):
        model = BeatsModel._from_config(config, attn_implementation=attention).to(options.device).eval()
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        variants[attention] = torch.no_grad()(lambda model=model: model(features))
    rows = compare(variants, options.device, options.repeats)
    report(f"BEATs, {options.batch} clips of {options.seconds:g} s, {options.layers} layers", rows, options.device)
    return rows


if __name__ == "__main__":
    main()
