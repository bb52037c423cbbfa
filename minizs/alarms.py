"""How this kind of training dies: signs that the metrics show long before the last step."""

from collections import deque
from statistics import fmean

WINDOW = 10  # steps that are averaged, so that one bad batch rings nothing
# Name: the metric, when it rings (now: its mean of late; low, high: of earlier windows), and why.
ALARMS = {
    "reward collapse": (
        "reward", lambda now, low, high: high > 0.1 and now < high / 3,
        "it was above 3 times that: lower --lr, raise --kl_coef, look at trajectories.jsonl"),
    "KL running away": (
        "kl", lambda now, low, high: now > max(1.0, 2 * low),
        "the policy has left its starting model: raise --kl_coef or lower --lr"),
    "entropy running away": (
        "entropy", lambda now, low, high: now > max(1.0, 2 * low),
        "the policy writes ever more at random: lower --lr or --entropy_coef"),
    "no valid actions": (
        "valid_rate", lambda now, low, high: high > 0.3 and now < 0.05,
        "the policy has forgotten its tags and is paid for nothing: lower --lr"),
    "no searches": (
        "searches_per_question", lambda now, low, high: high > 0.3 and now < 0.05,
        "the policy answers from memory: are the documents of any use?"),
    "responses at the limit": (
        "truncated", lambda now, low, high: low < 0.3 and now > 0.6,
        "most trajectories end without an answer: raise --max_turn_tokens or lower --lr"),
}  # fmt: skip


def alarms(rows: list[dict]) -> dict[str, str]:
    """What is wrong by these lines of metrics, oldest first: a sentence for each name."""
    blocks = [rows[i - WINDOW : i] for i in range(len(rows), WINDOW - 1, -WINDOW)]  # newest first
    ringing = {}
    for name, (metric, rings, why) in ALARMS.items():
        means = [fmean(row[metric] or 0.0 for row in block) for block in blocks]
        now, *earlier = means or [0.0]
        if earlier and rings(now, min(earlier), max(earlier)):
            ringing[name] = f"{name}: {metric} is {now:.3g} over the last {WINDOW} steps; {why}."
    return ringing


class Alarms:
    """Call it with each line of metrics in turn: the sentences that are new, each alarm's once."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.rung = deque(rows, maxlen=50 * WINDOW), set()

    def __call__(self, row: dict) -> list[str]:
        self.rows.append(row)
        new = {n: text for n, text in alarms(list(self.rows)).items() if n not in self.rung}
        self.rung |= new.keys()
        return list(new.values())
