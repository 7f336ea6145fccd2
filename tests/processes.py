"""What the tests over several processes share."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist


def join(rank: int, world: int, folder: str, **options) -> None:
    """A process of a test joins the others (gloo), with one thread and without warnings."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, **options)


def refusal(make) -> str:
    """The text of the RuntimeError that ``make`` raises, or nothing."""
    try:
        make()
    except RuntimeError as error:
        return str(error)
    return ""
