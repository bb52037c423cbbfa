"""The data that all parts share: a question, a search request, a turn, a trajectory. No torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """A question and its gold answers."""

    question: str
    answers: tuple[str, ...]  # any of them is right
    source: str = "data"  # the data set that it comes from


@dataclass(frozen=True)
class SearchRequest:
    """All that an engine may need for one query, so that nothing is matched up by position."""

    query: str
    question: str = ""
    answers: tuple[str, ...] = ()
    noisy: bool = False
    key: tuple[int, ...] = ()  # names the request for the engine's random numbers


@dataclass
class Turn:
    """One generation of the policy, as text, and what came back for it."""

    text: str  # the policy's own words
    action: str  # "search", "answer" or "invalid"
    content: str  # the query or the answer
    documents: list[str] | None = None  # made neutral; None where nothing was searched
    noisy: bool = False  # whether noisy documents were asked for


@dataclass
class Trajectory:
    """The token ids exactly as the model saw and sampled them. It only ever grows at its end, by
    `append` alone, so that `ids`, `loss_mask` and `logprobs` always have equal lengths."""

    example: Example
    ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)  # 1 on what the policy sampled, else 0
    logprobs: list[float] = field(default_factory=list)  # of sampling; 0.0 where the mask is 0
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    truncated: str = ""  # why it ended without an answer: see rollout.py
    reward: float = 0.0

    def append(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        """Add tokens: the policy's own come with their log-probabilities, all others without."""
        if logprobs is not None and len(logprobs) != len(ids):
            raise ValueError(f"{len(ids)} sampled tokens came with {len(logprobs)} logprobs.")
        self.ids += ids
        self.loss_mask += [int(logprobs is not None)] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs

    @property
    def ended(self) -> bool:
        """Whether it has an answer, or ended without one."""
        return self.answer is not None or bool(self.truncated)

    @property
    def searches(self) -> int:
        """How many searches were executed; one in the last turn, for instance, is not."""
        return sum(turn.documents is not None for turn in self.turns)
