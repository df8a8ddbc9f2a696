"""Log-mel features at the clips' true length against WhisperFeatureExtractor.

    python benchmarks/feature_extractor.py --seconds 6 --batch 16

The baseline pads to 30 s, as Whisper's extractor does by default. The last row adds the filter bank of BEATs.
"""

import numpy as np
from harness import Measurement, arguments, compare, report
from transformers import WhisperFeatureExtractor

from listen.feature_extraction_listen import ListenFeatureExtractor

SAMPLING_RATE = 16000


def main(given: list[str] | None = None) -> list[Measurement]:
    """Runs the comparison and prints its table."""
    options = arguments(__doc__, given, seconds=6.0, batch=16)
    random = np.random.default_rng(options.seed)
    samples = round(options.seconds * SAMPLING_RATE)
    clips = [0.1 * random.standard_normal(samples).astype(np.float32) for _ in range(options.batch)]
    call = {"sampling_rate": SAMPLING_RATE, "return_tensors": "pt"}
    whisper = WhisperFeatureExtractor()
    mel = ListenFeatureExtractor(num_fbank_bins=None)
    padded = ListenFeatureExtractor(num_fbank_bins=None, pad_to_30s=True)
    both = ListenFeatureExtractor()
    variants = {
        "WhisperFeatureExtractor, 30 s": lambda: whisper(clips, **call),
        "WhisperFeatureExtractor, longest": lambda: whisper(clips, padding="longest", **call),
        "ListenFeatureExtractor, 30 s": lambda: padded(clips, **call),
        "ListenFeatureExtractor": lambda: mel(clips, **call),
        "ListenFeatureExtractor + filter bank": lambda: both(clips, **call),
    }
    rows = compare(variants, "cpu", options.repeats)
    report(f"Features of {options.batch} clips of {options.seconds:g} s", rows, "cpu")
    return rows


if __name__ == "__main__":
    main()
