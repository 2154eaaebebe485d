"""Tests: counts promises kept under faults: an interrupted run loses nothing, and bad input costs one line.

    python tests/faults.py                # all of it, at most 20 minutes on two cores; exits with 1 if anything failed
    python tests/faults.py kills disk     # some parts: kills, disk, locks, finished, numbers, fuzz, load
    python tests/faults.py --quick        # a sample of all but load, in a minute

Every run is the real program with tiny networks, in processes of its own. Each process is a fork of this one, so torch
is imported only once. Several are started as torchrun starts them, by RANK, WORLD_SIZE and the like.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # other threads would not survive a fork
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fuzz
import numpy as np
import torch
from conftest import write_tiny_toy
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import evaluate
import generate
import train
from support.datasets import read_items
from support.files import one_line_errors
from support.machine import cores
from toy.world import write_world

WEIGHTS = "diffusion_pytorch_model.safetensors"
NOBODY = 65534  # a user with fewer rights than root
Fault = str | None  # what went wrong in a case; None: nothing did

# ---------------------------------------------------------------- programs as processes


@dataclass
class Run:
    """A program that runs in forks of this process, one for each rank; its output goes to a log."""

    processes: list[int]
    log: Path
    ended: dict[int, int] = field(default_factory=dict)  # process: its exit status, negative for a signal
    memory: int = 0  # bytes: the largest process's peak

    def wait(self, seconds: float) -> bool:
        """Waits for all processes, at most this long -> whether they have ended."""
        end = time.monotonic() + seconds
        while True:
            for process in set(self.processes) - self.ended.keys():
                done, status, usage = os.wait4(process, os.WNOHANG)
                if done:
                    self.ended[process] = os.waitstatus_to_exitcode(status)
                    self.memory = max(self.memory, 1024 * usage.ru_maxrss)
            if len(self.ended) == len(self.processes) or time.monotonic() > end:
                return len(self.ended) == len(self.processes)
            time.sleep(0.002)

    def kill(self, processes: list[int] | None = None) -> None:
        """Sends SIGKILL to some of the processes, then to the others what torchrun sends: SIGTERM, later SIGKILL."""
        first = processes or self.processes
        for chosen, number in ((first, signal.SIGKILL), (self.processes, signal.SIGTERM),
                               (self.processes, signal.SIGKILL)):
            for process in set(chosen) - self.ended.keys():
                os.kill(process, number)
            if self.wait(1.0):
                break
        self.wait(60)

    def fault(self, *statuses: int, seconds: float = 120) -> Fault:
        """Waits for the end -> a fault unless the exit status is one of these; 2 needs one line that says why."""
        if not self.wait(seconds):
            self.kill()
            return f"did not end in {seconds} s"
        said = self.log.read_text(errors="replace")
        errors = said.count("\nerror: ") + said.startswith("error: ")
        for status in self.ended.values():
            if status not in statuses:
                return f"exit status {status}: {said[-1500:]}"
        if "Traceback" in said or errors != [*self.ended.values()].count(2):
            return f"said {said[-1500:]}"
        return None


def start(program: Callable, arguments: list, folder: Path, world: int = 1, limits: dict | None = None,
          user: int | None = None) -> Run:
    """Starts program(arguments) in `world` new processes, whose working folder is `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, log = [], folder / f"log_{len([*folder.glob('log_*')])}"
    for rank in range(world):
        if not (process := os.fork()):
            torchrun = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=world,
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=port) if world > 1 else {}
            become(program, [str(a) for a in arguments], log, torchrun, limits or {}, user)
        processes.append(process)
    return Run(processes, log)


def become(program: Callable, arguments: list[str], log: Path, environment: dict, limits: dict, user: int | None):
    """In a fork: runs a program as its command line does, and ends."""
    status = 1
    try:
        os.setsid()
        os.chdir(log.parent)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.environ.update({name: str(value) for name, value in environment.items()})
        for what, most in limits.items():
            resource.setrlimit(what, (most, most))
        if user is not None:
            os.setuid(user)
        with one_line_errors():
            program(arguments)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# ---------------------------------------------------------------- what is run, and the runs that nothing disturbs

TMP = Path(tempfile.gettempdir()) / f"faults-{os.getpid()}"
TINY = TMP / "tiny"  # base, cg, pg, ads
WHOLE = TMP / "whole"


def make_tiny(_) -> None:
    """Writes a base, CG and PG with random weights at 64 pixels, and the toy's ads."""
    write_world(TINY, size=64, ads=24, bg1k=8, pairs=8, workers=1, parts=("ads",))
    items, _ = read_items(TINY / "ads")
    write_tiny_toy(TINY, {name: f"sks {i}" for i, name in enumerate(sorted({item.category for item in items}))})


TRAINING = ["--data", TINY / "ads", "--weights", TINY / "base", "--device", "cpu", "--size", 64, "--batch", 4,
            "--steps", 8, "--save-every", 2, "--sample-every", 4, "--log-every", 1, "--ema", 0.9, "--lr", 1e-3]
PAINTING = ["--weights", TINY / "base", "--cg", TINY / "cg", "--pg", TINY / "pg", "--device", "cpu",
            "--dtype", "float32", "--steps", 2]
PAIRS = ["--data", TINY / "ads", "--split", "bgpair", "--batch", 3]
COMMANDS = {  # program, arguments, processes
    "train cg": (train.main, ["cg", *TRAINING], 1),
    "train pg": (train.main, ["pg", "--cg", TINY / "cg", *TRAINING], 1),
    "train joint": (train.main, ["joint", *TRAINING], 1),
    "train cg, two processes": (train.main, ["cg", *TRAINING], 2),
    "train joint, two processes": (train.main, ["joint", *TRAINING], 2),
    "generate --data": (generate.main, [*PAINTING, *PAIRS], 1),
    "generate --data, two processes": (generate.main, [*PAINTING, *PAIRS], 2),
}


def begin(name: str, folder: Path, *options, **how) -> Run:
    """Starts one of COMMANDS; it writes to folder/run/out and, if it trains, folder/run/cache."""
    program, arguments, world = COMMANDS[name]
    return start(program, [*arguments, "--out", folder / "run" / "out", *options], folder, world, **how)


def go_on(name: str, folder: Path) -> Fault:
    """Does what a user does after a fault: gives the same command, with --resume where there is a checkpoint.

    Returns a fault unless everything ends as if nothing had happened.
    """
    resume = ["--resume"] if [*folder.rglob("checkpoint_*")] else []
    return begin(name, folder, *resume).fault(0) or difference(WHOLE / name, folder)


def whole(name: str) -> Fault:
    """The run that nothing disturbs; it writes its duration to a file."""
    folder = WHOLE / name
    folder.mkdir(parents=True)
    clock = time.monotonic()
    fault = begin(name, folder).fault(0)
    (folder / "seconds").write_text(str(time.monotonic() - clock))
    return fault


def results(folder: Path) -> dict[str, object]:
    """The content of each file under folder/run, by name, without what depends on the time."""
    found = {}
    for path in sorted((folder / "run").rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            lasting = [[line.get(key) for key in ("step", "item", "file", "how")] for line in lines]
            found[name] = sorted(map(json.dumps, lasting))
        elif path.suffix == ".safetensors":
            found[name] = fuzz.split_file(path.read_bytes())  # the header's order differs from one process to the next
        elif path.is_file() and path.name != "loss.png":
            found[name] = path.read_bytes()
        elif path.name.startswith("."):
            found[name] = "scratch"
    return found


def difference(expected: Path, folder: Path) -> Fault:
    """The difference between two folders' results, if any. Surplus checkpoints do not count."""
    a, b = results(expected), results(folder)
    b = {name: content for name, content in b.items() if name in a or "/checkpoint_" not in name}
    different = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return f"differs from the undisturbed run: {', '.join(different[:5])}" if different else None


# ---------------------------------------------------------------- 1. kills


def kill(folder: Path, name: str, number: int) -> Fault:
    """Sends SIGKILL at a random moment, in every second case while a file is written; then gives the command again.

    With two processes, every second case kills only one, and torchrun ends the other.
    """
    rng = random.Random(f"{name} {number}")
    seconds = float((WHOLE / name / "seconds").read_text())
    while True:
        run = begin(name, folder)
        run.wait(rng.uniform(0, seconds))
        while number % 2 and not run.wait(0.001) and not [*folder.rglob(".scratch-*")]:
            pass
        if not run.wait(rng.uniform(0, 0.01)):
            break
        shutil.rmtree(folder / "run")  # it ended first: try again, with an earlier moment
        seconds *= 0.9
    run.kill(rng.sample(run.processes, 1) if number % 4 < 2 else None)
    return go_on(name, folder)


def kills() -> Iterator[tuple]:
    for name, count in zip(COMMANDS, (18, 14, 14, 14, 10, 16, 14)):
        yield from (("kills", name, kill, name, i) for i in range(count))


# ---------------------------------------------------------------- 2. full disks and folders that are read-only


def starve(folder: Path, name: str, number: int) -> Fault:
    """A disk that is too small, or, where mounting is not allowed, a limit on file sizes; then there is room."""
    rng = random.Random(f"{name} {number}")
    sizes = sorted(path.stat().st_size for path in (WHOLE / name / "run").rglob("*") if path.is_file())
    (folder / "run").mkdir()
    disk = ["mount", "-t", "tmpfs", "-o", f"size={int(rng.uniform(0.05, 0.9) * sum(sizes)) // 4096 * 4 + 8}k", "none",
            folder / "run"]
    mounted = number % 2 and subprocess.run(disk, capture_output=True).returncode == 0
    limits = {} if mounted else {resource.RLIMIT_FSIZE: max(8192, rng.randrange(sizes[-1]))}
    try:
        fault = begin(name, folder, limits=limits).fault(2) or not_whole(folder)
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", folder / "run"], check=True)
        return fault or go_on(name, folder)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder / "run"], check=True)


def lock_out(folder: Path, name: str, number: int) -> Fault:
    """All folders become read-only at a random moment, and later writable again."""
    rng, root = random.Random(f"{name} {number}"), os.getuid() == 0
    (folder / "run").mkdir()
    for path in (folder, folder / "run"):
        os.chown(path, NOBODY if root else -1, -1)
    run = begin(name, folder, user=NOBODY if root else None)
    run.wait(rng.uniform(0.2, 0.8) * float((WHOLE / name / "seconds").read_text()))
    folders = [path for path in [folder / "run", *(folder / "run").rglob("*")] if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    fault = run.fault(0, 2) or (2 in run.ended.values() and not_whole(folder)) or None
    for path in folders:
        path.chmod(0o755)
    return fault or go_on(name, folder)


def not_whole(folder: Path) -> Fault:
    """Files under folder/run that can't be opened, and scratch files, if there are any."""
    for path in (folder / "run").rglob("*"):
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".png":
                Image.open(path).load()
        except Exception as error:
            return f"{path} is not whole: {error}"
        if path.name.startswith(".scratch-"):
            return f"{path} is left"
    return None


def convert_on_a_full_disk(folder: Path, number: int) -> Fault:
    """`weights.py convert` writes the whole file or none, even over an old one."""
    torch.save({"state_dict": {"w": torch.ones(100_000)}}, folder / "in.ckpt")
    out, old = folder / "run" / "out.safetensors", number % 2
    out.parent.mkdir()
    if old:
        save_file({"old": torch.ones(1)}, out)
    limits = {resource.RLIMIT_FSIZE: random.Random(number).randrange(1000, 400_000)}
    fault = start(fuzz.weights.main, ["convert", folder / "in.ckpt", out], folder, limits=limits).fault(2)
    left = {path.name: [*load_file(path)] for path in out.parent.iterdir()}
    return fault or (f"left {left}" if left != ({out.name: ["old"]} if old else {}) else None)


def disk() -> Iterator[tuple]:
    for name, count in (("train cg", 16), ("train cg, two processes", 8), ("generate --data", 16)):
        yield from (("full disk", name, starve, name, i) for i in range(count))
    yield from (("full disk", "weights.py convert", convert_on_a_full_disk, i) for i in range(10))
    for name in ("train cg", "generate --data"):
        yield from (("read-only", name, lock_out, name, i) for i in range(6))


# ---------------------------------------------------------------- 3. locks; 4. finished runs


def refused(folder: Path, first: str, second: str) -> Fault:
    """While the first command runs, the second is refused in one line. Once the first is killed, the second may run."""
    endless = ["--steps", 10**6] if first.startswith("train") else ["--steps", 500]
    run, out = begin(first, folder, *endless), folder / "run" / "out"

    def other() -> Run:
        if second == "evaluate":
            return start(evaluate.main, ["table1", "--data", "none", "--out", out], folder)
        return begin(second, folder)

    while not (out / ".in_use").exists():
        if run.wait(0.01):
            return f"the first ended: {run.log.read_text()}"
    again = other()
    fault, said = again.fault(2), again.log.read_text()
    if not fault and f"error: --out {out}: another run writes into it" not in said:
        fault = f"said {said}"
    run.kill()
    third = other()
    third.fault(0, 2)
    return fault or ("the lock was left" if "writes into" in third.log.read_text() else None)


def locks() -> Iterator[tuple]:
    pairs = [(first, second) for first in COMMANDS for second in (*COMMANDS, "evaluate")]
    for first, second in random.Random(0).sample(pairs, 20):
        yield "two runs into one --out", "all programs", refused, first, second


def finish(folder: Path, name: str) -> Fault:
    """--resume of a finished run changes nothing; with a larger --steps it trains on."""
    shutil.copytree(WHOLE / name / "run", folder / "run")
    run = begin(name, folder, "--resume")
    fault = run.fault(0) or difference(WHOLE / name, folder)
    if "from step 8 to 8" not in run.log.read_text():
        return fault or f"said {run.log.read_text()}"
    fault = fault or begin(name, folder, "--resume", "--steps", 9).fault(0)
    return fault or (None if [*folder.rglob("checkpoint_00000009.safetensors")] else "trained no further")


def finished() -> Iterator[tuple]:
    yield from (("finished runs", name, finish, name) for name in COMMANDS if name.startswith("train"))


# ---------------------------------------------------------------- 7. numbers that must not be trusted


def poisoned(folder: Path, name: str, part: str, number: float) -> Fault:
    """If some weights of one network are NaN or infinite, no picture and no checkpoint comes from them."""
    shutil.copytree(TINY, folder / "tiny", ignore=shutil.ignore_patterns("ads"))
    file = next((folder / "tiny" / part).glob("*.safetensors"))
    tensors, rng = load_file(file), random.Random(f"{name} {part} {number}")
    if part == "base/vae":  # what training and painting read of it
        kept = ("encoder", "quant") if name.startswith("train") else ("decoder", "post_quant")
        chosen = rng.choice([tensor for tensor in tensors if tensor.startswith(kept) and tensor.endswith(".bias")])
    else:
        chosen = rng.choice([tensor for tensor in tensors if tensor.endswith(".bias")])
    tensors[chosen][:] = number
    save_file(tensors, file)
    options = {"--weights": folder / "tiny" / "base", "--cg": folder / "tiny" / "cg", "--pg": folder / "tiny" / "pg"}
    used = ("--weights", "--cg", "--pg") if name.startswith("generate") else ("--weights",)
    fault = begin(name, folder, *(word for option in used for word in (option, options[option]))).fault(2)
    left = [path.name for path in folder.glob("run/out/**/*") if path.suffix in (".png", ".safetensors")]
    return f"{chosen}: {fault}" if fault else f"{chosen}: wrote {left}" if left else None


def explode(folder: Path, amp: list[str]) -> Fault:
    """A learning rate that is far too high ends in one line or a result, and what is saved is finite."""
    fault = begin("train cg", folder, "--lr", 10, "--steps", 60, "--ema", 0, *amp).fault(0, 2)
    for path in folder.glob("run/out/**/*.safetensors"):
        if broken := [name for name, tensor in load_file(path).items() if not tensor.isfinite().all()]:
            return f"{path}: {broken[0]} is not finite"
    return fault


def all_product(folder: Path, level: int) -> Fault:
    """A mask that is white or nearly white everywhere."""
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(folder / "ad.png")
    Image.fromarray(np.full((40, 30), level, np.uint8)).save(folder / "mask.png")
    arguments = ["--product", folder / "ad.png", "--mask", folder / "mask.png", "--category", "watch",
                 "--out", folder / "run"]
    return start(generate.main, [*PAINTING, *arguments], folder).fault(2)


def numbers() -> Iterator[tuple]:
    base = ("base/unet", "base/vae", "base/text_encoder")
    for name, networks in (("train cg", base), ("generate --data", (*base, "cg", "pg"))):
        for network in networks:
            for number in (float("nan"), float("inf")):
                yield "numbers", "NaN and infinite weights", poisoned, name, network, number
    for amp in ([], ["--amp", "float16"], ["--amp", "bfloat16"]):
        yield "numbers", "learning rate 10", explode, amp
    for level in (255, 254, 200):
        yield "numbers", "an ad that is all product", all_product, level


# ---------------------------------------------------------------- 5. fuzzed files

CPU_SECONDS, WALL_SECONDS, MEMORY = 10, 60, 2 << 30


def fuzzed(folder: Path, kind: str, number: int) -> Fault:
    """A broken or hostile file ends in a result or in one line, soon, with little memory, and does nothing else."""
    program, arguments, steps = fuzz.KINDS[kind](folder, TINY, random.Random(f"{kind} {number}"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    run = start(program, arguments, folder, limits={resource.RLIMIT_CPU: CPU_SECONDS, resource.RLIMIT_CORE: 0,
                                                    resource.RLIMIT_AS: virtual + MEMORY})
    fault = run.fault(0, 2, seconds=WALL_SECONDS)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    written = {path.relative_to(folder).parts[0] for path in after if before.get(path) != after[path]}
    if not fault and run.memory > MEMORY:
        fault = f"took {run.memory >> 20} MB"
    if not fault and "memory is full" in run.log.read_text(errors="replace"):
        fault = "asked for more than 2 GB"
    if not fault and written - {"log_0", "out", "out.safetensors"}:
        fault = f"wrote {written}"
    return f"{steps}: {fault}" if fault else None


def fuzzes() -> Iterator[tuple]:
    for kind, count in fuzz.COUNTS.items():
        yield from (("fuzzed files", kind, fuzzed, kind, i) for i in range(count))


# ---------------------------------------------------------------- 6. load


def load(folder: Path, name: str, count: int) -> Fault:
    """Memory at the end is within 5% of that after the first tenth, and the number of open files is constant."""
    if name == "train cg":
        options, progress = ["--steps", count, "--sample-every", 200], "run/out/training/cg/log.jsonl"
    else:
        data, progress = folder / "data", "run/out/manifest.jsonl"
        data.mkdir()
        items = read_items(TINY / "ads", "bgpair")[0]
        lines = []
        for i in range(count):
            item = items[i % len(items)]
            files = {key: getattr(item, key) for key in ("image", "mask", "reference", "reference_mask")}
            for file in files.values():
                if not (data / f"{file.parent.name}_{file.name}").exists():
                    shutil.copy(file, data / f"{file.parent.name}_{file.name}")
            names = {key: f"{file.parent.name}_{file.name}" for key, file in files.items()}
            lines.append({"file_name": names.pop("image"), **names, "category": item.category})
        (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = ["--data", data, "--split", "bg60k", "--batch", 4, "--steps", 1]
    run, samples = begin(name, folder, *options), []
    while not run.wait(0.2):
        file = folder / progress
        done = len(file.read_bytes().splitlines()) / count if file.exists() else 0
        try:
            memory = int(Path(f"/proc/{run.processes[0]}/statm").read_text().split()[1]) * resource.getpagesize()
            samples.append((done, memory, len(os.listdir(f"/proc/{run.processes[0]}/fd"))))
        except OSError:
            break  # it has ended
    if fault := run.fault(0):
        return fault
    early, late = ([s[1:] for s in samples if low <= s[0] <= high] for low, high in ((0.1, 0.2), (0.9, 1)))
    (memory, files), (memory_then, files_then) = (np.median(x, axis=0) for x in (late, early))
    said = f"{memory_then / 2**20:.0f} MB after the first tenth, {memory / 2**20:.0f} at the end; open files " \
           f"{files_then:.0f} and {files:.0f}"
    print(f"{name}: {said}", file=sys.stderr)
    return said if memory > 1.05 * memory_then or files != files_then else None


def loads() -> Iterator[tuple]:
    yield "load", "train.py, 2,000 steps", load, "train cg", 2000
    yield "load", "generate.py --data, 2,000 items", load, "generate --data", 2000


# ---------------------------------------------------------------- all of it

PARTS = {"load": loads, "kills": kills, "disk": disk, "locks": locks, "finished": finished, "numbers": numbers,
         "fuzz": fuzzes}
QUICK = {"load": 0, "kills": 5, "disk": 3, "locks": 2, "finished": 1, "numbers": 4, "fuzz": 60}  # cases of --quick


def carry_out(job: tuple) -> tuple[tuple[str, str], Fault]:
    """Carries out one case in a folder of its own, which is kept if the case failed."""
    part, label, function, *case = job
    folder = Path(tempfile.mkdtemp(dir=TMP))
    folder.chmod(0o755)
    try:
        fault = function(folder, *case)
    except Exception:
        fault = traceback.format_exc()
    if fault:
        fault = f"{part}, {label}, {case} in {folder}: {fault}"
    else:
        shutil.rmtree(folder)
    return (part, label), fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--quick", action="store_true", help="a sample, in a minute")
    args = parser.parse_args()
    jobs, tried, faults = [], {}, []
    for name in args.parts or PARTS:
        cases = [*PARTS[name]()]
        jobs += random.Random(0).sample(cases, QUICK[name]) if args.quick else cases
    used = [name for name in COMMANDS if any(name in job for job in jobs)]
    TMP.mkdir()
    if broken := start(make_tiny, [], TMP).fault(0):
        sys.exit(broken)
    with ProcessPoolExecutor(cores(), multiprocessing.get_context("fork")) as pool:
        if broken := [fault for fault in pool.map(whole, used) if fault]:
            sys.exit(f"an undisturbed run failed: {broken[0]}")
        done = as_completed([pool.submit(carry_out, job) for job in jobs])
        for result in tqdm(done, total=len(jobs), disable=not sys.stderr.isatty()):
            row, fault = result.result()
            count, survived = tried.get(row, (0, 0))
            tried[row] = count + 1, survived + (fault is None)
            if fault:
                faults.append(fault)
                tqdm.write(f"failed: {fault}", file=sys.stderr)
    print("| fault | in | tried | survived |", "| --- | --- | --- | --- |", sep="\n")
    for row, counts in tried.items():
        print("|", " | ".join([*row, *(f"{count:,}" for count in counts)]), "|")
    if faults:
        sys.exit(f"{len(faults)} of {len(jobs)} failed; their folders are in {TMP}")
    shutil.rmtree(TMP)


if __name__ == "__main__":
    main()
