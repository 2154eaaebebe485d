"""Support: checkpoints of a training run; not needed to understand the paper."""

import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.cache import hashed
from support.files import BadInput, write_atomic
from support.machine import processes


def checkpoints(args) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((args.out / "training" / args.stage).glob("checkpoint_*.safetensors"))


def settings_of(args) -> dict:
    """What must stay the same for a resumed run to be the run that was interrupted."""
    names = ("data", "weights", "tokenizer", "cg", "init_control", "batch", "steps", "size", "lr", "warmup", "decay",
             "weight_decay", "clip_gradient", "ema", "noise_offset", "weighting", "prompt_dropout", "theta", "sigma", "seed",
             "amp")
    values = {name: getattr(args, name) for name in names}
    return {name: value if isinstance(value, (int, float, list)) else str(value)
            for name, value in values.items()} | {"identifiers": hashed(args.identifiers), "frozen weights": args.frozen}


def save_checkpoint(args, step: int, parameters: dict, ema: dict, optimizer, scaler) -> None:
    """Weights, averages and Adam's moments in one safetensors file, the step and the settings in its header.

    The newest --keep stay. Random states need no saving: they follow from seed and step.
    """
    tensors = {f"weights.{n}": p.detach() for n, p in parameters.items()} | {f"ema.{n}": p for n, p in ema.items()}
    for name, p in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            if p in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[p][moment]
    # Adam counts fewer steps than the run where a scaler skipped some
    counts = [int(state["step"]) for state in optimizer.state.values()]
    header = {"step": str(step), "adam": str(max(counts, default=0)), "settings": json.dumps(settings_of(args)),
              "scaler": json.dumps(scaler.state_dict())}
    path = args.out / "training" / args.stage / f"checkpoint_{step:08}.safetensors"
    write_atomic(path, lambda new: save_file({n: t.contiguous() for n, t in tensors.items()}, new, header))
    for old in checkpoints(args)[: -args.keep]:
        old.unlink()


def load_checkpoint(args, parameters: dict, ema: dict, optimizer, scaler) -> int:
    """Fills everything from the run's newest checkpoint -> its step. Tells on stderr which settings are not the run's.

    Raises BadInput where the checkpoint is broken or of another model.
    """
    path = checkpoints(args)[-1]
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            header = file.metadata()
            step, settings = int(header["step"]), json.loads(header["settings"])
            adam = float(header.get("adam", step))
            for name, p in parameters.items():
                p.copy_(file.get_tensor(f"weights.{name}"))
                if ema:
                    ema[name].copy_(file.get_tensor(f"ema.{name}"))
                if f"exp_avg.{name}" in file.keys():
                    moments = {m: torch.empty_like(p).copy_(file.get_tensor(f"{m}.{name}"))
                               for m in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[p] = {"step": torch.tensor(adam, device=p.device), **moments}
            if scaler.is_enabled():
                scaler.load_state_dict(json.loads(header["scaler"]))
    except (RuntimeError, KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise BadInput(f"{path} is broken, or of another model or other settings ({str(error).splitlines()[0]}); "
                       "give the options of the run, or remove it to go on from the one before") from None
    now = json.loads(json.dumps(settings_of(args)))
    if settings.get("identifiers") != now["identifiers"]:
        raise BadInput(f"the categories of {args.data}, or their identifiers, are not those that the run began with; "
                       "give the run's --data and --identifier, or train anew to another --out")
    changed = [f"{name} {settings.get(name)} -> {now[name]}" for name in now if settings.get(name) != now[name]]
    if changed and processes()[0] == 0:
        print(f"resumed with other settings than the run's: {', '.join(changed)}", file=sys.stderr)
    return step
