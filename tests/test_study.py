"""Tests: the user study: what raters get, and what their files say; the page has tests of its own."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import random, refused
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import evaluate
import study
from rivals import lab as methods
from rivals.lab import lab_of
from rivals.metrics import half_width, resampled_means
from study import Pair, balanced_orders, plan, write_handout
from support.datasets import Item
from support.files import read_json, write_json
from support.images import to_image
from toy.world import write_world

FIVE = ["controlnet", "blended-diffusion", "paint-by-example", "cg", "cg+pg"]


def written_study(folder: Path, pairs: int = 6, names: list[str] = FIVE) -> dict:
    """Writes a study with pictures of noise to folder/study, and its key to folder/key.json, and returns the key."""
    made = folder / "made"
    made.mkdir(parents=True)

    def picture(name: str) -> Path:
        path, text = made / f"{name}.png", PngInfo()
        text.add_text("how", f"painted by {name}")
        to_image(random(3, 40, 32, seed=len([*made.iterdir()])).sigmoid()).save(path, pnginfo=text)
        return path

    to_image(torch.eye(40, 32)[None]).save(made / "mask.png")
    handout = plan([Pair(Item(picture(f"product_{i}"), made / "mask.png", "mug", picture(f"reference_{i}")),
                         {name: picture(f"{i}_{name}") for name in names}) for i in range(pairs)])
    write_handout(handout, folder / "study")
    key = {"study": handout.study, "methods": names, "pairs": handout.key}
    write_json(key, folder / "key.json")
    return key


def rankings(key: dict, rater: str, order: list[str], saved: str = "2026-01-01") -> dict:
    """The file of a rater who always ranks the methods in one order by similarity, and in the reverse by quality."""
    ranked = {pair["pair"]: [pair["candidates"][name] for name in order] for pair in key["pairs"]}
    return {"study": key["study"], "rater": rater, "saved": saved,
            "rankings": {name: {"similarity": r, "quality": r[::-1]} for name, r in ranked.items()}}


# ---------------------------------------------------------------- what raters get


@pytest.mark.parametrize("methods, count", [(5, 100), (5, 13), (9, 9)])
def test_each_method_stands_equally_often_in_each_place(methods, count):
    orders = balanced_orders(count, methods)
    assert len(orders) == count and all(sorted(order) == [*range(methods)] for order in orders)
    for in_place in zip(*orders):
        times = [in_place.count(method) for method in range(methods)]
        assert max(times) - min(times) <= 1


def test_nothing_in_the_folder_betrays_a_method(tmp_path):
    """No name, text or order in it depends on the method, the key is not in it, and no seed gives its names away."""
    for number in "12":
        written_study(tmp_path / number, pairs=10)
    (page, folder), (_, other) = (sorted((tmp_path / n / "study").iterdir()) for n in "12")
    assert (page.name, folder.name) == ("index.html", "pictures")
    pictures = sorted(folder.iterdir())
    assert len({path.name for path in (*pictures, *other.iterdir())}) == 2 * 10 * 7
    content = b"".join(path.read_bytes() + path.name.encode() for path in (page, *pictures))
    assert not [word for word in (*FIVE[:3], "cg+pg", "painted by", "product_") if word.encode() in content]
    assert sorted(pictures, key=lambda path: path.stat().st_mtime_ns) == pictures, "random names give the order"
    for path in pictures:
        assert not Image.open(path).info.keys() - {"srgb"} and len(path.stem) == 12 and int(path.stem, 16) >= 0


def test_the_page_shows_the_painted_pictures_in_a_balanced_order(tmp_path):
    """According to the key, which the page does not have, each method is equally often in each place."""
    key, places = written_study(tmp_path, pairs=10), Counter()
    page = (tmp_path / "study" / "index.html").read_text(encoding="utf-8")
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert data["study"] == key["study"]
    for i, (pair, shown) in enumerate(zip(key["pairs"], data["pairs"], strict=True)):
        assert shown["pair"] == pair["pair"]
        for method, name in pair["candidates"].items():
            places[method, shown["candidates"].index(name)] += 1
            picture, made = tmp_path / "study" / "pictures" / f"{name}.png", tmp_path / "made" / f"{i}_{method}.png"
            assert Image.open(picture).tobytes() == Image.open(made).tobytes()
    assert len(places) == 25 and {*places.values()} == {2}


def test_the_page_asks_nothing_of_any_server():
    text = study.PAGE.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "://" not in text and "fetch(" not in text and "@import" not in text


# ---------------------------------------------------------------- score


@pytest.mark.parametrize("by_rater, by_pair", [(1, 0), (0, 1), (1, -1)])
def test_the_interval_is_that_of_raters_and_pairs_drawn_apart(by_rater, by_pair):
    """It is ± 1.96 σ / √n, where σ has the divisor n, as in the bootstrap. The variances of raters and of pairs add.

    If the two were drawn together, (1, -1) would have no width.
    """
    x = random(50)
    values = by_rater * x[:, None] + by_pair * x[None]
    expected = 1.96 * x.std(correction=0) / 50**0.5 * (by_rater**2 + by_pair**2) ** 0.5
    half = half_width(resampled_means(values, 4000))
    assert half.item() == pytest.approx(expected.item(), rel=0.1)  # whose own error is 1 / √8000


def score(tmp_path: Path, *contents: dict | str) -> tuple[dict, str]:
    """Table 3 by rankings-0.json and so on."""
    paths = [tmp_path / f"rankings-{i}.json" for i in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    study.main(["score", "--key", str(tmp_path / "key.json"), "--out", str(tmp_path), *map(str, paths)])
    return read_json(tmp_path / "table3.json"), (tmp_path / "table3.md").read_text()


def means(table: dict) -> list[list[float]]:
    """The methods' mean rank scores by similarity, and by quality."""
    return [[mean for mean, _ in table[question]["mean_rank_scores"]] for question in study.QUESTIONS]


def test_table_3_has_the_mean_rank_scores_beside_the_papers(tmp_path, capsys):
    """One of two raters swaps the first two methods, so both of these get 4.5. The key's order of pictures is none."""
    key = written_study(tmp_path)
    for pair in key["pairs"]:
        pair["candidates"] = dict(sorted(pair["candidates"].items()))
    write_json(key, tmp_path / "key.json")
    first, second, *others = FIVE[::-1]
    files = rankings(key, "a", [first, second, *others]), rankings(key, "李", [second, first, *others])
    table, text = score(tmp_path, *files)
    assert means(table) == [[1, 2, 3, 4.5, 4.5], [5, 4, 3, 1.5, 1.5]] and table["raters"] == ["a", "李"]
    assert "| ControlNet | 1.00 ± 0.00 | 2.39 | 5.00 ± 0.00 | 2.61 |" in text and "compare only the order" not in text
    rates = torch.tensor(table["similarity"]["win_rates"])[..., 0]  # the later method wins
    assert rates.tolist() == [[0] * 5, [1] + [0] * 4, [1, 1] + [0] * 3, [1, 1, 1, 0, 0.5], [1, 1, 1, 0.5, 0]]
    S = 16 + 4 + 0 + 9 + 9  # total ranks 2, 4, 6, 9, 9 around their mean; W = 12 S / (R² (M³ − M))
    assert table["similarity"]["kendalls_w"] == pytest.approx(12 * S / (4 * 120))
    assert capsys.readouterr().out.startswith(text)


def test_the_papers_figures_are_a_ranking_of_five():
    """Their sum is 5 (5 + 1) / 2, up to the rounding of five numbers."""
    for question in study.QUESTIONS:
        assert sum(getattr(row, question) for row in study.PAPER.values()) == pytest.approx(15, abs=0.025)


def test_other_methods_than_the_papers_are_compared_by_their_order(tmp_path):
    key = written_study(tmp_path, names=["cg", "stable-diffusion", "cg+pg"])
    _, text = score(tmp_path, rankings(key, "a", ["cg+pg", "cg", "stable-diffusion"]))
    assert "| stable-diffusion | 1.00 ± 0.00 |  | 3.00 ± 0.00 |  |" in text and "compare only the order" in text
    assert "With one rater it is over pairs alone." in text


def test_bad_files_are_named_and_left_out_and_the_rest_is_counted(tmp_path, capsys):
    key = written_study(tmp_path)
    good, pair = rankings(key, "good", FIVE), key["pairs"][0]["pair"]
    similarity, (best, *others) = good["rankings"][pair].values()

    def with_pair_1(quality: list) -> dict:
        return good | {"rankings": good["rankings"] | {pair: {"similarity": similarity, "quality": quality}}}

    bad = [
        (json.dumps(good)[:-40], "can't be read as JSON"),
        ("[]", "does not hold a JSON object"),
        (good | {"study": "another"}, "from another study"),
        (with_pair_1(others), "pair 1 for quality"),
        (with_pair_1([others[0], *others]), "pair 1 for quality"),
        (with_pair_1([None, *others]), "pair 1 for quality"),
        (good | {"rankings": None}, "pair 1 for similarity"),
        (good | {"rater": 7}, "does not say who"),
    ]
    table, _ = score(tmp_path, *(content for content, _ in bad), good)
    assert table["raters"] == ["good"] and len(table["left_out"]) == len(bad)
    for i, (line, (_, reason)) in enumerate(zip(capsys.readouterr().err.splitlines(), bad, strict=True)):
        assert line.startswith("left out: ") and f"rankings-{i}.json" in line and reason in line


def test_of_two_files_by_one_rater_the_one_saved_last_counts(tmp_path):
    key = written_study(tmp_path)
    late = rankings(key, "a", FIVE, "2026-01-02T09:00:00.000Z")
    early = rankings(key, "a", FIVE[::-1], "2026-01-01T10:00:00.000Z")
    for contents in ((late, early), (early, late)):
        table, _ = score(tmp_path, *contents)
        assert means(table)[0][0] == 5 and "is by rater a, as is" in table["left_out"][0]


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("words, message", [
    ("make --methods cg nonsense", "--methods: there is no method nonsense; choose from "),
    ("make --methods cg shuffled", "--methods: there is no method shuffled"),
    ("make --methods cg cg", "two to nine different"),
    ("make --methods cg cg+pg --key study/key.json", "--key study/key.json is in the folder that the raters get"),
    ("make --methods cg cg+pg --out there", "--out there is there already"),
    ("make --methods cg cg+pg --key there", "--key there is there already"),
    ("make --methods cg cg+pg --pairs 0", "whole number"),
    ("score --key none.json rankings.json", "--key none.json: no such key"),
    ("score --key there/other.json rankings.json", "--key there/other.json: no such key"),
    ("score --key there/key.json none.json", "no file of rankings is left"),
    ("score", "required: FILE"), ("nonsense", "nonsense"), ("", "required: make or score"),
])  # fmt: skip
def test_bad_use_is_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json({"study": "a", "methods": ["cg", "cg+pg"], "pairs": []}, Path("there", "key.json"))
    write_json({}, Path("there", "other.json"))
    with refused(message):
        study.main(words.split())
    assert not Path("study").exists()


def test_under_torchrun_it_says_how_to_paint_on_many_gpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("torchrun evaluate.py table2"):
        study.main(["make", "--methods", "cg", "cg+pg"])


@pytest.fixture(scope="module")
def painting(tmp_path_factory):
    """The options of a study of three of the toy's pairs, at 64 pixels, in one step."""
    root = tmp_path_factory.mktemp("painting")
    write_world(root, size=64, base=0, ads=8, bg1k=2, pairs=3, workers=1, parts=("ads",))
    return ["--data", str(root / "ads"), "--steps", "1", "--size", "64", "--dtype", "float32", "--device", "cpu"]


def make(root: Path, *options: str) -> dict[Path, int]:
    """Makes a study, and returns the times at which its pictures were painted."""
    study.main(["make", *options, "--pictures", str(root / "results"), "--out", str(root / "study"), "--key",
                str(root / "key.json")])
    return {path: path.stat().st_mtime_ns for path in root.glob("results/**/*.png")}


def test_make_paints_what_is_missing_and_score_counts_it(painting, tmp_path, monkeypatch):
    """A second, larger study and evaluate.py find the first one's pictures."""
    before = make(tmp_path, *painting, "--methods", "cg", "stable-diffusion", "--pairs", "2")
    key = read_json(tmp_path / "key.json")
    painted = {Image.open(path).tobytes(): path for path in before}
    for pair in key["pairs"]:
        for method, name in pair["candidates"].items():
            path = painted[Image.open(tmp_path / "study" / "pictures" / f"{name}.png").tobytes()]
            assert path.parent.name.startswith(f"{method}-") and Path(pair["product"]).stem in path.name
    table, _ = score(tmp_path, rankings(key, "a", ["stable-diffusion", "cg"]))
    assert means(table) == [[1, 2], [2, 1]]
    (tmp_path / "study").rename(tmp_path / "first")
    (tmp_path / "key.json").unlink()
    after = make(tmp_path, *painting, "--methods", "cg", "cg+pg")
    assert len(before) == 2 * 2 and len(after) == 2 * 3 + 2 and before.items() <= after.items()
    monkeypatch.setattr(methods, "paint_items", None)  # can't be called
    lab = lab_of(evaluate.options().parse_args(["table2", *painting]), tmp_path / "results")
    assert {path for method in ("cg", "cg+pg") for path in lab.pictures(method, lab.items("ref"), "ref")} <= {*after}


def test_the_seed_draws_the_pairs_and_one_whose_picture_cannot_be_read_is_named_and_left_out(
        painting, tmp_path, capsys, monkeypatch):
    def paint(lab, method, items, folder, chosen):
        drawn.append(tuple(chosen))
        return [items[i].image for i in chosen[:-1]] + [tmp_path / "broken.png"]

    monkeypatch.setattr(methods.Lab, "pictures", paint)
    (tmp_path / "broken.png").write_bytes(b"")
    drawn = []
    for seed in "0123":
        make(tmp_path / seed, *painting, "--methods", "cg", "cg+pg", "--pairs", "2", "--seed", seed)
        said = capsys.readouterr()
        assert "pairs: 1\n" in said.out and f"left out, with its pair: {tmp_path / 'broken.png'}" in said.err
    assert len({*drawn}) > 1
