"""data.py: Eq. 5 and 6 written out, cut-outs without halos, fitting without stretching, formats and errors."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import data
from support.datasets import Item, categories_of, list_folder, read_identifiers
from support.files import BadInput

SIZE = 24  # pixels of the test images


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def disc(h, w, radius, soft=1.0):
    """(1, h, w): 1 in a disc in the middle, falling to 0 over `soft` pixels."""
    y, x = torch.arange(h)[:, None] - (h - 1) / 2, torch.arange(w)[None] - (w - 1) / 2
    return ((radius - (y**2 + x**2).sqrt()) / soft + 0.5).clamp(0, 1)[None]


def flat(colour, h, w):
    return torch.tensor(colour).view(3, 1, 1).expand(3, h, w)


@pytest.fixture
def photo(tmp_path):
    """An RGB photo and its mask, as files of SIZE x SIZE."""
    data.save_image(torch.rand(3, SIZE, SIZE, generator=generator()), tmp_path / "photo.png")
    data.save_image(disc(SIZE, SIZE, 6), tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


# ---------------------------------------------------------------- Eq. 5 and 6


@pytest.mark.parametrize("theta", [1, 2, 5, 8])
def test_dilate_equals_eq5_written_out(theta):
    M = torch.rand(1, 13, 17, generator=generator())
    expected = torch.zeros_like(M)
    for i in range(13):
        for j in range(17):
            for di in range(-(theta // 2), (theta + 1) // 2):
                for dj in range(-(theta // 2), (theta + 1) // 2):
                    if 0 <= i + di < 13 and 0 <= j + dj < 17:
                        expected[0, i, j] = max(expected[0, i, j], M[0, i + di, j + dj])
    assert torch.equal(data.dilate(M, theta), expected)
    assert (data.dilate(M, theta) >= M).all()


def test_mixup_equals_eq6_written_out():
    I, I_rand, M = torch.rand(3, 16, 16), torch.rand(3, 16, 16), disc(16, 16, 4)
    hint = data.perturb(I, M, I_rand, generator(), theta=0)
    sigma = 0.75 + 0.2 * torch.rand((), generator=generator())
    assert torch.allclose(hint, (sigma * I + (1 - sigma) * I_rand) * (1 - M), atol=1e-6)


def test_without_perturbation_the_hint_is_the_background():
    I, M = torch.rand(3, 16, 16), disc(16, 16, 4)
    hint = data.perturb(I, M, I, generator(), theta=0, sigma=(1, 1))
    assert torch.equal(hint, data.background_hint(I, M))
    assert torch.allclose(hint + data.product_hint(I, M), I)


def test_perturbed_hint_hides_the_product_and_theta_around_it_whatever_is_drawn():
    white, M = torch.ones(3, 128, 128), disc(128, 128, 20)
    M_dilated = data.dilate(M, round(50 * 128 / 512))  # θ scales with the image
    for seed in range(30):
        hint = data.perturb(white, M, white, generator(seed))
        assert (hint <= 1 - M_dilated + 1e-6).all()
        assert hint.mean() > 0.1, "some background is left"


def test_same_generator_state_gives_the_same_perturbation_and_the_next_state_another():
    I, I_rand, M = torch.rand(3, 64, 64), torch.rand(3, 64, 64), disc(64, 64, 10)
    random = generator(3)
    state = random.get_state()
    first, second = data.perturb(I, M, I_rand, random), data.perturb(I, M, I_rand, random)
    random.set_state(state)
    assert torch.equal(data.perturb(I, M, I_rand, random), first)
    assert not torch.equal(first, second)


# ---------------------------------------------------------------- cut-outs


def test_unmix_edges_removes_the_old_background_from_soft_edges():
    red, green, blue = flat([0.9, 0.1, 0.1], 64, 64), flat([0.0, 1.0, 0.0], 64, 64), flat([0.0, 0.0, 1.0], 64, 64)
    M = disc(64, 64, 20, soft=5)
    photo = red * M + green * (1 - M)
    assert ((photo * M + blue * (1 - M))[1] > 0.2).any(), "the naive paste has a green halo"
    pasted = data.unmix_edges(photo, M) * M + blue * (1 - M)
    assert torch.allclose(pasted, red * M + blue * (1 - M), atol=1 - data.SOLID)


def test_unmix_edges_leaves_solid_pixels_bit_exact():
    photo, M = torch.rand(3, 50, 61, generator=generator()), disc(50, 61, 15, soft=4)
    solid = (M == 1).expand_as(photo)
    assert torch.equal(data.unmix_edges(photo, M)[solid], photo[solid])


def test_unmix_edges_keeps_the_texture_of_a_translucent_product():
    M = disc(64, 64, 24) * 0.9
    M[:, 28:36, 28:36] = 1
    texture = torch.rand(3, 64, 64, generator=generator())
    photo = texture * M + (1 - M)  # on white
    inside = (M == 0.9).expand_as(photo)
    error = (data.unmix_edges(photo, M) - texture)[inside]
    assert error.std() < 0.2 * texture[inside].std()


def test_extend_gives_every_pixel_a_known_colour_and_changes_no_known_one():
    for shape in [(1, 7), (5, 1), (33, 47)]:
        rgb, known = torch.rand(3, *shape), torch.zeros(1, *shape, dtype=torch.bool)
        known[0, 0, 0] = True
        assert torch.allclose(data.extend(rgb, known), rgb[:, :1, :1].expand_as(rgb))


def test_cutout_with_a_mask_file_and_with_alpha_agree_on_solid_pixels(photo, tmp_path):
    image, mask = photo
    rgba = Image.open(image)
    rgba.putalpha(Image.open(mask))
    rgba.save(tmp_path / "cut.png")
    (rgb, M), (rgb_alpha, M_alpha) = data.load_cutout(image, mask), data.load_cutout(tmp_path / "cut.png")
    assert rgb.shape == (3, SIZE, SIZE) and torch.equal(M, M_alpha)
    solid = (M == 1).expand_as(rgb)
    assert torch.equal(rgb[solid], rgb_alpha[solid])


def test_a_background_still_stored_under_the_alpha_channel_leaves_no_halo(tmp_path):
    """A red product on a green and yellow wall, made transparent by a mask alone, as a photo's putalpha does."""
    M = disc(64, 64, 20, soft=5)
    wall = flat([0.0, 1.0, 0.0], 64, 64).clone()
    wall[0, :, 32:] = 1
    photo = flat([0.8, 0.2, 0.2], 64, 64) * M + wall * (1 - M)
    Image.fromarray((torch.cat([photo, M]) * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "cut.png")
    rgb, M = data.load_cutout(tmp_path / "cut.png")
    red = flat([0.8, 0.2, 0.2], 64, 64)
    assert ((photo - red).abs() * M).max() > 0.19, "as stored, the edge is green and yellow"
    assert ((rgb - red).abs() * M).max() < 0.07


def test_alpha_cutout_keeps_visible_colours_and_hides_those_under_zero_alpha(tmp_path):
    M = disc(SIZE, SIZE, 6, soft=3)
    stored = flat([0.8, 0.2, 0.2], SIZE, SIZE) * (M > 0)  # black where invisible, as most programs save it
    Image.fromarray((torch.cat([stored, M]) * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "cut.png")
    rgb, M = data.load_cutout(tmp_path / "cut.png")
    assert torch.allclose(rgb, flat([0.8, 0.2, 0.2], SIZE, SIZE), atol=0.01)


def test_mask_file_may_be_grey_rgb_alpha_palette_or_16_bit(photo, tmp_path):
    image, mask = photo
    grey = Image.open(mask)
    alpha = Image.new("RGBA", grey.size, "black")
    alpha.putalpha(grey)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    expected = data.load_masked(image, mask)[1]
    for i, variant in enumerate([grey, grey.convert("RGB"), alpha, grey.quantize(256), sixteen]):
        variant.save(tmp_path / f"{i}.png")
        assert torch.allclose(data.load_masked(image, tmp_path / f"{i}.png")[1], expected, atol=0.02), variant.mode


def test_inverted_mask_file_is_turned(photo, tmp_path):
    image, mask = photo
    data.save_image(1 - data.load_mask(mask), tmp_path / "inverse.png")
    assert torch.allclose(data.load_masked(image, tmp_path / "inverse.png", inverted=True)[1], data.load_mask(mask))


# ---------------------------------------------------------------- files


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image.save(tmp_path / "turned.jpg", exif=exif)
    upright = data.open_image(tmp_path / "turned.jpg")
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[0] < 9 and upright.getpixel((10, 35))[0] > 246


@pytest.mark.parametrize("mode, opened", [("1", "RGB"), ("L", "RGB"), ("LA", "RGBA"), ("P", "RGB"), ("RGBA", "RGBA"),
                                          ("I;16", "RGB")])
def test_every_mode_opens_as_rgb_or_rgba(mode, opened, tmp_path):
    Image.new(mode, (4, 4)).save(tmp_path / "x.png")  # colour 0: transparent where the mode has alpha
    assert data.open_image(tmp_path / "x.png").mode == opened


def test_palette_transparency_is_alpha_and_opaque_alpha_is_none(tmp_path):
    image = Image.new("P", (4, 4))
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    assert data.open_image(tmp_path / "palette.png").getchannel("A").getextrema() == (0, 255)
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "opaque.png")
    assert data.open_image(tmp_path / "opaque.png").mode == "RGB"


def test_tensor_and_file_round_trip_bit_exact(tmp_path):
    x = torch.randint(0, 256, (3, 9, 7)) / 255
    data.save_image(x, tmp_path / "new" / "folder" / "x.png")
    assert torch.equal(data.to_tensor(data.open_image(tmp_path / "new" / "folder" / "x.png")), x)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as data.py sets it, which pytest undoes
def test_bad_files_are_refused_in_one_line_that_names_them(tmp_path, monkeypatch):
    data.save_image(torch.rand(3, 64, 64), tmp_path / "big.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "big.png").read_bytes()[:3000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)  # Pillow itself would only warn
    for name in ["big.png", "cut.png", "empty.png", "text.jpg", "missing.png", ""]:
        with pytest.raises(BadInput) as error:
            data.open_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(BadInput, match="can.t be written"):
        data.save_image(torch.rand(3, 4, 4), tmp_path / "file" / "x.png")


def test_bad_masks_are_refused_and_the_option_is_named(photo, tmp_path):
    image, mask = photo
    data.save_image(torch.zeros(1, SIZE, SIZE), tmp_path / "empty.png")
    data.save_image(torch.ones(1, SIZE, SIZE), tmp_path / "full.png")
    data.save_image(torch.ones(1, SIZE, 9), tmp_path / "narrow.png")
    for path, message in [(None, "reference .* no alpha"), (tmp_path / "empty.png", "is empty"),
                          (tmp_path / "full.png", "covers the whole"), (tmp_path / "narrow.png", "9 x 24 .* 24 x 24")]:
        with pytest.raises(BadInput, match=f"{message}.*--reference-mask"):
            data.load_cutout(image, path, "reference", "--reference-mask")


# ---------------------------------------------------------------- fitting


@pytest.mark.parametrize("mode", ["contain", "cover"])
@pytest.mark.parametrize("h, w", [(40, 80), (80, 40), (200, 90), (64, 64)])
def test_fit_keeps_circles_circles(mode, h, w):
    M, _ = data.fit(disc(h, w, 12), 64, 96, mode)
    scale = (min if mode == "contain" else max)(64 / h, 96 / w)
    assert M.shape == (1, 64, 96) and 0 <= M.min() and M.max() <= 1
    rows, columns = M[0].amax(1).sum(), M[0].amax(0).sum()  # the disc's height and width
    assert rows == pytest.approx(24 * scale, abs=2) and columns == pytest.approx(24 * scale, abs=2)


def test_fit_contain_pads_pictures_with_their_edge_and_masks_with_zero_and_boxes_what_it_kept():
    picture, (top, left, h, w) = data.fit(torch.full((3, 30, 60), 0.7), 64, 64, "contain")
    assert (top, left, h, w) == (16, 0, 32, 64) and torch.allclose(picture, torch.tensor(0.7))
    mask, box = data.fit(torch.ones(1, 30, 60), 64, 64, "contain")
    assert box == (16, 0, 32, 64) and mask[:, top : top + h, left : left + w].min() > 0.999
    assert mask.sum() == pytest.approx(h * w, rel=1e-3)


def test_fit_contain_cropped_to_its_box_and_scaled_back_is_the_picture():
    picture = data.resize(torch.rand(3, 5, 8, generator=generator()), 50, 80)  # smooth
    canvas, (top, left, h, w) = data.fit(picture, 128, 128, "contain")
    back = data.resize(canvas[:, top : top + h, left : left + w], 50, 80)
    assert (back - picture).abs().max() < 0.05


def test_fit_cover_keeps_the_centre_asked_for_within_the_picture():
    x = torch.arange(100.0).expand(1, 50, 100) / 100
    for centre, left in [(None, 25), ((25, 60), 35), ((25, 99), 50), ((25, 0), 0)]:
        cropped, box = data.fit(x, 50, 50, "cover", centre)
        assert box == (0, left, 50, 50) and torch.equal(cropped, x[:, :, left : left + 50])


def test_canvas_holds_the_picture_with_less_than_one_multiple_of_padding():
    for h, w in [(100, 100), (300, 400), (1000, 333), (1, 2000), (511, 512)]:
        H, W = data.canvas_size(h, w, 512, 64)
        assert max(H, W) == 512 and H % 64 == W % 64 == 0
        assert 0 <= H - h * 512 / max(h, w) < 64 and 0 <= W - w * 512 / max(h, w) < 64
    for size in [0, -64, 32, 500]:
        with pytest.raises(BadInput, match="--size"):
            data.canvas_size(100, 100, size, 64)


# ---------------------------------------------------------------- data sets


def write_bg60k(root, rows, delimiter, split="bg60k", folder="bg60k", inverted=False):
    """A data set in BG60k's format: rows of (image file, ..., category), the n-th image in folder n % 2."""
    names = dict.fromkeys(name for *images, _ in rows for name in images)
    mask = disc(SIZE, SIZE, 6)
    for i, name in enumerate(names):
        data.save_image(torch.rand(3, SIZE, SIZE), root / f"{folder}_imgs_{i % 2}" / name)
        stem = name.rpartition(".")[0]
        data.save_image(1 - mask if inverted else mask, root / f"{folder}_masks_{i % 2}" / f"{stem}.webp")
    (root / f"{split}_info.txt").write_text("\n".join(map(delimiter.join, rows)), "utf-8-sig", "surrogateescape")


@pytest.mark.parametrize("delimiter", ["\t", ",", ", ", " ", "   "])
def test_bg60k_is_read_with_any_delimiter_and_categories_with_spaces(delimiter, tmp_path):
    rows = [("1.jpg", "电饭煲"), ("2.png", "rice cooker"), ("a.b.jpg", "笔记本 电脑"), ("3.jpg", "mug, tall")]
    write_bg60k(tmp_path, rows, delimiter)
    items, notes = data.read_items(tmp_path)
    assert [(item.image.name, item.category) for item in items] == rows
    assert [item.image.parent.name for item in items] == ["bg60k_imgs_0", "bg60k_imgs_1"] * 2
    assert [item.mask.name for item in items] == ["1.webp", "2.webp", "a.b.webp", "3.webp"]
    assert not items[0].inverted and "4 images in 4 categories" in notes[0]
    assert categories_of(items) == sorted(category for _, category in rows)


def test_bg60k_names_may_hold_the_folder_and_lack_the_suffix(tmp_path):
    write_bg60k(tmp_path, [("1.jpg", "mug"), ("2.jpg", "mug")], "\t")
    (tmp_path / "bg60k_info.txt").write_text("bg60k_imgs_0/1\tmug\n./bg60k_imgs_1/2.jpg\tmug\n1\tmug\n")
    assert [item.image.stem for item in data.read_items(tmp_path)[0]] == ["1", "2", "1"]


def test_bg60k_name_in_two_folders_is_found_by_its_folder_and_refused_without(tmp_path):
    write_bg60k(tmp_path, [("1.jpg", "mug"), ("2.jpg", "mug")], "\t")
    for kind, suffix in ("imgs", "jpg"), ("masks", "webp"):
        (tmp_path / f"bg60k_{kind}_1" / f"1.{suffix}").write_bytes(b"another")
    (tmp_path / "bg60k_info.txt").write_text("bg60k_imgs_0/1.jpg\tmug\n")
    item = data.read_items(tmp_path)[0][0]
    assert item.image.parent.name == "bg60k_imgs_0" and item.mask.parent.name == "bg60k_masks_0"
    for name, message in [("1.jpg", "no single image 1.jpg"), ("gone.jpg", "no single image gone.jpg")]:
        (tmp_path / "bg60k_info.txt").write_text(f"{name}\tmug\n")
        with pytest.raises(BadInput, match=message):
            data.read_items(tmp_path)
    (tmp_path / "bg60k_masks_1" / "2.webp").unlink()
    (tmp_path / "bg60k_info.txt").write_text("2.jpg\tmug\n")
    with pytest.raises(BadInput, match="no single mask for 2.jpg"):
        data.read_items(tmp_path)


def test_bgpair_reads_references_and_their_masks_from_bg1k_folders(tmp_path):
    write_bg60k(tmp_path, [("1.jpg", "2.jpg", "rice cooker"), ("2.jpg", "1.jpg", "mug")], " ", "bgpair", "bg1k")
    items, _ = data.read_items(tmp_path, "bgpair")
    assert [(item.image.stem, item.reference.stem, item.reference_mask.stem, item.category) for item in items] == [
        ("1", "2", "2", "rice cooker"), ("2", "1", "1", "mug")]


def test_inverted_masks_are_noticed_said_and_honoured(tmp_path):
    write_bg60k(tmp_path, [(f"{i}.jpg", "mug") for i in range(6)], "\t", inverted=True)
    items, notes = data.read_items(tmp_path)
    assert items[0].inverted and any("inverted" in note for note in notes)
    mask = data.load_ad(items[0], SIZE)[1]
    assert mask[0, 0, 0] == 0 and mask[0, SIZE // 2, SIZE // 2] == 1


def test_ones_own_masks_are_white_on_the_product_however_much_they_cover(tmp_path):
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "1.png")
    mask = Image.new("L", (SIZE, SIZE), 255)
    mask.paste(0, (8, 8, 16, 16))
    mask.save(tmp_path / "1_mask.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "mask": "1_mask.png", "category": "mug"}\n')
    items, notes = data.read_items(tmp_path)
    assert not items[0].inverted and any("are they white on the background?" in note for note in notes)


def test_the_long_tail_is_reported_in_three_numbers(tmp_path):
    write_bg60k(tmp_path, [("1.jpg", "mug"), ("2.jpg", "pot")], "\t")
    (tmp_path / "bg60k_info.txt").write_text("1\tmug\n" * 101 + "2\tpot\n" * 10 + "1\tpan\n2\tcup\n")
    note = next(note for note in data.read_items(tmp_path)[1] if "long tail" in note)
    assert "2 categories with fewer than 10" in note and "1 with more than 100" in note and "mug, with 101" in note


def test_one_percent_may_be_missing_and_is_named_and_counted(tmp_path):
    write_bg60k(tmp_path, [("1.jpg", "mug")], "\t")
    (tmp_path / "bg60k_info.txt").write_text("1.jpg\tmug\n" * 99 + "gone.jpg\tmug\n")
    items, notes = data.read_items(tmp_path)
    assert len(items) == 99 and any("info.txt:100" in note and "gone.jpg" in note for note in notes)
    assert notes[-1] == "skipped in all: 1"
    (tmp_path / "bg60k_info.txt").write_text("1.jpg\tmug\n" * 98 + "gone.jpg\tmug\n")
    with pytest.raises(BadInput, match="1 of 99 .* gone.jpg"):
        data.read_items(tmp_path)


def write_imagefolder(root, entries):
    for name in "mug.png", "pot.png":
        data.save_image(torch.rand(3, SIZE, SIZE), root / "images" / name)
        data.save_image(disc(SIZE, SIZE, 6), root / "masks" / name)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


MUG = {"file_name": "images/mug.png", "mask": "masks/mug.png", "category": "mug"}
POT = {"file_name": "images/pot.png", "mask": "masks/pot.png", "category": "pot", "product": "a red pot",
       "reference": "images/mug.png", "reference_mask": "masks/mug.png", "scene": "on a table"}


def test_imagefolder_is_read(tmp_path):
    write_imagefolder(tmp_path, [MUG, "", POT])
    (mug, pot), _ = data.read_items(tmp_path)
    assert mug == Item(tmp_path / "images/mug.png", tmp_path / "masks/mug.png", "mug")
    assert pot.reference == mug.image and pot.reference_mask == mug.mask
    assert (pot.product, pot.scene) == ("a red pot", "on a table")


@pytest.mark.parametrize("entry, message", [
    ("{not json", ":2: not a JSON object"), ("[1, 2]", ":2: not a JSON object"),
    ({**MUG, "mask": 7}, ":2: not a JSON object of strings"), ({"file_name": "images/mug.png"}, ":2: needs"),
    ({**MUG, "mask": "../secret.png"}, ":2: mask ../secret.png leaves"),
    ({**MUG, "reference": "/etc/hostname"}, ":2: reference /etc/hostname leaves"),
    ({**MUG, "mask": "masks/../../secret.png"}, ":2: mask masks/../../secret.png leaves"),
    ({**MUG, "mask": "C:\\masks\\mug.png"}, r":2: mask C:.* leaves"),
    ({**MUG, "mask": "masks\\mug.png"}, ":2: mask .* holds a backslash; write /"),
    ({**MUG, "category": "\udcb1"}, ":2: not UTF-8 text"),
    ({**MUG, "file_name": "n" * 300}, "1 of 2 .*:2: no file nnn"),
    ({**MUG, "file_name": "\0"}, "1 of 2 .*:2: no file"),
    ({**MUG, "file_name": "link.png"}, "1 of 2 .*:2: no file link.png"),
    ({**MUG, "file_name": "gone.png"}, "1 of 2 .*:2: no file gone.png"),
])
def test_bad_imagefolder_line_is_named(entry, message, tmp_path):
    write_imagefolder(tmp_path / "set", [MUG, entry])
    data.save_image(torch.rand(3, 4, 4), tmp_path / "secret.png")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(BadInput, match=message):
        data.read_items(tmp_path / "set")


def test_folders_that_are_no_data_set_say_what_was_expected(tmp_path):
    for root in tmp_path / "missing", tmp_path:
        with pytest.raises(BadInput, match="metadata.jsonl.*bg60k_info.txt"):
            data.read_items(root)
    with pytest.raises(BadInput, match="--split bg2k.*bg60k, bg1k, bgpair"):
        data.read_items(tmp_path, "bg2k")
    (tmp_path / "bg60k_info.txt").write_bytes("电饭煲".encode("gb18030"))
    with pytest.raises(BadInput, match="folders bg60k_imgs_0"):
        data.read_items(tmp_path)
    write_bg60k(tmp_path / "set", [("1.jpg", "mug")], "\t")
    for content, message in [("电饭煲".encode("gb18030"), "UTF-8"), (b"", "empty"), (b"one-column", "2 columns"),
                             ("1.jpg\t电饭煲".encode("gb18030"), "UTF-8"), (b"\xff\xfe1", "UTF-8"),
                             (b"../1.jpg\tmug", "1: ../1.jpg leaves"), (b"/1.jpg\tmug", "1: /1.jpg leaves"),
                             (b"bg60k_imgs_0\\1.jpg\tmug", "1: .* holds a backslash")]:
        (tmp_path / "set" / "bg60k_info.txt").write_bytes(content)
        with pytest.raises(BadInput, match=message):
            data.read_items(tmp_path / "set")


def test_lists_may_have_a_byte_order_mark_windows_line_ends_or_utf_16(tmp_path):
    write_imagefolder(tmp_path, [MUG, POT | {"category": "电饭煲"}])
    list_, text = tmp_path / "metadata.jsonl", (tmp_path / "metadata.jsonl").read_text(encoding="utf-8")
    expected = data.read_items(tmp_path)
    for encoding, end in [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-16", "\r\n"), ("utf-8", "\r")]:
        list_.write_bytes(text.replace("\n", end).encode(encoding))
        assert data.read_items(tmp_path) == expected


# ---------------------------------------------------------------- links, spellings, odd names

NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
GBK = os.fsdecode("杯".encode("gbk"))  # as a Chinese zip leaves it on Linux


def put(path):
    """A cut-out at `path`, whatever its name says about the format."""
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
    rgba.putalpha(Image.fromarray((disc(SIZE, SIZE, 6)[0] * 255).byte().numpy()))
    path.parent.mkdir(parents=True, exist_ok=True)
    rgba.save(path, format="PNG")


def link_into_blobs(root):
    """Makes a folder what the Hugging Face cache holds: every file a link to a blob without a suffix beside it."""
    (root.parent / "blobs").mkdir()
    for i, file in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        file.rename(root.parent / "blobs" / str(i))
        file.symlink_to(os.path.relpath(root.parent / "blobs" / str(i), file.parent))


def test_a_data_set_in_the_hugging_face_cache_is_read_under_the_names_that_are_written(tmp_path):
    write_imagefolder(tmp_path / "own" / "snapshot", [MUG, POT])
    link_into_blobs(tmp_path / "own" / "snapshot")
    items = data.read_items(tmp_path / "own" / "snapshot")[0]
    images = tmp_path / "own" / "snapshot" / "images"
    assert [item.image for item in items] == [images / "mug.png", images / "pot.png"]
    assert data.load_ad(items[0], SIZE)[0].shape == (3, SIZE, SIZE)
    write_bg60k(tmp_path / "bg60k" / "snapshot", [("1.jpg", "mug"), ("2.jpg", "pot")], "\t")
    link_into_blobs(tmp_path / "bg60k" / "snapshot")
    items = data.read_items(tmp_path / "bg60k" / "snapshot")[0]
    assert [(item.image.name, item.mask.name) for item in items] == [("1.jpg", "1.webp"), ("2.jpg", "2.webp")]


def test_folders_may_be_links(tmp_path):
    put(tmp_path / "disk" / "a.png")
    (tmp_path / "ads").mkdir()
    (tmp_path / "ads" / "mug").symlink_to(tmp_path / "disk")
    list_folder(tmp_path / "ads")
    [item] = data.read_items(tmp_path / "ads")[0]
    assert item.image == tmp_path / "ads" / "mug" / "a.png" and item.category == "mug"
    write_bg60k(tmp_path / "release", [("1.jpg", "mug")], "\t")
    for kind in "imgs", "masks":
        (tmp_path / "release" / f"bg60k_{kind}_0").rename(tmp_path / kind)
        (tmp_path / "release" / f"bg60k_{kind}_0").symlink_to(tmp_path / kind)
    assert data.read_items(tmp_path / "release")[0][0].image.parent.name == "bg60k_imgs_0"


@pytest.mark.parametrize("on_disk, in_list", [(NFC, NFD), (NFD, NFC)])
def test_a_file_is_found_in_either_of_unicodes_spellings(on_disk, in_list, tmp_path):
    put(tmp_path / "own" / on_disk / f"{on_disk}.png")
    line = {"file_name": f"{in_list}/{in_list}.png", "category": f" {in_list} ", "product": in_list, "scene": "x"}
    (tmp_path / "own" / "metadata.jsonl").write_text(json.dumps(line))
    [item] = data.read_items(tmp_path / "own")[0]
    assert item.image == tmp_path / "own" / on_disk / f"{on_disk}.png"
    assert (item.category, item.product) == (NFC, NFC)
    write_bg60k(tmp_path / "release", [(f"{on_disk}.jpg", "x")], "\t")
    (tmp_path / "release" / "bg60k_info.txt").write_text(f"bg60k_imgs_0/{in_list}\t{in_list}\n")
    [item] = data.read_items(tmp_path / "release")[0]
    assert (item.image.name, item.mask.name, item.category) == (f"{on_disk}.jpg", f"{on_disk}.webp", NFC)


def test_a_category_spelt_in_two_ways_is_one(tmp_path):
    for folder, name in ((NFC, "a"), (NFD, "b")):
        put(tmp_path / folder / f"{name}.png")
    data.save_image(disc(SIZE, SIZE, 6), tmp_path / NFC / f"{NFC}_mask.png")
    put(tmp_path / NFC / f"{NFD}.png")
    list_folder(tmp_path)
    items = data.read_items(tmp_path)[0]
    assert {item.category for item in items} == {NFC} and len(items) == 3
    assert [item.mask and item.mask.name for item in items if item.image.stem == NFD] == [f"{NFC}_mask.png"]
    line = {"file_name": f"{NFC}/{NFC}.png", "category": "x"}  # of which the folder is there, and the file in NFD
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    assert data.read_items(tmp_path)[0][0].image == tmp_path / NFC / f"{NFD}.png"
    (tmp_path / "categories.json").write_text(json.dumps({NFD: "sks 0"}))
    assert read_identifiers(tmp_path / "categories.json") == {NFC: "sks 0"}


def test_names_that_are_no_utf_8_are_listed_read_dropped_and_printed_by_escapes(tmp_path):
    put(tmp_path / "ads" / "mug" / f"{GBK}.png")
    put(tmp_path / "ads" / "mug" / "b.png")
    for arguments in (["--list"], []):
        command = [sys.executable, data.__file__, tmp_path / "ads", "--size", "16", *arguments]
        console = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
        result = subprocess.run(command, text=True, capture_output=True, env=console)
        assert result.returncode == 0 and "2 images load" in result.stdout, result.stderr
    assert (tmp_path / "ads" / "metadata.jsonl").read_text(encoding="utf-8").count(r"mug/\udcb1\udcad.png") == 1
    items = data.read_items(tmp_path / "ads")[0]
    assert [item.image for item in items] == [tmp_path / "ads" / "mug" / name for name in ("b.png", f"{GBK}.png")]
    write_bg60k(tmp_path / "release", [(f"{GBK}.jpg", "mug"), ("2.jpg", "mug")], "\t")
    assert data.read_items(tmp_path / "release")[0][0].image.name == f"{GBK}.jpg"
    list_, line = tmp_path / "release" / "bg60k_info.txt", "杯.jpg\tmug\n".encode("gbk")
    assert data.drop_lines(list_, {2}).read_bytes() == line + b"2.jpg\tmug"
    assert list_.read_bytes() == line


# ---------------------------------------------------------------- training samples


def test_load_ad_keeps_the_background_and_crops_around_the_product(tmp_path):
    picture, mask = torch.rand(3, 20, 60), torch.zeros(1, 20, 60)
    mask[:, 5:15, 40:46] = 1  # its centroid is at x = 43
    data.save_image(picture, tmp_path / "x.png")
    data.save_image(mask, tmp_path / "m.png")
    image, cropped = data.load_ad(Item(tmp_path / "x.png", tmp_path / "m.png", "mug"), 20)
    assert torch.allclose(image, picture[:, :, 33:53], atol=1 / 500) and torch.equal(cropped, mask[:, :, 33:53])


def test_ads_replace_a_broken_item_name_it_once_and_stop_above_one_percent(photo, tmp_path, capsys):
    good, bad = Item(*photo, "mug"), Item(tmp_path / "gone.png", photo[1], "mug")
    ads = data.Ads([bad] + [good] * 99, SIZE)
    assert [ads[0]["index"], ads[0]["index"], ads[1]["index"]] == [1, 1, 1] and list(ads.broken) == [0]
    assert capsys.readouterr().err.count("gone.png") == 1
    with pytest.raises(BadInput, match="2 of 100"):
        ads = data.Ads([bad, bad] + [good] * 98, SIZE)
        ads[0]


# ---------------------------------------------------------------- sheet, command


def test_sheet_has_equal_cells_and_room_for_labels():
    picture = torch.zeros(3, 32, 48)
    plain = data.sheet([[picture, None], [torch.zeros(1, 10, 10), picture]])
    assert plain.size == (2 * (48 + 4) + 4, 2 * (32 + 4) + 4) and plain.getpixel((80, 20)) == (255, 255, 255)
    labelled = data.sheet([[picture], [picture]], ["image"], ["mug", "电饭煲"])
    assert labelled.width > 48 + 8 and labelled.height > 2 * (32 + 4) + 4


def test_command_checks_a_data_set_and_draws_it(tmp_path, capsys):
    write_imagefolder(tmp_path, [MUG, POT])
    data.main([str(tmp_path), "--sheet", str(tmp_path / "sheet.png"), "--size", "32"])
    assert "3 images load, 0 are broken" in capsys.readouterr().out  # two items and a reference
    assert Image.open(tmp_path / "sheet.png").width > 4 * 32


def test_a_folder_of_categories_is_listed(photo, tmp_path, capsys):
    for category, suffix in (("mug", "jpg"), ("电饭煲", "png")):
        (tmp_path / category).mkdir()
        Image.open(photo[0]).convert("RGB").save(tmp_path / category / f"a b.{suffix}")
        Image.open(photo[1]).save(tmp_path / category / "a b_mask.png")
    rgba = Image.open(photo[0]).convert("RGB")
    rgba.putalpha(Image.open(photo[1]).convert("L"))
    rgba.save(tmp_path / "mug" / "cutout.png")
    data.main([str(tmp_path), "--list", "--size", "32"])
    assert "3 pictures listed" in capsys.readouterr().out
    items = data.read_items(tmp_path)[0]
    assert [(i.image.name, i.mask and i.mask.name, i.category) for i in items] == [
        ("a b.jpg", "a b_mask.png", "mug"), ("cutout.png", None, "mug"), ("a b.png", "a b_mask.png", "电饭煲")]
    with pytest.raises(BadInput, match="is there already"):
        data.main([str(tmp_path), "--list"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no pictures in folders of categories"):
        data.main([str(tmp_path / "empty"), "--list"])


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".thumbnails", ".Trash-1000", "__MACOSX", "@eaDir", "#recycle",
                                  "$RECYCLE.BIN", "System Volume Information", "lost+found", "@Recycle"])
def test_hidden_folders_and_those_of_systems_are_no_categories_and_hold_no_masks(name, tmp_path):
    put(tmp_path / "ads" / "mug" / "a.png")
    put(tmp_path / "ads" / name / "a.png")
    put(tmp_path / "ads" / "mug" / name / "a.png")
    notes = list_folder(tmp_path / "ads")
    assert [item.category for item in data.read_items(tmp_path / "ads")[0]] == ["mug"] and len(notes) == 1
    write_bg60k(tmp_path / "release", [("1.jpg", "mug")], "\t")
    put(tmp_path / "release" / "bg60k_imgs_0" / name / "1.jpg")
    assert data.read_items(tmp_path / "release")[0][0].image.parent.name == "bg60k_imgs_0"


def test_companions_of_pictures_are_no_pictures(tmp_path):
    put(tmp_path / "ads" / "mug" / "a.png")
    write_bg60k(tmp_path / "release", [("1.jpg", "mug")], "\t")
    for folder in ("ads/mug", "release/bg60k_imgs_0", "release/bg60k_masks_0"):
        for name in ("._a.png", "._1.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (tmp_path / folder / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "release" / "bg60k_imgs_0" / "1.txt").write_text("a caption")
    assert len(list_folder(tmp_path / "ads")) == 1 and len(data.read_items(tmp_path / "ads")[0]) == 1
    (tmp_path / "release" / "bg60k_info.txt").write_text("1\tmug\n")
    assert [item.image.name for item in data.read_items(tmp_path / "release")[0]] == ["1.jpg"]


def test_what_a_listing_takes_and_what_it_leaves_out_is_said_in_one_note(tmp_path):
    taken = ["mug/a.jfif", "mug/b.JPG", "mug/c.webp", "mug/d.gif", "mug/e.TIFF", "mug/f.bmp", "mug/g.mpo",
             "face/sheet_mask.png", "face/x_mask.png", "face/x_mask_mask.png"]  # the last is the mask of x_mask
    for name in taken:
        put(tmp_path / name)
    for name in ("loose.png", "mug/2024/a.png", "mug/2024/raw/b.png", "mug/h.heic", "mug/notes.txt", "a\\b/c.png",
                 f"{GBK}/a.png", "face/sheet.tmp"):
        put(tmp_path / name)
    (tmp_path / "mug" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "mug" / "round").symlink_to(tmp_path)
    notes = list_folder(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert sorted(line["file_name"] for line in lines) == sorted(taken[:-1])
    assert [line["mask"] for line in lines if "mask" in line] == ["face/x_mask_mask.png"]
    assert notes[0].startswith("9 pictures listed") and len(notes) == 2 and "\n" not in notes[1]
    for part in ("1 not in the folder of a category, such as loose.png", "in deeper folders, such as mug/2024/a.png",
                 "3 of other formats than JPEG, PNG", "such as face/sheet.tmp",
                 "1 that are links to nothing, such as mug/gone.png", "2 to be renamed"):
        assert part in notes[1], notes[1]


def test_a_listing_whose_check_fails_leaves_nothing_and_can_be_given_again(tmp_path, monkeypatch):
    put(tmp_path / "mug" / "a.png")
    (tmp_path / "mug" / "b.png").write_text("broken")
    for _ in range(2):
        with pytest.raises(BadInput, match="b.png: not a readable image"):
            data.main([str(tmp_path), "--list", "--size", "16"])
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "b.png", "mug"]
    put(tmp_path / "mug" / "b.png")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "check_items", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        data.main([str(tmp_path), "--list", "--size", "16"])
    data.main([str(tmp_path), "--list", "--size", "16"])
    assert len(data.read_items(tmp_path)[0]) == 2


def test_the_command_ends_with_what_it_wrote_and_what_to_do_next(tmp_path, capsys):
    put(tmp_path / "ads" / "mug" / "a.png")
    data.main([str(tmp_path / "ads"), "--list", "--size", "16", "--sheet", str(tmp_path / "sheet.png")])
    *_, wrote, train, paint = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {tmp_path / 'ads' / 'metadata.jsonl'}, {tmp_path / 'sheet.png'}"
    assert f"train.py cg --data {tmp_path / 'ads'}" in train and f"generate.py --data {tmp_path / 'ads'} --out" in paint
    write_bg60k(tmp_path / "release", [("1.jpg", "mug")], "\t", "bg1k", "bg1k")
    data.main([str(tmp_path / "release"), "--split", "bg1k", "--size", "16"])
    assert "next" in (last := capsys.readouterr().out.splitlines()[-1]) and "--split bg1k" in last


def test_blank_backgrounds_are_reported_and_dropped_and_the_whole_list_is_kept(tmp_path, capsys):
    write_imagefolder(tmp_path, [MUG, POT])
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    blank = np.full((SIZE, SIZE, 3), 240, np.uint8)
    blank[8:-8, 8:-8] = np.random.default_rng(0).integers(0, 255, (SIZE - 16, SIZE - 16, 3))  # a product of all colours
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[8:-8, 8:-8] = 255
    Image.fromarray(blank).save(tmp_path / "images" / "blank.png")
    Image.fromarray(mask).save(tmp_path / "images" / "blank_mask.png")
    line = json.dumps({"file_name": "images/blank.png", "mask": "images/blank_mask.png", "category": "mug"})
    (tmp_path / "metadata.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    data.main([str(tmp_path), "--size", str(SIZE), "--drop-blank"])
    out = capsys.readouterr().out
    assert "1 have a blank background" in out and "blank.png" in out and "metadata.jsonl.all" in out
    assert (tmp_path / "metadata.jsonl").read_text().splitlines() == lines
    assert line in (tmp_path / "metadata.jsonl.all").read_text()
    data.main([str(tmp_path), "--size", str(SIZE), "--drop-blank"])
    assert "0 have a blank background" in capsys.readouterr().out
    assert line in (tmp_path / "metadata.jsonl.all").read_text(), "the first, whole list stays"
    for end in (".png", "_mask.png"):
        shutil.copy(tmp_path / "images" / f"blank{end}", tmp_path / "images" / f"late{end}")
    late = line.replace("blank", "late")  # an ad that is added later, and dropped
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write(late + "\n")
    data.main([str(tmp_path), "--size", str(SIZE), "--drop-blank"])
    assert (tmp_path / "metadata.jsonl").read_text().splitlines() == lines
    assert {*lines, line, late} == {*(tmp_path / "metadata.jsonl.all").read_text().splitlines()}


def test_command_ends_with_one_line_and_status_2_even_where_a_worker_finds_the_error(tmp_path, capfd):
    with pytest.raises(SystemExit) as end, data.one_line_errors():
        data.main([str(tmp_path / "gone")])
    assert end.value.code == 2 and capfd.readouterr().err.startswith(f"error: {tmp_path / 'gone'}: no such data set")
    write_imagefolder(tmp_path, [MUG, POT])
    (tmp_path / "images" / "pot.png").write_text("broken")
    result = subprocess.run([sys.executable, data.__file__, str(tmp_path)], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert last.startswith("error: ") and "pot.png: not a readable image" in last
