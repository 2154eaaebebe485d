"""Tests: support/images.py and cutouts.py: files become sRGB, cut-outs have no halos, fitting does not stretch."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFilter

from support import cutouts, images
from support.cutouts import PREMULTIPLIED, SOLID, STORED, STRAIGHT
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
    """An RGB photo and its mask, in files of SIZE x SIZE pixels."""
    images.save_image(torch.rand(3, SIZE, SIZE, generator=generator()), tmp_path / "photo.png")
    images.save_image(disc(SIZE, SIZE, 6), tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


# ---------------------------------------------------------------- colours

P3 = (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)  # xy of red, green, blue; white is D65
P3_TO_SRGB = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])  # linear, as published
SRGB_PRIMARIES = (0.64, 0.33), (0.30, 0.60), (0.15, 0.06)


def encode(linear):
    """sRGB's curve, IEC 61966-2-1: linear light in [0, 1] -> numbers from 0 to 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decode_curve(v):
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def icc(space, connection, tags):
    """An ICC profile, version 2, from tags {name: data}."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s12x4s28x3i48x", 128 + len(table + body), b"", 0x02100000,
                       b"prtr" if space == b"CMYK" else b"mntr", space, connection, b"acsp", 63190, 65536, 54061)
    return head + table + body


def curve(*values):
    return b"curv\0\0\0\0" + struct.pack(f">I{len(values)}H", len(values), *values)


def xyz(values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(v) * 65536) for v in values))


def rgb_profile(primaries, *values):
    """A profile with these primaries and white D65. A curve of one value is an exponent in parts of 256."""
    as_xyz = lambda x, y: np.array([x / y, 1, (1 - x - y) / y])  # noqa: E731
    columns = np.stack([as_xyz(*xy) for xy in primaries], 1)
    columns = columns * np.linalg.solve(columns, as_xyz(0.3127, 0.3290))
    d65_to_d50 = np.array([[1.0479, 0.0229, -0.0502], [0.0296, 0.9904, -0.0171], [-0.0092, 0.0151, 0.7519]])  # Bradford
    columns = d65_to_d50 @ columns
    tags = {b"rXYZ": xyz(columns[:, 0]), b"gXYZ": xyz(columns[:, 1]), b"bXYZ": xyz(columns[:, 2])}
    return icc(b"RGB ", b"XYZ ", tags | {name: curve(*values) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(gamma):
    return icc(b"GRAY", b"XYZ ", {b"wtpt": xyz((0.9642, 1, 0.8249)), b"kTRC": curve(round(gamma * 256))})


def press_profile():
    """CMYK to Lab by a table of its 16 corners: paper is a warm white, inks darken it."""
    ramp = bytes(range(256))
    corners = b"".join(bytes([max(20, 250 - 60 * (c + m + y) - 120 * k), 128 - 40 * c + 70 * m, 135 - 40 * c + 80 * y])
                       for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1))
    unit = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + ramp * 4 + corners + ramp * 3
    return icc(b"CMYK", b"Lab ", {b"A2B0": table})


COLOURS = np.array([[200, 40, 40], [30, 160, 60], [128, 128, 128], [250, 240, 230], [20, 30, 90], [0, 0, 0]], np.uint8)


def opened(path):
    return np.asarray(images.open_image(path)).astype(int)


CURVE_1024 = [round(65535 * float(decode_curve(i / 1023))) for i in range(1024)]  # sRGB's, as in its profile of 1998


@pytest.mark.parametrize("suffix, how", [("png", {}), ("tif", {}), ("webp", {"lossless": True})])
def test_a_display_p3_picture_becomes_srgb(suffix, how, tmp_path):
    """Its numbers go through sRGB's curve to linear light, then through the matrix between the primaries, and back."""
    expected = encode(decode_curve(COLOURS / 255) @ P3_TO_SRGB.T)
    Image.fromarray(COLOURS[None]).save(tmp_path / f"x.{suffix}", icc_profile=rgb_profile(P3, *CURVE_1024), **how)
    assert np.abs(opened(tmp_path / f"x.{suffix}")[0] - expected).max() < 1.5
    assert np.abs(expected[0] - [218, 0, 26]).max() < 1


def test_palettes_and_cutouts_with_a_profile_become_srgb_and_keep_their_alpha(tmp_path):
    profile, expected = rgb_profile(P3, round(2.2 * 256)), encode((COLOURS / 255) ** 2.2 @ P3_TO_SRGB.T)
    picture = Image.fromarray(COLOURS[None])
    picture.quantize(6).save(tmp_path / "palette.png", icc_profile=profile)
    assert np.abs(opened(tmp_path / "palette.png")[0] - expected).max() < 1.5
    alpha = np.array([[0, 50, 100, 150, 200, 255]], np.uint8)
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / "cut.png", icc_profile=profile)
    cut = opened(tmp_path / "cut.png")[0]
    assert np.abs(cut[:, :3] - expected).max() < 1.5 and np.array_equal(cut[:, 3], alpha[0])


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_with_a_profile_becomes_srgb(mode, tmp_path):
    grey = np.arange(0, 256, 5, dtype=np.uint8)[None]
    picture = Image.fromarray(grey) if mode != "I;16" else Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "LA":
        picture.putalpha(128)
    picture.save(tmp_path / "x.png", icc_profile=grey_profile(1.8))
    seen = opened(tmp_path / "x.png")
    assert np.abs(seen[0, :, :3] - encode((grey[0] / 255) ** 1.8)[:, None]).max() < 1.5
    assert seen.shape[2] == 3 or (seen[..., 3] == 128).all()


def test_cmyk_is_converted_by_its_press_profile_and_as_pillow_does_without_one_which_is_said(tmp_path, capsys):
    inks = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    picture, profile = Image.fromarray(inks, "CMYK"), press_profile()
    picture.save(tmp_path / "press.tif", icc_profile=profile)
    srgb, source = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(BytesIO(profile))
    expected = np.asarray(ImageCms.profileToProfile(picture, source, srgb, outputMode="RGB")).astype(int)
    assert np.array_equal(opened(tmp_path / "press.tif"), expected) and not capsys.readouterr().err
    picture.save(tmp_path / "bare.tif")
    plain = np.asarray(picture.convert("RGB")).astype(int)
    assert np.array_equal(opened(tmp_path / "bare.tif"), plain) and np.abs(plain - expected).max() > 50
    assert capsys.readouterr().err.count("bare.tif: CMYK without a profile") == 1


def test_lab_is_read(tmp_path):
    Image.new("LAB", (2, 2), (128, 128, 128)).save(tmp_path / "x.tif")  # L* = 100 * 128 / 255, a* = b* = 0
    Y = ((100 * 128 / 255 + 16) / 116) ** 3
    assert np.abs(opened(tmp_path / "x.tif") - encode(Y)).max() < 1.5


def test_srgbs_own_profiles_change_nothing(tmp_path):
    x = torch.randint(0, 256, (3, 32, 32), generator=generator()) / 255
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in built_in, rgb_profile(SRGB_PRIMARIES, *CURVE_1024):
        images.to_image(x).save(tmp_path / "x.png", icc_profile=profile)
        assert torch.equal(images.to_tensor(images.open_image(tmp_path / "x.png")), x)


@pytest.mark.parametrize("profile", [b"no profile", rgb_profile(P3, 563)[:200], grey_profile(1.8), press_profile()])
def test_a_broken_or_unfitting_profile_is_left_out_and_that_is_said(profile, tmp_path, capsys):
    Image.fromarray(COLOURS[None]).save(tmp_path / "x.png", icc_profile=profile)
    assert np.array_equal(opened(tmp_path / "x.png")[0], COLOURS)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "x.png: its colour profile" in err


def test_masks_are_numbers_and_not_colour_managed(photo, tmp_path):
    Image.open(photo[1]).save(tmp_path / "mask.png", icc_profile=grey_profile(1.0))
    assert torch.equal(images.load_mask(tmp_path / "mask.png"), images.load_mask(photo[1]))


def test_a_saved_picture_says_that_it_is_srgb_and_carries_its_text(tmp_path):
    picture = Image.fromarray(COLOURS[None])
    picture.info["icc_profile"] = rgb_profile(P3, 563)  # of the file it came from
    text = {"prompt": "A photo of café 电饭煲", "product": "\udcb1.png"}
    images.save_image(picture, tmp_path / "x.png", text)
    written, chunks, at = (tmp_path / "x.png").read_bytes(), [], 8
    while at < len(written):
        chunks.append((written[at + 4 : at + 8], struct.unpack(">I", written[at : at + 4])[0]))
        at += 12 + chunks[-1][1]
    names = [name for name, _ in chunks]
    assert (b"sRGB", 1) in chunks and names.index(b"sRGB") < names.index(b"IDAT") and b"iCCP" not in names
    with Image.open(tmp_path / "x.png") as file:
        file.load()
        assert file.text == {"prompt": text["prompt"], "product": "\\udcb1.png"}


# ---------------------------------------------------------------- cut-outs


def test_unmix_edges_removes_the_old_background_from_soft_edges():
    red, green, blue = flat([0.9, 0.1, 0.1], 64, 64), flat([0.0, 1.0, 0.0], 64, 64), flat([0.0, 0.0, 1.0], 64, 64)
    M = disc(64, 64, 20, soft=5)
    photo = red * M + green * (1 - M)
    assert ((photo * M + blue * (1 - M))[1] > 0.2).any(), "the naive paste has a green halo"
    pasted = cutouts.unmix_edges(photo, M) * M + blue * (1 - M)
    assert torch.allclose(pasted, red * M + blue * (1 - M), atol=1 - SOLID)


def test_unmix_edges_leaves_solid_pixels_bit_exact():
    photo, M = torch.rand(3, 50, 61, generator=generator()), disc(50, 61, 15, soft=4)
    solid = (M == 1).expand_as(photo)
    assert torch.equal(cutouts.unmix_edges(photo, M)[solid], photo[solid])


def test_unmix_edges_keeps_the_texture_of_a_translucent_product():
    M = disc(64, 64, 24) * 0.9
    M[:, 28:36, 28:36] = 1
    texture = torch.rand(3, 64, 64, generator=generator())
    photo = texture * M + (1 - M)  # on white
    inside = (M == 0.9).expand_as(photo)
    error = (cutouts.unmix_edges(photo, M) - texture)[inside]
    assert error.std() < 0.2 * texture[inside].std()


def test_extend_gives_every_pixel_a_known_colour_and_changes_no_known_one():
    for shape in [(1, 7), (5, 1), (33, 47)]:
        rgb, known = torch.rand(3, *shape), torch.zeros(1, *shape, dtype=torch.bool)
        known[0, 0, 0] = True
        assert torch.allclose(cutouts.extend(rgb, known), rgb[:, :1, :1].expand_as(rgb))


def test_cutout_with_a_mask_file_and_with_alpha_agree_on_solid_pixels(photo, tmp_path):
    image, mask = photo
    rgba = Image.open(image)
    rgba.putalpha(Image.open(mask))
    rgba.save(tmp_path / "cut.png")
    (rgb, M), (rgb_alpha, M_alpha) = images.load_cutout(image, mask), images.load_cutout(tmp_path / "cut.png")
    assert rgb.shape == (3, SIZE, SIZE) and torch.equal(M, M_alpha)
    solid = (M == 1).expand_as(rgb)
    assert torch.equal(rgb[solid], rgb_alpha[solid])


def test_a_background_still_stored_under_the_alpha_channel_leaves_no_halo(tmp_path):
    """A red product on a green and yellow wall, which only the mask makes transparent, as Pillow's putalpha does."""
    M = disc(64, 64, 20, soft=5)
    wall = flat([0.0, 1.0, 0.0], 64, 64).clone()
    wall[0, :, 32:] = 1
    photo = flat([0.8, 0.2, 0.2], 64, 64) * M + wall * (1 - M)
    Image.fromarray((torch.cat([photo, M]) * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "cut.png")
    rgb, M = images.load_cutout(tmp_path / "cut.png")
    red = flat([0.8, 0.2, 0.2], 64, 64)
    assert ((photo - red).abs() * M).max() > 0.19, "as stored, the edge is green and yellow"
    assert ((rgb - red).abs() * M).max() < 0.07


def test_alpha_cutout_keeps_visible_colours_and_hides_those_under_zero_alpha(tmp_path):
    M = disc(SIZE, SIZE, 6, soft=3)
    stored = flat([0.8, 0.2, 0.2], SIZE, SIZE) * (M > 0)  # black where invisible, as most programs save it
    Image.fromarray((torch.cat([stored, M]) * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "cut.png")
    rgb, M = images.load_cutout(tmp_path / "cut.png")
    assert torch.allclose(rgb, flat([0.8, 0.2, 0.2], SIZE, SIZE), atol=0.01)


def test_mask_file_may_be_grey_rgb_alpha_palette_or_16_bit(photo, tmp_path):
    image, mask = photo
    grey = Image.open(mask)
    alpha = Image.new("RGBA", grey.size, "black")
    alpha.putalpha(grey)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    expected = images.load_masked(image, mask)[1]
    for i, variant in enumerate([grey, grey.convert("RGB"), alpha, grey.quantize(256), sixteen]):
        variant.save(tmp_path / f"{i}.png")
        assert torch.allclose(images.load_masked(image, tmp_path / f"{i}.png")[1], expected, atol=0.02), variant.mode


def test_inverted_mask_file_is_turned(photo, tmp_path):
    image, mask = photo
    images.save_image(1 - images.load_mask(mask), tmp_path / "inverse.png")
    assert torch.allclose(images.load_masked(image, tmp_path / "inverse.png", inverted=True)[1], images.load_mask(mask))


# ---------------------------------------------------------------- alpha channels

ROUND = Image.new("L", (128, 128))
ImageDraw.Draw(ROUND).rounded_rectangle([40, 20, 90, 110], 12, fill=255)
ROUND = ROUND.filter(ImageFilter.GaussianBlur(2))
M_ROUND = np.asarray(ROUND) / 255
SOFT = (M_ROUND > 0.15) & (M_ROUND < 0.85)
WEBP = [dict(lossless=True, exact=True), dict(quality=80), dict(quality=80, exact=True)]


def cutout(colour, hidden, mixed):
    """A product with a soft edge over `hidden`. At the edge it has its own colour, or the two `mixed`."""
    if mixed:
        picture = Image.composite(Image.new("RGB", ROUND.size, colour), Image.new("RGB", ROUND.size, hidden), ROUND)
    else:
        picture = Image.new("RGB", ROUND.size, hidden)
        picture.paste(colour, (0, 0, *ROUND.size), ROUND.point(lambda v: 255 * (v > 0)))
    picture.putalpha(ROUND)
    return picture


def edge_error(path, colour):
    """The mean error of the product's colour at its soft edge, in levels of 255."""
    rgb, _ = images.load_cutout(path)
    return np.abs(255 * rgb.permute(1, 2, 0).numpy() - colour)[SOFT].mean()


@pytest.mark.parametrize("colour", [(245, 240, 235), (40, 90, 210), (20, 20, 20), (5, 200, 5)])
def test_what_the_edge_holds_is_recognised_whatever_lies_under_alpha_0(colour, tmp_path):
    for hidden, mixed, holds in [((255, 255, 255), False, STRAIGHT), ((0, 0, 0), False, STRAIGHT),
                                 ((60, 70, 90), True, STORED), ((0, 0, 0), True, PREMULTIPLIED)]:
        for how in WEBP:
            cutout(colour, hidden, mixed).save(tmp_path / "x.webp", **how)
            found = cutouts.edge_holds(*images.load_masked(tmp_path / "x.webp"))
            assert found == holds, (hidden, mixed, how)


@pytest.mark.parametrize("colour", [(245, 240, 235), (40, 90, 210), (20, 20, 20)])
def test_premultiplied_colours_are_divided_by_alpha(colour, tmp_path):
    """rembg's default. Rounding to 8 bits changes M F / M by at most 0.5 / M, which is less than 4 where M > 0.15."""
    cutout(colour, (0, 0, 0), mixed=True).save(tmp_path / "x.png")
    rgb, mask = images.load_cutout(tmp_path / "x.png")
    error = np.abs(255 * rgb.permute(1, 2, 0).numpy() - colour)
    assert error[SOFT].max() < 4 and (error * mask[0].numpy()[..., None])[M_ROUND > 0].max() < 1.5


def test_a_dark_products_own_colours_are_not_divided(tmp_path):
    """At an antialiased edge, M = 0, 0.5, 1, the colour 20 is below alpha, as a multiplied colour would be."""
    rgba = np.full((32, 32, 4), 20, np.uint8)
    rgba[..., 3] = 0
    rgba[7:25, 7:25, 3], rgba[8:24, 8:24, 3] = 128, 255
    rgba[rgba[..., 3] == 0] = 0
    Image.fromarray(rgba).save(tmp_path / "x.png")
    rgb, _ = images.load_cutout(tmp_path / "x.png")
    assert torch.allclose(rgb, torch.full_like(rgb, 20 / 255))


@pytest.mark.parametrize("how", WEBP)
def test_noise_under_alpha_0_is_no_stored_background(how, tmp_path):
    cutout((40, 90, 210), (255, 255, 255), mixed=False).save(tmp_path / "x.webp", **how)
    assert edge_error(tmp_path / "x.webp", (40, 90, 210)) < 2


@pytest.mark.filterwarnings("error")
def test_transparency_of_every_kind_of_png_is_alpha(tmp_path):
    grey = np.full((4, 6), 1000, np.uint16)
    grey[1:3, 1:3] = 60000
    colour = np.stack([grey, grey, grey], -1)
    expected = np.where(grey == 1000, 0, 255)
    Image.fromarray(grey).save(tmp_path / "grey16.png", transparency=1000)
    Image.fromarray((grey / 257).astype(np.uint8)).save(tmp_path / "grey8.png", transparency=3)
    Image.fromarray((colour / 257).astype(np.uint8)).save(tmp_path / "rgb8.png", transparency=(3, 3, 3))
    Image.fromarray((colour / 257).astype(np.uint8)).quantize(2).save(tmp_path / "index.png")
    index = Image.open(tmp_path / "index.png")
    index.save(tmp_path / "palette.png", transparency=index.getpixel((0, 0)))
    index.save(tmp_path / "palettes.png", transparency=bytes(255 * (i != index.getpixel((0, 0))) for i in range(2)))
    for name in "grey16", "grey8", "rgb8", "palette", "palettes":
        image = images.open_image(tmp_path / f"{name}.png")
        assert image.mode == "RGBA" and np.array_equal(image.getchannel("A"), expected), name
        assert np.abs(np.asarray(image)[1, 1, :3].astype(int) - 60000 / 257).max() <= 1, name


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_png(path, rgb):
    """Writes a PNG with 16 bits per channel, (H, W, 3), because Pillow can't."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    head = struct.pack(">IIBBBBB", rgb.shape[1], rgb.shape[0], 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def test_an_alpha_channel_that_is_254_at_least_is_opaque(photo, tmp_path):
    picture, mask = Image.open(photo[0]), Image.open(photo[1]).convert("RGB")
    for image, name in (picture, "photo.png"), (mask, "mask.png"):
        image.putalpha(Image.fromarray(np.random.default_rng(0).integers(254, 256, (SIZE, SIZE), dtype=np.uint8)))
        image.save(tmp_path / name)
    assert images.open_image(tmp_path / "photo.png").mode == "RGB"
    with pytest.raises(BadInput, match="no alpha channel"):
        images.load_masked(tmp_path / "photo.png")
    M = images.load_masked(tmp_path / "photo.png", tmp_path / "mask.png")[1]
    assert torch.allclose(M, disc(SIZE, SIZE, 6), atol=1 / 255)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("black, white", [(4, 255), (0, 250), (12, 246), (16, 235), (60, 255)])
def test_a_raised_black_and_a_grey_white_are_0_and_1(black, white, photo, tmp_path):
    levels = disc(SIZE, SIZE, 6, soft=4)
    images.save_image((black + (white - black) * levels) / 255, tmp_path / "mask.png")
    M = images.load_masked(photo[0], tmp_path / "mask.png")[1]
    assert (M[levels == 0] == 0).all() and (M[levels == 1] == 1).all()
    assert torch.allclose(M, levels, atol=1 / (white - black))


def test_a_jpegs_mask_leaves_no_old_background(tmp_path):
    """A white product on a dark wall. The mask's levels are 4 and 250, plus JPEG's noise."""
    M = disc(96, 96, 30, soft=6)
    bottle, wall = flat([0.96, 0.94, 0.92], 96, 96), flat([0.2, 0.3, 0.4], 96, 96)
    images.save_image(bottle * M + wall * (1 - M), tmp_path / "x.png")
    images.to_image((4 + 246 * M) / 255).save(tmp_path / "mask.jpg", quality=85)
    rgb, mask = images.load_cutout(tmp_path / "x.png", tmp_path / "mask.jpg")
    soft = ((M > 0.15) & (M < 0.85)).expand_as(rgb)
    assert (rgb - bottle)[soft].abs().mean() < 8 / 255
    assert (mask[M == 0] <= 1 - SOLID).float().mean() > 0.9 and (mask[M == 1] >= SOLID).float().mean() > 0.9


def test_a_soft_masks_levels_are_meant(tmp_path, photo):
    """A product that is soft or half clear all over stays so: its mask has no distinct top level, or one below 235."""
    for M in disc(SIZE, SIZE, 6, soft=12), 0.8 * disc(SIZE, SIZE, 6):
        images.save_image(M, tmp_path / "mask.png")
        assert torch.allclose(images.load_masked(photo[0], tmp_path / "mask.png")[1], M, atol=1 / 255)


@pytest.mark.parametrize("scale, kind", [(1, np.uint8), (1, np.uint16), (3, np.uint8)])
def test_label_maps_are_called_so(scale, kind, photo, tmp_path):
    labels = (np.asarray(Image.open(photo[1])) > 127).astype(kind) * scale
    Image.fromarray(labels).save(tmp_path / "labels.png")
    with pytest.raises(BadInput, match=rf"label map \(levels 0, {scale} of 255\): make the product's.*--mask"):
        images.load_masked(photo[0], tmp_path / "labels.png")


def test_16_bit_masks_of_8_bit_numbers_are_read(photo, tmp_path):
    for suffix in "png", "tif":
        Image.fromarray(np.asarray(Image.open(photo[1])).astype(np.uint16)).save(tmp_path / f"x.{suffix}")
        assert torch.equal(images.load_mask(tmp_path / f"x.{suffix}"), images.load_mask(photo[1]))


def test_a_mask_on_all_four_borders_is_pointed_out_and_used(photo, tmp_path, capsys):
    images.load_cutout(*photo)
    product = disc(SIZE, SIZE, 6)
    product[:, 12:, 8:16] = 1  # it stands on the lower border
    images.save_image(product, tmp_path / "standing.png")
    images.load_cutout(photo[0], tmp_path / "standing.png")
    assert not capsys.readouterr().err
    images.save_image(1 - disc(SIZE, SIZE, 6), tmp_path / "inverse.png")
    rgb, mask = images.load_cutout(photo[0], tmp_path / "inverse.png")
    err = capsys.readouterr().err
    assert mask[0, 0, 0] == 1 and err.count("\n") == 1 and "inverse.png covers the picture's border" in err
    images.load_cutout(photo[0], tmp_path / "inverse.png", inverted=True)
    assert not capsys.readouterr().err


# ---------------------------------------------------------------- large pictures


def test_a_large_picture_is_saved_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGE", 100)
    x = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8, generator=generator())
    images.save_image(x, tmp_path / "x.png")
    assert torch.equal(images.to_tensor(images.open_image(tmp_path / "x.png")), x / 255)


def header(w, h):
    """The start of a PNG, without pixels."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + struct.pack(">I", 10**6) + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_than_120_megapixels_are_refused_before_decoding(tmp_path):
    assert 108e6 < Image.MAX_IMAGE_PIXELS == 120_000_000, "a phone's 108 megapixels are read"
    for size in (12000, 10001), (60000, 60000):
        (tmp_path / "x.png").write_bytes(header(*size))
        with pytest.raises(BadInput, match="over 120,000,000 pixels; make it smaller"):
            images.open_image(tmp_path / "x.png")


# ---------------------------------------------------------------- formats


def test_first_pictures_of_animations_and_pairs_and_odd_suffixes_are_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    for name, kind in [("x.gif", "GIF"), ("x.webp", "WEBP"), ("x.png", "PNG"), ("x.tif", "TIFF"), ("x.jpg", "MPO")]:
        frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:])
        assert np.abs(opened(tmp_path / name)[..., :3] - [255, 0, 0]).max() < 9, name
    frames[1].save(tmp_path / "x.jfif", "JPEG")
    assert np.abs(opened(tmp_path / "x.jfif") - [0, 255, 0]).max() < 9


def test_numbers_of_16_bits_are_read_in_both_orders_and_larger_ones_refused(tmp_path):
    grey = (np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "little.tif")
    Image.frombytes("I;16B", (4, 3), grey.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    write_png(tmp_path / "rgb.png", np.stack([grey] * 3, -1))
    for name in "little.tif", "big.tif", "rgb.png":
        assert np.abs(opened(tmp_path / name) - (grey / 257)[..., None]).max() <= 1, name
    for kind in np.float32, np.int32:
        Image.fromarray((grey * 10000.0).astype(kind)).save(tmp_path / "x.tif")
        with pytest.raises(BadInput, match="32-bit.*save it as PNG or JPEG"):
            images.open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("start, fault", [
    (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"), (b"\0\0\0\x18ftypmif1", "HEIC"), (b"<!DOCTYPE html><html>", "identify"),
    (b"", "identify"), (b"\xff\xd8\xff\xe0\0\x10JFIF", ""), (header(4, 4), "")])
def test_what_is_no_picture_is_refused_with_the_remedy(start, fault, tmp_path):
    (tmp_path / "x.jpg").write_bytes(start)
    with pytest.raises(BadInput, match=rf"^[^\n]*x.jpg: not a readable image \(.*{fault}.*\); save it as PNG or JPEG$"):
        images.open_image(tmp_path / "x.jpg")


# ---------------------------------------------------------------- files


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image.save(tmp_path / "turned.jpg", exif=exif)
    upright = images.open_image(tmp_path / "turned.jpg")
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[0] < 9 and upright.getpixel((10, 35))[0] > 246


@pytest.mark.parametrize("mode, opened", [("1", "RGB"), ("L", "RGB"), ("LA", "RGBA"), ("P", "RGB"), ("RGBA", "RGBA"),
                                          ("I;16", "RGB")])
def test_every_mode_opens_as_rgb_or_rgba(mode, opened, tmp_path):
    Image.new(mode, (4, 4)).save(tmp_path / "x.png")  # colour 0: transparent where the mode has alpha
    assert images.open_image(tmp_path / "x.png").mode == opened


def test_palette_transparency_is_alpha_and_opaque_alpha_is_none(tmp_path):
    image = Image.new("P", (4, 4))
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    assert images.open_image(tmp_path / "palette.png").getchannel("A").getextrema() == (0, 255)
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "opaque.png")
    assert images.open_image(tmp_path / "opaque.png").mode == "RGB"


def test_tensor_and_file_round_trip_bit_exact(tmp_path):
    x = torch.randint(0, 256, (3, 9, 7)) / 255
    images.save_image(x, tmp_path / "new" / "folder" / "x.png")
    assert torch.equal(images.to_tensor(images.open_image(tmp_path / "new" / "folder" / "x.png")), x)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as images.py sets it, which pytest undoes
def test_bad_files_are_refused_in_one_line_that_names_them(tmp_path, monkeypatch):
    images.save_image(torch.rand(3, 64, 64), tmp_path / "big.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "big.png").read_bytes()[:3000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)  # Pillow itself would only warn
    for name in ["big.png", "cut.png", "empty.png", "text.jpg", "missing.png", ""]:
        with pytest.raises(BadInput) as error:
            images.open_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(BadInput, match="can.t be written"):
        images.save_image(torch.rand(3, 4, 4), tmp_path / "file" / "x.png")


def test_bad_masks_are_refused_and_the_option_is_named(photo, tmp_path):
    image, mask = photo
    images.save_image(torch.zeros(1, SIZE, SIZE), tmp_path / "empty.png")
    images.save_image(torch.ones(1, SIZE, SIZE), tmp_path / "full.png")
    images.save_image(torch.ones(1, SIZE, 9), tmp_path / "narrow.png")
    for path, message in [(None, "reference .* no alpha"), (tmp_path / "empty.png", "is empty"),
                          (tmp_path / "full.png", "covers the whole"), (tmp_path / "narrow.png", "9 x 24 .* 24 x 24")]:
        with pytest.raises(BadInput, match=f"{message}.*--reference-mask"):
            images.load_cutout(image, path, "reference", "--reference-mask")


# ---------------------------------------------------------------- fitting


@pytest.mark.parametrize("mode", ["contain", "cover"])
@pytest.mark.parametrize("h, w", [(40, 80), (80, 40), (200, 90), (64, 64)])
def test_fit_keeps_circles_circles(mode, h, w):
    M, _ = images.fit(disc(h, w, 12), 64, 96, mode)
    scale = (min if mode == "contain" else max)(64 / h, 96 / w)
    assert M.shape == (1, 64, 96) and 0 <= M.min() and M.max() <= 1
    rows, columns = M[0].amax(1).sum(), M[0].amax(0).sum()  # the disc's height and width
    assert rows == pytest.approx(24 * scale, abs=2) and columns == pytest.approx(24 * scale, abs=2)


def test_fit_contain_pads_pictures_with_their_edge_and_masks_with_zero_and_boxes_what_it_kept():
    picture, (top, left, h, w) = images.fit(torch.full((3, 30, 60), 0.7), 64, 64, "contain")
    assert (top, left, h, w) == (16, 0, 32, 64) and torch.allclose(picture, torch.tensor(0.7))
    mask, box = images.fit(torch.ones(1, 30, 60), 64, 64, "contain")
    assert box == (16, 0, 32, 64) and mask[:, top : top + h, left : left + w].min() > 0.999
    assert mask.sum() == pytest.approx(h * w, rel=1e-3)


def test_fit_contain_cropped_to_its_box_and_scaled_back_is_the_picture():
    picture = images.resize(torch.rand(3, 5, 8, generator=generator()), 50, 80)  # smooth
    canvas, (top, left, h, w) = images.fit(picture, 128, 128, "contain")
    back = images.resize(canvas[:, top : top + h, left : left + w], 50, 80)
    assert (back - picture).abs().max() < 0.05


def test_fit_cover_keeps_the_centre_asked_for_within_the_picture():
    x = torch.arange(100.0).expand(1, 50, 100) / 100
    for centre, left in [(None, 25), ((25, 60), 35), ((25, 99), 50), ((25, 0), 0)]:
        cropped, box = images.fit(x, 50, 50, "cover", centre)
        assert box == (0, left, 50, 50) and torch.equal(cropped, x[:, :, left : left + 50])


def test_canvas_holds_the_picture_with_less_than_one_multiple_of_padding():
    for h, w in [(100, 100), (300, 400), (1000, 333), (1, 2000), (511, 512)]:
        H, W = images.canvas_size(h, w, 512, 64)
        assert max(H, W) == 512 and H % 64 == W % 64 == 0
        assert 0 <= H - h * 512 / max(h, w) < 64 and 0 <= W - w * 512 / max(h, w) < 64
    for size in [0, -64, 32, 500]:
        with pytest.raises(BadInput, match="--size"):
            images.canvas_size(100, 100, size, 64)


# ---------------------------------------------------------------- sheets


def test_sheet_has_equal_cells_and_room_for_labels():
    picture = torch.zeros(3, 32, 48)
    plain = images.sheet([[picture, None], [torch.zeros(1, 10, 10), picture]])
    assert plain.size == (2 * (48 + 4) + 4, 2 * (32 + 4) + 4) and plain.getpixel((80, 20)) == (255, 255, 255)
    labelled = images.sheet([[picture], [picture]], ["image"], ["mug", "电饭煲"])
    assert labelled.width > 48 + 8 and labelled.height > 2 * (32 + 4) + 4


def test_a_thumbnail_of_a_product_is_on_white():
    rgb, mask = flat([1.0, 0.0, 0.0], 300, 600), torch.zeros(1, 300, 600)
    mask[:, 100:200, 200:400] = 1
    small = images.thumbnail(rgb, 60, mask)
    assert small.size == (60, 30)
    assert small.getpixel((2, 2)) == (255, 255, 255) and small.getpixel((30, 15)) == (255, 0, 0)
    assert images.thumbnail(rgb, 600, mask).size == (600, 300)
