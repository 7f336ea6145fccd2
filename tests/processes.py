"""What the tests over several processes share."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist


def join(rank: int, world: int, folder: str, **options) -> None:
    """A process of a test joins the others (gloo), with one thread and without warnings."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, **options)


def together(worker, world: int, folder: Path, seconds: float = 400) -> list[dict]:
    """What the processes ``worker(rank, world, folder)`` have saved as ``folder/RANK.pt``.

    One that waits for ever is ended after ``seconds``, and fails the test instead of stopping CI.
    """
    started = time.monotonic()
    context = torch.multiprocessing.spawn(worker, (world, str(folder)), world, join=False)
    while not context.join(timeout=1):  # an error of one ends all, and is raised here
        if time.monotonic() - started > seconds:
            alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"after {seconds} s these ranks were still running: {alive}")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def refusal(make) -> str:
    """The text of the RuntimeError that ``make`` raises, or nothing."""
    try:
        make()
    except RuntimeError as error:
        return str(error)
    return ""
