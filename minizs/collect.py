"""Stage 1's data: what a real engine returned for scripted queries, labelled useful or noisy.

Paper section 3.3: a language model searches with a real engine, and a judge decides of each reply
whether it suffices for its query. Here scripted searchers put good and sloppy queries to BM25 over
many tiny worlds, and the judge is exact. A reply is useful if one of its documents is.
"""

import random
from statistics import fmean

from minizs.base import sloppy_query
from minizs.engines import BM25
from minizs.trajectory import SearchRequest
from minizs.world import RELATIONS, World, read_fact

KINDS = [(label, hop) for hop in ("final", "first") for label in ("useful", "noisy")]


def collect(worlds: int, examples: int, seed: int, top_k: int = 3, split: str = "train",
            good: float = 0.75) -> list[dict]:  # fmt: skip
    """Rows of query, question, answers, documents, label and hop, as many useful as noisy.

    A share `good` of the queries is good, the others are sloppy. Half of all queries ask BM25 for
    its best documents without what is needed, so that noise is near misses: the right subject and
    another relation, or a name that looks alike. A reply that is useless only because its query is
    about the wrong thing is left out: from it a simulator learns to state, as noise, the very fact
    that a query asks for, and no reader could tell that from a true one.
    """
    rng = random.Random(f"collect {split} {seed}")
    halves: dict[str, list[dict]] = {"useful": [], "noisy": []}
    for number in range(worlds):
        world = World(seed * 100_000 + 50_000 + number, split, people=60, towns=30, companies=30,
                      countries=12)  # fmt: skip
        engine, requests, hops = BM25(world.documents, top_k, world.judge), [], []
        for question in world.questions()[: 1 + 2 * examples // worlds]:
            step = rng.randrange(len(question.path))
            goal = question.path[step]
            query = RELATIONS[goal[1]].query.format(s=goal[0])
            if rng.random() > good:
                query = sloppy_query(world, goal, question, rng)
            noisy = rng.random() < 0.5
            requests.append(SearchRequest(query, question.text, (question.answer,), noisy))
            hops.append("final" if step == len(question.path) - 1 else "first")
        for request, hop, documents in zip(requests, hops, engine.search(requests), strict=True):
            useful = any(world.judge(text, request) for text in documents)
            if not useful and states(request.query, documents):
                continue
            row = {"query": request.query, "question": request.question,
                   "answers": list(request.answers), "documents": documents,
                   "label": "useful" if useful else "noisy", "hop": hop}  # fmt: skip
            halves[row["label"]].append(row)
    size = min(examples // 2, *map(len, halves.values()))
    rows = [row for half in halves.values() for row in rng.sample(half, size)]
    rng.shuffle(rows)
    return rows


def request_of(row: dict, key: tuple[int, ...] = ()) -> SearchRequest:
    """The request that a simulator gets for a row: the row's label is the word it is asked with."""
    noisy = row["label"] == "noisy"
    return SearchRequest(row["query"], row["question"], tuple(row["answers"]), noisy, key)


def report(engine, queries: int, seed: int) -> tuple[dict[str, float], list[dict]]:
    """How a simulator does on worlds that nobody trained on: figures, and a few examples.

    `useful_final` and `noisy_final` are how often a reply to a last-hop query contains the gold
    answer when useful or noisy documents are asked for, `..._first` the same for first hops.
    `..._on_topic` is how often a reply states the fact that was asked for, whatever its object: a
    useful first hop should (it invents the bridge), and a noisy reply should not, since no reader
    could tell its fact from a true one.
    """
    rows = collect(8, 10**6, seed, engine.top_k, "test", good=1.0)
    figures, shown = {}, []
    for kind, (label, hop) in enumerate(KINDS):
        asked = [row | {"label": label} for row in rows if row["hop"] == hop][:queries]
        replies = engine.search([request_of(row, (kind, i)) for i, row in enumerate(asked)])
        for row, reply in zip(asked, replies, strict=True):
            row["documents"] = reply
        holds = [any(row["answers"][0] in text for text in row["documents"]) for row in asked]
        on_topic = [states(row["query"], row["documents"]) for row in asked]
        figures |= {f"{label}_{hop}": fmean(holds), f"{label}_{hop}_on_topic": fmean(on_topic)}
        shown += asked[:2]
    return figures | {"n": len(asked)}, shown


def states(query: str, documents: list[str]) -> bool:
    """Does a document state the fact (subject and relation) that a good query asks for?"""
    facts = filter(None, map(read_fact, documents))
    return any(RELATIONS[relation].query.format(s=subject) == query
               for subject, relation, _ in facts)  # fmt: skip


def describe(figures: dict[str, float], shown: list[dict]) -> str:
    """The report as text: what the figures mean, and examples."""
    out = []
    for label, hop in KINDS:
        holds, on_topic = figures[f"{label}_{hop}"], figures[f"{label}_{hop}_on_topic"]
        out.append(f"{label:>6} documents, {hop:>5} hop: {holds:6.1%} contain the answer, "
                   f"{on_topic:6.1%} state the fact asked for")  # fmt: skip
    out.append(f"({figures['n']} queries of each kind, on worlds that nobody trained on. A first "
               "hop's fact is invented: only the final answer is in the prompt.)")  # fmt: skip
    for row in shown:
        out.append(f"\n{row['label']}: {row['query']}   [{row['question']} {row['answers'][0]}]")
        out += [f"    {text}" for text in row["documents"]]
    return "\n".join(out)
