"""Support: curves, and small pictures for sheets; not needed to understand the paper."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from support.images import GAP, THUMBNAIL, open_image, sheet, thumbnail

COLOURS = ("#1f4e8c", "#c2521a")


def draw_curves(curves: dict[str, list[tuple[float, float]]], title: str, x_label: str) -> Image.Image:
    """Draws some lines by name, at most as many as COLOURS; a later one lies on top. The y axis leaves out 2% of the
    values at either end, so that one bad batch does not flatten a curve.
    """
    page = Image.new("RGB", (1800, 900), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(30)
    points = [point for line in curves.values() for point in line]
    last, values = max(x for x, _ in points), sorted(y for _, y in points)
    low, high = values[len(values) // 50], values[-1 - len(values) // 50]
    margin = (high - low) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        up = (min(max(y, low), high) - low) / (high - low)
        return 180 + 1580 * x / last, 780 - 700 * up

    for i in range(5):
        x, y = last * i / 4, low + (high - low) * i / 4
        draw.line([place(0, y), place(last, y)], "#dddddd", 2)
        draw.text(place(0, y), f"{y:.3g}  ", "black", font, anchor="rm")
        draw.text(place(x, low), f"\n{x:,.0f}", "black", font, anchor="ma")
    draw.text((900, 900), x_label, "black", font, anchor="md")
    draw.text((180, 48), title, "black", font, anchor="ls")
    for i, (name, colour) in enumerate(zip(curves, COLOURS)):
        draw.line([place(*point) for point in curves[name]], colour, 4, joint="curve")
        draw.text((1760 - 300 * i, 48), name, colour, font, anchor="rs")
    return page.reduce(2)


def draw_film(sheets: list[Path], side: int, curve: Path) -> Image.Image:
    """Film strips of a training: what is painted for four ads (rows) after more and more steps (columns), over the
    loss. sheets: those of the run, in order, for pictures of `side` pixels; each column skips half of the sheets before
    the next one.
    """
    chosen = [sheets[k] for k in sorted({(len(sheets) - 1) >> halvings for halvings in range(6)})]
    side = min(side, THUMBNAIL)
    columns = []
    for page in map(Image.open, chosen):
        top, right = page.height - 2 * (side + GAP), page.width - (side + GAP)  # the row above the last
        columns.append([page.crop((x, top, x + side, top + side)) for x in range(right, 0, -side - GAP)][:4])
    strips = sheet([*zip(*columns)], [f"step {int(path.stem[6:]):,}" for path in chosen])
    loss = ImageOps.contain(Image.open(curve), (strips.width, strips.width))
    page = Image.new("RGB", (strips.width, strips.height + loss.height), "white")
    page.paste(strips)
    page.paste(loss, (0, strips.height))
    return page


# ---------------------------------------------------------------- small pictures


def picture_of(path: Path | None) -> Image.Image | None:
    """The picture in a file as a thumbnail; None if there is no file."""
    return thumbnail(open_image(path).convert("RGB")) if path and path.exists() else None
