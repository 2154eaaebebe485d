"""Tests: support/images.py: files become sRGB, masks mean 0 to 1, fitting does not stretch."""

import struct
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from support import images
from support.files import BadInput

SIZE = 24  # pixels of the test images


def disc(radius=6, soft=1.0):
    """(1, SIZE, SIZE): 1 in a disc in the middle, falling to 0 over `soft` pixels."""
    y, x = torch.meshgrid(*[torch.arange(SIZE) - (SIZE - 1) / 2] * 2, indexing="ij")
    return ((radius - torch.hypot(y, x)) / soft + 0.5).clamp(0, 1)[None]


@pytest.fixture
def photo(tmp_path):
    """An RGB photo and its mask, in files of SIZE x SIZE pixels."""
    images.save_image(torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), tmp_path / "photo.png")
    images.save_image(disc(), tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


def opened(path):
    return np.asarray(images.open_image(path)).astype(int)


# ---------------------------------------------------------------- colours

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"    ").replace(b"gXYZ", b"rXYZ").replace(b"    ", b"gXYZ")  # red is green's colour
CURVE = SRGB.index(b"para") + 8
LINEAR_GREY = (SRGB[:CURVE] + b"\0\0\0\0\0\1\0\0" + SRGB[CURVE + 8 :]).replace(  # the curve x ** 1
    b"RGB ", b"GRAY", 1).replace(b"rTRC", b"kTRC")  # fmt: skip


def press_profile():
    """CMYK to Lab by a table of its 16 corners: each ink, whichever it is, darkens white paper by 60 of 255 levels."""
    ramp, identity = bytes(range(256)), struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    corners = b"".join(bytes([255 - 60 * sum(inks), 128, 128]) for inks in product((0, 1), repeat=4))
    table = b"mft1\0\0\0\0\4\3\2\0" + identity + ramp * 4 + corners + ramp * 3
    head = struct.pack(">I", 144 + len(table)) + SRGB[4:12] + b"prtrCMYKLab " + SRGB[24:128]
    return head + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


COLOURS = np.array([[[200, 40, 40], [30, 160, 60], [128, 128, 128], [250, 240, 230], [20, 30, 90]]], np.uint8)


@pytest.mark.parametrize("name", ["RGB.png", "RGB.tif", "P.png", "RGBA.png", "RGBA.webp"])
def test_a_picture_goes_through_its_profile_to_srgb_and_keeps_its_alpha(name, tmp_path):
    picture, alpha = Image.fromarray(COLOURS), np.array([[0, 50, 100, 200, 255]], np.uint8)
    if "A" in name:
        picture.putalpha(Image.fromarray(alpha))
    picture = picture.quantize(5) if name[0] == "P" else picture
    picture.save(tmp_path / name, icc_profile=SWAPPED, lossless=True, exact=True)  # as regards WebP
    seen = opened(tmp_path / name)
    assert np.abs(seen[..., :3] - COLOURS[..., [1, 0, 2]]).max() <= 1
    assert "A" not in name or np.array_equal(seen[..., 3], alpha)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_with_a_profile_becomes_srgb(mode, tmp_path):
    """Of 255, 55 in linear light is sRGB's 1.055 * (55 / 255) ** (1 / 2.4) - 0.055 = 128."""
    grey = np.array([[0, 55, 255]], np.uint8)
    picture = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey)
    if mode == "LA":
        picture.putalpha(100)
    picture.save(tmp_path / "x.png", icc_profile=LINEAR_GREY)
    seen = opened(tmp_path / "x.png")[0]
    assert np.abs(seen[:, :3].T - [0, 128, 255]).max() <= 1 and (seen[:, 3:] == 100).all()


def test_cmyk_goes_through_its_press_profile_and_without_one_its_colours_are_said_to_be_a_guess(tmp_path, capsys):
    """L* = 100 * 195 / 255 = 76.5 is Y = ((L* + 16) / 116) ** 3 = 0.507 and sRGB's 189."""
    inks = Image.fromarray(255 * np.eye(5, 4, dtype=np.uint8)[None], "CMYK")  # one at a time, and bare paper
    inks.save(tmp_path / "press.tif", icc_profile=press_profile())
    assert np.abs(opened(tmp_path / "press.tif")[0].T - [189, 189, 189, 189, 255]).max() <= 1
    assert not capsys.readouterr().err
    inks.save(tmp_path / "bare.tif")
    assert opened(tmp_path / "bare.tif")[0, 0].tolist() == [0, 255, 255]
    assert capsys.readouterr().err.count("bare.tif: CMYK without a profile") == 1


def test_srgbs_own_profile_changes_no_number(tmp_path):
    x = torch.randint(0, 256, (3, 32, 32)) / 255
    images.to_image(x).save(tmp_path / "x.png", icc_profile=SRGB)
    assert torch.equal(images.to_tensor(images.open_image(tmp_path / "x.png")), x)


@pytest.mark.parametrize("code, red", [(b"\1\r\0\1", 200), (b"\f\r\0\1", 217), (b"\t\x10\0\1", 40)])
def test_a_cicp_chunk_of_srgb_or_display_p3_goes_before_the_profile_and_hdrs_is_named(code, red, tmp_path, capsys):
    """Display P3's (200, 40, 40): in linear light its red is 1.2249 * 0.578 - 0.2249 * 0.0212 = 0.703, sRGB's 217."""
    chunks = PngInfo()
    chunks.add(b"cICP", code)
    Image.fromarray(COLOURS).save(tmp_path / "x.png", pnginfo=chunks, icc_profile=SWAPPED)
    assert abs(opened(tmp_path / "x.png")[0, 0, 0] - red) <= 1
    assert capsys.readouterr().err.count("its cICP chunk names the colours [9, 16]") == (red == 40)


@pytest.mark.parametrize("profile", [b"no profile", SWAPPED[:200], LINEAR_GREY, press_profile()])
def test_a_broken_or_unfitting_profile_is_left_out_and_that_is_said(profile, tmp_path, capsys):
    Image.fromarray(COLOURS).save(tmp_path / "x.png", icc_profile=profile)
    assert np.array_equal(opened(tmp_path / "x.png"), COLOURS)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "x.png: its colour profile" in err


def test_a_saved_picture_keeps_its_numbers_says_that_it_is_srgb_and_carries_its_text(tmp_path):
    levels, path = torch.randint(0, 256, (3, 9, 7)), tmp_path / "new" / "folder" / "x.png"
    picture = images.to_image((levels - 0.4) / 255)  # is rounded
    picture.info["icc_profile"] = SWAPPED  # of the file it came from
    images.save_image(picture, path, {"prompt": "A photo of café 电饭煲", "product": "\udcb1.png"})
    with Image.open(path) as file:  # reads what stands before the pixels
        assert file.info["srgb"] == 0 and "icc_profile" not in file.info
        assert file.text == {"prompt": "A photo of café 电饭煲", "product": "\\udcb1.png"}
    assert torch.equal(images.to_tensor(images.open_image(path)), levels / 255)


# ---------------------------------------------------------------- masks


def masks():
    """Forms in which a disc's mask may be stored: name -> image."""
    grey = images.to_image(disc(soft=4))
    sixteen, alpha, opaque = np.asarray(grey).astype(np.uint16), Image.new("RGBA", grey.size), grey.convert("RGB")
    alpha.putalpha(grey)
    opaque.putalpha(254)  # a program's rounding
    raised = {f"{low} to {high}": images.to_image((low + (high - low) * disc(soft=4)) / 255)
              for low, high in ((0, 250), (16, 235), (60, 255))}
    return raised | {"grey": grey, "RGB": grey.convert("RGB"), "alpha": alpha, "palette": grey.quantize(256),
                     "16 bits": Image.fromarray(sixteen * 257), "8 in 16 bits": Image.fromarray(sixteen),
                     "opaque": opaque}


@pytest.mark.parametrize("name", masks())
def test_a_mask_may_be_stored_in_any_form(name, photo, tmp_path):
    masks()[name].save(tmp_path / "x.png", icc_profile=LINEAR_GREY if name == "grey" else None)  # numbers, not colours
    M = images.load_masked(photo[0], tmp_path / "x.png")[1]
    levels = disc(soft=4)
    assert torch.allclose(M, levels, atol=0.01) and M[levels == 0].max() == 0 and M[levels == 1].min() == 1


def test_a_mask_on_all_four_borders_is_pointed_out(photo, tmp_path, capsys):
    standing = disc()
    standing[:, 12:, 4:20] = 1  # on the lower border
    for name, mask in ("standing.png", standing), ("inverse.png", 1 - disc()):
        images.save_image(mask, tmp_path / name)
        images.load_masked(photo[0], tmp_path / name)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "inverse.png covers the picture's border" in err


def test_a_soft_masks_levels_are_meant(photo, tmp_path):
    """A product that is soft or half clear all over stays so: its mask has no distinct top level, or one below 235."""
    for M in disc(soft=12), 0.8 * disc():
        images.save_image(M, tmp_path / "mask.png")
        assert torch.allclose(images.load_masked(photo[0], tmp_path / "mask.png")[1], M, atol=1 / 255)


def test_an_unusable_mask_is_refused_and_the_option_is_named(photo, tmp_path):
    labels = np.asarray(Image.open(photo[1])) // 85
    opaque = Image.open(photo[0])
    opaque.putalpha(254)
    opaque.save(photo[0])  # a program's rounding, and no cut-out
    for mask, message in [(None, "reference .* no alpha"), (0 * labels, "is empty"),
                          (255 + 0 * labels, "covers the whole"), (labels[:, :9], "9 x 24 .* 24 x 24"),
                          (labels, r"label map \(levels 0, [1, 2]*3 of 255\): make the product's"),
                          (labels.astype(np.uint16), "label map")]:
        if mask is not None:
            Image.fromarray(mask).save(tmp_path / "x.png")
        with pytest.raises(BadInput, match=f"{message}.*--reference-mask"):
            images.load_cutout(photo[0], mask if mask is None else tmp_path / "x.png", "reference", "--reference-mask")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_pictures_in_every_format_are_read_whatever_their_suffix_and_of_several_the_first(kind, tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime"))
    first.save(tmp_path / "x", kind, save_all=kind not in ("JPEG", "BMP"), append_images=[second])
    assert np.abs(opened(tmp_path / "x")[..., :3] - [255, 0, 0]).max() < 9


def test_the_transparent_colour_of_every_kind_of_png_is_alpha(tmp_path):
    sixteen = np.full((4, 6), 60000, np.uint16)
    sixteen[0] = 1000
    grey = Image.fromarray((sixteen / 257).astype(np.uint8))
    index = grey.convert("RGB").quantize(2)
    for image, transparent in [(Image.fromarray(sixteen), 1000), (grey.convert("RGB"), (3, 3, 3)),
                               (index, index.getpixel((0, 0)))]:
        image.save(tmp_path / "x.png", transparency=transparent)
        rgba = opened(tmp_path / "x.png")
        assert np.array_equal(rgba[..., 3], np.where(sixteen == 1000, 0, 255)), image.mode
        assert np.abs(rgba[1:, :, :3] - 60000 / 257).max() <= 1


def test_numbers_of_16_bits_are_read_in_both_orders_and_larger_ones_refused(tmp_path):
    grey = (np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "little.tif")
    Image.frombytes("I;16B", (4, 3), grey.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    for name in "little.tif", "big.tif":
        assert np.abs(opened(tmp_path / name) - (grey / 257)[..., None]).max() <= 1, name
    for kind in np.float32, np.int32:
        Image.fromarray((grey * 10000.0).astype(kind)).save(tmp_path / "x.tif")
        with pytest.raises(BadInput, match="32-bit.*save it as PNG or JPEG"):
            images.open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("content, fault", [
    (b"\0\0\0\x18ftypheic", "HEIC.*save it as PNG or JPEG$"), (b"\0\0\0\x18ftypmif1", "HEIC.*save it as PNG or JPEG$"),
    (b"<!DOCTYPE html>", "identify.*save it as PNG or JPEG$"), (b"", "identify"), (b"\xff\xd8\xff\xe0\0\x10JFIF", ""),
    (None, "no such file")])
def test_what_is_no_picture_is_refused_in_one_line_that_names_it(content, fault, tmp_path):
    if content is not None:
        (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(BadInput, match=rf"^[^\n]*x.jpg: (not a readable image )?[^\n]*{fault}"):
        images.open_image(tmp_path / "x.jpg")
    with pytest.raises(BadInput, match=f"{tmp_path}: not a readable image .Is a directory"):
        images.open_image(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as images.py sets it, which pytest undoes
def test_more_than_120_megapixels_are_refused_before_decoding(photo, monkeypatch):
    assert 108e6 < Image.MAX_IMAGE_PIXELS == 120_000_000, "a phone's 108 megapixels are read"
    photo[0].write_bytes(photo[0].read_bytes()[:1000])  # can't be decoded
    for limit, refusal in [(SIZE**2, "photo.png: not a readable image"), (SIZE**2 - 1, "over 575 pixels; make it"),
                           (SIZE, "over 24 pixels; make it smaller")]:  # the last is so large that Pillow objects
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadInput, match=refusal):
            images.open_image(photo[0])


# ---------------------------------------------------------------- fitting


@pytest.mark.parametrize("mode, scale", [("contain", 1.2), ("cover", 1.6)])
def test_fit_keeps_squares_square(mode, scale):
    square = torch.zeros(1, 40, 80)
    square[:, 8:32, 28:52] = 1
    fitted, _ = images.fit(square, 64, 96, mode)
    assert fitted.shape == (1, 64, 96) and 0 <= fitted.min() and fitted.max() <= 1
    for axis in (1, 2):
        assert fitted.amax(axis).sum() == pytest.approx(24 * scale, abs=2)


def test_fit_contain_pads_pictures_with_their_edge_and_masks_with_0_and_boxes_the_whole_picture():
    picture = images.resize(torch.rand(3, 5, 8), 50, 80)  # smooth
    canvas, box = images.fit(picture, 128, 128, "contain")
    mask, box_of_mask = images.fit(torch.ones(1, 50, 80), 128, 128, "contain")
    top, left, h, w = box
    assert box == box_of_mask == (24, 0, 80, 128)
    assert torch.equal(canvas[:, :top], canvas[:, top : top + 1].expand(3, top, w))
    assert mask[:, top : top + h].min() > 0.999 and mask.sum() == pytest.approx(h * w, rel=1e-3)
    assert (images.resize(canvas[:, top : top + h], 50, 80) - picture).abs().max() < 0.05


def test_fit_cover_keeps_the_centre_asked_for_within_the_picture():
    x = torch.arange(100.0).expand(1, 50, 100) / 100
    for centre, left in [(None, 25), ((25, 60), 35), ((25, 99), 50), ((25, 0), 0)]:
        cropped, box = images.fit(x, 50, 50, "cover", centre)
        assert box == (0, left, 50, 50) and torch.equal(cropped, x[:, :, left : left + 50])


def test_canvas_holds_the_picture_with_less_than_one_multiple_of_padding():
    for h, w in [(1000, 333), (1, 2000), (511, 512)]:
        H, W = images.canvas_size(h, w, 512, 64)
        assert max(H, W) == 512 and H % 64 == W % 64 == 0
        assert 0 <= H - h * 512 / max(h, w) < 64 and 0 <= W - w * 512 / max(h, w) < 64
    for size in [0, 32, 500]:
        with pytest.raises(BadInput, match="--size"):
            images.canvas_size(100, 100, size, 64)


# ---------------------------------------------------------------- sheets


def test_a_sheet_has_equal_cells_and_room_for_labels():
    picture = torch.zeros(3, 32, 48)
    plain = images.sheet([[picture, None], [torch.zeros(1, 10, 10), picture]])
    assert plain.size == (2 * (48 + 4) + 4, 2 * (32 + 4) + 4) and plain.getpixel((80, 20)) == (255, 255, 255)
    labelled = images.sheet([[picture], [picture]], ["image"], ["mug", "电饭煲"])
    assert labelled.width > 48 + 8 and labelled.height > 2 * (32 + 4) + 4


def test_a_thumbnail_of_a_product_is_on_white():
    red, mask = torch.eye(3)[0][:, None, None].expand(3, 300, 600), torch.zeros(1, 300, 600)
    mask[..., 300:] = 1
    small = images.thumbnail(red, 60, mask)
    assert small.size == (60, 30) and small.getpixel((2, 2)) == (255,) * 3 and small.getpixel((50, 15)) == (255, 0, 0)
    assert images.thumbnail(red, 600).size == (600, 300)
