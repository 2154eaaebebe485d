"""Support: how a picture was painted, and the command that paints it again; not needed to understand the paper."""

import argparse
import json
import shlex
from pathlib import Path

from PIL import Image

from support.files import BadInput

# Options left out of the record: what is painted is recorded for each picture, and the machine changes none
HARMLESS = {"product", "mask", "category", "reference", "reference_mask", "data", "split", "limit", "prompt", "num",
            "seed", "batch", "device", "out", "how", "what", "centres", "keep_first", "methods", "pairs", "pictures",
            "key", "noise", "studies"}


def record_of(args: argparse.Namespace, **settled) -> dict:
    """How pictures are painted, as JSON can hold it: all options but the harmless ones, so a new one can't be
    forgotten, and the settings that were `settled` later.
    """
    options = {name: value for name, value in vars(args).items() if name not in HARMLESS} | settled
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def command_of(file: Path, parser: argparse.ArgumentParser) -> str:
    """The command line that paints a picture again, from its PNG's text. Raises BadInput if it holds none."""
    try:
        with Image.open(file) as image:
            line = json.loads(image.text["how"])
    except FileNotFoundError:
        raise BadInput(f"--how {file}: no such file") from None
    except (OSError, AttributeError, KeyError, ValueError):
        raise BadInput(f"--how {file}: does not say how it was painted; give a PNG from generate.py") from None
    if "method" in line["how"]:
        raise BadInput(f"--how {file}: painted by evaluate.py, which has no command for one picture; its settings: "
                       f"{json.dumps(line['how'])}")
    if line["inverted"]:
        raise BadInput(f"--how {file}: its mask is white on the background; give --product {line['image']} and --mask "
                       f"the inverse of {line['mask']}")
    values = {"product": line["image"], "mask": line["mask"], "reference": line["reference"],
              "reference_mask": line["reference_mask"], "category": line["category"], "prompt": line.get("prompt"),
              "seed": line["seed"], **line["how"], "dtype": line["dtype"]}
    words = []
    for action in parser._actions:  # the only way to an option's name and default
        value = values.get(action.dest)
        if value is True:
            words.append(action.option_strings[0])
        elif value not in (None, False) and value != action.default:
            words += [action.option_strings[0], str(value)]
    return shlex.join(["python", "generate.py", *words])
