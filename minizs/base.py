"""What the tiny base model learns from: it can read, and is a poor searcher. It plays Qwen2.5.

Four kinds of text, with the loss on what a model would write itself:
  recitals         documents said once more in another order: copying, where reading begins
  drills           many look-ups in one block of documents: reading, the hard skill
  demonstrations   whole trajectories of a sloppy searcher, who at each decision mostly errs
  pages            documents written for a simulator's prompt, whose word useful or noisy is wrong
                   one time in four: it can write results, but does not mind that word much

`python -m minizs.pretrain` trains it; the package ships the result in `minizs/tiny_base`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from minizs import protocol
from minizs.engines import BM25
from minizs.trajectory import SearchRequest
from minizs.world import RELATIONS, Question, World, holds_what_is_needed, names, read_fact

PROMPT = "Question: {question}"
SIMULATOR_PROMPT = (
    "Query: {query} Question: {question} Answer: {answers} Write {quality} documents:"
)
SEARCH, GUESS, RETRY = "I should look this up", "I know this", "that does not help"

Segment = tuple[str, bool]  # some text, and whether the loss is on it
Search = Callable[[str, Question, float], list[str]]


def think(thought: str, tag: str, content: str) -> Segment:
    return f"<think> {thought} </think> <{tag}> {content} </{tag}>", True


@dataclass(frozen=True)
class Habits:
    """How often the demonstrations do the right thing. Every other time they are sloppy."""

    search: float = 0.62  # rather than answer at once with a guess
    query: float = 0.5  # rather than a query about the wrong thing
    read: float = 0.88  # the right document, where there is one
    retry: float = 0.35  # search again where nothing helps, rather than believe anything
    hop: float = 0.38  # go on to the second hop, rather than answer with the first or a guess
    answer: float = 0.4  # give the whole answer and nothing else


def sloppy_query(
    world: World, goal: tuple[str, str], question: Question, rng: random.Random
) -> str:
    subject, relation = goal
    same_kind = [r for r in RELATIONS if RELATIONS[r].subject == RELATIONS[relation].subject]
    other = world.draw(RELATIONS[relation].subject, rng)
    return rng.choice([
        question.text.removesuffix("?"),
        subject.split()[0],
        RELATIONS[relation].query.format(s=other),
        RELATIONS[rng.choice(same_kind)].query.format(s=subject),
    ])  # fmt: skip


def sloppy_answer(answer: str, rng: random.Random) -> str:
    """A part of an answer of several words, or a sentence around one of a single word."""
    words = answer.split()
    return words[-1] if len(words) > 1 else f"it must be {answer}"


def wrong_object(world: World, relation: str, documents: list[str], avoid: str | None,
                 rng: random.Random) -> str:  # fmt: skip
    """Something of the right kind from the documents, else from nowhere: how bad readers answer."""
    kind = RELATIONS[relation].object
    facts = [f for f in map(read_fact, documents) if f]
    seen = [o for _, r, o in facts if RELATIONS[r].object == kind and o != avoid]
    return rng.choice(seen) if seen else world.draw(kind, rng)


def demonstration(
    world: World,
    question: Question,
    search: Search,
    rng: random.Random,
    habits: Habits = Habits(),
    noise: float = 0.35,
    turns: int = 6,
) -> list[Segment]:  # noqa: B008
    """One trajectory of a searcher with these habits, as segments of text."""
    segments: list[Segment] = [(protocol.build_prompt(question.text, PROMPT), False)]
    kind = RELATIONS[question.path[-1][1]].object
    if rng.random() > habits.search:
        return segments + [think(GUESS, "answer", world.draw(kind, rng))]
    thought, step, subject = SEARCH, 0, question.path[0][0]
    for _ in range(turns - 1):
        goal = (subject, question.path[step][1])
        relation = RELATIONS[goal[1]]
        good = rng.random() < habits.query
        query = (
            relation.query.format(s=subject) if good else sloppy_query(world, goal, question, rng)
        )
        documents = search(query, question, noise) if rng.random() > 0.02 else []
        segments.append(think(thought, "search", query))
        segments.append((protocol.wrap_documents(protocol.number_documents(documents)), False))
        found = {f[2] for f in map(read_fact, documents) if f and f[:2] == goal}
        if found and rng.random() < habits.read:
            believed = found.pop()
        elif not found and rng.random() < habits.retry:
            thought = RETRY
            continue
        else:
            believed = wrong_object(world, goal[1], documents, found.pop() if found else None, rng)
        thought = relation.claim.format(s=subject, o=believed)
        if step == len(question.path) - 1:
            good = rng.random() < habits.answer
            return segments + [
                think(thought, "answer", believed if good else sloppy_answer(believed, rng))
            ]
        if rng.random() > habits.hop:
            guess = believed if rng.random() < 0.6 else world.draw(kind, rng)
            return segments + [think(thought, "answer", guess)]
        step, subject = step + 1, believed
    return segments + [think(thought, "answer", world.draw(kind, rng))]


def drill(world: World, question: Question, search: Search, rng: random.Random) -> list[Segment]:
    """Many look-ups in one block of documents, a sixth of them for a fact that is not there."""
    subject, relation = rng.choice(question.path)
    documents = search(RELATIONS[relation].query.format(s=subject), question, 0.1)
    documents = documents + rng.sample(world.documents, rng.randint(0, 3))
    rng.shuffle(documents)
    block = protocol.wrap_documents(protocol.number_documents(documents))
    segments: list[Segment] = [(block, False)]
    facts = [f for f in map(read_fact, documents) if f]
    stated = {f[:2] for f in facts}
    for subject, relation, obj in rng.sample(facts, len(facts)):
        form = RELATIONS[relation]
        thought = form.claim.format(s=subject, o=obj)
        if rng.random() < 1 / 6:
            others = [r for r in RELATIONS if RELATIONS[r].subject == form.subject
                      and (subject, r) not in stated]  # fmt: skip
            if others:  # the same subject, another of its relations
                form, thought = RELATIONS[rng.choice(others)], RETRY
        segments.append((f"<search> {form.query.format(s=subject)} </search>", True))
        segments.append((f"<think> {thought} </think>", True))
    return segments


def recital(world: World, size: int, rng: random.Random) -> list[Segment]:
    """Random documents, then the same in another order: the plainest exercise in copying."""
    documents = rng.sample(world.documents, size)
    block = protocol.wrap_documents(protocol.number_documents(documents))
    again = [(f"<think> {text} </think>", True) for text in rng.sample(documents, size)]
    return [(block, False), *again]


def page(world: World, question: Question, search: Search, rng: random.Random) -> list[Segment]:
    """Documents for a simulator's prompt; its word of quality is right three times out of four."""
    goal = rng.choice(question.path)
    query = RELATIONS[goal[1]].query.format(s=goal[0])
    if rng.random() < 0.2:
        query = sloppy_query(world, goal, question, rng)
    documents = search(query, question, 0.5)
    useful = any(holds_what_is_needed(text, query, question) for text in documents)
    word = "useful" if useful == (rng.random() < 0.75) else "noisy"
    prompt = SIMULATOR_PROMPT.format(
        query=query, question=question.text, answers=question.answer, quality=word
    )
    return [(prompt, False), (protocol.number_documents(documents), True)]


def stream(
    seed: int, weights: Callable[[], Sequence[float]], progress: Callable[[], float]
) -> Iterator[tuple[list[Segment], bool]]:
    """Endless training texts over re-drawn worlds, each with whether it ends (in the eos token).

    `weights()` are those of recitals, drills, demonstrations and pages just now; recitals grow from
    two documents to eight with `progress()`.
    """
    rng, number = random.Random(f"base {seed}"), 0
    while True:
        world = World(seed * 100_000 + number, people=60, towns=30, companies=30, countries=12)
        number += 1
        engine = BM25(world.documents, top_k=8)

        def search(
            query: str, question: Question, noise: float, engine: BM25 = engine
        ) -> list[str]:
            ranked = engine.search([SearchRequest(query)])[0]
            if rng.random() < noise:
                ranked = [d for d in ranked if not holds_what_is_needed(d, query, question)]
            return ranked[:3]

        for question in world.questions()[:200]:
            kind = rng.choices(["recital", "drill", "demonstration", "page"], weights())[0]
            if kind == "recital":
                yield recital(world, min(8, 2 + int(progress() * 60)), rng), False
            elif kind == "drill":
                yield drill(world, question, search, rng), False
            elif kind == "demonstration":
                yield demonstration(world, question, search, rng), False
            else:
                yield page(world, question, search, rng), True


def make_tokenizer():
    """One token a word or tag, `Doc 1:` and its like too; saved in the Hugging Face format."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tags = [
        f"<{end}{name}>"
        for name in ("think", "search", "information", "answer")
        for end in ("", "/")
    ]
    marks = [f"Doc {i}:" for i in range(1, 11)] + ["Query:", "Question:", "Answer:"]
    texts = [w for r in RELATIONS.values() for w in (r.question, r.query, r.claim, *r.wordings)]
    texts += [PROMPT, SIMULATOR_PROMPT, protocol.INVALID_ACTION, SEARCH, GUESS, RETRY, "it must be"]
    texts += ["useful noisy employer founder of ? . ,"]
    from minizs.world import COMPANY_KINDS, MONTHS, TWO_HOP

    texts += [text for *_, text in TWO_HOP]
    words = [w for text in texts for w in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]
    words = sorted(
        {w for w, _ in words} - {"{", "}", "s", "o", "query", "question", "answers", "quality"}
    )
    words += MONTHS + COMPANY_KINDS + [w for pool in names().values() for w in pool]
    words += [str(n) for n in [*range(1, 32), *range(1900, 2000)]]
    special = ["<unk>", "<pad>", "<eos>"]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(special + words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in tags + marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
