"""``python -m subspace_optim --versions``: what a report of a bug should begin with."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import torch

_NEEDED: Final = ("subspace_optim", "torch", "numpy", "scipy")
_OPTIONAL: Final = (
    "matplotlib",
    "pandas",
    "tqdm",
    "accelerate",
    "lightning",
    "transformers",
    "tensorboard",
    "wandb",
    "mlflow",
)


def versions() -> dict[str, str]:
    """Returns the versions of the package, of what it needs and may use, and the machine."""
    found = {name: _version(name) for name in _NEEDED}
    found |= {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "devices": _devices(),
        "threads": f"{torch.get_num_threads()} of torch, {os.cpu_count()} CPUs",
        "float32 products": torch.get_float32_matmul_precision(),
    }
    return found | {name: _version(name) for name in _OPTIONAL}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    """Returns the accelerators that torch sees, and with which CUDA or ROCm it was built."""
    built = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        return "cpu" if built is None else f"cpu (torch is built for {built}, and sees no device)"
    names = (torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return f"{', '.join(names)} (torch is built for {built})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the versions."""
    parser = argparse.ArgumentParser(prog="python -m subspace_optim", description=__doc__)
    parser.add_argument(
        "--versions", action="store_true", help="what is installed, and on which machine"
    )
    if not parser.parse_args(arguments).versions:
        parser.print_help()
        return
    found = versions()
    width = max(map(len, found))
    sys.stdout.writelines(f"{name:<{width}}  {text}\n" for name, text in found.items())


if __name__ == "__main__":
    main()
