"""The pictures of the README, from a real run.

    python benchmarks/pictures.py runs/policy-1 --ask "when was the founder of Tatco Mining born?"

docs/report.png        the first curves of the run's page in Chromium: light, a desktop's width
docs/report-phone.png  the page: dark, a phone's width
docs/trajectory.png    two trajectories of its training, one with an advantage above 0, one below,
                       with useful and noisy documents as far as there are any
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
WIDTH, LINE, LETTER = 112, 20, 8.43  # letters in a line; pixels of a line and a letter of 14 px
COLOURS = {"2": "#8b949e", "36": "#56d4dd", "32": "#7ee787", "33": "#ffa657", "34": "#79c0ff"}


class Terminal(io.StringIO):
    """What is printed, as it would be for a terminal."""

    def isatty(self) -> bool:
        return True


def screenshot(html: str, picture: Path, width: int, height: int, dark: bool = False) -> None:
    """The top of a page as Chromium shows it. Raises where there is no Chromium, or it fails."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        raise SystemExit("error: this needs chromium or google-chrome on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        page.write_text(html, encoding="utf-8")
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--hide-scrollbars",
                f"--user-data-dir={folder}/profile",
                f"--window-size={width},{height}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--screenshot={picture.resolve()}",
                str(page),
            ],
            check=True,
            capture_output=True,
        )


def opened(html: str) -> str:
    """A report of two trajectories of training alone, unfolded: one with an advantage above 0 that
    is right and one below that is wrong, if possible with both useful and noisy documents."""
    head, rows = html.split("<main>")
    rows = re.findall(r'<details class="all train.*?</details>', rows, flags=re.DOTALL)
    best = []
    for sign, ending in (("up", "right"), ("down", "wrong")):
        worth = [f'class="all train {ending}', 'class="noisy"', 'class="useful"']
        some = [row for row in rows if f'<span class="{sign}"' in row and "title=" in row]
        best += sorted(some, key=lambda row: [kind not in row for kind in worth])[:1]
    hidden = "<style>.plots, h1, h2, input, label { display: none }</style>"
    shown = "".join(re.sub(" open|(?=>)", " open", row, count=1) for row in best)
    return f"{head}{hidden}<main>{shown}</main></html>"


def lines(text: str) -> list[list[tuple[str, str]]]:
    """Coloured text as lines of (ANSI colour or "", word), at most `WIDTH` letters in each."""
    out = []
    for line in text.splitlines():
        out.append([])
        used, colour = 0, ""
        for part in re.split(r"(\033\[\d+m| )", line):
            if part.startswith("\033"):
                colour = part[2:-1]
                continue
            used += len(part)
            if used > WIDTH:
                out.append([])
                used = len(part)
            out[-1].append((colour, part))
    return out


def svg(text: str) -> str:
    """A picture of a terminal in which this has been printed."""
    rows = []
    for i, parts in enumerate(lines(text)):
        spans = "".join(
            f'<tspan fill="{COLOURS.get(colour, "#e6edf3")}">{escape(word)}</tspan>'
            for colour, word in parts
        )
        rows.append(f'<text x="16" y="{(i + 1.5) * LINE:.0f}">{spans}</text>')
    height, width = (len(rows) + 1.5) * LINE, WIDTH * LETTER + 32
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}">
<style>text {{ font: 14px ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre }}</style>
<rect width="100%" height="100%" rx="10" fill="#0d1117"/>
{"".join(rows)}
</svg>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="The folder of a finished run.")
    parser.add_argument("--ask", default="when was the founder of Tatco Mining born?")
    parser.add_argument("--docs", type=Path, default=HERE / "docs", help="Where they go.")
    config = parser.parse_args()
    import evaluate
    from minizs.runs import page

    config.docs.mkdir(exist_ok=True)
    page.write_page(config.run)
    html = (config.run / "report.html").read_text(encoding="utf-8")
    screenshot(html, config.docs / "report.png", 1280, 750)
    screenshot(html, config.docs / "report-phone.png", 390, 1500, dark=True)
    screenshot(opened(html), config.docs / "trajectory.png", 1000, 1210)
    terminal = Terminal()
    print(f'$ python evaluate.py --ask "{config.ask}"', file=terminal)
    with redirect_stdout(terminal):
        evaluate.main(["--policy", str(config.run / "policy"), "--ask", config.ask])
    (config.docs / "ask.svg").write_text(svg(terminal.getvalue()), encoding="utf-8")
    print(f"The pictures are in {config.docs}")


if __name__ == "__main__":
    main()
