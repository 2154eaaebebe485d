"""Tests: data sets in every format, with links and odd names; ads as they are loaded; the command that checks them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import unicodedata
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import data
from support.checks import check_ads, drop_lines, hold_out, list_folder
from support.datasets import Item, categories_of, load_square, read_identifiers, read_items
from support.files import BadInput
from support.images import save_image

SIZE = 24  # pixels of the test images
DISC = (torch.arange(SIZE) - SIZE / 2 + 0.5).square()
DISC = (DISC[:, None] + DISC < 36).float()[None]  # a mask: 1 in a disc in the middle


def put(path):
    """Writes a cut-out to `path`, whatever its name says about the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rgba = Image.fromarray((torch.cat([torch.rand(3, SIZE, SIZE), DISC]) * 255).byte().permute(1, 2, 0).numpy())
    rgba.save(path, format="PNG")


def write_bg60k(root, rows, delimiter="\t", split="bg60k", folder="bg60k", mask=DISC):
    """Writes a data set in BG60k's format: rows of (image file, ..., category), the n-th image in folder n % 2."""
    for i, name in enumerate(dict.fromkeys(name for *images, _ in rows for name in images)):
        save_image(torch.rand(3, SIZE, SIZE), root / f"{folder}_imgs_{i % 2}" / name)
        save_image(mask, root / f"{folder}_masks_{i % 2}" / f"{name.rpartition('.')[0]}.webp")
    (root / f"{split}_info.txt").write_text("\n".join(map(delimiter.join, rows)), "utf-8-sig", "surrogateescape")


def write_imagefolder(root, entries):
    for name in "mug.png", "pot.png":
        save_image(torch.rand(3, SIZE, SIZE), root / "images" / name)
        save_image(DISC, root / "masks" / name)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


MUG = {"file_name": "images/mug.png", "mask": "masks/mug.png", "category": "mug"}
POT = {"file_name": "images/pot.png", "mask": "masks/pot.png", "category": "pot", "product": "a red pot",
       "reference": "images/mug.png", "reference_mask": "masks/mug.png", "scene": "on a table"}

# ---------------------------------------------------------------- BG60k as released


@pytest.mark.parametrize("delimiter", ["\t", ",", ", ", " ", "   "])
def test_bg60k_is_read_with_any_delimiter_and_categories_with_spaces(delimiter, tmp_path):
    rows = [("1.jpg", "电饭煲"), ("2.png", "rice cooker"), ("a.b.jpg", "笔记本 电脑"), ("3.jpg", "mug, tall")]
    write_bg60k(tmp_path, rows, delimiter)
    items, notes = read_items(tmp_path)
    assert [(item.image.name, item.category) for item in items] == rows
    assert [item.image.parent.name for item in items] == ["bg60k_imgs_0", "bg60k_imgs_1"] * 2
    assert [item.mask.name for item in items] == ["1.webp", "2.webp", "a.b.webp", "3.webp"]
    assert not items[0].inverted and "4 images in 4 categories" in notes[0]
    assert categories_of(items) == sorted(category for _, category in rows)


def test_bg60k_names_may_hold_their_folder_and_lack_their_suffix_but_must_name_one_image_and_mask(tmp_path):
    write_bg60k(tmp_path, [("1.jpg", "mug"), ("2.jpg", "mug"), ("3.jpg", "mug")])
    for kind, suffix in ("imgs", "jpg"), ("masks", "webp"):
        (tmp_path / f"bg60k_{kind}_1" / f"1.{suffix}").write_bytes(b"another")
    (tmp_path / "bg60k_masks_0" / "3.webp").unlink()
    for name, folder in {"bg60k_imgs_0/1.jpg": 0, "bg60k_imgs_1/1": 1, "./bg60k_imgs_1/2.jpg": 1, "2": 1}.items():
        (tmp_path / "bg60k_info.txt").write_text(f"{name}\tmug\n")
        [item] = read_items(tmp_path)[0]
        assert item.image.parent.name == f"bg60k_imgs_{folder}" and item.mask.parent.name == f"bg60k_masks_{folder}"
    for name in "1.jpg", "gone.jpg", "3.jpg":
        (tmp_path / "bg60k_info.txt").write_text(f"{name}\tmug\n")
        with pytest.raises(BadInput, match=f":1: .*no single image and mask of that name: {name} mug"):
            read_items(tmp_path)


def test_bgpair_reads_references_and_their_masks_from_bg1k_folders(tmp_path):
    write_bg60k(tmp_path, [("1.jpg", "2.jpg", "rice cooker"), ("2.jpg", "1.jpg", "mug")], " ", "bgpair", "bg1k")
    items, _ = read_items(tmp_path, "bgpair")
    assert [(item.image.stem, item.reference.stem, item.reference_mask.stem, item.category) for item in items] == [
        ("1", "2", "2", "rice cooker"), ("2", "1", "1", "mug")]


def test_inverted_masks_are_noticed_said_and_honoured(tmp_path):
    write_bg60k(tmp_path, [(f"{i}.jpg", "mug") for i in range(6)], mask=1 - DISC)
    items, notes = read_items(tmp_path)
    assert items[0].inverted and any("inverted" in note for note in notes)
    mask = data.load_ad(items[0], SIZE)[1]
    assert mask[0, 0, 0] == 0 and mask[0, SIZE // 2, SIZE // 2] == 1


def test_ones_own_masks_are_white_on_the_product_however_much_they_cover(tmp_path):
    write_imagefolder(tmp_path, [MUG])
    save_image(1 - DISC, tmp_path / "masks" / "mug.png")
    items, notes = read_items(tmp_path)
    assert not items[0].inverted and any("are they white on the background?" in note for note in notes)


def test_the_long_tail_is_reported_and_one_percent_may_be_missing_and_is_named_and_counted(tmp_path):
    write_bg60k(tmp_path, [("1.jpg", "mug"), ("2.jpg", "pot")])
    (tmp_path / "bg60k_info.txt").write_text("1\tmug\n" * 101 + "2\tpot\n" * 10 + "1\tpan\n2\tcup\ngone.jpg\tmug\n")
    items, notes = read_items(tmp_path)
    assert len(items) == 113 and notes[0].endswith("1 skipped")
    assert any("2 categories with fewer than 10" in note and "1 with more than 100" in note for note in notes)
    assert any("info.txt:114" in note and "gone.jpg" in note for note in notes)
    (tmp_path / "bg60k_info.txt").write_text("1.jpg\tmug\n" * 98 + "gone.jpg\tmug\n")
    with pytest.raises(BadInput, match="1 of 99 .* gone.jpg"):
        read_items(tmp_path)


# ---------------------------------------------------------------- a folder with metadata.jsonl


def test_imagefolder_is_read(tmp_path):
    write_imagefolder(tmp_path, [MUG, "", POT])
    (mug, pot), _ = read_items(tmp_path)
    assert mug == Item(tmp_path / "images/mug.png", tmp_path / "masks/mug.png", "mug")
    assert pot.reference == mug.image and pot.reference_mask == mug.mask
    assert (pot.product, pot.scene) == ("a red pot", "on a table")


@pytest.mark.parametrize("entry, message", [
    ("{not json", ":2: not a JSON object"), ({**MUG, "mask": 7}, ":2: not a JSON object of strings"),
    ({"file_name": "images/mug.png"}, ":2: needs"), ({**MUG, "mask": "masks/../../secret.png"}, ":2: masks.* leaves"),
    ({**MUG, "reference": "/etc/hostname"}, ":2: /etc/hostname leaves"),
    ({**MUG, "mask": "C:\\masks\\mug.png"}, r":2: C:.* leaves .* with /"),
    ({**MUG, "category": "\udcb1"}, ":2: not UTF-8 text"), ({**MUG, "file_name": "\0"}, "1 of 2 .*:2: no file"),
    ({**MUG, "file_name": "n" * 300}, "1 of 2 .*:2: no file nnn"),
    ({**MUG, "file_name": "link.png"}, "1 of 2 .*:2: no file link.png"),
])
def test_bad_imagefolder_line_is_named(entry, message, tmp_path):
    write_imagefolder(tmp_path / "set", [MUG, entry])
    save_image(torch.rand(3, 4, 4), tmp_path / "secret.png")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(BadInput, match=message):
        read_items(tmp_path / "set")


def test_folders_that_are_no_data_set_say_what_was_expected(tmp_path):
    with pytest.raises(BadInput, match="metadata.jsonl.*bg60k_info.txt"):
        read_items(tmp_path / "missing")
    with pytest.raises(BadInput, match="--split bg2k.*bg60k, bg1k, bgpair"):
        read_items(tmp_path, "bg2k")
    write_bg60k(tmp_path, [("1.jpg", "mug")])
    for content, message in [("1.jpg\t电饭煲".encode("gb18030"), "UTF-8"), (b"", "empty"), (b"one-column", "2 columns"),
                             (b"\xff\xfe1", "UTF-8"), (b"../1.jpg\tmug", "1: ../1.jpg leaves"),
                             (b"/1.jpg\tmug", "1: /1.jpg leaves")]:
        (tmp_path / "bg60k_info.txt").write_bytes(content)
        with pytest.raises(BadInput, match=message):
            read_items(tmp_path)
    shutil.rmtree(tmp_path / "bg60k_imgs_0")
    with pytest.raises(BadInput, match="no pictures in folders bg60k_imgs_0"):
        read_items(tmp_path)


def test_lists_may_have_a_byte_order_mark_or_windows_line_ends(tmp_path):
    write_imagefolder(tmp_path, [MUG, POT | {"category": "电饭煲"}])
    list_, expected = tmp_path / "metadata.jsonl", read_items(tmp_path)
    text = list_.read_text(encoding="utf-8")
    for encoding, end in [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8", "\r")]:
        list_.write_bytes(text.replace("\n", end).encode(encoding))
        assert read_items(tmp_path) == expected


# ---------------------------------------------------------------- links, spellings, odd names

NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
GBK = os.fsdecode("杯".encode("gbk"))  # as a Chinese zip leaves it on Linux


def test_a_data_set_in_the_hugging_face_cache_is_read_under_the_names_that_are_written(tmp_path):
    """There every file is a link to a blob without a suffix."""
    write_imagefolder(tmp_path / "own", [MUG, POT])
    write_bg60k(tmp_path / "release", [("1.jpg", "mug"), ("2.jpg", "pot")])
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate([path for path in tmp_path.rglob("*") if path.is_file()]):
        blob = file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(os.path.relpath(blob, file.parent))
    items = read_items(tmp_path / "own")[0]
    assert [item.image for item in items] == [tmp_path / "own" / "images" / name for name in ("mug.png", "pot.png")]
    assert data.load_ad(items[0], SIZE)[0].shape == (3, SIZE, SIZE)
    items = read_items(tmp_path / "release")[0]
    assert [(item.image.name, item.mask.name) for item in items] == [("1.jpg", "1.webp"), ("2.jpg", "2.webp")]


def test_folders_may_be_links(tmp_path):
    put(tmp_path / "disk" / "a.png")
    (tmp_path / "ads").mkdir()
    (tmp_path / "ads" / "mug").symlink_to(tmp_path / "disk")
    list_folder(tmp_path / "ads")
    [item] = read_items(tmp_path / "ads")[0]
    assert item.image == tmp_path / "ads" / "mug" / "a.png" and item.category == "mug"
    write_bg60k(tmp_path / "release", [("1.jpg", "mug")])
    folder = tmp_path / "release" / "bg60k_imgs_0"
    folder.symlink_to(folder.rename(tmp_path / "imgs"))
    assert read_items(tmp_path / "release")[0][0].image.parent == folder


@pytest.mark.parametrize("on_disk, in_list", [(NFC, NFD), (NFD, NFC)])
def test_a_file_is_found_in_either_of_unicodes_spellings(on_disk, in_list, tmp_path):
    put(tmp_path / "own" / on_disk / f"{on_disk}.png")
    line = {"file_name": f"{in_list}/{in_list}.png", "category": f" {in_list} ", "product": in_list, "scene": "x"}
    (tmp_path / "own" / "metadata.jsonl").write_text(json.dumps(line))
    [item] = read_items(tmp_path / "own")[0]
    assert item.image == tmp_path / "own" / on_disk / f"{on_disk}.png"
    assert (item.category, item.product) == (NFC, NFC)
    write_bg60k(tmp_path / "release", [(f"{on_disk}.jpg", "x")])
    (tmp_path / "release" / "bg60k_info.txt").write_text(f"bg60k_imgs_0/{in_list}\t{in_list}\n")
    [item] = read_items(tmp_path / "release")[0]
    assert (item.image.name, item.mask.name, item.category) == (f"{on_disk}.jpg", f"{on_disk}.webp", NFC)


def test_a_category_spelt_in_two_ways_is_one(tmp_path):
    for name in (f"{NFC}/a.png", f"{NFD}/b.png", f"{NFC}/{NFD}.png"):
        put(tmp_path / name)
    save_image(DISC, tmp_path / NFC / f"{NFC}_mask.png")
    list_folder(tmp_path)
    items = read_items(tmp_path)[0]
    assert {item.category for item in items} == {NFC} and len(items) == 3
    assert [item.mask and item.mask.name for item in items if item.image.stem == NFD] == [f"{NFC}_mask.png"]
    (tmp_path / "categories.json").write_text(json.dumps({NFD: "sks 0"}))
    assert read_identifiers(tmp_path / "categories.json") == {NFC: "sks 0"}


@pytest.mark.slow
def test_names_that_are_no_utf_8_are_listed_read_dropped_and_printed_by_escapes(tmp_path):
    for name in (f"{GBK}.png", "b.png"):
        put(tmp_path / "ads" / "mug" / name)
    for arguments in (["--list"], []):
        command = [sys.executable, data.__file__, tmp_path / "ads", "--size", "16", *arguments]
        console = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
        result = subprocess.run(command, text=True, capture_output=True, env=console)
        assert result.returncode == 0 and "2 images load" in result.stdout, result.stderr
    assert (tmp_path / "ads" / "metadata.jsonl").read_text(encoding="utf-8").count(r"mug/\udcb1\udcad.png") == 1
    items = read_items(tmp_path / "ads")[0]
    assert [item.image for item in items] == [tmp_path / "ads" / "mug" / name for name in ("b.png", f"{GBK}.png")]
    write_bg60k(tmp_path / "release", [(f"{GBK}.jpg", "mug"), ("2.jpg", "mug")])
    items = read_items(tmp_path / "release")[0]
    assert items[0].image.name == f"{GBK}.jpg"
    list_, line = tmp_path / "release" / "bg60k_info.txt", "杯.jpg\tmug\n".encode("gbk")
    assert drop_lines(list_, items[1:]).read_bytes() == line + b"2.jpg\tmug\n" and list_.read_bytes() == line


# ---------------------------------------------------------------- ads as they are loaded


def test_load_ad_keeps_the_background_and_crops_around_the_product(tmp_path):
    picture, mask = torch.rand(3, 20, 60), torch.zeros(1, 20, 60)
    mask[:, 5:15, 40:46] = 1  # its centroid is at x = 43
    save_image(picture, tmp_path / "x.png")
    save_image(mask, tmp_path / "m.png")
    image, cropped = data.load_ad(Item(tmp_path / "x.png", tmp_path / "m.png", "mug"), 20)
    assert torch.allclose(image, picture[:, :, 33:53], atol=1 / 500) and torch.equal(cropped, mask[:, :, 33:53])


def test_a_wide_ad_is_cropped_to_what_holds_most_of_its_product_and_the_check_says_what_is_cut(tmp_path, capsys):
    """Between two products, at the centroid, a crop would show none."""
    mask = torch.zeros(1, 20, 100)
    mask[:, 5:15, 2:12] = mask[:, 5:15, 80:98] = 1
    save_image(mask, tmp_path / "m.png")
    save_image(torch.rand(3, 20, 100), tmp_path / "x.png")
    _, cropped, kept = load_square(Item(tmp_path / "x.png", tmp_path / "m.png", "mug"), 20)
    assert torch.equal(cropped, mask[:, :, 78:98]) and kept.item() == pytest.approx(18 / 28)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "mask": "m.png", "category": "mug"}')
    check(tmp_path)
    assert "cuts 1 products, and leaves 64% to 64% of them" in capsys.readouterr().out


def test_ads_replace_a_broken_item_name_it_once_and_stop_above_one_percent(tmp_path, capsys):
    put(tmp_path / "mug.png")
    good, bad = (Item(tmp_path / name, None, "mug") for name in ("mug.png", "gone.png"))
    ads = data.AdDataset([bad] + [good] * 99, SIZE)
    assert [ads[0]["index"], ads[0]["index"], ads[1]["index"]] == [1, 1, 1] and list(ads.broken) == [0]
    assert capsys.readouterr().err.count("gone.png") == 1
    with pytest.raises(BadInput, match="2 of 100"):
        data.AdDataset([bad, bad] + [good] * 98, SIZE)[0]


# ---------------------------------------------------------------- held-out ads


def test_test_lines_are_held_out_and_those_with_a_reference_are_pairs(tmp_path):
    write_imagefolder(tmp_path, [MUG, POT, MUG | {"split": "test"}, POT | {"split": "test"}])
    lines = {split: [item.line for item in read_items(tmp_path, split)[0]] for split in ("bg60k", "bg1k", "bgpair")}
    assert lines == {"bg60k": [1, 2], "bg1k": [3, 4], "bgpair": [4]}
    write_imagefolder(tmp_path, [MUG, POT])
    assert [item.line for item in read_items(tmp_path, "bg1k")[0]] == [1, 2], "without test lines a list is all of them"
    gone = {"file_name": "gone.png", "category": "mug"}
    write_imagefolder(tmp_path, [MUG] * 200 + [POT | {"split": "test"}, gone])
    assert [len(read_items(tmp_path, split)[0]) for split in ("bg60k", "bg1k")] == [200, 1], "each split has its own 1%"
    write_imagefolder(tmp_path, [MUG, MUG | {"split": "validation"}])
    with pytest.raises(BadInput, match="metadata.jsonl:2: split validation is neither train nor test"):
        read_items(tmp_path)


def test_ads_are_held_out_by_their_names_and_stay_so_when_others_are_added(tmp_path, capsys):
    def held_out(count):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines + [
            {"file_name": f"{i}.png", "category": "mug"} for i in range(len(lines), count)]))
        said = hold_out(file, 0.1)
        names = [line["file_name"] for line in map(json.loads, file.read_text().splitlines()) if "split" in line]
        assert said == f"{file}: {len(names):,} of {count:,} ads are held out"
        return names

    file = tmp_path / "metadata.jsonl"
    file.touch()
    some, more = held_out(500), held_out(1000)
    assert 30 < len(some) < 75 and 70 < len(more) < 135 and some == more[: len(some)]
    file.write_text('{"file_name": "a", "category": "mug"}\n{"file_name": "b", "category": "pot"}\n')
    for _ in range(2):  # a category keeps its last ad, also when it gets another
        assert hold_out(file, 1.0).endswith("0 of 2 ads are held out; raise --hold-out")
    for name in "abc":
        put(tmp_path / "ads" / "mug" / f"{name}.png")
    check(tmp_path / "ads", "--list", "--hold-out", 0.5)
    assert "ads are held out" in capsys.readouterr().out
    assert len(read_items(tmp_path / "ads")[0]) + len(read_items(tmp_path / "ads", "bg1k")[0]) == 3
    write_bg60k(tmp_path / "release", [("1.jpg", "mug")])
    with pytest.raises(BadInput, match="--hold-out: .* has no metadata.jsonl"):
        check(tmp_path / "release", "--hold-out", 0.5)


# ---------------------------------------------------------------- a folder of categories, and the command


def check(*arguments) -> None:
    data.main([str(argument) for argument in (*arguments, "--size", SIZE)])


def test_a_folder_of_categories_is_listed_checked_and_drawn_and_what_to_do_next_is_said(tmp_path, capsys):
    for name in ("mug/a b.jpg", "mug/cutout.png", "电饭煲/a b.png"):
        put(tmp_path / "ads" / name)
    for category in ("mug", "电饭煲"):
        save_image(DISC, tmp_path / "ads" / category / "a b_mask.png")
    check(tmp_path / "ads", "--list", "--sheet", tmp_path / "sheet.png")
    out = capsys.readouterr().out
    *_, wrote, train = out.splitlines()
    assert "metadata.jsonl: 3 pictures" in out and "3 images load, 0 are broken" in out
    assert wrote == f"wrote {tmp_path / 'sheet.png'}" and f"train.py cg --data {tmp_path / 'ads'}" in train
    assert Image.open(tmp_path / "sheet.png").width > 4 * SIZE
    assert [(i.image.name, i.mask and i.mask.name, i.category) for i in read_items(tmp_path / "ads")[0]] == [
        ("a b.jpg", "a b_mask.png", "mug"), ("cutout.png", None, "mug"), ("a b.png", "a b_mask.png", "电饭煲")]
    with pytest.raises(BadInput, match="is there already"):
        check(tmp_path / "ads", "--list")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="0 pictures in folders of categories.*expected .*mug"):
        check(tmp_path / "empty", "--list")


def test_hidden_and_system_folders_and_companions_of_pictures_hold_no_pictures(tmp_path):
    put(tmp_path / "ads" / "mug" / "a.png")
    write_bg60k(tmp_path / "release", [("1.jpg", "mug")])
    for folder in (".ipynb_checkpoints", ".thumbnails", ".Trash-1000", "__MACOSX", "@eaDir", "#recycle", "@Recycle",
                   "$RECYCLE.BIN", "System Volume Information", "lost+found"):
        for name in (f"ads/{folder}/a.png", f"ads/mug/{folder}/a.png", f"release/bg60k_imgs_0/{folder}/1.jpg"):
            put(tmp_path / name)
    for folder in ("ads/mug", "release/bg60k_imgs_0", "release/bg60k_masks_0"):
        for name in ("._a.png", "._1.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (tmp_path / folder / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "release" / "bg60k_imgs_0" / "1.txt").write_text("a caption")
    (tmp_path / "release" / "bg60k_info.txt").write_text("1\tmug\n")
    assert "1 pictures in folders of categories; left out 0" in list_folder(tmp_path / "ads")
    assert [item.category for item in read_items(tmp_path / "ads")[0]] == ["mug"]
    assert [item.image.name for item in read_items(tmp_path / "release")[0]] == ["1.jpg"]


def test_what_a_listing_takes_and_what_it_leaves_out_is_said_in_one_note(tmp_path):
    taken = ["mug/a.jfif", "mug/b.JPG", "mug/c.webp", "mug/d.gif", "mug/e.TIFF", "mug/f.bmp", "mug/g.mpo",
             "face/sheet_mask.png", "face/x_mask.png", "face/x_mask_mask.png"]  # the last is the mask of x_mask
    for name in (*taken, "mug/2024/a.png", "mug/h.heic", "mug/notes.txt", "face/sheet.tmp"):
        put(tmp_path / name)
    (tmp_path / "mug" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "mug" / "round").symlink_to(tmp_path)
    note = list_folder(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert sorted(line["file_name"] for line in lines) == sorted(taken[:-1])
    assert [line["mask"] for line in lines if line["mask"]] == ["face/x_mask_mask.png"]
    assert "9 pictures in folders of categories; left out 6 that are links to nothing, deeper folders or not" in note
    assert note.endswith("AVIF; face/sheet.tmp; mug/2024; mug/gone.png; mug/h.heic; mug/notes.txt")


def test_a_listing_that_fails_leaves_nothing_and_can_be_given_again(tmp_path, monkeypatch):
    def terminate(*_):
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)

    put(tmp_path / "mug" / "a.png")
    put(tmp_path / GBK / "a.png")
    with pytest.raises(BadInput, match="not UTF-8 text; convert the list, or rename"):
        check(tmp_path, "--list")
    shutil.rmtree(tmp_path / GBK)
    for name in ("check_ads", "hold_out"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"support.checks.{name}", terminate)
            check(tmp_path, "--list", "--hold-out", "0.5")
    monkeypatch.setattr("support.checks.is_blank", lambda *_: True)
    with pytest.raises(BadInput, match="all 1 backgrounds of .* are blank"):
        check(tmp_path, "--list", "--drop-blank")
    (tmp_path / "mug" / "b.png").write_text("broken")
    with pytest.raises(BadInput, match="b.png: not a readable image"):
        check(tmp_path, "--list")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "b.png", "mug"]
    put(tmp_path / "mug" / "b.png")
    check(tmp_path, "--list")
    assert len(read_items(tmp_path)[0]) == 2


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no shared memory of this kind")
def test_checking_starts_no_more_workers_than_have_room_in_shared_memory(tmp_path, monkeypatch):
    """A container by Docker has 64 MB. An ad of 512 pixels takes 4 MB with its mask, and each worker holds four."""
    loader = Mock(return_value=[])
    monkeypatch.setattr("support.checks.DataLoader", loader)
    monkeypatch.setattr("support.checks.cores", lambda: 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Mock(free=64 * 2**20))
    check_ads(data.AdDataset([], 512), 0, tmp_path)
    assert loader.call_args.kwargs["num_workers"] == 4


def test_blank_backgrounds_are_reported_and_dropped_and_the_whole_list_is_kept(tmp_path, capsys):
    write_imagefolder(tmp_path, [MUG, POT])
    list_, whole = tmp_path / "metadata.jsonl", tmp_path / "metadata.jsonl.all"
    dropped = []
    for name in "blank", "late":  # an ad with a product of all colours on grey; later another is added
        lines = list_.read_text().splitlines()
        save_image(torch.full((3, SIZE, SIZE), 0.9).lerp(torch.rand(3, SIZE, SIZE), DISC), tmp_path / f"{name}.png")
        dropped.append(json.dumps({"file_name": f"{name}.png", "mask": "masks/mug.png", "category": "mug"}))
        list_.write_text("\n".join([dropped[-1], *lines]) + "\n")
        check(tmp_path, "--drop-blank")
        out = capsys.readouterr().out
        assert "1 have a blank background" in out and f"{name}.png" in out and whole.name in out
        assert list_.read_text().splitlines() == lines
        hold_out(list_, 1)  # marks the others
    assert sorted([*lines, *dropped]) == sorted(whole.read_text().splitlines())


@pytest.mark.slow
def test_the_command_ends_with_one_line_and_status_2_even_where_a_worker_finds_the_error(tmp_path):
    write_imagefolder(tmp_path, [MUG, POT])
    (tmp_path / "images" / "pot.png").write_text("broken")
    result = subprocess.run([sys.executable, data.__file__, str(tmp_path)], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert last.startswith("error: ") and "pot.png: not a readable image" in last
