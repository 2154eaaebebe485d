"""Tests: the user study's page in a real browser. They are skipped without one: pip install playwright, and Chromium
from the system's packages or by playwright install chromium.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from test_study import means, written_study

import study

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow
PAIRS = 5
LETTERS = "abcde"  # of the candidates, by place
LAPTOP, PHONE = {"width": 1366, "height": 768}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            browser = engine.chromium.launch(executable_path=path)
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def handout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handout")
    return folder, written_study(folder, PAIRS)


@pytest.fixture
def visit(browser, handout):
    """visit(rater, viewport, language, touch) -> the page, as a new visitor sees it. The test fails on errors in the
    page, and on requests for anything but its own files.
    """
    faults = []

    def visit(rater: str = "", viewport=LAPTOP, language="en-GB", touch=False, root=handout[0]):
        page = browser.new_page(viewport=viewport, locale=language, has_touch=touch, is_mobile=touch)
        folder = (root / "study").as_uri()
        page.set_default_timeout(60_000)  # a busy machine is no fault of the page
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.on("request", lambda r: r.url.startswith((folder, "data:", "blob:")) or faults.append(r.url))
        page.goto(f"{folder}/index.html?rater={rater}")
        return page

    yield visit
    assert not faults


def shown(page) -> list[str]:
    """The candidates' names, by place."""
    return page.eval_on_selector_all(".candidate", "cards => cards.map((card) => card.dataset.name)")


def ranking(page) -> str:
    """From the best to the worst: a is the first candidate, b the second; - is a free place."""
    button = "places => places.map((place) => place.querySelector('button')?.dataset.name)"
    letters = dict(zip(shown(page), LETTERS))
    return "".join(letters.get(name, "-") for name in page.eval_on_selector_all(".place", button))


def candidate(letter: str) -> str:
    return f".candidate:nth-child({LETTERS.index(letter) + 1})"


def place(index: int) -> str:
    return f".place[data-place='{index}']"


def question(page) -> str:
    return page.text_content("#progress")


def press(page, keys: str) -> None:
    for key in keys.split():
        page.keyboard.press(key)


def begin(page) -> None:
    page.click("#start .main")


def drag(page, source: str, target: str) -> None:
    page.hover(source)
    page.mouse.down()
    page.hover(target)
    page.hover(target)  # a second move, as by a hand
    page.mouse.up()


def finish(page) -> None:
    """Ranks the rest in any way, by calling the page's own functions: this is faster than pressing keys."""
    page.evaluate("""() => { while (!find("#task").hidden) {
        for (const name of current.pair.candidates) if (!places().includes(name)) rank(toggled(places(), name), name);
        next();
    } }""")


def save(page, folder: Path) -> Path:
    with page.expect_download() as download:
        page.click("#save")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def method_of(key: dict) -> dict[str, str]:
    return {name: method for pair in key["pairs"] for method, name in pair["candidates"].items()}


def test_from_the_first_key_to_table_3(visit, tmp_path):
    """A rater ranks by keys and by dragging, reloads in the middle, finishes, saves; `score` counts the file."""
    names = ["controlnet", "cg", "cg+pg"]
    key = written_study(tmp_path, 3, names)
    method, page = method_of(key), visit("7", root=tmp_path)
    assert page.input_value("#name") == "7"
    begin(page)
    for number in range(6):
        assert question(page) == f"{number // 2 + 1} of 3 · question {number % 2 + 1} of 2"
        places = {names.index(method[name]): letter for name, letter in zip(shown(page), LETTERS)}
        order = places[0] + places[1] + places[2]
        if number % 2 == 0:
            order = order[::-1]
        if number in (1, 2):  # from the worst place to the best
            for index in (2, 1):
                drag(page, candidate(order[index]), place(index))
        else:
            press(page, " ".join(str(LETTERS.index(letter) + 1) for letter in order[:-1]))
        assert ranking(page) == order  # the last one by itself
        if number == 3:
            page.reload()
            assert ranking(page) == order
        press(page, "Enter")
    file = save(page, tmp_path)
    assert file.name == "rankings-7.json"
    study.main(["score", "--key", str(tmp_path / "key.json"), "--out", str(tmp_path), str(file)])
    table = json.loads((tmp_path / "table3.json").read_text())
    assert means(table) == [[1, 2, 3], [3, 2, 1]] and table["raters"] == ["7"]
    text = json.loads(page.input_value("#text"))
    assert text["rankings"] == json.loads(file.read_text(encoding="utf-8"))["rankings"]


def test_each_rater_sees_each_method_equally_often_in_each_place_and_in_an_order_of_their_own(visit, handout):
    method, page = method_of(handout[1]), visit()
    orders = []
    for rater in ("1", "2", "3", "李"):
        pairs = page.evaluate(f"arrangement('{rater}').map((pair) => pair.candidates)")
        places = Counter((method[name], place) for pair in pairs for place, name in enumerate(pair))
        assert {*places.values()} == {1} and len(places) == 25
        assert pairs == page.evaluate(f"arrangement('{rater}').map((pair) => pair.candidates)")
        orders.append(str(pairs))
    assert len({*orders}) > 2  # five pairs have 14,400 orders: now and then two raters get the same


def test_every_key_does_what_the_list_of_keys_says(visit):
    page = visit("keys")
    begin(page)
    for keys, expected in (
        ("3 1", "ca---"),
        ("3", "-a---"),  # takes it back
        ("u u", "c----"),
        ("ArrowRight ArrowRight ArrowDown", "c---b"),  # the second picture: to the worst place
        ("ArrowUp ArrowUp ArrowUp", "cb---"),
        ("ArrowUp", "bc---"),  # the other one makes room
        ("Enter", "-c---"),  # on a picture that is ranked: takes it back
        ("2 4 1", "bcdae"),
    ):
        press(page, keys)
        assert ranking(page) == expected
    press(page, "Enter")
    assert question(page).endswith("question 2 of 2") and ranking(page) == "-----"
    press(page, "Enter")  # not before all are ranked
    assert question(page).endswith("question 2 of 2") and "5 left" in page.text_content("#live")
    press(page, "b")
    assert question(page).endswith("question 1 of 2") and ranking(page) == "bcdae"
    press(page, "l")
    assert page.get_attribute("html", "lang") == "zh-CN"
    press(page, "?")
    assert page.is_visible("#keys")
    press(page, "Escape 2")
    assert not page.is_visible("#keys") and ranking(page) == "-cdae"


def test_all_rankings_can_be_reached_by_dragging(visit):
    """From the candidates in any order, then from place to place, then out of the ranking."""
    page = visit("drag")
    begin(page)
    for letter, index in (("b", 4), ("a", 0), ("e", 0)):
        drag(page, candidate(letter), place(index))
    assert ranking(page) == "ea--b"
    drag(page, place(0), place(4))  # b makes room
    assert ranking(page) == "-a-be"
    drag(page, candidate("c"), place(1))
    assert ranking(page) in ("acdbe", "dcabe")  # the last one by itself
    drag(page, place(4), "#question")
    assert "e" not in ranking(page) and "c" in ranking(page)


def test_insertion_moves_as_few_others_as_possible(visit):
    """Only those up to the nearest free place move; the place that the picture leaves is the nearer of two as near."""
    page = visit("insert")
    begin(page)
    for before, index, after in (("abc--", 4, "-bc-a"), ("abc--", 2, "-bac-"), ("-abc-", 3, "--bac"),
                                 ("bac--", 2, "bca--"), ("-bac-", 1, "-abc-"), ("-cb-a", 1, "cab--")):
        inserted = "([before, index]) => inserted([...before].map((x) => x === '-' ? null : x), 'a', index)"
        assert page.evaluate(inserted, [before, index]) == [None if x == "-" else x for x in after], (before, index)


def test_a_phone_taps_looks_in_full_size_and_drags_by_the_grip(visit):
    page = visit("phone", PHONE, touch=True)
    begin(page)
    page.tap(f"{candidate('b')} .pick")
    assert ranking(page) == "b----"
    page.tap(f"{candidate('b')} .look")
    assert "Picture 2 · Best" in page.text_content("#full span")
    page.tap("#after")
    assert "Picture 3" in page.text_content("#full span")
    page.tap("#close")
    assert not page.is_visible("#full")
    touch = page.context.new_cdp_session(page)

    def centre(selector: str) -> dict:
        box = page.locator(selector).bounding_box()
        return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}

    start, end = centre(f"{candidate('a')} .grip"), centre(place(0))
    between = {axis: (start[axis] + end[axis]) / 2 for axis in "xy"}
    for kind, points in (("touchStart", [start]), ("touchMove", [between]), ("touchMove", [end]), ("touchEnd", [])):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_function("numberOf(places()[0]) === 1")
    assert ranking(page) == "ab---"


@pytest.mark.parametrize("width, heights, touch", [(1366, (768, 657), False), (390, (844, 664), True)])
def test_the_page_fits_the_screen_in_both_languages(visit, width, heights, touch):
    """Nothing is cut off at the sides. A laptop shows a whole question at once, a phone its whole ranking. The lower
    heights are what a browser's own bars leave of the higher ones.
    """
    page = visit("fits", {"width": width, "height": heights[0]}, touch=touch)
    begin(page)
    parts = ["#question", "#given", "#places", "#next", *([] if touch else ["#candidates"])]
    boxes = "selectors => selectors.map((s) => { const {x, y, right, bottom} = find(s).getBoundingClientRect();" \
            " return [x, y, right, bottom]; })"
    for height in heights:
        page.set_viewport_size({"width": width, "height": height})
        for _ in range(2):
            page.evaluate("translate()")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            for part, (x, y, right, bottom) in zip(parts, page.evaluate(boxes, parts)):
                assert x >= 0 and y >= 0 and right <= width and bottom <= height, part
            sides = page.eval_on_selector_all(".pick img", "pictures => pictures.map((p) => p.clientWidth)")
            assert min(sides) > (150 if touch else 200)


def test_the_browsers_language_is_chosen_and_every_text_has_both(visit):
    page = visit(language="zh-TW")
    assert page.get_attribute("html", "lang") == "zh-CN" and "哪张" in page.text_content("#start h1")
    page.click("#language")
    assert page.get_attribute("html", "lang") == "en" and "Which" in page.text_content("#start h1")
    page.reload()  # the choice is kept
    assert page.get_attribute("html", "lang") == "en"
    kinds = "(language) => Object.entries(TEXTS[language]).map(([name, text]) => `${name} ${typeof text}`)"
    assert page.evaluate(kinds, "en") == page.evaluate(kinds, "zh")


def test_a_screen_reader_hears_what_is_shown(visit):
    """Every control has a name; pictures say their number and rank; each step is announced."""
    page = visit("ears")
    begin(page)
    assert page.evaluate("document.activeElement.id") == "question"
    press(page, "2")
    assert page.text_content("#live") == "Picture 2: Best. 4 left."
    picture = page.get_by_role("button", name="Picture 2, Best")
    assert picture.count() == 1 and page.get_by_role("button", name="Picture 1, not ranked").count() == 1
    press(page, "u")
    assert page.text_content("#live") == "Undone. 5 left."
    press(page, "1 2 3 4")
    assert page.text_content("#live") == "Picture 4: 4th. All are ranked. Press Enter for the next question."
    nameless = page.evaluate("""[...document.querySelectorAll("button, input, textarea, progress")].filter((part) =>
        !(part.textContent.trim() || part.ariaLabel || part.labels?.length || part.getAttribute("aria-labelledby")))""")
    assert nameless == []


def test_two_people_share_a_browser_and_keep_their_answers_apart(visit, tmp_path):
    page = visit()
    page.fill("#name", " 王 ")
    press(page, "Enter")
    press(page, "1 2 3 4 Enter 1")
    page.click("#rater")
    page.fill("#name", "Ann / B.")
    begin(page)
    assert question(page).startswith("1 of") and ranking(page) == "-----"
    finish(page)
    assert save(page, tmp_path).name == "rankings-Ann-B-.json"
    page.click("#another")
    page.fill("#name", "王")
    begin(page)
    assert question(page).endswith("question 2 of 2") and ranking(page) == "a----"


def test_a_second_tab_of_a_rater_goes_on_with_the_answers_of_the_first(visit):
    first = visit("tabs")
    begin(first)
    with first.expect_popup() as popup:
        first.evaluate("Object.assign(document.createElement('a'), {href: location, target: '_blank'}).click()")
    second = popup.value
    press(first, "1 2 3 4 Enter 2 1 3 4")
    ranked = "Object.values(answers).flatMap(Object.values).flat().filter((name) => name).length === {}".format
    second.wait_for_function(ranked(10))  # the browser has brought what the first has stored
    assert ranking(second) == "abcde"
    press(second, "Enter")
    assert question(second).endswith("question 2 of 2") and ranking(second) == "bacde"
    press(second, "Enter 5")
    first.wait_for_function(ranked(11))
    press(first, "Enter")
    assert ranking(first) == "e----"


def test_where_the_browser_keeps_nothing_it_says_so_and_the_study_can_be_finished(visit, tmp_path):
    page = visit()
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('blocked'); }; }")
    page.fill("#name", "private")
    begin(page)
    assert page.is_visible("#warning") and "do not close" in page.text_content("#warning")
    finish(page)
    assert len(json.loads(save(page, tmp_path).read_text())["rankings"]) == PAIRS
