"""What sharded models cost: ``python -m benchmarks.sharded``, described in ``__main__``."""
