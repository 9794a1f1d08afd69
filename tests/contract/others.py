"""Optimizers and wrappers as others write them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

import subspace_optim as so


class Homemade(Optimizer):
    """A third party's: its own momentum of signs, written from nothing, with no call of `super`."""

    def __init__(self, params: Any, lr: Any = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                old = state.get("average", torch.zeros_like(p))
                state["average"] = group["momentum"] * old + p.grad
                p.add_(torch.atan(state["average"]), alpha=-float(group["lr"]))
        return loss


class Derived(torch.optim.Adam):
    """A subclass that calls `super().step()`: torch fires the step hooks for both, one in other."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class DecaysAfter(torch.optim.Adam):
    """It goes on moving after the inner step, whose hooks have been fired by then."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self._decay()
        return loss

    @torch.no_grad()
    def _decay(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.25 * float(group["lr"]))


class DecaysBefore(DecaysAfter):
    """It moves before the inner step, between the first hooks and the second."""

    def step(self, closure: Any = None) -> Any:
        self._decay()
        return torch.optim.Adam.step(self, closure)


# Wrappers, as the libraries have them.


class Accelerated(Optimizer):
    """Accelerate's: a class of optimizer without its constructor, which may skip steps."""

    def __init__(self, optimizer: Optimizer, every: int = 1) -> None:
        self.optimizer, self.every, self.count = optimizer, every, 0

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return self.optimizer.step(closure) if self.count % self.every == 0 else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.count % self.every == 0:
            self.optimizer.zero_grad(set_to_none)


class Takes:
    """Lightning's and Fabric's: it takes on the class of what it wraps, and adds a closure."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        kind = type(optimizer)
        self.__class__ = type(f"Takes{kind.__name__}", (type(self), kind), {})  # type: ignore[assignment]

    optimizer = property(lambda self: self._optimizer)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure=closure or (lambda: None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class TakesAll(Takes):
    """As Lightning's was: with the attributes too."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.__dict__ = {n: v for n, v in vars(optimizer).items() if n not in ("step", "__del__")}
        super().__init__(optimizer)


class Lookahead(Optimizer):
    """As timm's: no call of the constructor, so that torch does not wrap ``step``."""

    def __init__(self, base_optimizer: Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults
        self.state = defaultdict(dict)
        self.k, self.alpha, self.count = k, alpha, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow", p.clone())
        loss = self._base_optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for p, state in self.state.items():
                p.copy_(state["slow"].lerp_(p, self.alpha))
        return loss


class OtherSAM(Optimizer):
    """Another library's: two calls, of which the second steps the optimizer inside."""

    def __init__(self, params: Any, base: Any, rho: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=self.param_groups[0]["rho"] / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)()
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()
        return loss


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Bare:
    """Lookahead again, by hand: nothing tells it from a wrapper that passes steps on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0
        self.slow = [p.detach().clone() for p in so.step_hooks.parameters_of(optimizer)]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, so.step_hooks.parameters_of(self.optimizer), strict=True):
                p.copy_(slow.lerp_(p, 0.5))
