r"""``OnSample``: a basis of a sample of the data, certified against all of them.

Two samples, the smaller a part of the larger. On the *small* one (some hundred examples) a basis is
solved for, probed and refined, at a cost that does not grow with the data. The *reference*, of as
many examples as the certificate asks for, is passed over once at an *anchor*: products with the
k + 1 rows that are held correct the small sample's matrix ``S`` to one that agrees there with the
reference's ``H`` (``linalg.control_variate``).

The angle to the subspace of all data has three parts, which add up like random directions, by their
squares:

- *staleness*: of the basis for the corrected matrix, by the rules of ``ByAngle``;
- *noise*: the corrected matrix is exact at the anchor. From there the basis turns, and of what it
  turns by the small sample tells with a relative error as large as the sine by which its own basis
  is off the reference's;
- *sampling error*: of the reference's basis for that of all data (``linalg.sampling_error``).

Where there is no gap the sampling error shows it, and all of the data are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError, check_integer
from subspace_optim.subspaces.checkpoints import SavedState
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.linalg.rows import largest_sine
from subspace_optim.linalg.sampling_error import Scatter
from subspace_optim.subspaces import eigenpairs
from subspace_optim.subspaces.corrected import Corrected
from subspace_optim.subspaces.eigenpairs import TopPairs
from subspace_optim.subspaces.refresh import ByAngle
from subspace_optim.subspaces.rule import RefreshRule, Situation

_SMALL = 256
"""Examples of the small sample, to begin with."""
_NOISY = 0.3
"""The sine of its basis to that of all data above which the small sample grows fourfold."""
_MOST = 0.7
"""The share of the data from which on a sample saves too little, and all of them are taken."""
_SHARES = {"staleness": 0.7, "noise": 0.5, "sampling error": 0.5}
"""Of ``max_angle``: their squares add up to less than 1. Without sampling error, the others
stretch to fill its place."""
_CAUTION = 1.5
"""What the noise is multiplied by, since it is known of one turn and used for another."""
_ROUGH = 1e-2
"""The relative residual of a solve on the small sample, which is far less accurate itself."""


@dataclass(frozen=True)
class Anchor:
    """What is known since the latest pass over the reference.

    Attributes:
        rows: ``(k + 1, P)``, basis and guard there.
        offset: ``(k + 1, P)``, what the small sample's products with them had too much.
        noise: the sine of the small sample's basis to the reference's, as expected.
        sampling: the sine of the reference's basis to that of all data, as expected.
        turned: the sine by which the basis has turned since.
    """

    rows: Tensor
    offset: Tensor
    noise: float
    sampling: float
    turned: float = 0.0

    @property
    def drifted(self) -> float:
        """The sine that the noise accounts for at present."""
        return _CAUTION * self.noise * self.turned


class OnSample(RefreshRule):
    """``ByAngle`` on a sample of the data: ``sample=n`` or ``"auto"``.

    Args:
        max_angle: the sine to the subspace of all data up to which a basis is kept. What
            ``sample=n`` is off by at all times is told, and is no reason to renew it.
        sample: examples of the reference; ``"auto"``: as many as keep the sampling error small
            enough, which are all of them where there is no gap.

    Attributes:
        by_angle: the rule for what is stale on the small sample, or on all data.
        small: examples of the small sample.
        whole: works on all of the data at present.

    Raises:
        ArgumentError: an argument is out of range.
    """

    def __init__(self, max_angle: float, sample: int | Literal["auto"]) -> None:
        self.by_angle = ByAngle(max_angle)
        super().__init__()
        self.max_angle = self.by_angle.max_angle
        if not isinstance(sample, str) or sample != "auto":
            remedy = "Or 'auto', for as many as the angle asks for; None for all."
            sample = check_integer("sample", sample, minimum=2, remedy=remedy)
        self.sample = sample
        self.small, self.whole = _SMALL, False
        self._reference: int | None = None  # examples of it; None: all
        self._anchor: Anchor | None = None
        self._drawn: dict[int, CurvatureOperator] = {}

    @property
    def pairs(self) -> TopPairs | None:
        """The eigenpairs; ``None`` before the first solve."""
        return self.by_angle.pairs

    @pairs.setter
    def pairs(self, pairs: TopPairs | None) -> None:
        self.by_angle.pairs = pairs

    def attach(self, operator: CurvatureOperator, k: int, *, tol: float, seed: int) -> None:
        """Takes what it is to find."""
        super().attach(operator, k, tol=tol, seed=seed)
        self.by_angle.attach(operator, k, tol=tol, seed=seed)

    def options(self) -> dict[str, Any]:
        """Returns the limit and the size."""
        return self.by_angle.options() | {"sample": self.sample}

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
        self._add_up()
        return due

    def plan(self, seen: Situation, *, forced: bool) -> str:
        """Returns the name of the method that fits what has changed."""
        return self.by_angle.plan(seen, forced=forced)

    def _add_up(self) -> None:
        """Adds what the sample is off by to what is known of the staleness."""
        stats, anchor = self.stats, self._anchor
        stats.sampling_error = anchor.sampling if anchor else 0.0
        if anchor is None:
            return
        others = math.hypot(anchor.drifted, anchor.sampling)
        for name in ("bound", "estimate"):
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
        small = None if self._anchor is None else self._draw(self.small)
        if self._anchor is None or small is None:  # on all of the data
            if self.by_angle.gapless:
                self.solve()
            else:
                getattr(self.by_angle, plan)()
            return
        with self._working(small):
            self._correct(small, self._anchor)
            getattr(self.by_angle, plan)()
            if not self.by_angle.gapless:
                self._follow()
        if self.by_angle.gapless:
            self.solve()
        self._add_up()

    def _follow(self) -> None:
        """Notes how far the basis has turned, and anchors it anew where that is too far."""
        anchor, basis = self._anchor, self.by_angle.basis
        assert anchor is not None  # noqa: S101 (asked for by the caller)
        assert basis is not None  # noqa: S101 (a solve came first)
        turned = largest_sine(anchor.rows[: self.k], basis.vectors)
        self._anchor = anchor = replace(anchor, turned=turned)
        if anchor.drifted > self._limit("noise"):
            self._cast()

    def solve(self) -> None:
        """Solves on the small sample, anchors that basis on the reference, and refines it."""
        self._drawn, self._anchor = {}, None
        if not (self.whole and self.by_angle.gapless) and self._solve_on_samples():
            self.whole = False
        else:
            self._solve_on_all()
        self._add_up()

    def _solve_on_all(self) -> None:
        self.whole, self._anchor = True, None
        self.by_angle.operator, self.by_angle.max_angle = self.operator, self.max_angle
        self.by_angle.solve()
        self.stats.examples = None

    def _solve_on_samples(self) -> bool:
        """Returns whether samples were of use."""
        by_angle = self.by_angle
        while True:
            small = self._draw(self.small)
            if small is None or small.examples is None or small.examples[0] > self._most(small):
                return False
            with self._working(small):
                by_angle.operator, by_angle.max_angle = small, self._limit("staleness")
                self.stats.cold += 1
                by_angle.settle(self._rough_pairs(small))
                if by_angle.gapless:
                    return False
                found = self._measured(small, self._rows())
                drawn, total = small.examples
                noise = found[1] * math.sqrt(1 - drawn / total)
                if noise <= _NOISY:
                    self._reference = self._wanted(noise, drawn, total)
                    self._cast(found)
                    return not by_angle.gapless
            self.small = 4 * drawn
            if self.small > self._most(small):
                return False

    def _most(self, view: CurvatureOperator) -> float:
        return _MOST * view.examples[1] if view.examples else 0.0

    def _rough_pairs(self, small: CurvatureOperator) -> TopPairs:
        tol = max(self.tol, _ROUGH)
        return eigenpairs.solve(small, self.k, tol=tol, seed=self.seed, max_angle=_NOISY / 3)

    def _wanted(self, noise: float, drawn: int, total: int) -> int | None:
        """Returns how many examples the reference needs; ``None`` for all.

        The square of a sampling error falls like ``1/n − 1/N``.

        Args:
            noise: the sampling error of the small sample.
            drawn: its size.
            total: N.
        """
        if self.sample != "auto":
            return max(int(self.sample), drawn) if int(self.sample) < total else None
        target = self.max_angle * _SHARES["sampling error"]
        shrunk = min(1.0, target / noise) if noise else 1.0
        wanted = math.ceil(1 / (1 / total + (1 / drawn - 1 / total) * shrunk**2))
        return wanted if wanted <= _MOST * total else None

    def _cast(self, found: tuple[Tensor, float] | None = None) -> None:
        """Passes over the reference, corrects the small sample's matrix, and refines the basis.

        Args:
            found: what ``_measured`` returns of the small sample, if it is known.
        """
        small, rows = self._draw(self.small), self._rows()
        reference = self.operator if self._reference is None else self._draw(self._reference)
        assert small is not None  # noqa: S101 (it was drawn for the solve)
        assert reference is not None  # noqa: S101 (as the small one)
        assert small.examples is not None  # noqa: S101 (it is a sample)
        with self._working(small, reference):
            offset, sine = found or self._measured(small, rows)
            drawn, total = small.examples
            sampling, of = 0.0, total
            if reference.examples is None:
                offset -= reference.matmat(rows)
            else:
                of = reference.examples[0]
                products, sine_of_reference = self._measured(reference, rows)
                sampling = min(1.0, sine_of_reference * math.sqrt(1 - of / total))
                offset -= products
            noise = min(1.0, sine * math.sqrt(max(0.0, 1 - drawn / of)))
            self.stats.examples = of
            self._anchor = anchor = Anchor(rows, offset, noise, sampling)
            self._correct(small, anchor)
            self.by_angle.refresh(drifted=False)
            if not self.by_angle.gapless:
                turned = largest_sine(rows[: self.k], self._present().basis.vectors)
                self._anchor = replace(anchor, turned=turned)

    def _correct(self, small: CurvatureOperator, anchor: Anchor) -> None:
        """Hands the corrected matrix of the small sample to the rule for what is stale there."""
        self.by_angle.operator = Corrected(small, anchor.rows, anchor.offset)
        self.by_angle.max_angle = self._limit("staleness")

    def _measured(self, view: CurvatureOperator, rows: Tensor) -> tuple[Tensor, float]:
        """Returns the products of a sample's matrix, and the sine by which samples like it are off.

        It is ``(1 − f)^½`` times as much for one that is a share f of what it stands for.
        """
        pairs = self._present()
        below = float(pairs.guard.eigenvalues[0]) if pairs.guard.k else -math.inf
        scatter = Scatter(pairs.basis, below, self.seed)
        products = view.batch_matmat(rows, scatter.see)
        scatter.gather(self.operator.ranks.sum_)
        return products, scatter.sine(products, view.matmat)

    def _rows(self) -> Tensor:
        pairs = self._present()
        return torch.cat([pairs.basis.vectors, pairs.guard.vectors])

    def _limit(self, part: str) -> float:
        """Returns what one part of the angle may take of ``max_angle``."""
        if self._reference is None:
            rest = math.sqrt(1 - _SHARES["sampling error"] ** 2)
            return self.max_angle * _SHARES[part] / rest
        return self.max_angle * _SHARES[part]

    def _present(self) -> TopPairs:
        assert self.pairs is not None  # noqa: S101 (a solve comes first)
        return self.pairs

    # --- samples --------------------------------------------------------------------------------

    def _draw(self, examples: int) -> CurvatureOperator | None:
        """Returns the matrix of a sample; the same one until the next solve."""
        if examples not in self._drawn:
            view = self.operator.sample(examples, seed=self.seed)
            if view is None:
                return None
            self._drawn = self._drawn | {examples: view}
        return self._drawn[examples]

    @contextmanager
    def _working(self, *views: CurvatureOperator) -> Iterator[None]:
        """Looks at the parameters on entry only, and frees what the samples have kept."""
        with ExitStack() as stack:
            for view in views:
                stack.callback(view.release)
                stack.enter_context(view.frozen())
            yield

    def warn(self) -> None:
        """Warns, once, where there is no gap."""
        self.by_angle.warn()

    # --- checkpoints ----------------------------------------------------------------------------

    def numbers(self) -> dict[str, Any]:
        """Returns what is known of the angle, and of the samples."""
        anchor = self._anchor
        own = {"small": self.small, "whole": self.whole, "anchored": anchor is not None}
        own["reference"] = self._reference or 0
        own["off"] = [anchor.noise, anchor.sampling, anchor.turned] if anchor else [0.0, 0.0, 0.0]
        return own | self.by_angle.numbers()

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters of the last refresh, and the products of the last anchor."""
        operator = self.operator
        options: Any = {"dtype": operator.dtype, "device": operator.device}
        shape = (min(self.k + 1, operator.size), operator.size)
        none = torch.zeros(shape, **options)
        rows, offset = (self._anchor.rows, self._anchor.offset) if self._anchor else (none, none)
        anchored = {"anchor_rows": rows.clone(), "anchor_offset": offset.clone()}
        return self.by_angle.tensors() | anchored

    def take(self, saved: SavedState) -> None:
        """Takes what ``numbers`` and ``tensors`` gave."""
        self.by_angle.take(saved)
        operator = self.operator
        shape = (min(self.k + 1, operator.size), operator.size)
        rows, offset = (
            saved.tensor(f"anchor_{name}", shape, operator.dtype, operator.device)
            for name in ("rows", "offset")
        )
        self.small, self.whole = saved.count("small"), saved.flag("whole")
        self._reference = saved.count("reference") or None
        off = saved.numbers("off", 3, minimum=0, maximum=1)
        self._anchor = Anchor(rows, offset, *off) if saved.flag("anchored") else None
        self._drawn = {}

    def adopt(self) -> None:
        """Leaves the basis of another rule out."""
        super().adopt()
        self.by_angle.pairs = None
