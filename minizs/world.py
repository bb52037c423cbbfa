"""The tiny world: people, towns, companies and countries with made-up names, anew for every seed.

It is what lets the whole method run offline and be judged exactly. A world is a set of facts
`(subject, relation) -> object`, a corpus of one-sentence documents that state them, and one-hop and
two-hop questions about them. Names come from one fixed vocabulary, facts from the seed, so a model
trained on some worlds knows the language of every other world and none of its facts: the only way
to a high score is to search, read, hop and answer. Full names of people and companies are split
between training and testing, so that a test name is a pair of words no model has seen together.

Left out on purpose: objects that are named before their subject, paraphrases without a word in
common with the query (BM25 could not find them) and symmetric relations.
"""

import re
from dataclasses import dataclass
from functools import cache
from random import Random

from minizs.trajectory import Example, SearchRequest

MONTHS = """January February March April May June
    July August September October November December""".split()
COMPANY_KINDS = "Works Press Mills Mining Lines Motors Bank Labs Timber Foods".split()


@dataclass(frozen=True)
class Relation:
    """One kind of fact. `{s}` stands for its subject, `{o}` for its object."""

    subject: str
    object: str
    question: str
    query: str  # what a good searcher types
    claim: str  # how a careful reader notes the fact
    wordings: tuple[str, ...]  # how documents state it


RELATIONS = {
    "born_in": Relation(
        "person", "town", "where was {s} born?", "{s} born in", "{s} was born in {o}",
        ("{s} was born in {o}", "{s} , born in {o} long ago", "records show {s} was born in {o}"),
    ),
    "born_on": Relation(
        "person", "date", "when was {s} born?", "{s} born on", "{s} was born on {o}",
        ("{s} was born on {o}", "{s} , born on {o} at home", "records show {s} was born on {o}"),
    ),
    "works_for": Relation(
        "person", "company", "whom does {s} work for?", "{s} works for", "{s} works for {o}",
        ("{s} works for {o}", "{s} , who works for {o} today", "friends say {s} works for {o}"),
    ),
    "lies_in": Relation(
        "town", "country", "in which country is {s}?", "{s} lies in", "{s} lies in {o}",
        ("{s} lies in {o}", "{s} , which lies in {o} today", "maps show {s} lies in {o}"),
    ),
    "founded_by": Relation(
        "company", "person", "who founded {s}?", "{s} founded by", "{s} was founded by {o}",
        ("{s} was founded by {o}", "{s} , founded by {o} long ago",
         "records show {s} was founded by {o}"),
    ),
    "based_in": Relation(
        "company", "town", "where is {s} based?", "{s} based in", "{s} is based in {o}",
        ("{s} is based in {o}", "{s} , based in {o} today", "maps show {s} is based in {o}"),
    ),
}  # fmt: skip

TWO_HOP = (
    ("born_in", "lies_in", "in which country was {s} born?"),
    ("works_for", "based_in", "where is the employer of {s} based?"),
    ("works_for", "founded_by", "who founded the employer of {s}?"),
    ("founded_by", "born_on", "when was the founder of {s} born?"),
    ("founded_by", "born_in", "where was the founder of {s} born?"),
    ("based_in", "lies_in", "in which country is {s} based?"),
)


@cache
def names() -> dict[str, list[str]]:
    """The fixed vocabulary by role, most of it invented: the same in every world and process."""
    rng, seen = Random("minizs names"), {"work", "works"}
    onsets = "b br c ch d dr f fl g gr h j k kl l m n p pr r s sk st t tr v w z".split()
    vowels, codas = "a e i o u ai ea ou".split(), "l n r s t nd rk lm th ck x".split()
    endings = {"town": "by ton ford wick stead", "country": "ia land mark",
               "given": "a o en is", "family": "er ow ard ley", "company": "co va tex"}  # fmt: skip
    sizes = {"given": 80, "family": 80, "town": 100, "country": 30, "company": 80}
    out = {"month": MONTHS, "company_kind": COMPANY_KINDS}
    for role, size in sizes.items():
        words = out[role] = []
        while len(words) < size:
            word = rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas)
            word += rng.choice(endings[role].split())
            if word not in seen:
                seen.add(word)
                words.append(word.capitalize())
    return out


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    kind: str  # "one_hop" or "two_hop"
    path: tuple[tuple[str, str], ...]  # the (subject, relation) pairs to look up, in order


class World:
    """All facts, documents and questions of one seed. `split` is "train" or "test" (see above)."""

    def __init__(self, seed: int, split: str = "train", people: int = 150, towns: int = 60,
                 companies: int = 60, countries: int = 20):  # fmt: skip
        self.rng = rng = Random(f"world {split} {seed}")
        pool = names()
        self.members = {
            "person": _pairs(pool["given"], pool["family"], split, people, rng),
            "company": _pairs(pool["company"], COMPANY_KINDS, split, companies, rng),
            "town": rng.sample(pool["town"], towns),
            "country": rng.sample(pool["country"], countries),
        }
        self.facts = {
            (subject, name): self.draw(relation.object)
            for name, relation in RELATIONS.items()
            for subject in self.members[relation.subject]
        }
        self.documents = [
            rng.choice(RELATIONS[name].wordings).format(s=subject, o=obj)
            for (subject, name), obj in self.facts.items()
        ]
        self._by_text: dict[str, Question] = {}

    def draw(self, role: str, rng: Random | None = None) -> str:
        """A random thing of this kind: a member of the world, or any date."""
        rng = rng or self.rng
        if role == "date":
            return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1900, 1999)}"
        return rng.choice(self.members[role])

    def judge(self, document: str, request: SearchRequest) -> bool:
        """`holds_what_is_needed` for a request that asks one of this world's questions."""
        if not self._by_text:
            self._by_text.update({q.text: q for q in self.questions()})
        question = self._by_text.get(request.question)
        return question is not None and holds_what_is_needed(document, request.query, question)

    def examples(self) -> list[Example]:
        """The questions in the form that training and evaluation take."""
        return [Example(q.text, (q.answer,), q.kind) for q in self.questions()]

    def questions(self) -> list[Question]:
        """Every question of this world, in a fixed shuffled order, one-hop and two-hop by turns."""
        one = [
            Question(RELATIONS[r].question.format(s=s), obj, "one_hop", ((s, r),))
            for (s, r), obj in self.facts.items()
        ]
        two = []
        for first, second, text in TWO_HOP:
            for s in self.members[RELATIONS[first].subject]:
                bridge = self.facts[s, first]
                path = ((s, first), (bridge, second))
                two.append(Question(text.format(s=s), self.facts[bridge, second], "two_hop", path))
        rng = Random(len(one))
        rng.shuffle(one)
        rng.shuffle(two)
        return [q for pair in zip(one, two, strict=False) for q in pair]


def _pairs(first: list[str], second: list[str], split: str, n: int, rng: Random) -> list[str]:
    """`n` two-word names; a fifth of all pairs is kept for the test split."""
    pairs = [f"{a} {b}" for i, a in enumerate(first) for j, b in enumerate(second)
             if ((i + j) % 5 == 0) == (split == "test")]  # fmt: skip
    return rng.sample(pairs, n)


_PATTERNS = [  # the longest wording of a relation first
    (name, re.compile(re.escape(text).replace(r"\{s\}", "(.+)").replace(r"\{o\}", "(.+)")))
    for name, relation in RELATIONS.items()
    for text in sorted(relation.wordings, key=len, reverse=True)
]


@cache
def read_fact(document: str) -> tuple[str, str, str] | None:
    """The (subject, relation, object) that a document states, whoever wrote it; None if garbled."""
    for name, pattern in _PATTERNS:
        if match := pattern.fullmatch(document):
            return match[1], name, match[2]
    return None


def holds_what_is_needed(document: str, query: str, question: Question) -> bool:
    """The exact judge: does the document state a fact that this query, for this question, is after?

    True when the fact is a step of the question's path and the query names its subject, in part at
    least: a first hop restated in the reply to a second-hop query is of no use.
    """
    fact = read_fact(document)
    if fact is None or fact[:2] not in question.path:
        return False
    return not set(fact[0].split()).isdisjoint(query.split())


@cache
def embedded(role: str) -> World:
    """The worlds that the scripts use: "train" for RL, "dev" while it trains, "test" at the end.

    They are larger than those that base and simulator learn from. "dev" and "test" share no person
    or company with any world that is trained on; all worlds draw on the same towns and countries,
    so that a few towns lie in the same country in two of them, by chance.
    """
    seed = {"train": -1, "dev": -2, "test": -3}[role]
    split = "train" if role == "train" else "test"
    return World(seed, split, people=300, towns=100, companies=100, countries=30)
