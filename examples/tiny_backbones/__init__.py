"""The parts of ``examples/build_tiny_backbones.py``: each module makes one frozen part of the miniature stack."""
