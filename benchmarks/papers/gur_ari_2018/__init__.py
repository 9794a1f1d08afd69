"""Gur-Ari, Roberts & Dyer 2018, reproduced."""
