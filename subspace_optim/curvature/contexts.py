"""Contexts in which curvature is computed without a trace: what they change, they put back."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from subspace_optim.curvature.loaders import loader_parts

Mode = Literal["train", "eval"]


Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def _device_generators(device: torch.device) -> list[Generator]:
    """Torch's own generators that code on ``device`` draws from."""
    generators: list[Generator] = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators


def global_generators(device: torch.device) -> list[Generator]:
    """Returns the global generators of torch, NumPy and Python."""
    python: Any = random.seed  # a method of the one that is shared
    legacy: Any = np.random.mtrand._rand  # noqa: SLF001 (np.random.seed is a method of it)
    return [*_device_generators(device), legacy, python.__self__]


def _seed(generator: Generator, seed: int) -> None:
    """Seeds a generator of any of the three libraries."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    else:
        generator.seed(seed)


@contextmanager
def states_kept(generators: Sequence[Generator], seed: int | None = None) -> Iterator[None]:
    """Puts the states of generators back at the end; inside they are seeded, if there is a seed."""
    held = [(put, get()) for get, put in map(_access, generators)]
    try:
        if seed is not None:
            for generator in generators:
                _seed(generator, seed)
        yield
    finally:
        for put, state in held:
            put(state)


def _access(generator: Generator) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Returns what reads the state of a generator, and what writes it."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state, generator.set_state
    return generator.getstate, generator.setstate


def seeded(device: torch.device, seed: int) -> AbstractContextManager[None]:
    """Seeds torch's own generators inside, so that dropout masks are fixed, and restores them."""
    return states_kept(_device_generators(device), seed)


def random_state_kept(device: torch.device, data: object) -> AbstractContextManager[None]:
    """Leaves the random state of torch, NumPy, Python and the loader ``data`` as found."""
    of_loader = [getattr(part, "generator", None) for part in loader_parts(data)]
    found = [g for g in of_loader if isinstance(g, torch.Generator)]
    return states_kept([*global_generators(device), *found])


@contextmanager
def in_mode(model: nn.Module, mode: Mode | None) -> Iterator[None]:
    """Puts the model in train or eval mode (``None``: as it is), and each module back."""
    modules = list(model.modules())
    flags = [module.training for module in modules]
    try:
        if mode is not None:
            model.train(mode == "train")
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            if module.training is not flag:
                module.training = flag


def _precision_settings(device: torch.device) -> Iterable[tuple[Any, Any]]:
    """The precision setting of each operation, with that of its backend.

    An operation whose setting is "none" follows its backend.
    """
    backends: Any = torch.backends  # its annotations lack the settings by operation
    on_cuda = device.type == "cuda"
    library = backends.cudnn if on_cuda else backends.mkldnn
    matmul = (backends.cuda.matmul, backends) if on_cuda else (library.matmul, library)
    return [matmul, (library.conv, library), (library.rnn, library)]


@contextmanager
def full_precision(device: torch.device, *, fused: bool = False) -> Iterator[None]:
    """Computes float32 as float32: no tf32 or bf16 inside of products, and no autocast.

    Args:
        device: where the computation runs.
        fused: leaves attention to the kernel that torch chooses. Otherwise it takes its
            mathematical form, since fused kernels have no second derivative.
    """
    settings = list(_precision_settings(device))
    # A setting of "none" reads as its backend's. So one that equals it is put back as "none".
    saved = [
        "none" if setting.fp32_precision == above.fp32_precision else setting.fp32_precision
        for setting, above in settings
    ]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if not fused:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for (setting, _), value in zip(settings, saved, strict=True):
            stack.callback(setattr, setting, "fp32_precision", value)
            setting.fp32_precision = "ieee"
        yield


@contextmanager
def no_autocast_inside() -> Iterator[None]:
    """Keeps autocast off, for this thread, where the model itself switches it on."""
    switch, own = torch.set_autocast_enabled, threading.get_ident()

    def only_off(*arguments: Any) -> None:
        on = arguments[-1] and threading.get_ident() != own
        switch(*arguments[:-1], on)  # type: ignore[call-overload]

    torch.set_autocast_enabled = only_off  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.set_autocast_enabled = switch


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM to the end of the block; a second one comes at once.

    An interrupt between two instructions of a ``finally`` would leave the model half put back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    present: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in present.items() if callable(handler)}

    def wait(number: int, frame: Any) -> None:
        if came:
            handlers[number](number, frame)
        came.append((number, frame))

    for number in handlers:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            handlers[came[0][0]](*came[0])
