"""Running a function in several gloo processes on this machine."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(function, world, folder, *arguments):
    """Run a function in gloo processes that know each other, and give what it returned in each; None where it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_meet, (function, world, str(folder), arguments), nprocs=world, start_method="fork")
    saved = [folder / f"{rank}.pt" for rank in range(world)]
    return [torch.load(path) if path.exists() else None for path in saved]


def _meet(rank, function, world, folder, arguments):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(function(*arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
