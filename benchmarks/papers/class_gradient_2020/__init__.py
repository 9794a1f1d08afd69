"""Quasi-Newton's method in the space of the class gradients (2020), reproduced."""
