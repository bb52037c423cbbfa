"""What the tiny base model learns from: it can read, and is a poor searcher. It plays Qwen2.5.

Four kinds of text, with the loss on what a model would write itself:
  recitals         documents said once more in another order: copying, where reading begins
  drills           many look-ups in one block of documents: reading, the hard skill
  demonstrations   whole trajectories of a sloppy searcher, who at each decision mostly errs
  pages            documents written for a simulator's prompt, whose word useful or noisy is wrong
                   one time in four: it can write results, but does not mind that word much

`python -m minizs.pretrain` trains it; the package ships the result in `minizs/tiny_base`.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from random import Random

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minizs import protocol
from minizs.engines import BM25
from minizs.sft import Segment
from minizs.trajectory import SearchRequest
from minizs.world import RELATIONS, TWO_HOP, Question, World, holds_what_is_needed, names, read_fact

PROMPT = "Question: {question}"
SIMULATOR_PROMPT = (
    "Query: {query} Question: {question} Answer: {answers} Write {quality} documents:"
)
SEARCH, GUESS, RETRY = "I should look this up", "I know this", "that does not help"

Search = Callable[[str, Question, float], list[str]]


def think(thought: str, tag: str, content: str) -> Segment:
    return f"<think> {thought} </think> <{tag}> {content} </{tag}>", True


class Habits:
    """How often the demonstrations do the right thing. Every other time they are sloppy."""

    search = 0.62  # rather than answer at once with a guess
    query = 0.5  # rather than a query about the wrong thing
    read = 0.88  # the right document, where there is one
    retry = 0.35  # search again where nothing helps, rather than believe anything
    hop = 0.38  # go on to the second hop, rather than answer with the first or a guess
    answer = 0.4  # give the whole answer and nothing else


def sloppy_query(world: World, goal: tuple[str, str], question: Question, rng: Random) -> str:
    """The question itself, half a name, another subject or another relation."""
    subject, relation = goal
    same_kind = [r for r in RELATIONS if RELATIONS[r].subject == RELATIONS[relation].subject]
    other = world.draw(RELATIONS[relation].subject, rng)
    return rng.choice([
        question.text.removesuffix("?"),
        subject.split()[0],
        RELATIONS[relation].query.format(s=other),
        RELATIONS[rng.choice(same_kind)].query.format(s=subject),
    ])  # fmt: skip


def sloppy_answer(answer: str) -> str:
    """A part of an answer of several words, or a sentence around one of a single word."""
    words = answer.split()
    return words[-1] if len(words) > 1 else f"it must be {answer}"


def wrong_object(world: World, relation: str, documents: list[str], avoid: str | None,
                 rng: Random) -> str:  # fmt: skip
    """Something of the right kind from the documents, else from nowhere: how bad readers answer."""
    kind = RELATIONS[relation].object
    facts = [f for f in map(read_fact, documents) if f]
    seen = [o for _, r, o in facts if RELATIONS[r].object == kind and o != avoid]
    return rng.choice(seen) if seen else world.draw(kind, rng)


def demonstration(world: World, question: Question, search: Search, rng: Random) -> list[Segment]:
    """One trajectory of a searcher with these habits, of at most six turns."""
    segments: list[Segment] = [(protocol.build_prompt(question.text, PROMPT), False)]
    kind = RELATIONS[question.path[-1][1]].object
    if rng.random() > Habits.search:
        return segments + [think(GUESS, "answer", world.draw(kind, rng))]
    thought, step, subject = SEARCH, 0, question.path[0][0]
    for _ in range(5):
        goal = (subject, question.path[step][1])
        relation = RELATIONS[goal[1]]
        query = relation.query.format(s=subject)
        if rng.random() >= Habits.query:
            query = sloppy_query(world, goal, question, rng)
        documents = search(query, question, 0.35) if rng.random() > 0.02 else []
        segments.append(think(thought, "search", query))
        segments.append((protocol.wrap_documents(protocol.number_documents(documents)), False))
        found = {f[2] for f in map(read_fact, documents) if f and f[:2] == goal}
        if found and rng.random() < Habits.read:
            believed = found.pop()
        elif not found and rng.random() < Habits.retry:
            thought = RETRY
            continue
        else:
            believed = wrong_object(world, goal[1], documents, found.pop() if found else None, rng)
        thought = relation.claim.format(s=subject, o=believed)
        if step == len(question.path) - 1:
            if rng.random() >= Habits.answer:
                believed = sloppy_answer(believed)
            return segments + [think(thought, "answer", believed)]
        if rng.random() > Habits.hop:
            guess = believed if rng.random() < 0.6 else world.draw(kind, rng)
            return segments + [think(thought, "answer", guess)]
        step, subject = step + 1, believed
    return segments + [think(thought, "answer", world.draw(kind, rng))]


def drill(world: World, question: Question, search: Search, rng: Random) -> list[Segment]:
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


def recital(world: World, size: int, rng: Random) -> list[Segment]:
    """Random documents, then the same in another order: the plainest exercise in copying."""
    documents = rng.sample(world.documents, size)
    block = protocol.wrap_documents(protocol.number_documents(documents))
    again = [(f"<think> {text} </think>", True) for text in rng.sample(documents, size)]
    return [(block, False), *again]


def page(world: World, question: Question, search: Search, rng: Random) -> list[Segment]:
    """Documents for a simulator's prompt; its word of quality is right three times out of four."""
    goal = rng.choice(question.path)
    query = RELATIONS[goal[1]].query.format(s=goal[0])
    if rng.random() < 0.2:
        query = sloppy_query(world, goal, question, rng)
    documents = search(query, question, 0.5)
    useful = any(holds_what_is_needed(text, query, question) for text in documents)
    word = "useful" if useful == (rng.random() < 0.75) else "noisy"
    prompt = SIMULATOR_PROMPT.format(query=query, question=question.text, answers=question.answer,
                                     quality=word)  # fmt: skip
    return [(prompt, False), (protocol.number_documents(documents), True)]


def searcher(world: World, rng: Random) -> Search:
    """BM25 over this world that gives three documents, noisy ones as often as it is told."""
    engine = BM25(world.documents, top_k=8)

    def search(query: str, question: Question, noise: float) -> list[str]:
        ranked = engine.search([SearchRequest(query)])[0]
        if rng.random() < noise:
            ranked = [d for d in ranked if not holds_what_is_needed(d, query, question)]
        return ranked[:3]

    return search


def stream(
    seed: int, weights: Callable[[], Sequence[float]], progress: Callable[[], float]
) -> Iterator[tuple[list[Segment], bool]]:
    """Endless training texts over re-drawn worlds, each with whether it ends (in the eos token).

    `weights()` are those of recitals, drills, demonstrations and pages just now; recitals grow from
    two documents to eight with `progress()`.
    """
    rng = Random(f"base {seed}")
    for number in count(seed * 100_000):
        world = World(number, people=60, towns=30, companies=30, countries=12)
        search = searcher(world, rng)
        for question in world.questions()[:200]:
            [write] = rng.choices([recital, drill, demonstration, page], weights())
            if write is recital:
                yield recital(world, min(8, 2 + int(progress() * 60)), rng), False
            else:
                yield write(world, question, search, rng), write is page


def make_tokenizer():
    """One token a word or tag, `Doc 1:` and its like too; saved in the Hugging Face format."""
    pairs = ("think", "search", "information", "answer")
    tags = [f"<{end}{name}>" for name in pairs for end in ("", "/")]
    marks = [f"Doc {i}:" for i in range(1, 11)] + ["Query:", "Question:", "Answer:"]
    texts = [w for r in RELATIONS.values() for w in (r.question, r.query, r.claim, *r.wordings)]
    texts += [PROMPT, SIMULATOR_PROMPT, protocol.INVALID_ACTION, SEARCH, GUESS, RETRY, "it must be"]
    texts += ["useful noisy employer founder of ? . ,", *(text for *_, text in TWO_HOP)]
    words = [w for text in texts for w in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]
    words = sorted({w for w, _ in words} - set("{ } s o query question answers quality".split()))
    words += [w for pool in names().values() for w in pool]
    words += map(str, [*range(1, 32), *range(1900, 2000)])
    vocabulary = dict.fromkeys(["<unk>", "<pad>", "<eos>", *words])
    vocabulary = {w: i for i, w in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in tags + marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
