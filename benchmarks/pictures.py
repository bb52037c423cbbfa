"""The pictures of the README, from a real run.

    python benchmarks/pictures.py runs/policy-1 --ask "when was the founder of Farkva Press born?"

docs/report.png        the first curves of the run's page in Chromium: light, a desktop's width
docs/report-phone.png  the page: dark, a phone's width
docs/trajectory.png    two trajectories of its training: a right one with an advantage above 0 and a
                       wrong one below, with useful and noisy documents as far as there are any
docs/ask.svg           what `evaluate.py --ask` prints in a terminal, with its colours
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
COLUMNS = 112  # letters in a line of the terminal
LINE_HEIGHT, LETTER_WIDTH = 20, 8.43  # pixels, of letters of 14 pixels
FOREGROUND, BACKGROUND = "#e6edf3", "#0d1117"
COLOURS = {"2": "#8b949e", "36": "#56d4dd", "32": "#7ee787", "33": "#ffa657", "34": "#79c0ff"}
# Leaves only the trajectories on a page.
TRAJECTORIES_ALONE = "<style>.plots, .legend, h1, h2, fieldset { display: none }</style>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="The folder of a finished run.")
    parser.add_argument("--ask", default="when was the founder of Farkva Press born?")
    parser.add_argument("--docs", type=Path, default=HERE / "docs", help="Where they go.")
    arguments = parser.parse_args()
    from minizs.runs import page

    docs = arguments.docs
    docs.mkdir(exist_ok=True)
    page.write_page(arguments.run)
    html = (arguments.run / "report.html").read_text(encoding="utf-8")
    take_screenshot(html, docs / "report.png", 1280, 750)
    take_screenshot(html, docs / "report-phone.png", 390, 1500, dark=True)
    take_screenshot(page_of_two_trajectories(arguments.run), docs / "trajectory.png", 1000, 1210)
    picture = terminal_picture(printed_answer(arguments.run / "policy", arguments.ask))
    (docs / "ask.svg").write_text(picture, encoding="utf-8")
    print(f"The pictures are in {docs}")


# ---- The page in a browser -----------------------------------------------------------------------


def take_screenshot(html: str, picture: Path, width: int, height: int, dark: bool = False) -> None:
    """The top of a page as Chromium shows it. Raises where there is no Chromium, or it fails."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        raise SystemExit("error: this needs chromium or google-chrome on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(html, encoding="utf-8")
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--screenshot={picture.resolve()}",
            str(file),
        ]
        subprocess.run(command, check=True, capture_output=True)


def page_of_two_trajectories(run: Path) -> str:
    """The page of a run with two trajectories of its training alone, both unfolded."""
    from minizs.runs import page, run_folder

    rows = run_folder.read_lines(run / "trajectories.jsonl")
    examples = [(row,) for row in (best_example(rows, 1), best_example(rows, -1)) if row]
    html = page.render_page(run.name, metrics=[], groups={"train": examples})
    html = re.sub(r"<details class=\"(.*?)\".*?>", r'<details class="\1" open>', html)
    return html.replace("<main>", f"{TRAJECTORIES_ALONE}<main>")


def best_example(rows: list[dict], sign: int) -> dict | None:
    """A trajectory whose advantage has this sign; if possible one that is right where it is above
    0 and wrong where it is below, with noisy and with useful documents."""

    def missing(row: dict) -> tuple[bool, bool, bool]:
        replies = [turn for turn in row["turns"] if turn["documents"] is not None]
        has_noisy = any(turn["noisy"] for turn in replies)
        has_useful = any(not turn["noisy"] for turn in replies)
        return (row["reward"] == 1) != (sign > 0), not has_noisy, not has_useful

    fitting = [row for row in rows if any(sign * value > 0 for value in row["advantages"])]
    return min(fitting, key=missing, default=None)


# ---- A terminal ----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """What is printed, as it would be for a terminal."""

    def isatty(self) -> bool:
        return True


def printed_answer(policy: Path, question: str) -> str:
    """The command `evaluate.py --ask` and what it prints."""
    import evaluate

    terminal = Terminal()
    print(f'$ python evaluate.py --ask "{question}"', file=terminal)
    with redirect_stdout(terminal):
        evaluate.main(["--policy", str(policy), "--ask", question])
    return terminal.getvalue()


def terminal_lines(text: str) -> list[list[tuple[str, str]]]:
    """Coloured text as lines of (ANSI colour or "", word), at most `COLUMNS` letters in each."""
    lines: list[list[tuple[str, str]]] = []
    for line in text.splitlines():
        lines.append([])
        length = 0
        colour = ""
        for part in re.split(r"(\033\[\d+m| )", line):
            if part.startswith("\033"):
                colour = part[2:-1]
                continue
            length += len(part)
            if length > COLUMNS:
                lines.append([])
                length = len(part)
            lines[-1].append((colour, part))
    return lines


def terminal_picture(text: str) -> str:
    """An SVG picture of a terminal in which this has been printed."""
    rows = []
    for number, words in enumerate(terminal_lines(text), 1):
        spans = [
            f'<tspan fill="{COLOURS.get(colour, FOREGROUND)}">{escape(word)}</tspan>'
            for colour, word in words
        ]
        height = (number + 0.5) * LINE_HEIGHT
        rows.append(f'<text x="16" y="{height:.0f}">{"".join(spans)}</text>')
    width = COLUMNS * LETTER_WIDTH + 32
    height = (len(rows) + 1.5) * LINE_HEIGHT
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}">
<style>text {{ font: 14px ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre }}</style>
<rect width="100%" height="100%" rx="10" fill="{BACKGROUND}"/>
{chr(10).join(rows)}
</svg>
"""


if __name__ == "__main__":
    main()
