"""Ours against the peers: ``python -m benchmarks.speed``, described in ``__main__``."""
