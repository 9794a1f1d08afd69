"""What is measured for Figures 6 and 7 of `song_2024`: the toy quadratic of appendix A.2."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.papers.reproduction import Job, Raw


def toy_quadratic(job: Job, *, lr: float, steps: int, keep: int) -> Raw:
    """GD on L = ½(1000 x² + y²), SGD on L ± 100 x y; and SGD's updates in x or in y alone.

    (Appendix A.2.) χ_1 is the share of the gradient along the first axis, the top eigenvector.
    Dom and Bulk go on from SGD's point at half of the steps, with SGD's own noise. ``decrease`` is
    of the loss after that point, from the mean over the first quarter of the steps to the last, and
    ``floor`` of ½y² alone, the loss at the bottom of the valley.
    """
    curvature = np.array([1000.0, 1.0])
    signs = np.random.default_rng(job.seed).choice([-1.0, 1.0], size=steps)
    half = steps // 2

    def path(start: Any, first: int, noise: float, mask: Any) -> Any:
        points = [np.array(start)]
        for sign in signs[first:]:
            theta = points[-1]
            gradient = curvature * theta + noise * sign * 100.0 * theta[::-1]
            points.append(theta - lr * mask * gradient)
        return np.array(points)

    paths = {"GD": path([1.0, 1.0], 0, 0.0, 1.0), "SGD": path([1.0, 1.0], 0, 1.0, 1.0)}
    for name, mask in (("Dom-SGD", [1.0, 0.0]), ("Bulk-SGD", [0.0, 1.0])):
        paths[name] = path(paths["SGD"][half], half, 1.0, np.array(mask))
    raw: Raw = {"switch_step": half}
    for name, points in paths.items():
        first = steps + 1 - len(points)
        gradients = curvature * points
        chi = np.abs(gradients[:, 0]) / np.linalg.norm(gradients, axis=1)
        loss = 0.5 * (curvature * points**2).sum(axis=1)
        late = slice(len(points) // 2, None)
        # The noise lasts for 1/(1000 η) steps: a quarter of the branch averages over it.
        quarter = (steps - half) // 4
        fall = [
            float(after[:quarter].mean() - after[-quarter:].mean())
            for after in (loss[half - first :], 0.5 * points[half - first :, 1] ** 2)
        ]
        # All of the first steps, in which x falls, and then a few.
        evenly = np.linspace(0, len(points) - 1, keep).astype(int)
        thin = np.union1d(np.arange(min(keep, len(points))), evenly)
        raw[name] = {
            "step": (thin + first).tolist(),
            "x": points[thin, 0].tolist(),
            "y": points[thin, 1].tolist(),
            "chi": chi[thin].tolist(),
            "loss": loss[thin].tolist(),
            "mean_chi_of_the_second_half": float(chi[late].mean()),
            "decrease": fall[0],
            "floor": fall[1],
        }
    return raw
