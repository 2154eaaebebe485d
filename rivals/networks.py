"""Rivals: the networks of the lab, some of them trained on first use; not needed to understand the paper."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from clip import CLIP
from model import CategoryGenerator
from programs.models import TOY, categories_file
from rivals.stages import RIVAL_STAGES
from support.datasets import read_identifiers
from support.files import BadInput
from support.machine import barrier, processes
from support.tensors import fingerprint, model_fingerprint
from toy.world import TOY_DATA
from weights import load_clip, load_control, save_control

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {"weights": TOY / "base", **{name: TOY / name for name in ("cg", "pg", "cg-plain", "clip")}}
TRAINED = {  # the toy's others, trained on first use: a stage, with options of train.py
    "controlnet": ["controlnet", "--data", str(TOY_DATA / "base")],
    "lama": ["lama"],
    "paint-by-example": ["paint-by-example"],
    "guide-clip": ["clip", "--seed", "1"],
    "pg-controlnet": ["pg"],
    "pg-none": ["pg", "--steps", "600", "--theta", "0", "--sigma", "1", "1"],
    "pg-dilation": ["pg", "--steps", "600", "--sigma", "1", "1"],
    "pg-mixup": ["pg", "--steps", "600"],
}


class Networks(NamedTuple):
    """Where the networks are, by the names of their options and in TRAINED."""

    options: dict  # a program's, with hyphens in their names; `weights` is the base. None if an option was not given
    device: str  # where they run, and are trained

    def given(self, name: str) -> Path | None:
        """A network's path, by its option or as shipped; None if it is the toy's and must be trained.

        Raises BadInput if its option is missing with a base other than the toy's, which needs networks of its own.
        """
        path, base = self.options.get(name), self.options["weights"]
        if base and not path:
            raise BadInput(f"--{name} is missing: the toy's does not go with --weights {base}" if name in self.options
                           else "this command works with the toy only: leave out --weights")
        return path or SHIPPED.get(name)

    def path(self, name: str) -> Path:
        """As `given`, but trains the network first if it must be."""
        if path := self.given(name):
            return path
        command, frozen = TRAINED[name], []
        if command[0] == "pg":
            cg = self.given("cg")
            frozen = [as_plain_cg(self.path("controlnet"), cg) if name == "pg-controlnet" else cg]
            command = [*command, "--cg", str(frozen[0])]
        return train_once(name, command, frozen, self.device)

    def load_clip(self, name: str) -> CLIP:
        """The CLIP that measures ("clip") or guides ("guide-clip")."""
        return load_clip(self.path(name), self.device, torch.float32)


def as_plain_cg(controlnet: Path, cg: Path) -> Path:
    """The toy's ControlNet as a CG with plain attention, which computes the same: `train.py pg` trains beside a CG."""
    out = controlnet.parent / "as-cg"
    if processes()[0] == 0 and not out.exists():
        branch = load_control(controlnet, "controlnet")
        plain = CategoryGenerator(branch.config | {"attention": "plain"})
        plain.load_state_dict(branch.state_dict())
        save_control(plain, out, categories=read_identifiers(categories_file(cg)))
    barrier()
    return out


def train_once(name: str, command: list[str], frozen: list[Path], device: str) -> Path:
    """Trains a network of the toy on the base and `frozen` networks, unless it is there already; returns its folder.

    command: the stage and its options. Under torchrun one process trains and the others wait. An interrupted training
    is resumed. Raises BadInput if it fails.
    """
    key = [command, [model_fingerprint(path) for path in (SHIPPED["weights"], *frozen)]]
    out = Path("runs", "evaluate", f"{name}-{fingerprint(key)[:8]}")
    if processes()[0] == 0 and not out.exists():
        unfinished = out.with_name(f"{out.name}.unfinished")
        program = ["rivals/lab.py", "train"] if command[0] in RIVAL_STAGES else ["train.py"]
        words = [*program, *command, "--out", str(unfinished), "--device", device, "--amp", "--resume"]
        print("training, once: python", *words, file=sys.stderr)
        alone = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
        run = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], env=alone, stdout=2)  # 1 is the table's
        if run.returncode:
            raise BadInput("the training failed, as it says above; once that is fixed, this command goes on")
        unfinished.rename(out)
    barrier()
    return out / command[0]
