"""Figures for the README: `python tests/bench.py`, with --all those that take minutes too.

Each line is one measurement on this machine; nothing else may run meanwhile.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """The processor's name and what we may use of it."""
    try:
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    except OSError:
        names = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {cores} cores, Python {platform.python_version()}"


def process(*arguments: str, repeat: int = 3) -> float:
    """Best wall-clock seconds of a whole process, start-up included."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def peak(*arguments: str) -> float:
    """Peak resident memory of a process in MB, measured in a child of its own."""
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    out = subprocess.run([sys.executable, "-c", code, sys.executable, *arguments], cwd=ROOT, check=True,
                         capture_output=True, text=True).stdout
    return int(out) / (1024 if sys.platform != "darwin" else 1024**2)


def main() -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as out:
        default = ("generate.py", "--out", out)
        print(f"python generate.py, 50 steps, whole process   {process(*default):6.1f} s   (aim: 12)")
        print(f"                    peak memory               {peak(*default):6.0f} MB  (aim: 1000)")
    bare = process("-c", "import torch")
    print(f"import torch                                  {bare:6.2f} s")
    print(f"import generate (torch included)              {process('-c', 'import generate'):6.2f} s")
    print(f"import train (torch included)                 {process('-c', 'import train'):6.2f} s")
    print(f"python generate.py --help                     {process('generate.py', '--help'):6.2f} s")
    if "--all" in sys.argv:
        with tempfile.TemporaryDirectory() as out:
            seconds = process("train.py", "cg", "--steps", "500", "--out", out, repeat=1)
            print(f"python train.py cg, to its first sheet        {seconds:6.0f} s   (aim: 600)")
        seconds = process("-m", "pytest", "-q", repeat=1)
        print(f"python -m pytest                              {seconds:6.0f} s   (aim: 600)")


if __name__ == "__main__":
    main()
