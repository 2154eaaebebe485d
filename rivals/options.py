"""Rivals: the options of evaluate.py and study.py for what the methods paint and how, and the lab that they make."""

import argparse
from collections.abc import Callable
from pathlib import Path

from rivals.baselines import STRENGTH
from rivals.methods import TRAINED, Lab
from support.files import BadInput
from support.machine import pick_device
from support.models import ModelChoice, add_model_options
from support.networks import OPTIONS, Networks
from support.options import Parser, real_number, whole_number
from support.painting import add_walk_options, painting_of, settled
from support.record import record_of
from toy.world import TOY_DATA


def add_lab_options(parser: Parser) -> Callable:
    """Adds them. Returns the add_argument of the group for the program's own options."""
    own = parser.add_argument_group("what is painted, and where it goes")
    own.add_argument("--data", metavar="DIR", type=Path, default=TOY_DATA / "ads",
                     help="BG60k as released, or metadata.jsonl [the toy's ads]")
    add = parser.add_argument_group("how the methods paint").add_argument
    add_walk_options(add, "1, the paper's")
    add("--seed", metavar="N", type=whole_number(0, 2**32 - 1), default=0, help="item i is painted with SEED + i [0]")
    add("--strength", metavar="X", type=real_number(0, 1e6), default=STRENGTH,
        help=f"strength of Blended Diffusion's CLIP guidance [{STRENGTH:g}, chosen on the toy]")
    add = parser.add_argument_group("models [the toy's; those not shipped are trained on first use]").add_argument
    add_model_options(add)
    add("--pg-controlnet", metavar="PATH", type=Path, help="PG trained beside --controlnet, for Table 4's (a)")
    add("--cg-plain", metavar="PATH", type=Path, help="CG with plain attention, from train.py cg --attention plain")
    add("--clip", metavar="DIR", type=Path, help="CLIP that measures, such as openai/clip-vit-base-patch32")
    add("--guide-clip", metavar="DIR", type=Path, help="CLIP that guides Blended Diffusion: not the one that measures")
    add("--batch", metavar="N", type=whole_number(1, 1024), default=16, help="pictures painted at once [16]")
    return own.add_argument


def lab_of(args: argparse.Namespace, out: Path, limit: int | None = None, centres: int | None = None) -> Lab:
    """The lab that these options describe; it keeps its pictures in `out`. Raises BadInput for options that clash."""
    if args.hint == "inpaint" and not args.controlnet:
        raise BadInput("--hint goes with --controlnet; add that one")
    device = pick_device(args.device)
    networks = Networks({name: vars(args)[name.replace("-", "_")] for name in OPTIONS}, TRAINED, device)
    how = painting_of(args, refine=1)
    # without the options that name networks: Lab.pictures records the fingerprints of those that a method uses
    record = record_of(args, seed=args.seed, **settled(how))
    record = {name: value for name, value in record.items() if name.replace("_", "-") not in OPTIONS}
    return Lab(data=args.data.absolute(), limit=limit, centres=centres, networks=networks,
               choice=ModelChoice(args.weights, args.tokenizer, device=device, dtype=args.dtype),
               how=how, size=args.size, strength=args.strength, seed=args.seed, batch=args.batch, record=record,
               out=out)
