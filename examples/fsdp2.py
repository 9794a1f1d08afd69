"""A small language model, sharded by FSDP2, trained by BulkSGD and watched by a monitor.

    torchrun --nproc-per-node 2 examples/fsdp2.py

No process holds all of the parameters, nor all of the basis. Checkpoints go through
``torch.distributed.checkpoint``: run it again, on another number of processes too, and it goes on.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import subspace_optim as so

VOCABULARY, CONTEXT, WIDTH = 16, 12, 32


class LanguageModel(nn.Module):
    """Two causal blocks, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        block = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 4, **block) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of the next token at each place, ``(batch, vocabulary, places)``."""
        h = self.tokens(tokens) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.head(h).transpose(1, 2)


def batches(count: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Returns sequences to continue: each token is the sum of the two before it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCABULARY, (count, size, CONTEXT + 1), generator=generator)
    for place in range(2, CONTEXT + 1):
        text[..., place] = (text[..., place - 1] + text[..., place - 2]) % VOCABULARY
    return [(each[:, :-1], each[:, 1:]) for each in text]


def main() -> None:
    """Trains for some steps, from the latest checkpoint on if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, help="a folder to resume from, and to save to")
    options = parser.parse_args()

    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = LanguageModel()
    mesh = init_device_mesh("cpu", (size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    mine = batches(8 // size, 16, seed=rank)  # each process has data of its own
    hessian = so.HessianOperator(model, F.cross_entropy, mine)
    subspace = so.DominantSubspace(hessian, k=3, refresh=10)
    optimizer = so.BulkSGD(model.parameters(), lr=0.3, momentum=0.9, subspace=subspace)
    monitor = so.Monitor(optimizer, subspace, every=5, log="run.csv", append=True)

    def state() -> dict[str, object]:
        parameters, moments = get_state_dict(model, optimizer)
        return {"model": parameters, "optimizer": moments, "subspace": subspace, "monitor": monitor}

    if options.checkpoint and (options.checkpoint / ".metadata").exists():
        saved = state()
        dcp.load(saved, checkpoint_id=options.checkpoint)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
    for step in range(options.steps):
        x, y = mine[step % len(mine)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    if options.checkpoint:
        dcp.save(state(), checkpoint_id=options.checkpoint)
    if rank == 0:
        here, P = hessian.parameters.size_here, hessian.size
        print(f"{size} processes; this one has {here:,} of the {P:,} coordinates")
        for name in ("step", "loss", "chi_gradient", "sharpness"):
            print(f"{name:>12}:", *(f"{value:8.3g}" for value in monitor.history[name]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
