"""Support: an evaluation's networks, some trained on first use; not needed to understand the paper."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from model import CategoryGenerator
from support.cache import fingerprint
from support.datasets import read_identifiers
from support.files import BadInput, read_json
from support.machine import barrier, processes
from support.models import TOY, branch_path, categories_file, check_identifiers, identifiers_of
from support.tensors import model_fingerprint
from weights import load_control, save_control

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
OPTIONS = ("weights", "cg", "pg", "controlnet", "pg-controlnet", "cg-plain", "clip", "guide-clip", "lama",
           "paint-by-example")  # of evaluate.py
SHIPPED = {"weights": TOY / "base", "clip": TOY / "clip"}  # besides CG and PG, see branch_path


class Networks(NamedTuple):
    """The networks, by the names in OPTIONS (`weights` is the base) and in `trained`."""

    options: dict[str, Path | None]  # None if the option was not given
    trained: dict[str, list[str]]  # train.py's arguments for each toy network that is not shipped
    device: str

    def given(self, name: str) -> Path | None:
        """The path of a network's weights, by its option or as shipped; None if it is the toy's and must be trained.

        Raises BadInput if its option is missing with a base other than the toy's, which needs networks of its own.
        """
        path, base = self.options.get(name), self.options["weights"]
        if name in ("cg", "pg"):
            return branch_path(name, path, base)
        if base and not path:
            raise BadInput(f"--{name} is missing: the toy's does not go with --weights {base}" if name in self.options
                           else "this command works with the toy only: leave out --weights")
        return path or SHIPPED.get(name)

    def path(self, name: str) -> Path:
        """As `given`, but trains the network first if it must be."""
        if path := self.given(name):
            return path
        frozen = [] if name in ("guide-clip", "lama", "segmenter") else [self.given("weights")]
        if name == "pg-controlnet":
            frozen.append(as_plain_cg(self.path("controlnet"), self.given("cg")))
        elif name.startswith("pg-"):
            frozen.append(self.given("cg"))
        return train_once(name, self.trained[name], frozen, self.device)

    def check(self, names: list[str], categories: set[str]) -> None:
        """Raises BadInput if networks are missing or do not belong together, or if CG does not know one of the
        categories: at once, not after hours of painting.
        """
        paths = {name: path for name in names if (path := self.given(name))}
        for path in paths.values():
            model_fingerprint(path)
        if categories:
            identifiers_of(categories, self.given("cg"))
        for name in paths.keys() & {"cg-plain", "pg"}:
            check_identifiers(self.given("cg"), paths[name])
        for name, attention in (("cg", "mask-guided"), ("cg-plain", "plain")):
            if name in paths and (found := attention_of(paths[name])) != attention:
                raise BadInput(f"--{name} {paths[name]} is a CG with {found} attention; give one with {attention}")


def attention_of(cg: Path) -> str:
    """A CG's attention, "mask-guided" or "plain", as its config.json records train.py's --attention."""
    config = (cg.parent if cg.is_file() else cg) / "config.json"
    return read_json(config).get("attention", "mask-guided") if config.is_file() else "mask-guided"


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
    """Trains a network by `train.py *command` on the frozen networks, unless it is there already; returns its folder.

    Under torchrun one process trains and the others wait. An interrupted training is resumed. Raises BadInput if it
    fails.
    """
    key = [command, [model_fingerprint(path) for path in frozen]]
    out = Path("runs", "evaluate", f"{name}-{fingerprint(key)[:8]}")
    if processes()[0] == 0 and not out.exists():
        unfinished = out.with_name(f"{out.name}.unfinished")
        command = [*command, "--out", str(unfinished), "--cache", "runs/cache", "--device", device, "--amp"]
        if command[0] == "pg":
            command += ["--cg", str(frozen[1])]
        print("training, once: python train.py", *command, file=sys.stderr)
        if [*unfinished.glob("training/*/checkpoint_*")]:
            command.append("--resume")
        alone = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
        if subprocess.run([sys.executable, TRAIN, *command], env=alone, stdout=2).returncode:  # stdout is the table's
            raise BadInput("the training failed, as it says above; once that is fixed, this command goes on")
        unfinished.rename(out)
    barrier()
    return out / command[0]
