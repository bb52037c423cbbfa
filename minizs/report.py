"""One self-contained page about a run: its curves, and trajectories of its first and last step.

The page loads nothing and runs no script. Documents are written by a model or come from the web, so
all that is data goes through `html.escape`; the page's content policy would stop what slipped by.
"""

from html import escape
from pathlib import Path

from minizs import protocol
from minizs.runs import read_lines

CURVES = {  # name in metrics.jsonl: what a healthy one looks like
    "reward": "Mean F1 of the batch. Rises, unevenly, as each batch has new questions.",
    "held_out_f1": "With the real engine. Rises too, or only the simulator is being learnt.",
    "noise": "Probability of noisy documents. Climbs as the curriculum says, steepest at the end.",
    "searches_per_question": "Settles near what the questions need; at 0 the policy only guesses.",
    "valid_rate": "Share of turns that search or answer. Nears 1 early and stays there.",
    "response_tokens": "Levels off; endless growth is rambling, a fall to almost none guessing.",
    "kl": "Distance from the starting model. Grows slowly; a jump often precedes a collapse.",
    "entropy": "Falls gently; near 0 nothing new is tried any more, and a sudden rise is babble.",
    "clip_fraction": "A few per cent of the tokens at most; 0 with one optimiser step a batch.",
    "grad_norm": "Before clipping. Keeps its order of magnitude, with few spikes.",
    "seconds": "Of a whole step. Flat, but for the steps that also evaluate.",
}
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --page: #fff; --text: #1a1a1a; --own: #0b4fb3; --grey: #666;
  --line: #ddd; --box: #f4f4f4; --noisy: #a33a00; --useful: #1a6b2f }
@media (prefers-color-scheme: dark) { :root { --page: #141414; --text: #e6e6e6; --own: #8ab8ff;
  --grey: #a0a0a0; --line: #383838; --box: #202020; --noisy: #ff9d66; --useful: #7fd494 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 .5rem } h3 { font-size: 1rem; margin: 0 } h3 b { float: right }
.curves { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)) }
svg { display: block; width: 100% } svg path { stroke: var(--line) } circle { fill: var(--own) }
polyline { fill: none; stroke: var(--own) } svg text { font-size: 11px; fill: var(--grey) }
details { border-top: 1px solid var(--line); padding: .6rem 0 } .own { color: var(--own) }
.own, .other { white-space: pre-wrap; margin: .6rem 0 }
.other { background: var(--box); padding: .5rem .75rem } .other, small { color: var(--grey) }
.noisy { color: var(--noisy) } .useful { color: var(--useful) }</style>"""
LEGEND = """<small><span class=own>The policy's own words</span> are trained on; a grey box is
masked from the loss. Useful or noisy is what the engine was asked for.</small>"""


def write(folder: Path) -> None:
    """Write `report.html` from the logs in `folder`, whatever there is; replaced in one go."""
    metrics, trajectories = (read_lines(folder / f"{x}.jsonl") for x in ("metrics", "trajectories"))
    name = escape(folder.resolve().name)
    page = [f"{HEAD}<title>{name}</title><h1>{name}</h1><div class=curves>"]
    page += [curve(metrics, title) for title in CURVES] + ["</div>"]
    for step in sorted({row["step"] for row in trajectories[:1] + trajectories[-1:]}):
        page.append(f"<h2>Trajectories of step {step:d}</h2>{LEGEND}")
        page += [trajectory(row) for row in trajectories if row["step"] == step]
    temporary = folder / "report.html.tmp"
    temporary.write_text("\n".join(page), encoding="utf-8", errors="replace")
    temporary.replace(folder / "report.html")  # os.replace: a reader never sees half a page


def curve(metrics: list[dict], title: str) -> str:
    """One value over the steps of the run; '' where it was never a finite number."""
    points = [(row["step"], row[title]) for row in metrics if row.get(title) is not None]
    if not points:
        return ""
    first, last = metrics[0]["step"], metrics[-1]["step"]
    low, high = min(y for _, y in points), max(y for _, y in points)
    across, up = 314 / (last - first or 1), 56 / (high - low or 1)
    xy = [(across * (x - first), 76 - up * (y - low)) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in xy)
    x, y = xy[-1]
    return f"""<div><h3>{title} <b>{number(points[-1][1])}</b></h3>
<svg viewBox="0 0 320 96"><path d="M0 80H314"/><polyline points="{line}"/>
<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><text y="12">min {number(low)}, max {number(high)}</text>
<text y="93">step {first}</text><text x="314" y="93" text-anchor="end">{last}</text></svg>
<small>{CURVES[title]}</small></div>"""


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def trajectory(row: dict) -> str:
    """A question, and turn by turn what the policy wrote and what it was given."""
    example, turns, reward = row["example"], row["turns"], number(row["reward"])
    page = [f"<details><summary>{escape(example['question'])} <b>reward {reward}</b></summary>"]
    for turn in turns:
        last = turn is turns[-1]
        page.append(f"<div class=own>{escape(turn['text'].strip())}</div>")
        if turn["documents"] is not None:
            kind = "noisy" if turn["noisy"] else "useful"
            text = escape(protocol.number_documents(turn["documents"]) or "nothing found")
            unread = " (did not fit, never read)" if last else ""
            page.append(f"<div class=other><b class={kind}>{kind}</b>{unread}\n{text}</div>")
        elif turn["action"] == "invalid" and not last:
            page.append(f"<div class=other>{protocol.INVALID_ACTION.strip()}</div>")
    answer = f"none ({row['truncated']})" if row["answer"] is None else row["answer"]
    gold = " or ".join(example["answers"])
    page.append(f"Answer: <b>{escape(answer)}</b><br>Gold: <b>{escape(gold)}</b></details>")
    return "".join(page)
