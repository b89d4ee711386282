"""Several processes on this machine that talk through gloo, each of which runs the same tasks."""

import datetime
import json
import multiprocessing
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fxprune import PruneError

# Importing these takes longer than most tasks, so one process does it and the others are forked from that one. fxprune is not
# among them: each process imports that of the path which pytest has set.
IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo", "safetensors.torch"]
multiprocessing.set_forkserver_preload([*IMPORTED, "networkx", "scipy.sparse", "rich", "pytest"])


def work(rank, world, port, tasks, folder):
    """Run tasks, each called with the rank, and write what they return, or the PruneError that they raise, as JSON."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
    results = {}
    for task in tasks:
        try:
            results[task.__name__] = task(rank)
        except PruneError as error:
            results[task.__name__] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def in_processes(world, tasks, folder):
    """What each task returned in each process: one dict by name of the task for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, (world, port, tasks, folder), nprocs=world, start_method="forkserver")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
