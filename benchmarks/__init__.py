"""Benchmarks on real data; the package never imports them."""
