"""A searcher without a model, for real data before there is any policy that can search.

It asks the question itself. Where the documents do not hold a gold answer, it asks narrower
queries: a name from the documents, with those words of the question that the name's sentence does
not explain. Where a document holds a gold answer, it gives that answer. So it is a teacher who
looks up whether an answer is right, but who writes no query that a reader of the documents could
not write. Its trajectories are demonstrations for a warm start (demonstrations.py), and its
searches are examples for the simulator (collect.py).

Left out on purpose: questions whose gold is "yes" or "no" are never answered, since no document
states such an answer; scripts without capital letters have no names, so that there the second query
is the question's own words, and the last.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from minizs.protocol import neutralize
from minizs.randomness import uniform
from minizs.reward import JUDGEMENTS, f1_score, normalize_answer
from minizs.trajectory import Example, SearchRequest, Trajectory, Turn

FIRST_THOUGHT = "I should look this up"  # words that the tiny world's model knows as well
NEXT_THOUGHT = "that does not help"
THOUGHT_WORDS = 20  # at most, of the sentence that is noted before an answer
NOISE, ENGINE = 0, 1  # what a random number is for is part of its key
COMMON_WORDS = frozenset(
    """a an and are as at be been but by can could did do does for from had has have he her him his
    how i if in into is it its me my of on or our she should so than that the their them then there
    these they this those to was we were what when where which while who whom whose why will with
    would you your""".split()
)
MONTHS = frozenset(
    """january february march april may june july august september october november
    december""".split()
)
CONNECTORS = {"of", "the", "de", "la", "von", "van"}  # inside a name, between capitalised words
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Candidate(NamedTuple):
    """A name in a document, which may be the next thing to ask about."""

    name: str
    sentence: str  # where it stands
    shared: int  # how many of the question's words this sentence has


def search_plainly(
    examples: Sequence[Example],
    engine,
    *,
    max_searches: int,
    noise: float = 0.0,
    seed: int = 0,
    keys: Sequence[tuple[int, ...]] | None = None,
) -> list[Trajectory]:
    """A trajectory for each example, of turns without tokens (see demonstrations.py for these).

    All questions advance together, so that the engine answers a whole turn at once. With the
    probability `noise` a search asks for noisy documents; after these the searcher tries again.
    `keys`: what the random numbers of an example depend on, by default its index.
    """
    keys = keys or [(index,) for index in range(len(examples))]
    searchers = [_Searcher(example) for example in examples]
    for turn in range(max_searches):
        requests: dict[int, SearchRequest] = {}
        for index, searcher in enumerate(searchers):
            query = searcher.next_query()
            if query:
                noisy = uniform(seed, NOISE, *keys[index], turn) < noise
                requests[index] = searcher.request(query, noisy, (ENGINE, *keys[index], turn))
        if not requests:
            break
        replies = engine.search(list(requests.values()))
        for (index, request), documents in zip(requests.items(), replies, strict=True):
            searchers[index].read(request, documents)
    return [searcher.trajectory for searcher in searchers]


class _Searcher:
    """One question on its way: what has been asked, what has been read, what may be asked next."""

    def __init__(self, example: Example) -> None:
        self.trajectory = Trajectory(example)
        self.question = neutralize(example.question).strip()
        self.words = content_words(self.question)
        self.queries: list[str] = []
        self.candidates: list[Candidate] = []

    def next_query(self) -> str:
        """The next query, which has not been tried yet; "" where there is an answer or no idea."""
        if self.trajectory.answer is not None:
            return ""
        if not self.queries:
            return self.question.removesuffix("?").strip()
        for candidate in self.candidates:
            query = narrow_query(self.words, candidate)
            if query not in self.queries:
                return query
        plain_words = " ".join(self.words)
        return plain_words if plain_words not in self.queries else ""

    def request(self, query: str, noisy: bool, key: tuple[int, ...]) -> SearchRequest:
        self.queries.append(query)
        return SearchRequest(query, self.question, self.trajectory.example.answers, noisy, key)

    def read(self, request: SearchRequest, documents: list[str]) -> None:
        """Note the search as a turn, and the answer as another if a document holds it."""
        thought = NEXT_THOUGHT if self.trajectory.turns else FIRST_THOUGHT
        documents = [neutralize(text) for text in documents]
        turn = make_turn(thought, "search", request.query)
        turn.documents = documents
        turn.noisy = request.noisy
        self.trajectory.turns.append(turn)
        evidence = find_answer(documents, self.trajectory.example.answers)
        if evidence is None:
            self.candidates += names_in(documents, self.words)
            # The most promising name first; of equals the one that was read first.
            self.candidates.sort(key=lambda candidate: -candidate.shared)
            return
        answer, sentence = evidence
        thought = excerpt(sentence, answer)
        self.trajectory.turns.append(make_turn(thought, "answer", answer))
        self.trajectory.answer = answer
        self.trajectory.reward = f1_score(answer, self.trajectory.example.answers)


def make_turn(thought: str, action: str, content: str) -> Turn:
    """A policy's turn in the form that the prompt asks for."""
    text = f"<think> {thought} </think> <{action}> {content} </{action}>"
    return Turn(text, action, content)


def find_answer(documents: list[str], answers: Sequence[str]) -> tuple[str, str] | None:
    """The first gold answer that stands in a document, word for word but for case and punctuation,
    and the sentence that holds it (or the document, where the answer runs across sentences)."""
    for document in documents:
        for answer in answers:
            if not is_stated(answer, document):
                continue
            for sentence in SENTENCE_END.split(document):
                if is_stated(answer, sentence):
                    return answer, sentence
            return answer, document
    return None


def is_stated(answer: str, text: str) -> bool:
    """Whether a text holds an answer as whole words. "yes" and "no" are stated by nothing."""
    words = normalize_answer(answer)
    if not words or words in JUDGEMENTS:
        return False
    return f" {words} " in f" {normalize_answer(text)} "


def excerpt(sentence: str, answer: str) -> str:
    """The first `THOUGHT_WORDS` words of a sentence, or the first so many that hold the answer."""
    words = sentence.split()
    for start in range(len(words)):
        part = " ".join(words[start : start + THOUGHT_WORDS])
        if is_stated(answer, part):
            return part
    return answer


def content_words(text: str) -> list[str]:
    """The words of a text that mean something by themselves, in their order, each once."""
    words = re.findall(r"\w[\w'’.-]*\w|\w", text)
    return list(dict.fromkeys(word for word in words if word.lower() not in COMMON_WORDS))


def narrow_query(question_words: list[str], candidate: Candidate) -> str:
    """A name and what is still to be found out: the question's words that neither the name nor its
    sentence has."""
    explained = {word.lower() for word in content_words(candidate.sentence)}
    remaining = [word for word in question_words if word.lower() not in explained]
    return " ".join([candidate.name, *remaining])


def names_in(documents: list[str], question_words: list[str]) -> list[Candidate]:
    """Every name of the documents that the question does not hold already, in their order."""
    known = {word.lower() for word in question_words}
    candidates: dict[str, Candidate] = {}
    for document in documents:
        for sentence in SENTENCE_END.split(document):
            words = {word.lower() for word in content_words(sentence)}
            shared = len(known & words)
            for name in capitalised_names(sentence):
                is_new = not {word.lower() for word in content_words(name)} <= known
                if is_new and name not in candidates:
                    candidates[name] = Candidate(name, sentence, shared)
    return list(candidates.values())


def capitalised_names(sentence: str) -> list[str]:
    """Runs of capitalised words, such as "University of Oslo", in their order. The first word of
    the sentence alone is none, since it has its capital anyway."""
    names: list[list[str]] = [[]]
    for token in sentence.split():
        word = token.strip("\"'“”‘’()[].,;:!?")
        ends = token != word and not token.endswith(word)  # punctuation behind it ends a name
        if word[:1].isupper():
            names[-1].append(word)
        elif names[-1] and word in CONNECTORS:
            names[-1].append(word)
        else:
            names.append([])
        if ends:
            names.append([])
    if len(names[0]) == 1:
        names[0] = []
    trimmed = [_trim(words) for words in names]
    return [name for name in trimmed if name and name.lower() not in MONTHS]


def _trim(words: list[str]) -> str:
    """A name without common words and connectors at its ends: "The Nile of" becomes "Nile"."""
    while words and words[0].lower() in COMMON_WORDS | CONNECTORS:
        words = words[1:]
    while words and words[-1].lower() in COMMON_WORDS | CONNECTORS:
        words = words[:-1]
    return " ".join(words)
