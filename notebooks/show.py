"""Support: what all notebooks share, to find the project and to show pictures; not needed to understand the paper.

    import show  # first of all: from then on the project's own files can be imported
"""

import io
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import torch
from IPython.display import Image
from PIL import Image as Pillow
from torch import Tensor, nn

from programs.models import TOY
from support.images import fit, load_cutout, load_masked, sheet, to_image

SIDE = 256  # pixels: pictures are shown twice as large as the toy's first pass paints them


def large(picture: Tensor | Pillow.Image | None, side: int = SIDE, smooth: bool = True) -> Pillow.Image | None:
    """(3 or 1, H, W) or (1, 3 or 1, H, W) in [0, 1], or a picture, at `side` x `side`. A mask gets a grey frame."""
    if picture is None:
        return None
    is_mask = isinstance(picture, Tensor) and picture.shape[-3] == 1
    if isinstance(picture, Tensor):
        picture = picture.detach().reshape(picture.shape[-3:]).clamp(0, 1)
        picture = to_image(picture.expand(3, -1, -1))
    picture = picture.resize((side, side), Pillow.Resampling.LANCZOS if smooth else Pillow.Resampling.NEAREST)
    if is_mask:
        framed = Pillow.new("RGB", (side, side), "grey")
        framed.paste(picture.crop((2, 2, side - 2, side - 2)), (2, 2))
        return framed
    return picture


def pictures(rows: list[list], labels: list[str] | None = None, row_labels: list[str] | None = None,
             side: int = SIDE, smooth: bool = True, file: str | None = None) -> Image:
    """Rows of pictures (see `large`), labelled, stored once, as a JPEG; `file` in notebooks/pictures gets it too."""
    page = sheet([[large(picture, side, smooth) for picture in row] for row in rows], labels, row_labels)
    data = io.BytesIO()
    page.convert("RGB").save(data, "JPEG", quality=70)
    if file:
        (ROOT / "notebooks" / "pictures" / file).write_bytes(data.getvalue())
    return Image(data.getvalue(), format="jpeg", width=page.width)


def heat(maps: list[list[Tensor | None]], labels: list[str], row_labels: list[str], top: float | None = None,
         meaning: str = "", side: float = 2.0, outline: Tensor | None = None, file: str | None = None) -> None:
    """Rows of maps (h, w), all on one scale from 0 to `top` (their maximum), its colour bar beside them; None leaves a
    cell empty. A square of a map is a square of the picture: nothing is smoothed.

    outline: a mask M (1, 1, H, W) of any resolution, whose edge is drawn over each map; file: as in `pictures`.
    """
    top = top or max(float(m.max()) for row in maps for m in row if m is not None)
    figure, axes = plt.subplots(len(maps), len(labels), squeeze=False, layout="constrained",
                                figsize=(side * len(labels) + 1, side * len(maps) + 0.4))
    for row, cells, row_label in zip(maps, axes, row_labels):
        for m, axis in zip(row, cells):
            axis.set(xticks=[], yticks=[], aspect="equal")
            if m is None:
                axis.spines[:].set_visible(False)
                continue
            shown = axis.imshow(m, vmin=0, vmax=top, interpolation="nearest", cmap="magma", extent=(0, 1, 1, 0))
            if outline is not None:
                axis.contour(outline[0, 0], [0.5], colors="white", linewidths=0.7, extent=(0, 1, 0, 1))
        cells[0].set_ylabel(row_label)
    for axis, label in zip(axes[0], labels):
        axis.set_title(label, fontsize=10)
    figure.colorbar(shown, ax=axes, label=meaning, shrink=0.9, pad=0.01, fraction=0.1 / len(labels))
    if file:
        figure.savefig(ROOT / "notebooks" / "pictures" / file, dpi=110, pil_kwargs={"quality": 88})
    plt.show()


def product(name: str, size: int = 128) -> tuple[Tensor, Tensor]:
    """A sample of toy/samples, such as "perfume_2", on a square canvas -> rgb (1, 3, size, size), M (1, 1, size, size)."""
    rgb, mask = load_cutout(TOY / "samples" / f"{name}.png")
    return tuple(fit(x, size, size, "contain")[0][None] for x in (rgb, mask))


def reference(name: str, size: int = 128) -> tuple[Tensor, Tensor]:
    """Its reference ad -> rgb (1, 3, size, size), and where the reference's own product is, M (1, 1, size, size)."""
    rgb, mask = load_masked(TOY / "samples" / f"{name}_reference.png")
    return tuple(fit(x, size, size, "cover")[0][None] for x in (rgb, mask))


def on_white(rgb: Tensor, mask: Tensor) -> Tensor:
    """The product before white."""
    return rgb * mask + 1 - mask


def words(tokenizer, text: str) -> list[str]:
    """The L pieces into which CLIP's tokenizer splits a text: "start", its words, "end", and the padding, "end" too."""
    pieces = (tokenizer.bpe.id_to_token(i).removesuffix("</w>") for i in tokenizer([text])[0].tolist())
    return [{"<|startoftext|>": "start", "<|endoftext|>": "end"}.get(piece, piece) for piece in pieces]


def millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}M parameters"


torch.set_grad_enabled(False)  # a lecture that trains turns it on again
