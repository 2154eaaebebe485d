"""Tests: data.py: Eq. 5 and 6 written out; data sets in every format, with links and odd names; the command."""

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


@pytest.fixture
def photo(tmp_path):
    """An RGB photo and its mask, in files of SIZE x SIZE pixels."""
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


# ---------------------------------------------------------------- data sets


def write_bg60k(root, rows, delimiter, split="bg60k", folder="bg60k", inverted=False):
    """Writes a data set in BG60k's format: rows of (image file, ..., category), the n-th image in folder n % 2."""
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
    for name in "1.jpg", "gone.jpg":
        (tmp_path / "bg60k_info.txt").write_text(f"{name}\tmug\n")
        with pytest.raises(BadInput, match=f":1: .*no single image and mask of that name: {name} mug"):
            data.read_items(tmp_path)
    (tmp_path / "bg60k_masks_1" / "2.webp").unlink()
    (tmp_path / "bg60k_info.txt").write_text("2.jpg\tmug\n")
    with pytest.raises(BadInput, match="no single image and mask of that name: 2.jpg"):
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


def test_the_long_tail_is_reported(tmp_path):
    write_bg60k(tmp_path, [("1.jpg", "mug"), ("2.jpg", "pot")], "\t")
    (tmp_path / "bg60k_info.txt").write_text("1\tmug\n" * 101 + "2\tpot\n" * 10 + "1\tpan\n2\tcup\n")
    note = next(note for note in data.read_items(tmp_path)[1] if "long tail" in note)
    assert "2 categories with fewer than 10" in note and "1 with more than 100" in note


def test_one_percent_may_be_missing_and_is_named_and_counted(tmp_path):
    write_bg60k(tmp_path, [("1.jpg", "mug")], "\t")
    (tmp_path / "bg60k_info.txt").write_text("1.jpg\tmug\n" * 99 + "gone.jpg\tmug\n")
    items, notes = data.read_items(tmp_path)
    assert len(items) == 99 and any("info.txt:100" in note and "gone.jpg" in note for note in notes)
    assert notes[0].endswith("1 skipped")
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
    ({**MUG, "mask": "../secret.png"}, ":2: ../secret.png leaves"),
    ({**MUG, "reference": "/etc/hostname"}, ":2: /etc/hostname leaves"),
    ({**MUG, "mask": "masks/../../secret.png"}, ":2: masks/../../secret.png leaves"),
    ({**MUG, "mask": "C:\\masks\\mug.png"}, r":2: C:.* leaves"),
    ({**MUG, "mask": "masks\\mug.png"}, ":2: masks.* leaves .* with /"),
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
    with pytest.raises(BadInput, match="no pictures in folders bg60k_imgs_0"):
        data.read_items(tmp_path)
    write_bg60k(tmp_path / "set", [("1.jpg", "mug")], "\t")
    for content, message in [("电饭煲".encode("gb18030"), "UTF-8"), (b"", "empty"), (b"one-column", "2 columns"),
                             ("1.jpg\t电饭煲".encode("gb18030"), "UTF-8"), (b"\xff\xfe1", "UTF-8"),
                             (b"../1.jpg\tmug", "1: ../1.jpg leaves"), (b"/1.jpg\tmug", "1: /1.jpg leaves"),
                             (b"bg60k_imgs_0\\1.jpg\tmug", "1: .* leaves .* with /")]:
        (tmp_path / "set" / "bg60k_info.txt").write_bytes(content)
        with pytest.raises(BadInput, match=message):
            data.read_items(tmp_path / "set")


def test_lists_may_have_a_byte_order_mark_or_windows_line_ends(tmp_path):
    write_imagefolder(tmp_path, [MUG, POT | {"category": "电饭煲"}])
    list_, text = tmp_path / "metadata.jsonl", (tmp_path / "metadata.jsonl").read_text(encoding="utf-8")
    expected = data.read_items(tmp_path)
    for encoding, end in [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8", "\r")]:
        list_.write_bytes(text.replace("\n", end).encode(encoding))
        assert data.read_items(tmp_path) == expected


# ---------------------------------------------------------------- links, spellings, odd names

NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
GBK = os.fsdecode("杯".encode("gbk"))  # as a Chinese zip leaves it on Linux


def put(path):
    """Writes a cut-out to `path`, whatever its name says about the format."""
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
    assert data.drop_lines(list_, data.read_items(tmp_path / "release")[0][1:]).read_bytes() == line + b"2.jpg\tmug\n"
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
    ads = data.AdDataset([bad] + [good] * 99, SIZE)
    assert [ads[0]["index"], ads[0]["index"], ads[1]["index"]] == [1, 1, 1] and list(ads.broken) == [0]
    assert capsys.readouterr().err.count("gone.png") == 1
    with pytest.raises(BadInput, match="2 of 100"):
        ads = data.AdDataset([bad, bad] + [good] * 98, SIZE)
        ads[0]


# ---------------------------------------------------------------- command


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
    assert "metadata.jsonl: 3 pictures" in capsys.readouterr().out
    items = data.read_items(tmp_path)[0]
    assert [(i.image.name, i.mask and i.mask.name, i.category) for i in items] == [
        ("a b.jpg", "a b_mask.png", "mug"), ("cutout.png", None, "mug"), ("a b.png", "a b_mask.png", "电饭煲")]
    with pytest.raises(BadInput, match="is there already"):
        data.main([str(tmp_path), "--list"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="0 pictures in folders of categories.*expected .*mug"):
        data.main([str(tmp_path / "empty"), "--list"])


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".thumbnails", ".Trash-1000", "__MACOSX", "@eaDir", "#recycle",
                                  "$RECYCLE.BIN", "System Volume Information", "lost+found", "@Recycle"])
def test_hidden_folders_and_those_of_systems_are_no_categories_and_hold_no_masks(name, tmp_path):
    put(tmp_path / "ads" / "mug" / "a.png")
    put(tmp_path / "ads" / name / "a.png")
    put(tmp_path / "ads" / "mug" / name / "a.png")
    assert "left out 0" in list_folder(tmp_path / "ads")
    assert [item.category for item in data.read_items(tmp_path / "ads")[0]] == ["mug"]
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
    assert "left out 0" in list_folder(tmp_path / "ads") and len(data.read_items(tmp_path / "ads")[0]) == 1
    (tmp_path / "release" / "bg60k_info.txt").write_text("1\tmug\n")
    assert [item.image.name for item in data.read_items(tmp_path / "release")[0]] == ["1.jpg"]


def test_what_a_listing_takes_and_what_it_leaves_out_is_said_in_one_note(tmp_path):
    taken = ["mug/a.jfif", "mug/b.JPG", "mug/c.webp", "mug/d.gif", "mug/e.TIFF", "mug/f.bmp", "mug/g.mpo",
             "face/sheet_mask.png", "face/x_mask.png", "face/x_mask_mask.png"]  # the last is the mask of x_mask
    for name in taken:
        put(tmp_path / name)
    for name in ("mug/2024/a.png", "mug/h.heic", "mug/notes.txt", "face/sheet.tmp"):
        put(tmp_path / name)
    (tmp_path / "mug" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "mug" / "round").symlink_to(tmp_path)
    note = list_folder(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert sorted(line["file_name"] for line in lines) == sorted(taken[:-1])
    assert [line["mask"] for line in lines if line["mask"]] == ["face/x_mask_mask.png"]
    assert "9 pictures in folders of categories; left out 6 that are links to nothing, deeper folders or not" in note
    assert note.endswith("AVIF; face/sheet.tmp; mug/2024; mug/gone.png; mug/h.heic; mug/notes.txt")


def test_a_category_whose_name_is_no_utf_8_is_named_and_leaves_no_list(tmp_path):
    put(tmp_path / GBK / "a.png")
    with pytest.raises(BadInput, match="not UTF-8 text; convert the list, or rename"):
        data.main([str(tmp_path), "--list"])
    assert not (tmp_path / "metadata.jsonl").exists()


def test_a_listing_whose_check_fails_leaves_nothing_and_can_be_given_again(tmp_path, monkeypatch):
    put(tmp_path / "mug" / "a.png")
    (tmp_path / "mug" / "b.png").write_text("broken")
    for _ in range(2):
        with pytest.raises(BadInput, match="b.png: not a readable image"):
            data.main([str(tmp_path), "--list", "--size", "16"])
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "b.png", "mug"]
    put(tmp_path / "mug" / "b.png")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "check_ads", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        data.main([str(tmp_path), "--list", "--size", "16"])
    data.main([str(tmp_path), "--list", "--size", "16"])
    assert len(data.read_items(tmp_path)[0]) == 2


def test_the_command_ends_with_what_it_wrote_and_what_to_do_next(tmp_path, capsys):
    put(tmp_path / "ads" / "mug" / "a.png")
    data.main([str(tmp_path / "ads"), "--list", "--size", "16", "--sheet", str(tmp_path / "sheet.png")])
    *_, wrote, train = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {tmp_path / 'sheet.png'}" and f"train.py cg --data {tmp_path / 'ads'}" in train
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
