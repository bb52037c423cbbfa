"""How this kind of training dies: signs that the metrics show long before the last step."""

from collections.abc import Iterator
from statistics import fmean

WINDOW = 10  # steps that are averaged, so that one bad batch rings nothing
# Name, metric, when it rings (now: its mean of late; low, high: of earlier windows), and why.
ALARMS = [
    (
        "reward collapse",
        "reward",
        lambda now, low, high: high > 0.1 and now < high / 3,
        "it was above 3 times that: lower --lr, raise --kl_coef, look at trajectories.jsonl",
    ),
    (
        "KL running away",
        "kl",
        lambda now, low, high: now > max(1.0, 2 * low),
        "the policy has left its starting model: raise --kl_coef or lower --lr",
    ),
    (
        "entropy running away",
        "entropy",
        lambda now, low, high: now > max(1.0, 2 * low),
        "the policy writes ever more at random: lower --lr or --entropy_coef",
    ),
    (
        "no valid actions",
        "valid_rate",
        lambda now, low, high: high > 0.3 and now < 0.05,
        "the policy has forgotten its tags and is paid for nothing: lower --lr",
    ),
    (
        "no searches",
        "searches_per_question",
        lambda now, low, high: high > 0.3 and now < 0.05,
        "the policy answers from memory: are the documents of any use?",
    ),
    (
        "responses at the limit",
        "truncated",
        lambda now, low, high: low < 0.3 and now > 0.6,
        "most trajectories end without an answer: raise --max_turn_tokens or lower --lr",
    ),
]


def alarms(rows: list[dict], rung: set[str]) -> Iterator[str]:
    """What is wrong by these lines of metrics, oldest first. Each rings once: `rung` notes it."""
    ends = range(len(rows), WINDOW - 1, -WINDOW)  # of the windows, the newest first
    for name, metric, rings, why in ALARMS if len(ends) > 1 else ():
        means = [fmean(row[metric] or 0.0 for row in rows[end - WINDOW : end]) for end in ends]
        if name not in rung and rings(means[0], min(means[1:]), max(means[1:])):
            rung.add(name)
            yield f"{name}: {metric} is {means[0]:.3g} over the last {WINDOW} steps; {why}."
