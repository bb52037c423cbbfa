"""One self-contained page about a run: its curves, and trajectories of its first and last step.

The page loads nothing and runs no script. Documents are written by a model or come from the web, so
all that is data goes through `html.escape`; the page's content policy would stop what slipped by.
"""

from html import escape
from pathlib import Path
from string import Template

import yaml

from minizs import protocol
from minizs.runs import read_lines

PAGE = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
CURVES = yaml.safe_load(Path(__file__).with_name("report.yaml").read_text(encoding="utf-8"))


def write(folder: Path) -> None:
    """Write `report.html` from the logs in `folder`, whatever there is; replaced in one go."""
    metrics, trajectories = (read_lines(folder / f"{x}.jsonl") for x in ("metrics", "trajectories"))
    shown = []
    for step in sorted({row["step"] for row in trajectories[:1] + trajectories[-1:]}):
        shown.append(f"<h2>Trajectories of step {step:d}</h2>")
        shown += [trajectory(row) for row in trajectories if row["step"] == step]
    page = PAGE.substitute(name=escape(folder.resolve().name), trajectories="\n".join(shown),
                           curves="\n".join(curve(metrics, name) for name in CURVES))  # fmt: skip
    temporary = folder / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(folder / "report.html")  # os.replace: a reader never sees half a page


def curve(metrics: list[dict], name: str) -> str:
    """One value over the steps of the run; '' where it was never a finite number."""
    points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    if not points:
        return ""
    first, last = metrics[0]["step"], metrics[-1]["step"]
    low, high = min(y for _, y in points), max(y for _, y in points)
    across, up = 314 / (last - first or 1), 56 / (high - low or 1)
    line = [f"{across * (x - first):.1f},{76 - up * (y - low):.1f}" for x, y in points]
    x, y = line[-1].split(",")
    return f"""<div><h3>{name} <b>{number(points[-1][1])}</b></h3>
<svg viewBox="0 0 320 96"><path d="M0 80H314"/><polyline points="{" ".join(line)}"/>
<circle cx="{x}" cy="{y}" r="3"/><text y="12">min {number(low)}, max {number(high)}</text>
<text y="93">step {first}</text><text x="314" y="93" text-anchor="end">{last}</text></svg>
<small>{CURVES[name]}</small></div>"""


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def trajectory(row: dict) -> str:
    """A question, and turn by turn what the policy wrote and what it was given."""
    example, turns, reward = row["example"], row["turns"], number(row["reward"])
    page = [f"<details><summary>{escape(example['question'])} <b>reward {reward}</b></summary>"]
    for turn in turns:
        page.append(f"<div class=own>{escape(turn['text'].strip())}</div>")
        if turn["documents"] is not None:
            kind = "noisy" if turn["noisy"] else "useful"
            text = escape(protocol.number_documents(turn["documents"]) or "nothing found")
            unread = " (did not fit, never read)" if turn is turns[-1] else ""
            page.append(f"<div class=other><b class={kind}>{kind}</b>{unread}\n{text}</div>")
        elif turn["action"] == "invalid" and turn is not turns[-1]:
            page.append(f"<div class=other>{protocol.INVALID_ACTION.strip()}</div>")
    answer = f"none ({row['truncated']})" if row["answer"] is None else row["answer"]
    gold = " or ".join(example["answers"])
    page.append(f"Answer: <b>{escape(answer)}</b><br>Gold: <b>{escape(gold)}</b></details>")
    return "".join(page)
