"""Speed and memory against baselines, see `benchmarks.run`."""
