"""The tiny world: people, towns, companies and countries with made-up names, anew for every seed.

A world is facts `(subject, relation) -> object`, sentences that state them and questions of one and
two hops, in the language of language.yaml. Names come from one vocabulary, facts from the seed: no
world tells a fact of another. A test's person or company is a pair of words never seen together."""

import re
from collections import namedtuple
from functools import cache
from pathlib import Path
from random import Random

import yaml

from minizs.trajectory import SearchRequest

Relation = namedtuple("Relation", "subject object question query wordings")  # see language.yaml
Question = namedtuple("Question", "text answer kind path")  # path: (subject, relation) pairs
LANGUAGE = yaml.safe_load(Path(__file__).with_name("language.yaml").read_text(encoding="utf-8"))
RELATIONS = {name: Relation(**form) for name, form in LANGUAGE["relations"].items()}
TWO_HOP = LANGUAGE["two_hop"]
_PATTERNS = [
    (name, re.compile(re.sub(r"\\\{[so]\\\}", "(.+)", re.escape(text))))
    for name, relation in RELATIONS.items()  # the longest wording of each first
    for text in sorted(relation.wordings, key=len, reverse=True)
]


@cache
def names() -> dict[str, list[str]]:
    """The fixed vocabulary by role, most of it invented: the same in every world and process."""
    rng, taken = Random("minizs names"), dict.fromkeys(LANGUAGE["not_names"])  # in their order
    out = {"month": LANGUAGE["months"], "company_kind": LANGUAGE["company_kinds"]}
    for role, form in LANGUAGE["names"].items():
        syllables = [part.split() for part in (*LANGUAGE["syllables"], form["endings"])]
        first = len(taken)
        while len(taken) < first + form["number"]:
            taken["".join(map(rng.choice, syllables))] = None
        out[role] = [word.capitalize() for word in list(taken)[first:]]
    return out


class World:
    """All facts, documents and questions of one seed. `split` is "train" or "test" (see above)."""

    def __init__(
        self,
        seed: int,
        split: str = "train",
        people: int = 60,
        towns: int = 30,
        companies: int = 30,
        countries: int = 12,
    ):
        rng, pool = Random(f"world {split} {seed}"), names()
        self.members = {
            "person": _pairs(pool["given"], pool["family"], split, people, rng),
            "company": _pairs(pool["company"], pool["company_kind"], split, companies, rng),
            "town": rng.sample(pool["town"], towns),
            "country": rng.sample(pool["country"], countries),
        }
        self.facts = {
            (s, name): self.draw(form.object, rng)
            for name, form in RELATIONS.items()
            for s in self.members[form.subject]
        }
        self.documents = [
            rng.choice(RELATIONS[name].wordings).format(s=subject, o=obj)
            for (subject, name), obj in self.facts.items()
        ]
        self._paths = {question.text: question.path for question in self.questions()}

    def draw(self, role: str, rng: Random) -> str:
        """A random thing of this kind: a member of the world, or any date."""
        if role == "date":
            return f"{rng.randint(1, 28)} {rng.choice(names()['month'])} {rng.randint(1900, 1999)}"
        return rng.choice(self.members[role])

    def judge(self, document: str, request: SearchRequest) -> bool:
        """Exact: does this document state a step of the question's path, and the query name its
        subject, in part at least? (Else a first hop restated to a second-hop query were useful.)"""
        subject, relation, _ = read_fact(document) or ("", "", "")
        on_path = (subject, relation) in self._paths.get(request.question, ())
        return on_path and not set(subject.split()).isdisjoint(request.query.split())

    def questions(self) -> list[Question]:
        """Every question, in a fixed shuffled order, one-hop and two-hop by turns."""
        one = [
            Question(RELATIONS[r].question.format(s=s), obj, "one_hop", ((s, r),))
            for (s, r), obj in self.facts.items()
        ]
        two = [
            Question(text.format(s=s), self.facts[path[1]], "two_hop", path)
            for first, second, text in TWO_HOP
            for s in self.members[RELATIONS[first].subject]
            for path in [((s, first), (self.facts[s, first], second))]
        ]
        rng = Random(len(one))
        rng.shuffle(one)
        rng.shuffle(two)
        return [q for pair in zip(one, two, strict=False) for q in pair]


def _pairs(first: list[str], second: list[str], split: str, n: int, rng: Random) -> list[str]:
    """`n` two-word names; a fifth of all pairs is kept for the test split."""
    return rng.sample(
        [
            f"{a} {b}"
            for i, a in enumerate(first)
            for j, b in enumerate(second)
            if ((i + j) % 5 == 0) == (split == "test")
        ],
        n,
    )


@cache
def read_fact(document: str) -> tuple[str, str, str] | None:
    """The (subject, relation, object) that a document states, whoever wrote it; None if garbled."""
    matches = ((name, pattern.fullmatch(document)) for name, pattern in _PATTERNS)
    return next(((found[1], name, found[2]) for name, found in matches if found), None)


@cache
def embedded(role: str) -> World:
    """The worlds of the scripts, larger than those of base and simulator: "train" for RL, "dev"
    while it trains, "test" at the end. The last two share no person or company with the others."""
    seed, split = {"train": (-1, "train"), "dev": (-2, "test"), "test": (-3, "test")}[role]
    return World(seed, split, people=300, towns=100, companies=100, countries=30)
