"""Vectors of sharded models beside those of whole ones, and models that are sharded in all ways."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from subspace_optim.curvature.parameters import ParameterSpace


def whole(space: ParameterSpace, vector: Tensor) -> Tensor:
    """A vector of a sharded model, all of it, in the order of the parameters."""
    pieces = []
    for p, piece in zip(space.tensors, space.unflatten(vector), strict=True):
        if isinstance(p, DTensor):
            spec: Any = p._spec
            pieces.append(DTensor(piece, spec, requires_grad=False).full_tensor().reshape(-1))
        else:
            pieces.append(piece.reshape(-1))
    return torch.cat(pieces)


def rows(space: ParameterSpace, vectors: Tensor) -> Tensor:
    """The same, row by row."""
    return torch.stack([whole(space, v) for v in vectors])


def part(space: ParameterSpace, vector: Tensor) -> Tensor:
    """What lies here of a vector of all coordinates."""
    tensors, pieces = space.tensors, []
    ends = vector.split([p.numel() for p in tensors])
    for p, piece in zip(tensors, ends, strict=True):
        value = piece.view(p.shape)
        if isinstance(p, DTensor):
            everywhere = [Replicate()] * p.device_mesh.ndim
            laid_out = DTensor.from_local(value, p.device_mesh, everywhere, run_check=False)
            value = laid_out.redistribute(placements=p.placements)
        pieces.append(value)
    return space.flatten(pieces, vector.dtype)


def everywhere(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


# --- models --------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs), nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(x)))


class Net(nn.Module):
    """Blocks of uneven sizes: 13 rows are 7 and 6 on two ranks, and 4, 4, 4, 1 on four."""

    def __init__(self, inputs: int = 7, width: int = 13, classes: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(inputs, width), Block(width, width)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Checkpointed(Net):
    """The same, that runs its blocks again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class Parallel(nn.Module):
    """Columns and then rows of two layers over the ranks; the rest is on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 12), nn.Linear(12, 7)
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 5, 3, stride=2)
        self.head = nn.Linear(5 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 42)).view(len(x), 1, 7, 7)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(1))


class GPT(nn.Module):
    """Two causal blocks with learned positions, whose output layer is the embedding's."""

    def __init__(self, *, norm: type[nn.Module] = nn.LayerNorm, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(Attention(norm) for _ in range(2))
        self.norm, self.head = norm(6), nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 3).long().clamp(0, 10)  # the same data as the others'
        h = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)).mean(1)


class Attention(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.before, self.between = norm(6), norm(6)
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.up, self.down = nn.Linear(6, 13), nn.Linear(13, 6)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(h)).view(*h.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.between(h))))


class Views(nn.Module):
    """Parameters in pieces, as complex numbers, and in products with themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(7, 7)])
        self.pairs, self.pieces = nn.Parameter(torch.rand(7, 2)), nn.Parameter(torch.rand(9, 7))
        self.square = nn.Parameter(torch.rand(7, 7) / 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.blocks[0](x))
        numbers = torch.view_as_complex(self.pairs)
        x = x + (numbers * torch.tanh(x) * numbers.conj()).real
        power = self.square
        for _ in range(3):
            power = power - power @ power.t() @ power
        first, second, third = self.pieces.split(3)
        return torch.tanh(x @ power @ first.t()) @ second[:, :3] + x @ third.t()


def llama() -> nn.Module:
    return GPT(norm=nn.RMSNorm, tied=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Net,
    "convolutions": Convolutions,
    "gpt": GPT,
    "llama": llama,
    "views": Views,
}


def made(kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype)


SIZES = (3, 1, 4, 2, 5, 6)  # examples of the batches, which the ranks take in turn


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(n, 7, generator=generator).to(dtype),
            torch.randint(3, (n,), generator=generator),
        )
        for n in SIZES
    ]


def own(data: list[Any], rank: int | None = None, size: int | None = None) -> list[Any]:
    """The batches of this rank."""
    rank = dist.get_rank() if rank is None else rank
    return data[rank :: dist.get_world_size() if size is None else size]


# --- ways to shard them ---------------------------------------------------------------------------


def fsdp(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """The blocks by themselves, and the rest with the model."""
    model = copy.deepcopy(model)
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    model = copy.deepcopy(model)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def bf16(model: nn.Module) -> nn.Module:
    return fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
