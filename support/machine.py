"""Support: the machine: device, cores, processes, which precision is fast; not needed to understand the paper."""

import os
import sys
import time
import timeit
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from support.files import BadInput


def pick_device(name: str) -> str:
    """The name of a device that this machine has. 'auto' is a GPU if there is one; 'cuda' is this process's own GPU.

    Raises BadInput for a device that it does not have.
    """
    device = name
    if name == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and torch.backends.mps.is_available():
            print("this machine has an Apple GPU: --device mps, which has not been tested, uses it", file=sys.stderr)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.ones(1, device=device).item()  # "meta" has no values
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device {name}: no such device here; choose auto, cpu or a GPU that torch sees") from None
    return device


def cores() -> int:
    """How many cores this process may use: a container or a batch system may give it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processes() -> tuple[int, int]:
    """This process's rank, and the number of processes; torchrun sets both."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    """Waits until all processes of a torchrun have come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(number: int) -> int:
    """The sum of a number over the processes of a torchrun. Each waits here for the others' work, since a torchrun ends
    all processes when one fails.
    """
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=timedelta(days=99))
        dist.all_reduce(total := torch.tensor(number))
        number = total.item()
    return number


# ---------------------------------------------------------------- precision

CLEARLY_FASTER = 1.25  # measured, on busy machines too: 1.9 with native bfloat16 (Zen 4), 0.5 or less without


def pick_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that --dtype names; "auto" is half precision if that is faster on the device."""
    if name == "auto" and device.startswith("cuda"):
        return torch.float16
    if name == "auto":
        return torch.bfloat16 if device == "cpu" and bfloat16_is_faster() else torch.float32
    return getattr(torch, name)


@cache
def bfloat16_is_faster() -> bool:
    """Whether the CPU multiplies matrices clearly faster in bfloat16 than in float32: it is measured.

    The CPU's list of features does not say: some CPUs have bfloat16 instructions that are slower than float32's.
    """
    return bfloat16_speedup() > CLEARLY_FASTER


def bfloat16_speedup() -> float:
    """How many times as fast as in float32 one core multiplies two 256 x 256 matrices in bfloat16.

    Takes 30 ms, or 150 ms where bfloat16 is emulated. Both take turns and the best of many short runs counts, so other
    programs on the machine can't favour one.
    """
    threads, runs = torch.get_num_threads(), []
    matrices = [torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    torch.set_num_threads(1)
    end = time.perf_counter() + 0.03
    while len(runs) < 3 or time.perf_counter() < end:
        runs.append([timeit.timeit("m @ m", number=1, globals={"m": matrix}) for matrix in matrices])
    torch.set_num_threads(threads)
    float32, bfloat16 = map(min, zip(*runs))
    return float32 / bfloat16
