"""Programs: paints a whole data set, with a manifest and prefetching; not needed to understand the paper."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data import AdInputs, Canvas
from programs.models import Models
from sampler import SamplerSettings
from support.datasets import MASK_OF_ITEM, Item
from support.files import BadInput, append_line, from_here, read_log, result_name
from support.images import grow_frame, load_cutout, load_masked, resize, save_image, sheet
from support.machine import processes
from support.plots import picture_of

# ---------------------------------------------------------------- a picture, and the line that says how it was painted


class Job(NamedTuple):
    """One picture to paint."""

    path: Path
    item: Item  # the files it is painted from; a prompt alone has none
    seed: int


def check_last_seed(seed: int) -> None:
    """Raises BadInput for a seed of more than 32 bits: torch's CPU generator would repeat a small seed's noise."""
    if seed >= 2**32:
        raise BadInput(f"--seed: the last picture's seed would be {seed}, more than {2**32 - 1}; give a lower one")


def jobs_of_items(items: list[Item], out: Path, seed: int) -> list[Job]:
    """A job for each item of a data set; item i is painted with seed + i. Raises BadInput for seeds above 32 bits."""
    check_last_seed(seed + len(items) - 1)
    return [Job(out / result_name(f"{i:06}_{item.image.stem}", ".png"), item, seed + i) for i, item in enumerate(items)]


def line_of(job: Job, record: dict, name: Callable[[Path], str] = str) -> dict:
    """A picture's line in the manifest: what it was painted from, and how. name: how files are named in it."""
    line = vars(job.item) | {"seed": job.seed, "how": record}
    return json.loads(json.dumps(line, default=name))  # as it comes back from the manifest


def save_picture(picture: Tensor, job: Job, record: dict) -> None:
    """Saves a job's picture; the PNG holds its line as text, unless record["no_metadata"]."""
    text = {"how": json.dumps(line_of(job, record, from_here))}
    save_image(picture, job.path, None if record.get("no_metadata") else text)


# ---------------------------------------------------------------- the manifest: the lines of a folder's pictures


def settings_of(line: dict) -> dict:
    """What must be equal in the lines of equal pictures. Of files only the names count, since data sets get moved."""
    files = {name: line[name] and Path(line[name]).name for name in ("image", "reference")}
    return line["how"] | files | {"category": line["category"], "seed": line["seed"]}


def names_of_painted(manifest: Path, jobs: list[Job], record: dict) -> set[str]:
    """The names of the pictures in a manifest. Raises BadInput for a line that does not say how a picture was painted,
    and for one of the jobs' pictures that was painted with other settings; the message names the first difference.
    """
    wanted, names = {job.path.name: settings_of(line_of(job, record)) for job in jobs}, set()
    for number, line in enumerate(read_log(manifest), 1):
        try:
            name, there = line["file"], settings_of(line)
            ours = wanted.get(name, there)
        except (KeyError, TypeError):
            raise BadInput(f"{manifest}:{number} does not say how a picture was painted; remove that line") from None
        for setting, value in ours.items():
            if there.get(setting) != value:
                how = "with other weights" if setting == "models" else f"with {setting} {there.get(setting)}"
                raise BadInput(f"--out {manifest.parent} holds {name}, which was painted {how}; name another folder, "
                               "or give the options it was painted with")
        names.add(name)
    return names


# ---------------------------------------------------------------- painting


def load_ads(jobs: list[Job], texts: dict, record: dict, mask: str = "--mask",
             reference_mask: str = "--reference-mask") -> list[AdInputs]:
    """What the jobs' pictures are painted from, in the frame that record's margin and aspect ask for; each file is read
    once.

    texts: the texts for P, P_fg and P_bg, by category. mask, reference_mask: where messages say that masks belong.
    Raises BadInput if a file can't be used.
    """
    @cache
    def cutout(image: Path, *options) -> tuple[Tensor, Tensor]:
        rgb, M = load_cutout(image, *options)
        return grow_frame(rgb, M, record.get("margin") or 0, record.get("aspect"), image)

    masked = cache(load_masked)
    return [AdInputs(*cutout(item.image, item.mask, "product", mask, item.inverted), texts[item.category], seed,
               item.reference and masked(item.reference, item.reference_mask, "reference", reference_mask,
                                         item.inverted))
            for _, item, seed in jobs]


def count_steps(models: Models, settings: SamplerSettings) -> int:
    """The steps of both passes. Raises BadInput if the schedule has too few for the first, or none for the second."""
    if not models.sd:  # another painter's
        return settings.steps
    schedule = models.sd.schedule
    second = settings.refine_from * schedule.T // 1000  # T', the timestep at which the second pass starts
    steps = len(schedule.timesteps(settings.steps))
    return steps if settings.refine == 1 else steps + len(schedule.timesteps(settings.steps, second))


def second_pass(paint: Callable, models: Models, settings: SamplerSettings, first: Tensor, canvas: Canvas,
                on_step: Callable) -> Tensor:
    """Paints again, on a larger canvas, what a first pass painted -> (B, 3, H, W); ours, not the paper's.

    paint: generate.paint. first (B, 3, h, w) is enlarged, noised to T' and denoised: the layout stays, edges are
    painted anew.
    """
    cg, pg = models.cg, models.pg
    if settings.refine_alone:
        canvas, settings = canvas._replace(texts=[("", "", "")] * len(first)), replace(settings, guidance=1)
        cg = pg = None
    # Enlarged as pictures, since enlarged latents decode blurred; with the real products put in
    enlarged = torch.stack([resize(picture, *canvas.rgb.shape[2:]) for picture in first])
    initial = canvas.rgb.lerp(enlarged, 1 - canvas.mask)
    return paint(models.sd, canvas, settings=settings, cg=cg, pg=pg, on_step=on_step, initial=initial,
                 start=settings.refine_from * models.sd.schedule.T // 1000)


def refuse_not_finite(painted: Tensor) -> None:
    """Raises BadInput for pixels that are not finite."""
    if not painted.isfinite().all():
        raise BadInput("--dtype: the painted pixels are not finite; add --dtype float32, or train without --amp; if "
                       "they still are not, the weights are broken")


def paint_items(jobs: list[Job], texts: dict, paint_all: Callable, record: dict,
                batch: int) -> tuple[int, int, int]:
    """Paints the jobs of a data set whose pictures are not there yet. Returns how many were painted, how many were
    there, and how many are broken; broken ones are reported and skipped.

    texts: the texts for P, P_fg and P_bg, by category. paint_all(ads) -> their pictures, see generate.paint_ads.
    record: how pictures are painted, see gallery.record_of.
    Under torchrun each process paints its share. If one picture of a batch is missing, the whole batch is painted
    again: rounding may depend on the batch, and an interruption must not change a byte. Raises BadInput if the folder
    holds pictures of these names that were painted from other items or with other settings.
    """
    manifest = jobs[0].path.with_name("manifest.jsonl")
    there = names_of_painted(manifest, jobs, record)
    rank, world = processes()
    share = jobs[rank::world]
    todo = {job for job in share if job.path.name not in there or not job.path.exists()}
    chunks = [chunk for k in range(0, len(share), batch) if todo.intersection(chunk := share[k : k + batch])]
    count, written = 0, ()

    def read(job: Job) -> AdInputs | None:
        try:
            return load_ads([job], texts, record, MASK_OF_ITEM, MASK_OF_ITEM)[0]
        except BadInput as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)

    def write(painted: dict[Job, Tensor]) -> None:
        for job, picture in painted.items():
            if job in todo:
                save_picture(picture, job, record)
                append_line({"file": job.path.name, **line_of(job, record)}, manifest)

    # Each thread computes on one core: torch's teams of threads would take the cores away from the painting
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        reading = (threads.map(read, chunk) for chunk in chunks)  # a chunk is read from when it is asked for
        ahead = next(reading, None)
        for chunk in tqdm(chunks, unit="batch", disable=None):
            ready, ahead = ahead, next(reading, None)
            ads = {job: ad for job, ad in zip(chunk, ready) if ad}
            if usable := todo.intersection(ads):
                painted = dict(zip(ads, paint_all([*ads.values()])))
                list(written)  # waits for the batch before, and raises its error
                written = threads.map(write, [painted])
                count += len(usable)
        list(written)
    return count, len(share) - len(todo), len(todo) - count


def save_data_sheet(jobs: list[Job]) -> None:
    """Writes sheet.png beside the pictures: the first 32, each above its reference if it has one."""
    pictures = [picture_of(job.path) for job in jobs[:32]]
    references = [picture and picture_of(job.item.reference) for picture, job in zip(pictures, jobs)]
    rows = [row for k in range(0, 32, 8) for cells in (pictures, references) if any(row := cells[k : k + 8])]
    if rows:
        save_image(sheet(rows), jobs[0].path.with_name("sheet.png"))
