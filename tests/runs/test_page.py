"""The page about a run: safe to open, and there however the run ended."""

import itertools
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from counts import COUNTS
from hypothesis import given, settings
from hypothesis import strategies as st

from minizs.runs import page as pages
from minizs.runs.terminal import visible
from minizs.trajectory import Example, Trajectory, Turn

HOSTILE = "</script><script>alert(1)</script></details><img src=x onerror=alert(2)> \" ' & {{ 7 }}"
UNSEEN = "\ud800 \u202e \u2066 \x1b[31m \r \x00"  # half a character, marks of direction, colours
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def logs(folder, name: str, rows: list[dict]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def page(folder, metrics=(), trajectories=(), tests=()) -> str:
    """The report of these logs; of a test, pairs of trajectories before and after training."""
    logs(folder, "metrics", metrics)
    logs(folder, "trajectories", [{"step": step} | row for step, row in trajectories])
    for i, kind in enumerate(("evaluation.before", "evaluation") if tests else ()):
        logs(folder, kind, [{"index": j} | pair[i] for j, pair in enumerate(tests)])
    pages.write_page(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def trajectory(text: str, noisy: bool = False, answer: str | None = "", **columns) -> dict:
    """A row of a log: one search and an answer, with `text` wherever somebody else's can stand."""
    row = Trajectory(Example(f"q {text}", (text, "gold")), answer=text, reward=0.5)
    row.answer = text if answer == "" else answer
    row.turns = [Turn(text, "search", text, [text], noisy), Turn(text, "answer", text)]
    return asdict(row) | columns


def tokens(text: str, advantages: tuple[float, float] = (1.0, -2.0)) -> dict:
    """What the run logs of the tokens of such a row: a prompt, a turn, documents, a turn."""
    first, last = advantages
    return {
        "pieces": [text, "own ", text, text, " more", text],
        "loss_mask": [0, 1, 1, 0, 1, 1],
        "advantages": [0.0, first, first, 0.0, last, last],
    }


class Tags(HTMLParser):
    """Fails where a tag is closed that is not open; keeps all texts and tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open = []
        self.tags = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_hostile_text_stays_text(tmp_path):
    """Markup that a model or the web wrote is shown, not run; what is hidden becomes a mark."""
    run = tmp_path / "<script>run"
    run.mkdir()
    text = HOSTILE + UNSEEN
    unanswered = trajectory(text, answer=None, truncated=text)
    pairs = [(unanswered, trajectory(text))]
    html = page(run, [], [(1, trajectory(text, **tokens(text)))], pairs)
    assert "<script" not in html and "<img" not in html
    seen = Tags(html)
    assert not seen.open and not seen.tags & {"script", "img", "a", "iframe"}
    # With tokens: the question, 4 pieces, answer, gold; without: 2 turns, a document, and as above.
    assert seen.text.count(HOSTILE) == 7 + (1 + 5 + 5)
    assert not set(UNSEEN) - set(" [31m") & set(seen.text)  # but as a mark, which can be seen
    assert "\ufffd" in seen.text


def test_the_page_loads_nothing(tmp_path):
    """The page can be read offline, and nobody is told that it is opened."""
    html = page(tmp_path, [{"step": 1, "reward": 0.5}], [(1, trajectory("text"))])
    assert not re.search(r"https?:|//\w|\b(src|href)\s*=|url\(|@import|<script", html)
    assert "default-src 'none'" in html


def test_curves_show_the_numbers_that_were_logged(tmp_path):
    """A curve is drawn from the logged numbers, with 0 in sight; what was not logged has none."""
    rows = [{"step": 1, "reward": 0.125}, {"step": 2, "reward": 0.875, "response_tokens": 12345}]
    rows += [{"step": 3, "reward": 0.625, "held_out_f1": 0.375, "held_out_noisy_f1": 0.125}]
    html = page(tmp_path, rows)
    assert "training <b>0.625</b>" in html
    assert "range 0 to 0.875" in html  # 0 is always in sight: a fall from 1 to 0.9 looks small
    assert 'points="0.0,85.1 157.0,20.0 314.0,41.7 "' in html  # y grows downwards
    assert 'points="314.0,20.0 "' in html and 'points="314.0,70.7 "' in html  # on the same axis
    assert "<b>12,345</b>" in html
    assert "clean engine <b>0.375</b>" in html and "noisy engine <b>0.125</b>" in html
    assert "<h3>KL" not in html and html.count("<svg") == 3
    everything = {name: 1.0 for form in pages.PLOTS.values() for name in form["series"]}
    html = page(tmp_path, [{"step": 1} | everything])
    assert html.count("<polyline") == len(everything) and html.count("<svg") == len(pages.PLOTS)
    assert all(form["healthy"].split("'")[0] in html for form in pages.PLOTS.values())


def test_a_killed_run_has_a_page(tmp_path):
    """Half a line, or no log at all, is what a crash leaves: there is a page nevertheless."""
    pages.write_page(tmp_path)
    assert (tmp_path / "report.html").exists()
    rows = '{"step": 1, "reward": 0.25, "kl": null}\n{"step": 2, "reward": null, "kl": null}\n'
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 3, "rewa')
    logs(tmp_path, "trajectories", [{"step": 1} | trajectory("text", **tokens("x"))])
    (tmp_path / "trajectories.jsonl").open("a").write('{"step": 2, "exam')
    pages.write_page(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "training <b>0.25</b>" in html and "<h3>KL" not in html and "q text" in html
    assert "nan" not in html.lower() and "inf," not in html
    assert not list(tmp_path.glob("*.tmp"))


def test_every_token_is_coloured_by_what_training_does_with_it(tmp_path):
    """Green for an advantage above 0, red below, hatched for what the policy did not write."""
    html = page(tmp_path, [], [(1, trajectory("text", True, **tokens("a")))])
    up = '<span class="up" style="--a:29%" title="advantage +1.00"><i>own </i><i>a</i></span>'
    down = '<span class="down" style="--a:50%" title="advantage -2.00"><i> more</i><i>a</i></span>'
    assert f'<div class="own">{up}</div>' in html and f'<div class="own">{down}</div>' in html
    assert '<div class="masked"><b class="prompt">prompt</b>\na</div>' in html
    noisy = '<b class="noisy">documents, asked to be noisy</b>'
    assert f'<div class="masked">{noisy}\na</div>' in html
    html = page(tmp_path, [], [(1, trajectory("text", **tokens("a", (0.0, 9.0))))])
    assert '<span class="up" style="--a:0%"><i>own' in html
    assert '<b class="useful">documents, asked to be useful</b>' in html
    assert html.count("--a:50%") == 2 + 1  # the legend's, and no more than full colour


def test_a_character_of_several_tokens_is_whole(tmp_path):
    """Tokens that add nothing, since their character is not complete yet, leave no mark."""
    row = trajectory("text", **tokens("a"))
    row["pieces"][1:3] = ["", "\U0001f600"]
    html = page(tmp_path, [], [(1, row)])
    assert "<i>\U0001f600</i></span></div>" in html and "<i></i>" not in html


def test_without_tokens_it_is_shown_turn_by_turn(tmp_path):
    """A test logs no tokens: its turns are shown with what they were answered with, and documents
    that did not fit are not shown as read."""
    unread, invalid, early = (trajectory(text) for text in ("unread", "invalid", "early"))
    unread["turns"].pop()
    unread["truncated"] = "context"
    invalid["turns"][0] |= {"documents": None, "action": "invalid"}
    early["turns"] = early["turns"][:1]  # one search before the only turn: --method rag
    late = trajectory("late", True)
    html = page(tmp_path, [], [(1, unread), (2, invalid), (3, early), (4, late)])
    noisy = '<b class="noisy">documents, asked to be noisy</b>'
    documents = f'<div class="masked">{noisy}\nDoc 1: late</div>'
    assert f"<i>late</i></span></div>\n{documents}" in html
    assert "documents that did not fit, never read</b>\nDoc 1: unread" in html
    assert "reply</b>\nThat action is not valid" in html
    assert "documents read beforehand</b>\nDoc 1: early" in html
    assert "late or gold" in html and "step 4: 0.5" in html and "title=" not in html
    assert "asked to be useful" not in html  # in a test nobody asks for that


def test_before_and_after_stand_side_by_side(tmp_path):
    """Answers to one question before and after training stand side by side; each filter has its
    count."""
    after = trajectory("a", answer="gold")
    repeated = trajectory("b")
    tests = [
        (trajectory("a", answer="no"), after),
        (repeated, repeated),
        (repeated, trajectory("else")),
    ]
    html = page(tmp_path, [], [(7, trajectory("c", answer=None))], tests)
    classes = re.findall(r'<details class="([^"]*)"', html)
    assert classes == ["test right changed", "test right", "train wrong"]
    assert html.index("Before training") < html.index("<b>no</b>") < html.index("After training")
    for text, groups in (
        ("all 3", 1),
        ("any answer", 1),
        ("changed its mind 1", 1),
        ("right 2", 1),
    ):
        assert html.count(f">{text}</label>") == groups
    rules = re.findall(r"#(\w+):checked\) main > :not\(\.(\w+)\) ", html)
    names = "test noisy_test train right wrong believed doubted changed".split()
    assert rules == [(name, name) for name in names]
    (tmp_path / "evaluation.jsonl").unlink()  # a test that was interrupted
    pages.write_page(tmp_path)
    assert "Before training" not in (tmp_path / "report.html").read_text()


def test_a_long_run_has_a_page_of_bounded_size(tmp_path):
    """The page of a long run shows both of its ends and a part of a test, and stays small."""
    rows = [(step, trajectory(f"s{step}.", **tokens("a"))) for step in range(1, 301)]
    pairs = [(trajectory(f"t{i}"), trajectory(f"t{i}")) for i in range(99)]
    curve = [{"step": step, "reward": step / 20000} for step in range(1, 20001)]
    html = page(tmp_path, curve, rows, pairs)
    points = re.search('points="(.*?) "', html)[1].split()
    assert 400 < len(points) <= 500 and points[-1] == "314.0,20.0"
    assert html.count("step 1: ") == html.count("step 300: ") == 1 and "step 150: " not in html
    trajectories = html.count("<details")
    assert trajectories <= pages.FIRST + pages.LAST + pages.TESTS
    # The log of a test takes its data sets in turn: no step of an own that could miss one.
    assert [f"q t{i}<" in html.replace("\n", "<") for i in range(17)] == [True] * 16 + [False]
    assert len(html) < 100_000


def test_filters_combine(tmp_path):
    """There is a note for each choice of one filter a group that no trajectory fits."""
    html = page(tmp_path, [], [(1, trajectory("a"))])
    groups = [[*filters] for filters in pages.FILTERS.values()]
    choices = [
        tuple(name for name in choice if name)
        for choice in itertools.product(*([None, *group] for group in groups))
    ]
    rules = re.findall(r"body(\S*) main::after { content", html)
    empty = [tuple(re.findall(r"#(\w+):checked", rule)) for rule in rules]
    assert len(choices) == 4 * 3 * 3 * 2 and len(set(empty)) == len(empty)
    # The one trajectory is of the training and right, and nothing else.
    assert set(choices) - set(empty) == {(), ("train",), ("right",), ("train", "right")}
    assert html.count('type="radio"') == sum(map(len, groups)) + len(groups)
    for number, group in enumerate(groups, 1):
        assert html.count(f'name="filter{number}"') == len(group) + 1


def test_near_misses_are_easy_to_find(tmp_path):
    """A filter shows those that were believed, another those that were doubted, in each of the
    tests and in training; and beside the documents it says so."""
    believed = trajectory("Anna", noisy=True)
    doubted = trajectory("Berta", noisy=True)
    for row, action in ((believed, "answer"), (doubted, "search")):
        row["example"] = {"question": "who?", "answers": ["gold"], "source": "data"}
        row["turns"][0] |= {"content": "who", "documents": [f"It is {row['answer']}"]}
        row["turns"][1] |= {"action": action, "content": "who" if action == "search" else "Anna"}
    page(tmp_path, [], [(1, doubted)], [(doubted, believed)])
    logs(tmp_path, "evaluation.before.noisy", [believed])
    logs(tmp_path, "evaluation.noisy", [doubted])
    pages.write_page(tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    classes = re.findall(r'<details class="([^"]*)"', html)
    assert classes == [
        "test wrong believed changed",
        "noisy_test wrong doubted changed",
        "train wrong doubted",
    ]
    label = '<b class="noisy">documents, asked to be noisy</b>: <b class="note">a near miss'
    assert html.count(f"{label}, believed") == 2 and html.count(f"{label}, doubted") == 3
    assert ">believed a near miss 1</label>" in html and ">doubted a near miss 2</label>" in html


def test_the_settings_of_the_run(tmp_path):
    """They are on the page, folded, as text; without them there is no such block."""
    (tmp_path / "config.yaml").write_text(f"policy: tiny\noutput: '{HOSTILE}'\n")
    html = page(tmp_path)
    assert "policy: tiny" in html and "<script>alert" not in html and "alert(1)" in html
    (tmp_path / "config.yaml").unlink()
    assert "config.yaml" not in page(tmp_path)


def test_two_writers_at_once(tmp_path, monkeypatch):
    """A training and a test that write the page at the same time do not fail over a shared file."""
    page(tmp_path)
    rename = Path.replace

    def interrupted(path, target):
        monkeypatch.setattr(Path, "replace", rename)
        pages.write_page(tmp_path)  # the other one, between writing and renaming
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    pages.write_page(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if ".tmp" in path.name] == []
    assert (tmp_path / "report.html").stat().st_mode & 0o044  # others can read it


LETTERS = st.sampled_from("<>&\"'/!-={}%# aå\n\r\x00\x1b\u202e\ufeff\ud800") | st.characters()


@settings(max_examples=400, deadline=None)
@given(st.text(LETTERS))
def test_any_text_stays_text(text):
    """No text whatever ends its place in the page."""
    row = trajectory(text, **tokens(text))
    seen = Tags(pages.render_page("run", [], {"train": [({"step": 1} | row,)]}))
    assert not seen.open and not seen.tags & {"script", "img", "a", "iframe"}
    assert seen.text.count(visible(text).strip()) >= 5
    assert visible(visible(text)) == visible(text)
    COUNTS["hostile texts tried"] += 1


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it(tmp_path, width, dark):
    """Chromium draws it for a phone and for a desktop, in light and dark, and nothing is wider than
    the window."""
    row = trajectory(HOSTILE + "x" * 500, True, **tokens(HOSTILE + "y" * 500))
    page(tmp_path, [{"step": i, "reward": i / 9} for i in range(1, 9)], [(1, row)], [(row, row)])
    file, picture = tmp_path / "report.html", tmp_path / "page.png"
    # In a frame: a window of Chromium's is never narrower than 500 pixels.
    probe = "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth], '*')"
    html = file.read_text().replace("default-src 'none'", "default-src 'unsafe-inline'")
    html = escape(html.replace("<details", "<details open") + probe + "</script>")
    (tmp_path / "probe.html").write_text(
        "<title></title><script>onmessage = said => document.title = said.data</script>"
        f'<iframe style="width: {width}px; height: 1500px; border: 0" srcdoc="{html}"></iframe>'
    )
    flags = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        f"--window-size={width},1500",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    call = {
        "capture_output": True,
        "text": True,
        "timeout": 100,
        "check": True,
        "env": os.environ | {"HOME": str(tmp_path)},
    }
    subprocess.run([*flags, f"--screenshot={picture}", str(file)], **call)
    assert picture.stat().st_size > 20_000
    dom = subprocess.run([*flags, "--dump-dom", str(tmp_path / "probe.html")], **call).stdout
    inner, needed = map(int, re.search(r"<title>(\d+),(\d+)</title>", dom).groups())
    assert inner == width >= needed
