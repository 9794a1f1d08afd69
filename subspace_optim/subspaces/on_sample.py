r"""``OnSample``: a basis of a sample of the data, certified against all of them.

Two samples, the smaller a part of the larger. On the *small* one (some hundred examples) a basis is
solved for, probed and refined, at a cost that does not grow with the data. The *reference*, of as
many examples as the certificate asks for, is passed over once at an *anchor*: products with the
k + 1 rows that are held correct the small sample's matrix ``S`` to one that agrees there with the
reference's ``H`` (``linalg.control_variate``).

The angle to the subspace of all data has three parts, which add up like random directions, by their
squares:

- *staleness*: of the basis for the corrected matrix, by the rules of ``ByAngle``;
- *noise*: at the anchor the corrected matrix is exact on the rows. As the basis turns away from
  there, the small sample misjudges the turn, by a share equal to the sine between its own basis and
  the reference's;
- *sampling error*: of the reference's basis for that of all data (``linalg.sampling_error``).

Where there is no gap the sampling error shows it, and all of the data are used.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from subspace_optim._validation import check_integer
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.linalg.rows import largest_sine
from subspace_optim.linalg.sampling_error import Scatter
from subspace_optim.subspaces import eigenpairs
from subspace_optim.subspaces.checkpoints import SavedState, saved_rows
from subspace_optim.subspaces.eigenpairs import TopPairs
from subspace_optim.subspaces.refresh import ByAngle
from subspace_optim.subspaces.rule import RefreshRule, Situation
from subspace_optim.subspaces.samples import (
    ANCHOR_NUMBERS,
    Anchor,
    Corrected,
    Measured,
    Samples,
    at_work,
    examples_needed,
)

_SMALL = 256
"""Examples of the small sample, to begin with."""
_NOISY = 0.25
"""The sine of its basis to that of all data above which the small sample grows fourfold."""
_MANY = 8
"""With fewer examples than this many small samples a solve on all of them is cheaper."""
_MOST = 0.7
"""The share of the data from which on a sample saves too little, and all of them are taken."""
_SHARES = {"staleness": 0.7, "noise": 0.5, "sampling error": 0.5}
"""Of ``max_angle``: their squares add up to 0.99. On all data the other two are scaled up."""
_COSTS = 2.5
"""Cheapest in the long run is a small sample of ``1/(2.5 r)`` of the reference, r the refreshes
between two anchors: these cost k + 1 products, those 14, and r grows like its square root."""
_SLACK = 0.8
"""A reference that is as large as this share of what is wanted, or the inverse, stays."""
_ANCHORS = 3
"""Anchors at one parameter state, at most: the first may be at a basis that is far off."""
_ROUGH = 5e-2
"""The relative residual of a solve on the small sample, which is far less accurate itself."""


class OnSample(RefreshRule):
    """``ByAngle`` on a sample of the data: ``sample=n`` or ``"auto"``.

    Args:
        max_angle: the sine to the subspace of all data up to which a basis is kept. What
            ``sample=n`` is off by at all times is told, and is no reason to renew it.
        sample: examples of the reference; ``"auto"``: as many as keep the sampling error small
            enough, which are all of them where there is no gap.

    Attributes:
        by_angle: the rule for what is stale on the small sample, or on all data.
        small_size: examples of the small sample.
        whole: works on all of the data at present.

    Raises:
        ArgumentError: an argument is out of range.
    """

    def __init__(self, max_angle: float, sample: int | Literal["auto"]) -> None:
        self.by_angle = ByAngle(max_angle)
        super().__init__()
        self.max_angle = self.by_angle.max_angle
        self.sample: int | Literal["auto"] = "auto"
        if sample != "auto":
            remedy = "Or 'auto', for as many as the angle asks for; None for all."
            self.sample = check_integer("sample", sample, minimum=2, remedy=remedy)
        self.small_size = self._least = (
            _SMALL if self.sample == "auto" else min(_SMALL, self.sample)
        )
        self.whole = False
        self._reference: int | None = None  # examples of it; None: all
        self._anchor: Anchor | None = None

    @property
    def pairs(self) -> TopPairs | None:
        """The eigenpairs; ``None`` before the first solve."""
        return self.by_angle.pairs

    @pairs.setter
    def pairs(self, pairs: TopPairs | None) -> None:
        self.by_angle.pairs = pairs

    def attach(
        self,
        operator: CurvatureOperator,
        k: int,
        *,
        tol: float,
        seed: int,
        basis_dtype: torch.dtype | None = None,
    ) -> None:
        """Takes what it is to find."""
        super().attach(operator, k, tol=tol, seed=seed, basis_dtype=basis_dtype)
        self.by_angle.attach(operator, k, tol=tol, seed=seed, basis_dtype=basis_dtype)
        self._samples = Samples(operator, seed)

    def options(self) -> dict[str, Any]:
        """Returns the limit and the size."""
        return {"refresh": "auto", "max_angle": self.max_angle, "sample": self.sample}

    def trial(self) -> OnSample:
        """Returns a copy to work on."""
        trial = super().trial()
        trial.by_angle = self.by_angle.trial()
        trial.by_angle.stats = trial.stats
        return trial

    # --- when -----------------------------------------------------------------------------------

    def is_due(self, seen: Situation) -> bool:
        """Returns whether the basis is stale; noise grows at refreshes alone."""
        self.by_angle.stats = self.stats
        due = self.by_angle.is_due(seen)
        self._add_up("estimate")
        return due

    def plan(self, seen: Situation, *, forced: bool) -> str:
        """Returns the name of the method that fits what has changed."""
        return self.by_angle.plan(seen, forced=forced)

    def _add_up(self, *names: str) -> None:
        """Adds what the sample is off by to what is known of the staleness."""
        stats, anchor = self.stats, self._anchor
        stats.sampling_error = anchor.sampled if anchor else 0.0
        if anchor is None:
            return
        others = math.hypot(anchor.misjudged, anchor.sampled)
        for name in names:
            staleness = getattr(stats, name)
            setattr(stats, name, min(1.0, math.hypot(staleness, others)))

    # --- how ------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Probes the basis on the small sample, and refines it or solves for it there."""
        self._on_present("renew")

    def reconsider(self) -> None:
        """Does the same where something else than the parameters has changed."""
        self._on_present("reconsider")

    def refresh(self) -> None:
        """Refines the basis without a probe before, and does the same."""
        self._on_present("refresh")

    def _on_present(self, plan: str) -> None:
        small = None if self._anchor is None else self._samples.of(self.small_size)
        if self._anchor is None or small is None:  # on all of the data
            if self.by_angle.gapless:
                self.solve()
            else:
                getattr(self.by_angle, plan)()
            return
        with at_work(small):
            self._correct(small, self._anchor)
            getattr(self.by_angle, plan)()
            if not self.by_angle.gapless:
                self._follow()
        if self.by_angle.gapless or self._is_blind():
            self.solve()
        else:
            self._add_up("bound", "estimate")

    def _follow(self) -> None:
        """Notes how far the basis has turned, and anchors it anew where that is too far."""
        anchor, pairs = self._anchored(), self._present()
        turned = largest_sine(anchor.rows[: self.k], pairs.basis.vectors, pairs.basis.inner)
        if self.by_angle.holds_two:
            turned = max(turned, anchor.turned)
        shrunk = min(1.0, (pairs.gap or 1.0) / anchor.gap)
        self._anchor = replace(anchor, turned=turned, shrunk=shrunk, served=anchor.served + 1)
        if self._is_poor():
            self._balance(anchor.served + 1)
            self._set_anchors()

    def _is_poor(self) -> bool:
        """Whether the basis has turned too far from its anchor, or that is of too few examples."""
        anchor = self._anchored()
        most = self._limit("sampling error") / _SLACK
        too_few = self.sample == "auto" and anchor.sampled > most
        return too_few or anchor.misjudged > self._limit("noise")

    def _anchored(self) -> Anchor:
        assert self._anchor is not None  # noqa: S101 (asked for where there is one)
        return self._anchor

    def _is_blind(self) -> bool:
        """Whether the small sample hardly shows the gap that it is to follow the basis by."""
        return self._anchor is not None and self._anchor.noise > 2 * _NOISY

    def _balance(self, served: int) -> None:
        """Doubles or halves the small sample, by the refreshes that the latest anchor served."""
        reference = self.stats.examples or 0
        best = reference / (_COSTS * served)
        if best >= 2 * self.small_size <= reference / 2:
            self.small_size *= 2
        elif best <= self.small_size / 2:
            self.small_size = max(self._least, self.small_size // 2)

    def solve(self) -> None:
        """Solves on the small sample, anchors that basis on the reference, and refines it."""
        self._samples, self._anchor = Samples(self.operator, self.seed), None
        known = self.whole and self.by_angle.gapless  # that a sample is of no use
        self.whole = known or not self._solve_on_samples()
        if self.whole:
            self._solve_on_all()
        self._add_up("bound", "estimate")

    def _solve_on_all(self) -> None:
        self._anchor = None
        self.by_angle.operator, self.by_angle.max_angle = self.operator, self.max_angle
        self.by_angle.solve()
        self.stats.examples = None

    def _solve_on_samples(self) -> bool:
        """Returns whether samples were of use."""
        by_angle, asked = self.by_angle, math.inf if self.sample == "auto" else self.sample
        while True:
            small = self._samples.of(self.small_size)
            if small is None or self._is_too_large(small):
                return False
            with at_work(small):
                by_angle.operator, by_angle.max_angle = small, self._limit("staleness")
                self.stats.cold += 1
                by_angle.settle(self._rough_pairs(small))
                if by_angle.gapless:
                    return False
                found = self._measured(small)
                drawn, total = small.examples or (1, 1)
                noise = self._sine(found, small, drawn / total)
                if noise <= _NOISY or drawn >= asked:
                    self._set_anchors(found)
                    if by_angle.gapless or not self._is_blind():
                        return not by_angle.gapless
            self.small_size = int(min(4 * drawn, asked))

    def _is_too_large(self, small: CurvatureOperator) -> bool:
        """Whether a small sample is too much of the data to save anything."""
        drawn, total = small.examples or (1, 1)
        few = self.sample == "auto" and total < _MANY * _SMALL
        return few or drawn > _MOST * total

    def _rough_pairs(self, small: CurvatureOperator) -> TopPairs:
        tol = max(self.tol, _ROUGH)
        return eigenpairs.solve(small, self.k, tol=tol, seed=self.seed, max_angle=_NOISY / 3)

    def store(self) -> float:
        """Holds the vectors in ``basis_dtype``; those of an anchor stay as they are."""
        self.by_angle.stats = self.stats
        return self.by_angle.store()

    def _set_anchors(self, found: Measured | None = None) -> None:
        """Anchors the basis until it is good, or ``_ANCHORS`` times."""
        for _ in range(_ANCHORS):
            self._set_anchor(found)
            if self.by_angle.gapless or not self._is_poor():
                return
            found = None

    def _set_anchor(self, found: Measured | None) -> None:
        """Passes over the reference, corrects the small sample's matrix, and refines the basis.

        Args:
            found: what is known of the small sample, if it is.
        """
        small, pairs = self._samples.of(self.small_size), self._present()
        assert small is not None  # noqa: S101 (it was drawn for the solve)
        drawn, total = small.examples or (1, 1)
        with at_work(small):
            own = found or self._measured(small)
            self._resize(self._sine(own, small, drawn / total), drawn, total)
            reference = self._samples.of(self._reference) if self._reference else self.operator
            assert reference is not None  # noqa: S101 (as the small one)
            with at_work(reference):
                theirs = own if reference is small else self._measured(reference)
            offset = own.products - theirs.products
            self._anchor = anchor = Anchor(pairs.rows, offset, 1.0, 1.0, 1.0)
            self._correct(small, anchor)
            self.by_angle.refresh(drifted=False)
            if self.by_angle.gapless:
                return
            of = reference.examples[0] if reference.examples else total
            noise = self._sine(own, small, drawn / of)
            sampling = self._sine(theirs, small, of / total)
            refined = self._present()
            basis = refined.basis
            turned = largest_sine(anchor.rows[: self.k], basis.vectors, basis.inner)
            gap = refined.gap or 1.0
            self._anchor = Anchor(pairs.rows, offset, noise, sampling, gap, turned=turned)
            self.stats.examples = of
            self._samples.keep(self.small_size, self._reference)
            self._resize(sampling, of, total)

    def _resize(self, error: float, drawn: int, total: int) -> None:
        """Lets the reference have as many examples as it needs; small changes are not made."""
        if self.sample != "auto":
            self._reference = max(self.sample, drawn) if self.sample < total else None
        elif drawn < total:
            target = self.max_angle * _SHARES["sampling error"]
            wanted, present = examples_needed(error, target, drawn, total), self._reference
            if wanted > _MOST * total:
                self._reference = None
            elif present is None or not present / 2 <= wanted <= present / _SLACK:
                self._reference = wanted

    def _correct(self, small: CurvatureOperator, anchor: Anchor) -> None:
        """Hands the corrected matrix of the small sample to the rule for what is stale there."""
        self.by_angle.operator = Corrected(small, anchor.rows, anchor.offset)
        self.by_angle.max_angle = self._limit("staleness")

    def _measured(self, operator: CurvatureOperator) -> Measured:
        """Multiplies basis and guard, and sees how the products of the batches scatter."""
        pairs = self._present()
        if operator.examples is None:
            return Measured(operator.matmat(pairs.rows), None)
        scatter = Scatter(pairs.basis, pairs.guard, self.seed)
        products = operator.batch_matmat(pairs.rows, scatter.see)
        scatter.gather(self.operator.ranks.of_all)
        return Measured(products, scatter)

    def _sine(self, measured: Measured, small: CurvatureOperator, share: float) -> float:
        """Returns the sine by which the basis of a sample is off that of what it is a share of."""
        pairs, (products, scatter) = self._present(), measured
        if scatter is None:
            return 0.0
        known = pairs.basis.eigenvalues, pairs.below
        return scatter.sine(products, small.matmat, *known, share)

    def _limit(self, part: str) -> float:
        """Returns what one part of the angle may take of ``max_angle``."""
        rest = 1.0 if self._reference else math.sqrt(1 - _SHARES["sampling error"] ** 2)
        return self.max_angle * _SHARES[part] / rest

    def warn(self) -> None:
        """Warns, once, where there is no gap."""
        self.by_angle.warn()

    # --- checkpoints ----------------------------------------------------------------------------

    def numbers(self) -> dict[str, Any]:
        """Returns what is known of the angle, and of the samples."""
        anchor = self._anchor
        own: dict[str, Any] = {
            "small": self.small_size,
            "whole": self.whole,
            "reference": self._reference or 0,
            "anchored": anchor is not None,
            "served": getattr(anchor, "served", 0),
        }
        values = [getattr(anchor, name, 0.0) for name in ANCHOR_NUMBERS]
        return own | {"anchor_numbers": values} | self.by_angle.numbers()

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters of the last refresh, and the products of the last anchor."""
        operator = self.operator
        options: Any = {"dtype": operator.dtype, "device": operator.device}
        shape = (min(self.k + 1, operator.size), operator.parameters.size_here)
        none = torch.zeros(shape, **options)
        rows, offset = (self._anchor.rows, self._anchor.offset) if self._anchor else (none, none)
        space = operator.parameters
        anchored = {
            "anchor_rows": saved_rows(space, rows.clone()),
            "anchor_offset": saved_rows(space, offset.clone()),
        }
        return self.by_angle.tensors() | anchored

    def take(self, saved: SavedState) -> None:
        """Takes what ``numbers`` and ``tensors`` gave."""
        self.by_angle.take(saved)
        operator = self.operator
        lead = (min(self.k + 1, operator.size),)
        rows, offset = (
            saved.rows(f"anchor_{name}", lead, operator.parameters) for name in ("rows", "offset")
        )
        self.small_size, self.whole = saved.count("small"), saved.flag("whole")
        self._reference = saved.count("reference") or None
        numbers = saved.numbers("anchor_numbers", len(ANCHOR_NUMBERS), minimum=0)
        own = dict(zip(ANCHOR_NUMBERS, numbers, strict=True))
        anchor = Anchor(rows, offset, **own, served=saved.count("served"))
        self._anchor = anchor if saved.flag("anchored") else None

    def adopt(self) -> None:
        """Leaves the basis of another rule out."""
        super().adopt()
        self.by_angle.pairs = None
