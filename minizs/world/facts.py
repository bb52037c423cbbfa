"""The tiny world: people, towns, companies and countries with made-up names, anew for each seed.

A world is a set of facts `(subject, relation) -> object`, one document for each fact, and questions
that take one fact (one hop) or two (two hops). The sentences come from `language.yaml`. The names
come from one fixed vocabulary, so that a word-level tokenizer knows them all, but the facts are
drawn from the world's seed: what is true in one world says nothing about another.

A person or a company is a pair of words. Of the worlds with all words, only those of the split
"test" have a certain fifth of the pairs. So a test asks about people who are in no text that the
simulator or the policy is trained on. The worlds of the base model have few words and do not keep
to this split. Their people can have the name of somebody in the test, but other facts.
"""

import re
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import yaml

from minizs.trajectory import SearchRequest

LANGUAGE = yaml.safe_load(Path(__file__).with_name("language.yaml").read_text(encoding="utf-8"))


class Relation(NamedTuple):
    """A kind of fact, and the sentences about it; `{s}` is the subject and `{o}` the object."""

    subject: str  # what a subject is: "person", "town", ...
    object: str  # what an object is; also "date"
    question: str
    query: str  # what a good searcher types
    wordings: list[str]  # how documents state the fact


class Question(NamedTuple):
    text: str
    answer: str
    kind: str  # "one_hop" or "two_hop"
    path: tuple[tuple[str, str], ...]  # the (subject, relation) pairs to look up, in order


class Fact(NamedTuple):
    subject: str
    relation: str
    object: str


RELATIONS = {name: Relation(**form) for name, form in LANGUAGE["relations"].items()}
TWO_HOP = LANGUAGE["two_hop"]  # rows of first relation, second relation, question


class World:
    """All facts, documents and questions of one seed; `split` is "train" or "test" (see above).

    `words` is how many words there are for each half of a person's name, and for a company's own
    name; by default all. The fewer, the more people share half of their names: a small world is
    then as full of near misses as a large one. With few words the split is by their places in this
    world, so that worlds of both splits can share a name.
    """

    def __init__(
        self,
        seed: int,
        split: str = "train",
        people: int = 60,
        towns: int = 30,
        companies: int = 30,
        countries: int = 12,
        words: int | None = None,
    ):
        rng = Random(f"world {split} {seed}")
        of = dict(names())
        if words:
            for role in ("given", "family", "company"):
                of[role] = rng.sample(of[role], words)
        self.members = {
            "person": _draw_pairs(of["given"], of["family"], split, people, rng),
            "company": _draw_pairs(of["company"], of["company_kind"], split, companies, rng),
            "town": rng.sample(of["town"], towns),
            "country": rng.sample(of["country"], countries),
        }
        self.facts = {
            (subject, name): self.draw(relation.object, rng)
            for name, relation in RELATIONS.items()
            for subject in self.members[relation.subject]
        }
        self.documents = [
            rng.choice(RELATIONS[name].wordings).format(s=subject, o=object)
            for (subject, name), object in self.facts.items()
        ]
        self._paths = {question.text: question.path for question in self.questions()}

    def draw(self, role: str, rng: Random) -> str:
        """A random thing of this kind: a member of the world, or any date."""
        if role == "date":
            return f"{rng.randint(1, 28)} {rng.choice(names()['month'])} {rng.randint(1900, 1999)}"
        return rng.choice(self.members[role])

    def judge(self, document: str, request: SearchRequest) -> bool:
        """Whether a document is of use to a request. This is exact: it states a fact on the path of
        the question, and the query names the fact's subject, in part at least. (Without the second
        condition, the first hop's fact would count as useful to a query for the second hop.)"""
        fact = read_fact(document)
        if fact is None:
            return False
        path = self._paths.get(request.question, ())
        if (fact.subject, fact.relation) not in path:
            return False
        return not set(fact.subject.split()).isdisjoint(request.query.split())

    def questions(self) -> list[Question]:
        """Every question, in a fixed shuffled order, one-hop and two-hop ones by turns."""
        one_hop = [
            Question(RELATIONS[name].question.format(s=subject), answer, "one_hop", path)
            for (subject, name), answer in self.facts.items()
            for path in [((subject, name),)]
        ]
        two_hop = []
        for first, second, text in TWO_HOP:
            for subject in self.members[RELATIONS[first].subject]:
                path = ((subject, first), (self.facts[subject, first], second))
                answer = self.facts[path[1]]
                two_hop.append(Question(text.format(s=subject), answer, "two_hop", path))
        rng = Random(len(one_hop))
        rng.shuffle(one_hop)
        rng.shuffle(two_hop)
        return [question for pair in zip(one_hop, two_hop, strict=False) for question in pair]


@cache
def names() -> dict[str, list[str]]:
    """The vocabulary by role, most of it invented: the same in every world and process."""
    rng = Random("minizs names")
    words = {"month": LANGUAGE["months"], "company_kind": LANGUAGE["company_kinds"]}
    inventions = dict.fromkeys(LANGUAGE["not_names"])  # a set that keeps its order
    for role, form in LANGUAGE["names"].items():
        syllables = [part.split() for part in (*LANGUAGE["syllables"], form["endings"])]
        first = len(inventions)
        while len(inventions) < first + form["number"]:
            word = "".join(rng.choice(choices) for choices in syllables)
            inventions[word] = None  # a word that is there already changes nothing
        words[role] = [word.capitalize() for word in list(inventions)[first:]]
    return words


def _draw_pairs(first: list[str], second: list[str], split: str, n: int, rng: Random) -> list[str]:
    """`n` two-word names out of the pairs of this split; "test" has a fifth of all pairs."""
    pairs = []
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            in_test = (i + j) % 5 == 0
            if in_test == (split == "test"):
                pairs.append(f"{one} {other}")
    return rng.sample(pairs, n)


def _compile_wordings() -> list[tuple[str, re.Pattern]]:
    """(relation, pattern) for each wording, of each relation the longest first."""
    patterns = []
    for name, relation in RELATIONS.items():
        for wording in sorted(relation.wordings, key=len, reverse=True):
            patterns.append((name, re.compile(_as_pattern(wording))))
    return patterns


def _as_pattern(sentence: str) -> str:
    """A regular expression for a sentence of the language, with a group for subject and object."""
    return re.sub(r"\\\{[so]\\\}", "(.+)", re.escape(sentence))


WORDINGS = _compile_wordings()


@cache
def read_fact(document: str) -> Fact | None:
    """The fact that a document states, whoever wrote it; None where it states none."""
    for name, pattern in WORDINGS:
        match = pattern.fullmatch(document)
        if match:
            return Fact(match[1], name, match[2])
    return None


def _compile_questions() -> list[tuple[list[str], re.Pattern]]:
    """(relations to look up in turn, pattern) for each form of a question, the longest first: a
    shorter form can fit a longer question as well."""
    forms = [([name], relation.question) for name, relation in RELATIONS.items()]
    forms += [([first, second], text) for first, second, text in TWO_HOP]
    forms.sort(key=lambda form: len(form[1]), reverse=True)
    return [(relations, re.compile(_as_pattern(text))) for relations, text in forms]


QUESTIONS = _compile_questions()


@cache
def read_question(text: str) -> tuple[str, list[str]] | None:
    """The subject of a question and the relations to look up, one after the other; None for a text
    that is no question of a tiny world."""
    for relations, pattern in QUESTIONS:
        match = pattern.fullmatch(text)
        if match:
            return match[1], relations
    return None


# The worlds of the scripts, and of the pages that the simulator learns from. They are larger than
# those of the base model, so that many people share half of their name.
LARGE = {"people": 300, "towns": 100, "companies": 100, "countries": 30}


@cache
def embedded(role: str) -> World:
    """The worlds of the scripts: "train" for RL, "dev" for evaluation during training, and "test"
    for evaluation after it. The last two share no person and no company with the first, or with the
    worlds that the simulator learns from."""
    seed, split = {"train": (-1, "train"), "dev": (-2, "test"), "test": (-3, "test")}[role]
    return World(seed, split, **LARGE)
