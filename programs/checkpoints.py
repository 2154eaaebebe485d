"""Programs: checkpoints of a training run; not needed to understand the paper."""


import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.files import BadInput, write_atomic
from support.machine import processes
from support.tensors import fingerprint, not_finite


def list_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint_*.safetensors"))


def read_header(folder: Path) -> dict:
    """What the newest checkpoint holds beside its tensors: "settings", the categories' "identifiers", ... It is {} if
    the checkpoint can't be read: `Checkpoints.load` says why.
    """
    try:
        with safe_open(list_checkpoints(folder)[-1], framework="pt") as file:
            return {name: json.loads(text) for name, text in file.metadata().items()}
    except (IndexError, ValueError, OSError, AttributeError, SafetensorError):
        return {}


class Checkpoints:
    """A run's checkpoints: weights, averages and Adam's moments in one safetensors file, all else in its header.

    settings: those that a resumed run shares with the interrupted one. identifiers: [D] of each category by name, or
    None. Random states need no saving: they follow from the seed and the step.
    """

    def __init__(self, folder: Path, keep: int, settings: dict, identifiers: dict[str, str] | None):
        self.folder, self.keep, self.settings, self.identifiers = folder, keep, settings, identifiers

    def save(self, step: int, parameters: dict, ema: dict, optimizer, scaler) -> None:
        """Writes a checkpoint and removes all but the newest `keep`. Raises BadInput if a number is not finite."""
        tensors = {f"weights.{n}": p.detach() for n, p in parameters.items()} | {f"ema.{n}": p for n, p in ema.items()}
        for name, p in parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if p in optimizer.state:
                    tensors[f"{moment}.{name}"] = optimizer.state[p][moment]
        if diverged := not_finite(tensors):
            raise BadInput(f"{diverged} is not finite at step {step}, so the step is not saved; resume from the "
                           "checkpoint before, or start again, with a lower --lr")
        # Adam counts fewer steps than the run if a scaler skipped some
        counts = [int(state["step"]) for state in optimizer.state.values()]
        header = {"step": step, "adam": max(counts, default=0), "settings": self.settings,
                  "identifiers": self.identifiers, "scaler": scaler.state_dict()}
        texts = {name: json.dumps(value) for name, value in header.items()}
        path = self.folder / f"checkpoint_{step:08}.safetensors"
        write_atomic(path, lambda new: save_file({n: t.contiguous() for n, t in tensors.items()}, new, texts))
        for old in list_checkpoints(self.folder)[: -self.keep]:
            old.unlink()

    def load(self, parameters: dict, ema: dict, optimizer, scaler) -> int:
        """Fills everything from the newest checkpoint and returns its step. Reports changed settings on stderr.

        Raises BadInput if it is broken, or from another model, or from a run whose categories had other identifiers.
        """
        path = list_checkpoints(self.folder)[-1]
        try:
            with safe_open(path, framework="pt") as file, torch.no_grad():
                header = {name: json.loads(text) for name, text in file.metadata().items()}
                adam = float(header.get("adam", header["step"]))
                for name, p in parameters.items():
                    p.copy_(file.get_tensor(f"weights.{name}"))
                    if ema:
                        ema[name].copy_(file.get_tensor(f"ema.{name}"))
                    if f"exp_avg.{name}" in file.keys():
                        moments = {m: torch.empty_like(p).copy_(file.get_tensor(f"{m}.{name}"))
                                   for m in ("exp_avg", "exp_avg_sq")}
                        optimizer.state[p] = {"step": torch.tensor(adam, device=p.device), **moments}
                if scaler.is_enabled():
                    scaler.load_state_dict(header["scaler"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, OSError, SafetensorError) as error:
            raise BadInput(f"{path} is broken, or from another model or other settings ({str(error).splitlines()[0]}); "
                           "give the options of the run, or remove it to go on from the one before") from None
        self.compare(header)
        return header["step"]

    def compare(self, header: dict) -> None:
        """Reports settings that differ from the checkpoint's; raises BadInput if known identifiers differ."""
        then, now = header["settings"], json.loads(json.dumps(self.settings))
        if "identifiers" in header:
            known, ours = header["identifiers"] or {}, self.identifiers or {}
            same = all(ours.get(name) == known[name] for name in known)
        else:  # a checkpoint from before categories could be added to a run
            same = then.get("identifiers") == fingerprint(self.identifiers)
        if not same:
            raise BadInput(f"the categories of {now['data']}, or their identifiers, are not those that the run began "
                           "with; give the run's --data and --identifier, or train anew to another --out")
        changed = [f"{name} {then[name]} -> {now[name]}" for name in now if name in then and then[name] != now[name]]
        if changed and processes()[0] == 0:
            print(f"resumed with changed settings: {', '.join(changed)}", file=sys.stderr)
