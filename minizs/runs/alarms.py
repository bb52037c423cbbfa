"""How this kind of training dies: signs that the metrics show long before the last step.

`Alarms` looks for two things. After the first steps it tells if nothing can be learned at all, as
when every trajectory ends at a limit. Later it compares the metrics with earlier ones of the run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean

from minizs.runs.metrics import LIMITS

WINDOW = 10  # steps that are averaged, so that one bad batch sounds no alarm
FIRST_STEPS = 5  # after these, a run that cannot learn is told so
REMEMBERED = 500  # steps that are looked at
NEARLY_ALL = 0.95
MANY = 0.2  # of the trajectories: a limit that ends so many is named where nothing is earned
WARM_START = "teach it that first (--warm_start scripted)"
PAGE = "see docs/running.md"  # its section has the symptoms, their causes and their cures


class History:
    """Means of the metrics over windows of steps, the newest window first."""

    def __init__(self, rows: list[dict]) -> None:
        ends = range(len(rows), WINDOW - 1, -WINDOW)
        self.windows = [rows[end - WINDOW : end] for end in ends]

    def means(self, metric: str) -> list[float]:
        """One mean for each window; what a row lacks counts as 0."""
        return [fmean(row.get(metric) or 0.0 for row in window) for window in self.windows]

    def now(self, metric: str) -> float:
        return self.means(metric)[0]

    def lowest(self, metric: str) -> float:
        """Of the windows before the newest."""
        return min(self.means(metric)[1:])

    def highest(self, metric: str) -> float:
        """Of the windows before the newest."""
        return max(self.means(metric)[1:])


def fell_to_nothing(history: History, metric: str) -> bool:
    return history.highest(metric) > 0.3 and history.now(metric) < 0.05


def ran_away(history: History, metric: str) -> bool:
    return history.now(metric) > max(1.0, 2 * history.lowest(metric))


def reward_stays(history: History) -> bool:
    return history.highest("reward") > 0.1 and history.now("reward") > 0.8 * history.highest(
        "reward"
    )


def reward_collapsed(history: History, metric: str) -> bool:
    return history.highest(metric) > 0.1 and history.now(metric) < history.highest(metric) / 3


def limit_reached(history: History, metric: str) -> bool:
    return history.lowest(metric) < 0.3 and history.now(metric) > 0.6


def answers_avoided(history: History, metric: str) -> bool:
    """Only answers that are likely to be right are given, so that the reward hides the loss."""
    fell = history.now(metric) < 0.7 * history.highest(metric)
    return fell and reward_stays(history)


def thinking_collapsed(history: History, metric: str) -> bool:
    """Thoughts shrink to a phrase while the reward is still what it was."""
    fell = history.now(metric) < 0.3 * history.highest(metric)
    return history.highest(metric) > 20 and fell and reward_stays(history)


@dataclass(frozen=True)
class Alarm:
    """`condition` sees the history and the metric's name. In `advice`, {limit} stands for the
    setting that ends the most trajectories."""

    name: str
    metric: str
    condition: Callable[[History, str], bool]
    advice: str


ALARMS = [
    Alarm(
        "reward collapse",
        "reward",
        reward_collapsed,
        "it was above 3 times that: lower --lr, raise --kl_coef, look at trajectories.jsonl",
    ),
    Alarm(
        "KL runaway",
        "kl",
        ran_away,
        "the policy has left its starting model: raise --kl_coef or lower --lr",
    ),
    Alarm(
        "entropy runaway",
        "entropy",
        ran_away,
        "the policy writes ever more at random: lower --lr or --entropy_coef",
    ),
    Alarm(
        "no valid actions",
        "valid_rate",
        fell_to_nothing,
        "the policy has forgotten its tags and earns nothing: lower --lr",
    ),
    Alarm(
        "no searches",
        "searches_per_question",
        fell_to_nothing,
        "the policy answers from memory: are the documents of any use?",
    ),
    Alarm(
        "responses at the limit",
        "truncated",
        limit_reached,
        "most trajectories end without an answer: raise --{limit} or lower --lr",
    ),
    Alarm(
        "answer avoidance",
        "answered",
        answers_avoided,
        "the reward stays, and ever fewer questions are answered: look at trajectories without an "
        "answer in trajectories.jsonl, lower --lr or raise --kl_coef",
    ),
    Alarm(
        "thinking collapse",
        "thinking_characters",
        thinking_collapsed,
        "the policy hardly thinks any more, and the reward often follows: lower --lr or raise "
        "--kl_coef",
    ),
]


class Alarms:
    """The alarms of one run. Each sounds once."""

    def __init__(self, rows: list[dict], replies_expected: bool = True) -> None:
        """`rows` are the lines of metrics so far; without an engine no replies are expected."""
        self.rows = rows[-REMEMBERED:]
        self.replies_expected = replies_expected
        self.sounded: set[str] = set()

    def check(self, row: dict) -> Iterator[str]:
        """Add a step's line of metrics. Yields a sentence for everything that is wrong."""
        self.rows = [*self.rows[1 - REMEMBERED :], row]
        if row["step"] == FIRST_STEPS:
            sentence = diagnosis(self.rows[-FIRST_STEPS:], self.replies_expected)
            if sentence:
                yield sentence
        history = History(self.rows)
        if len(history.windows) < 2:
            return
        for alarm in ALARMS:
            if alarm.name not in self.sounded and alarm.condition(history, alarm.metric):
                self.sounded.add(alarm.name)
                advice = alarm.advice.format(limit=LIMITS[limit_in_the_way(history.now)])
                yield (
                    f"{alarm.name}: {alarm.metric} is {history.now(alarm.metric):.3g} over the "
                    f"last {WINDOW} steps; {advice}; {PAGE}."
                )


def diagnosis(rows: list[dict], replies_expected: bool = True) -> str:
    """Why a run learns nothing from its first steps, in one sentence; "" where it can learn.

    Causes come before what they cause: a turn that is cut off has no valid action either, and
    where no trajectory answers, all rewards of a group are equal.
    """
    first_steps = f"in the first {len(rows)} steps"

    def mean(metric: str) -> float:
        return fmean(row.get(metric) or 0.0 for row in rows)

    if mean("truncated_turn_tokens") + mean("truncated_context") >= NEARLY_ALL:
        return cut_off_sentence(mean, first_steps)
    if mean("valid_rate") <= 1 - NEARLY_ALL:
        return (
            f"{mean('valid_rate'):.0%} of the turns {first_steps} hold a valid action: the model "
            "does not write <search> or <answer>. Take one that follows instructions, or "
            f"{WARM_START}; {PAGE}."
        )
    if mean("truncated_turns") >= NEARLY_ALL:
        return limit_sentence(mean, first_steps)
    if replies_expected and mean("searches_per_question") <= 1 - NEARLY_ALL:
        return (
            f"There are {mean('searches_per_question'):.2f} searches a question {first_steps}: the "
            "policy answers at once, and cannot learn to search. Take a model or a prompt with "
            f"which some trajectories search, or {WARM_START}; {PAGE}."
        )
    if replies_expected and mean("empty_replies") >= NEARLY_ALL:
        return (
            f"{mean('empty_replies'):.0%} of the replies {first_steps} hold no document: check "
            "what --engine names, its --corpus, its address or its --simulator."
        )
    if mean("reward") == 0:
        return no_reward_sentence(mean, first_steps)
    if mean("flat_groups") >= NEARLY_ALL:
        return (
            f"In {mean('flat_groups'):.0%} of the groups {first_steps} all rewards are equal (the "
            f"mean reward is {mean('reward'):.2f}), and such a group teaches nothing: raise "
            f"--group_size or --temperature, or take other questions; {PAGE}."
        )
    return ""


def limit_in_the_way(mean: Callable[[str], float]) -> str:
    """The limit that ends the most trajectories, by its name in `LIMITS`."""
    return max(LIMITS, key=lambda limit: mean(f"truncated_{limit}"))


def limit_sentence(mean: Callable[[str], float], where: str) -> str:
    """That a limit ended so many trajectories, and the flag to raise."""
    limit = limit_in_the_way(mean)
    return (
        f"{mean(f'truncated_{limit}'):.0%} of the trajectories {where} end without an answer at "
        f"--{LIMITS[limit]}: raise it."
    )


def cut_off_sentence(mean: Callable[[str], float], where: str) -> str:
    """The same where text is cut off. A model that knows no tag writes on to any limit."""
    sentence = limit_sentence(mean, where)
    if mean("valid_rate") > 1 - NEARLY_ALL:
        return sentence
    return f"{sentence} If it still writes no <search> or <answer> then, {WARM_START}; {PAGE}."


def no_reward_sentence(mean: Callable[[str], float], where: str) -> str:
    """That nothing was earned, and what became of the trajectories."""
    sentence = f"Every reward {where} is 0, so that there is nothing to reinforce: "
    sentence += f"{mean('answered'):.0%} of the trajectories give an answer, and each is wrong"
    limit = limit_in_the_way(mean)
    if mean(f"truncated_{limit}") >= MANY:
        share = f"{mean(f'truncated_{limit}'):.0%}"
        return f"{sentence}; {share} end without one at --{LIMITS[limit]}: raise it."
    return f"{sentence}. Look at trajectories.jsonl, and {PAGE}."
