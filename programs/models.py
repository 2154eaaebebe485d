"""Programs: loads a base, CG and PG that belong together, and their identifiers; not needed to understand the paper."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from model import ControlNet
from support.datasets import read_identifiers
from support.files import BadInput
from support.images import canvas_size
from support.machine import pick_device, pick_dtype
from support.tensors import model_fingerprint
from weights import StableDiffusion, load_control, load_stable_diffusion

TOY = Path(__file__).resolve().parent.parent / "toy"


@dataclass(frozen=True)
class ModelChoice:
    """Which models paint, and where, by the options of the same names. None stands for the toy's models."""

    weights: Path | None = None
    tokenizer: Path | None = None
    vae: Path | None = None
    cg: Path | None = None
    pg: Path | None = None
    controlnet: Path | None = None  # in CG's place
    device: str = "auto"
    dtype: str = "auto"


class Models(NamedTuple):
    """What pictures are painted with."""

    sd: StableDiffusion | None  # None only where another painter needs none
    cg: ControlNet | None  # or the plain ControlNet in its place
    pg: ControlNet | None
    identifiers: dict[str, str | None]  # [D] of each category, None for the plain prompt
    size: int  # the canvas's longer side in pixels
    multiple: int  # the canvas's sides are multiples of this number of pixels
    dtype: str  # of the weights, such as "float32"
    fingerprints: list  # of the weights' files


def load_models(choice: ModelChoice, size: int | None, categories: set[str], with_pg: bool = False,
                plain_prompt: bool = False) -> Models:
    """Loads the base; for `categories` also CG, or the plain ControlNet in its place; with_pg also PG.

    size: the canvas's longer side in pixels, by default the base's. Raises BadInput if weights are missing, broken or
    do not belong together, or if CG does not know a category.
    """
    base, cg, pg = choice.weights or TOY / "base", None, None
    if categories:
        cg = choice.controlnet or branch_path("cg", choice.cg, choice.weights)
    if with_pg:
        pg = branch_path("pg", choice.pg, choice.weights)
    identifiers = identifiers_of(categories, None if choice.controlnet else cg, plain_prompt)
    if pg and not choice.controlnet and not plain_prompt:
        check_identifiers(cg, pg)
    device = pick_device(choice.device)
    dtype = pick_dtype(choice.dtype, device)
    sd = load_stable_diffusion(base, device, dtype, choice.tokenizer, choice.vae)
    size = size or sd.size
    canvas_size(1, 1, size, sd.multiple)  # refuses a size that does not fit the base
    return Models(sd, cg and load_branch("controlnet" if choice.controlnet else "category", cg, sd),
                  pg and load_branch("personality", pg, sd), identifiers, size, sd.multiple,
                  str(dtype).removeprefix("torch."),
                  [model_fingerprint(path) for path in (base, choice.vae, cg, pg) if path])


def branch_path(option: str, given: Path | None, weights: Path | None) -> Path:
    """The path of "cg" or "pg", by default the toy's. Raises BadInput if none is given for another base."""
    if given is None and weights:
        raise BadInput(f"--{option} is missing: the base {weights} needs a {option.upper()} trained on it; "
                       f"train one by train.py {option} --weights {weights}")
    return given or TOY / option


def load_branch(kind: str, path: Path, sd: StableDiffusion, like: dict | None = None) -> ControlNet:
    """CG ("category"), PG ("personality") or a "controlnet". Raises BadInput if it is broken or of another base, or if
    its hint encoder does not fit the configuration `like`.
    """
    weight = sd.unet.conv_in.weight
    branch = load_control(path, kind, weight.device, weight.dtype)
    ours, base = branch.config, sd.unet.config
    hint_factor = 2 ** (len(ours["conditioning_embedding_out_channels"]) - 1)
    if (any(ours[key] != base[key] for key in ("block_out_channels", "layers_per_block", "cross_attention_dim"))
            or ours["in_channels"] != base["out_channels"] or hint_factor != sd.vae.factor):
        raise BadInput(f"{path} was trained on another base than the one given; give weights and branches that belong "
                       "together")
    if like and ours["conditioning_embedding_out_channels"] != like["conditioning_embedding_out_channels"]:
        raise BadInput(f"--init-control {path}: its hint encoder's channels are not those of ours")
    return branch


def categories_file(branch: Path) -> Path:
    """The file with the identifiers [D] of a branch's categories, in its folder or beside its single file."""
    return (branch.parent if branch.is_file() else branch) / "categories.json"


def check_identifiers(cg: Path, other: Path) -> None:
    """Raises BadInput if CG and the branch beside it know a category by different identifiers.

    One of them may know more: categories can be added to a trained CG.
    """
    if not categories_file(other).is_file():
        return
    ours, theirs = read_identifiers(categories_file(cg)), read_identifiers(categories_file(other))
    shared = ours.keys() & theirs.keys()
    if not shared or any(ours[name] != theirs[name] for name in shared):
        raise BadInput(f"{other} was trained on other categories than {cg}, or with other identifiers: "
                       "give branches that belong together")


def identifiers_of(names: set[str], cg: Path | None, plain_prompt: bool = False) -> dict[str, str | None]:
    """The identifier [D] of each category, as saved with CG; None stands for the plain prompt.

    Without a CG all categories get the plain prompt. Those that CG does not know get it with `plain_prompt`, else they
    raise BadInput.
    """
    if cg is None:
        return dict.fromkeys(names)
    file = categories_file(cg)
    known = {} if plain_prompt and not file.exists() else read_identifiers(file)
    if (unknown := sorted(names - known.keys())) and not plain_prompt:
        raise BadInput(f"CG was not trained on category {unknown[0]!r}; choose one from {file}, such as "
                       f"{', '.join([*known][:20])}; generate.py --plain-prompt paints others too")
    return {name: known.get(name) for name in names}


def add_model_options(add: Callable) -> None:
    """Adds the options of ModelChoice, and --hint. add: a parser's add_argument."""
    paths = {
        "--weights": "Stable Diffusion, a folder or a single file [toy/base; the paper's: SD 1.5]",
        "--tokenizer": "folder with vocab.json and merges.txt [tokenizer/ in --weights; beside a single file]",
        "--vae": "VAE in place of the base's own, a folder or a single file",
        "--cg": "Category-Wise Generator, trained on the base [toy/cg]",
        "--pg": "Personality-Wise Generator, trained on the base; used if there is a reference [toy/pg]",
        "--controlnet": "a plain ControlNet in place of CG, with the plain prompt 'A photo of CATEGORY': the paper's "
        "baseline",
    }
    for name, text in paths.items():
        add(name, type=Path, help=text)
    add("--hint", choices=["product", "inpaint"], default="product",
        help="what --controlnet sees around the product: black, or -1, as ControlNet 1.1 inpaint expects [product]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [auto: cuda where there is one]")
    add("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
        help="float32; float16 and bfloat16 are less precise [auto: float16 on CUDA, bfloat16 where it is faster]")
