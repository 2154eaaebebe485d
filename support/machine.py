"""Support: the machine: device, cores, processes, which precision is fast; not needed to understand the paper."""


import os
import time
from functools import cache

import torch
import torch.distributed as dist

from support.files import BadInput


def pick_device(name: str) -> str:
    """The name of a device that this machine has. 'auto' is a GPU if there is one; 'cuda' is this process's own GPU.

    Raises BadInput for a device that it does not have.
    """
    given = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.ones(1, device=name).item()  # "meta" has no values
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError):
        here = "auto, cpu, cuda" if torch.cuda.is_available() else "auto, cpu"
        raise BadInput(f"--device {given}: no such device here; choose {here}") from None
    return name


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


# ---------------------------------------------------------------- precision

PRODUCT = 256  # the side of the matrices that are multiplied to compare speeds
CLEARLY_FASTER = 1.25  # measured, on busy machines too: 1.9 with native bfloat16 (Zen 4), 0.5 or less without


def pick_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that --dtype names; "auto" is half precision if that is faster on the device."""
    if name == "auto" and device.startswith("cuda"):
        return torch.float16
    if name == "auto":
        return torch.bfloat16 if bfloat16_is_faster() else torch.float32
    return getattr(torch, name)


@cache
def bfloat16_is_faster() -> bool:
    """Whether the CPU multiplies matrices clearly faster in bfloat16 than in float32: it is measured.

    The CPU's list of features does not say: some CPUs have bfloat16 instructions that are slower than float32's.
    """
    speed = products_per_second()
    return speed[torch.bfloat16] > CLEARLY_FASTER * speed[torch.float32]


def products_per_second() -> dict[torch.dtype, float]:
    """How many products of two PRODUCT x PRODUCT matrices one core computes in a second, in float32 and bfloat16.

    Takes some 10 ms, or 150 ms where bfloat16 is emulated. Both take turns and the best of many short runs counts, so
    other programs on the machine can't favour one.
    """
    threads, fastest = torch.get_num_threads(), {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    torch.set_num_threads(1)
    try:
        matrices = {dtype: torch.ones(PRODUCT, PRODUCT, dtype=dtype) for dtype in fastest}
        start = time.perf_counter()
        for i in range(20):
            for dtype, matrix in matrices.items():
                clock = time.perf_counter()
                matrix @ matrix
                fastest[dtype] = min(fastest[dtype], time.perf_counter() - clock)
            if i >= 2 and time.perf_counter() - start > 0.05:
                break
    finally:
        torch.set_num_threads(threads)
    return {dtype: 1 / seconds for dtype, seconds in fastest.items()}
