"""Tests: counts promises kept under faults: an interrupted run loses nothing, and bad input costs one line.

    python tests/faults.py            # all of it, at most 15 minutes on two cores; exits with 1 if anything failed
    python tests/faults.py --quick    # a sample, in a minute

Every run is the real program with tiny networks, in forks of this process, so that torch is imported only once. Several
processes are started as torchrun starts them, by RANK, WORLD_SIZE and the like. Each case has its own working folder,
in which runs read from tiny/ and write to run/. A case that fails raises an error.
"""

import argparse
import multiprocessing
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # other threads would not survive a fork
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fuzz
import torch
from conftest import write_tiny_toy
from PIL import Image
from safetensors.torch import load_file, save_file
from test_pickles import COMMANDS as HOSTILE, archive, legacy
from tqdm import tqdm

import evaluate
import generate
import train
import weights
from support.files import one_line_errors
from support.machine import cores
from toy.products import PRODUCTS
from toy.world import write_world

FORK = multiprocessing.get_context("fork")
TMP = Path(tempfile.gettempdir()) / f"faults-{os.getpid()}"
TINY, WHOLE = TMP / "tiny", TMP / "whole"  # what all runs read; the runs that nothing disturbs

# ---------------------------------------------------------------- programs as processes


class Run:
    """A program that runs in forks of this process, one for each rank; its output goes to a log."""

    def __init__(self, program: Callable, arguments: list, folder: Path, world: int = 1, limits: dict | None = None):
        self.log = folder / f"log_{time.monotonic_ns()}"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.processes = [FORK.Process(target=become, args=(program, arguments, self.log, limits or {}, {
            "RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "faults",  # as under torchrun, processes wait for one another at the end
        })) for rank in range(world)]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float) -> bool:
        """Waits for all processes, at most this long -> whether they have ended."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        return not any(process.is_alive() for process in self.processes)

    def kill(self, first: list | None = None) -> None:
        """Sends SIGKILL to some processes, or to all; then to the others, like torchrun, SIGTERM and later SIGKILL."""
        for process in first or self.processes:
            process.kill()
        if not self.wait(1):
            for process in self.processes:
                process.terminate()
            if not self.wait(1):
                self.kill()

    def ends(self, *statuses: int) -> str:
        """Waits for the end -> the output. The exit status must be one of these; 2 needs one line that says why. If one
        process fails, the others are ended, as by torchrun.
        """
        end = time.monotonic() + 120
        while not (ended := self.wait(0.1)) and time.monotonic() < end and not any(p.exitcode for p in self.processes):
            pass
        self.kill()
        said, ends = self.log.read_text(errors="replace"), {process.exitcode for process in self.processes} - {-9}
        assert ended or any(ends), f"did not end in 120 s: {said[-1500:]}"
        assert ends <= {*statuses} and "Traceback" not in said, f"exit status {ends}: {said[-1500:]}"
        assert (2 in ends) <= f"\n{said}".count("\nerror: ") <= len(self.processes) * (2 in ends), said[-1500:]
        return said


def become(program: Callable, arguments: list, log: Path, limits: dict, environment: dict) -> None:
    """In a fork: runs a program as its command line does."""
    os.chdir(log.parent)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    for name, value in environment.items():
        os.environ[name] = str(value)
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))
    with one_line_errors():
        program([str(argument) for argument in arguments])


# ---------------------------------------------------------------- what is run, and the runs that nothing disturbs


def make_tiny(_) -> None:
    """Writes a base, CG and PG with random weights at 64 pixels, the toy's ads, and what fuzz.py damages."""
    write_world(TINY, size=64, ads=24, bg1k=8, pairs=8, workers=1, parts=("ads",))
    write_tiny_toy(TINY, {name: f"sks {i}" for i, name in enumerate(PRODUCTS)})
    torch.save({"state_dict": {"w": torch.ones(100_000)}}, TINY / "large.ckpt")
    fuzz.write_originals(TINY)


OUT = ["--out", "run/out"]
TRAINING = ["--data", "tiny/ads", "--weights", "tiny/base", "--device", "cpu", "--size", 64, "--batch", 4, "--steps", 8,
            "--save-every", 2, "--sample-every", 4, "--log-every", 1, "--ema", 0.9, "--lr", 1e-3, *OUT]
PAINTING = [*fuzz.MODELS, *fuzz.PAIRS, "--steps", 2, "--batch", 3, *OUT]
PROGRAMS = {  # program, arguments, processes
    "train cg": (train.main, ["cg", *TRAINING], 1),
    "train pg": (train.main, ["pg", "--cg", "tiny/cg", *TRAINING], 1),
    "train joint": (train.main, ["joint", *TRAINING], 1),
    "train cg, two processes": (train.main, ["cg", *TRAINING], 2),
    "train joint, two processes": (train.main, ["joint", *TRAINING], 2),
    "generate --data": (generate.main, PAINTING, 1),
    "generate --data, two processes": (generate.main, PAINTING, 2),
    "evaluate table1": (evaluate.main, ["table1", "--data", "none", *OUT], 1),
    "convert": (weights.main, ["convert", "tiny/large.ckpt", "run/out/large.safetensors"], 1),
}


def begin(name: str, folder: Path, *options, **how) -> Run:
    """Starts one of PROGRAMS with further options."""
    program, arguments, world = PROGRAMS[name]
    return Run(program, [*arguments, *options], folder, world, **how)


def undisturbed(name: str) -> None:
    """Runs a program that nothing disturbs, and writes down its duration."""
    start, folder = time.monotonic(), WHOLE / name
    shutil.copytree(TINY, folder / "tiny")
    begin(name, folder).ends(0)
    (folder / "seconds").write_text(str(time.monotonic() - start))


def contents(folder: Path) -> dict[str, object]:
    """The results in a folder by their names, without what depends on the time or on the process that wrote them."""
    found = {}
    for file in folder.glob("run/out/**/*.*"):
        content = file.read_bytes()
        if file.suffix == ".jsonl":
            content = sorted(re.sub(rb'"(seconds|images_per_second)": [^,}]*', b"", content).splitlines())
        elif file.suffix == ".safetensors":
            content = fuzz.split_file(content)
        elif file.suffix == ".pt":
            content = torch.load(file)["step"]
        found[str(file.relative_to(folder))] = content
    return found


def go_on(name: str, folder: Path) -> None:
    """Gives the same command after a fault, with --resume where there is a checkpoint. Everything must end as if
    nothing had happened, but for surplus checkpoints.
    """
    begin(name, folder, *["--resume"] * any(folder.rglob("checkpoint_*"))).ends(0)
    expected, found = contents(WHOLE / name), contents(folder)
    different = [file for file in expected | found if expected.get(file) != found.get(file)
                 and (file in expected or "/checkpoint_" not in file)]
    assert not different, f"differs from the undisturbed run: {different}"
    assert not any(folder.rglob(".*")), f"left over: {[*folder.rglob('.*')]}"


# ---------------------------------------------------------------- kills, full disks, second runs, finished runs


def kill(folder: Path, name: str, number: int) -> None:
    """SIGKILL at a random moment, in every second case while a file is written. In some cases with two processes only
    one is killed, and torchrun ends the other.
    """
    rng, seconds = random.Random(f"{name} {number}"), float((WHOLE / name / "seconds").read_text())
    while (run := begin(name, folder)).wait(rng.uniform(0, seconds)):
        shutil.rmtree(folder / "run")  # it ended first: try again, with an earlier moment
        seconds *= 0.9
    while number % 2 and not run.wait(0.001) and not any(folder.rglob(".scratch-*")):
        pass
    time.sleep(rng.uniform(0, 0.01))
    run.kill(rng.sample(run.processes, 1) if number % 4 < 2 else None)
    go_on(name, folder)


def full_disk(folder: Path, name: str, number: int) -> None:
    """A disk that is too small, or, where mounting is not allowed, a limit on the size of files; then there is room."""
    rng, run = random.Random(f"{name} {number}"), folder / "run"
    sizes = sorted(file.stat().st_size for file in (WHOLE / name).glob("run/**/*.*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={8192 + int(rng.uniform(0.05, 0.9) * sum(sizes))}", "none", run]
    run.mkdir()
    mounted = number % 2 and subprocess.run(mount, capture_output=True).returncode == 0
    limits = {} if mounted else {resource.RLIMIT_FSIZE: max(8192, rng.randrange(sizes[-1]))}
    try:
        begin(name, folder, limits=limits).ends(2)
        contents(folder)  # weights can be read
        for file in run.rglob("*.png"):
            Image.open(file).load()
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", run], check=True)
        go_on(name, folder)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", run], check=True)


def refused(folder: Path, first: str, second: str) -> None:
    """While the first command runs, the second is refused in one line. Once the first is killed, the second may run."""
    run, line = begin(first, folder, "--steps", 500), "error: --out run/out: another run writes into it"
    while not (folder / "run" / "out" / ".in_use").exists():
        assert not run.wait(0.01), run.log.read_text()
    assert line in begin(second, folder).ends(2)
    run.kill()
    assert line not in begin(second, folder).ends(0, 2)  # it may refuse what the first has written


def finished(folder: Path, name: str) -> None:
    """--resume of a finished run changes nothing; with a larger --steps it trains on."""
    shutil.copytree(WHOLE / name / "run", folder / "run")
    go_on(name, folder)
    begin(name, folder, "--resume", "--steps", 9).ends(0)
    assert any(folder.rglob("checkpoint_00000009.*")), "trained no further"


# ---------------------------------------------------------------- numbers and files that must not be trusted


def poisoned(folder: Path, name: str, network: str, number: str) -> None:
    """From a network whose biases are NaN or infinite comes no picture and no checkpoint."""
    file = next((folder / "tiny" / network).glob("*.safetensors"))
    tensors = load_file(file)
    for tensor in tensors:
        if tensor.endswith("bias"):
            tensors[tensor][:] = float(number)
    file.unlink()
    save_file(tensors, file)
    begin(name, folder).ends(2)
    written = {path.suffix for path in folder.glob("run/out/**/*")}
    assert not written & {".png", ".pt", ".safetensors"}, written


def diverges(folder: Path, name: str, *amp: str) -> None:
    """A learning rate that is far too high ends in one line or a result, and what is saved is finite."""
    begin(name, folder, "--lr", 10, "--steps", 60, "--ema", 0, *amp).ends(0, 2)
    for file in folder.glob("run/out/*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), f"{file} is not finite"


def fuzzed(folder: Path, kind: str, number: int) -> None:
    """A broken file ends in a result or in one line, within 10 s and 2 GB, and nothing else happens."""
    program, arguments = fuzz.broken(folder, kind, random.Random(f"{kind} {number}"))
    limits = {resource.RLIMIT_CPU: 10, resource.RLIMIT_DATA: 2 << 30}
    assert "memory is full" not in Run(program, arguments, folder, limits=limits).ends(0, 2)
    written = [file for file in folder.iterdir() if not re.match("log_|tiny|in.ckpt|out", file.name)]
    assert not written, f"{program.__module__} {arguments} wrote {written}"


def hostile(folder: Path, layout: str, kind: str) -> None:
    """A pickle that would make a file makes none. That it would is a test in test_pickles.py."""
    made = folder / "made"
    (folder / "in.ckpt").write_bytes({"zip": archive, "legacy": legacy}[layout](HOSTILE[kind](made)))
    Run(*fuzz.CONVERT, folder).ends(0, 2)
    assert not made.exists()


# ---------------------------------------------------------------- all of it

def numbered(counts: dict[str, int]) -> list[tuple[str, int]]:
    return [(name, i) for name, count in counts.items() for i in range(count)]


LOCKING = [name for name in PROGRAMS if name != "convert"]
CASES = {  # what is counted: the function, its arguments in each case, how many of these cases --quick takes
    "kills": (kill, numbered(dict(zip(PROGRAMS, (18, 14, 14, 14, 10, 16, 14)))), 5),
    "full disk": (full_disk, numbered({"train cg": 16, "generate --data": 16, "train cg, two processes": 8,
                                       "convert": 10}), 3),
    "second run": (refused, random.Random(0).sample([*product(LOCKING[:-1], LOCKING)], 20), 2),
    "finished run": (finished, [(name,) for name in PROGRAMS if "train" in name], 1),
    "NaN or infinity": (poisoned, [
        *product(["train cg", "generate --data"], ["base/unet", "base/vae", "base/text_encoder"], ["nan", "inf"]),
        *product(["generate --data"], ["cg", "pg"], ["nan", "inf"])], 4),
    "learning rate 10": (diverges, [("train cg",), *product(["train cg"], ["--amp"], ["float16", "bfloat16"])], 1),
    "fuzzed file": (fuzzed, numbered({kind: count for kind, (count, *_) in fuzz.KINDS.items()}), 60),
    "hostile pickle": (hostile, [*product(["zip", "legacy"], HOSTILE)], 4),
}


def attempt(part: str, case: tuple) -> bool:
    """Carries out a case in a folder of its own -> whether it succeeds. If it fails, the folder is kept."""
    folder = Path(tempfile.mkdtemp(dir=TMP))
    shutil.copytree(TINY, folder / "tiny", copy_function=os.symlink)
    try:
        CASES[part][0](folder, *case)
    except Exception:
        print(f"failed: {part}, {case}, in {folder}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        return False
    shutil.rmtree(folder)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sample, in a minute")
    quick = parser.parse_args().quick
    jobs = [(part, case) for part, (_, cases, sample) in CASES.items()
            for case in (random.Random(0).sample(cases, sample) if quick else cases)]
    TMP.mkdir()
    Run(make_tiny, [], TMP).ends(0)
    tried, survived = Counter(), Counter()
    with ProcessPoolExecutor(cores(), FORK) as pool:
        list(pool.map(undisturbed, {case[0] for _, case in jobs} & PROGRAMS.keys()))
        for (part, case), success in zip(jobs, tqdm(pool.map(attempt, *zip(*jobs)), total=len(jobs))):
            tried[f"| {part} | {case[0]} |"] += 1
            survived[f"| {part} | {case[0]} |"] += success
    print("| fault | in | tried | survived |", "| --- | --- | --- | --- |", sep="\n")
    for row, count in tried.items():
        print(row, f"{count:,} | {survived[row]:,} |")
    if survived != tried:
        sys.exit(f"some failed; their folders are in {TMP}")
    shutil.rmtree(TMP)


if __name__ == "__main__":
    main()
