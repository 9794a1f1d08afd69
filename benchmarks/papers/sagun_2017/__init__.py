"""Sagun, Evci, Guney, Dauphin & Bottou 2017, reproduced."""
