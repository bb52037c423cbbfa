"""Stage 1's data: what a real engine returned for scripted queries, labelled useful or noisy.

Paper section 3.3: a language model searches with a real engine, and a judge decides of each reply
whether it suffices for its query. Here scripted searchers put good and sloppy queries to BM25 over
many tiny worlds, and the judge is exact. A reply is useful if one of its documents is.
"""

import random
from dataclasses import replace

from minizs.base import sloppy_query
from minizs.engines import BM25
from minizs.trajectory import SearchRequest
from minizs.world import RELATIONS, World, read_fact

GOOD_QUERIES = 0.75


def collect(worlds: int, examples: int, seed: int, top_k: int = 3, split: str = "train",
            good: float = GOOD_QUERIES) -> list[dict]:  # fmt: skip
    """Rows of query, question, answers, documents, label and hop, as many useful as noisy.

    Half of the good queries ask BM25 for its best documents without what is needed, so that noise
    is near misses: the right subject and another relation, or a name that looks alike.
    """
    rng = random.Random(f"collect {split} {seed}")
    halves: dict[str, list[dict]] = {"useful": [], "noisy": []}
    for number in range(worlds):
        world = World(seed * 100_000 + 50_000 + number, split, people=60, towns=30, companies=30,
                      countries=12)  # fmt: skip
        engine, requests, hops = BM25(world.documents, top_k, world.judge), [], []
        for question in world.questions():
            step = rng.randrange(len(question.path))
            goal = question.path[step]
            query = RELATIONS[goal[1]].query.format(s=goal[0])
            if rng.random() > good:
                query = sloppy_query(world, goal, question, rng)
            requests.append(
                SearchRequest(query, question.text, (question.answer,), rng.random() < 0.5)
            )
            hops.append("final" if step == len(question.path) - 1 else "first")
        for request, hop, documents in zip(requests, hops, engine.search(requests), strict=True):
            useful = any(world.judge(text, request) for text in documents)
            label = "useful" if useful else "noisy"
            halves[label].append(row_of(request, documents, label, hop))
    size = min(examples // 2, *map(len, halves.values()))
    rows = [row for half in halves.values() for row in rng.sample(half, size)]
    rng.shuffle(rows)
    return rows


def row_of(request: SearchRequest, documents: list[str], label: str, hop: str) -> dict:
    return {"query": request.query, "question": request.question, "answers": list(request.answers),
            "documents": documents, "label": label, "hop": hop}  # fmt: skip


def request_of(row: dict, key: tuple[int, ...] = ()) -> SearchRequest:
    """The request that a simulator gets for a row: the row's label is the word it is asked with."""
    request = SearchRequest(row["query"], row["question"], tuple(row["answers"]), key=key)
    return replace(request, noisy=row["label"] == "noisy")


def report(engine, queries: int, seed: int) -> tuple[dict[str, float], list[dict]]:
    """How a simulator does on worlds that nobody trained on: figures, and a few examples.

    `useful_final` and `noisy_final` are how often a reply to a last-hop query contains the gold
    answer when useful or noisy documents are asked for, `..._first` the same for first hops.
    `..._on_topic` is how often a reply states the fact that was asked for, whatever its object: a
    useful first hop should (it invents the bridge), and a noisy reply should not, since no reader
    could tell its fact from a true one.
    """
    rows = [r for r in collect(8, 10**6, seed, engine.top_k, "test", good=1.0)]
    figures, shown = {}, []
    for hop in ("final", "first"):
        chosen = [row for row in rows if row["hop"] == hop][:queries]
        for label in ("useful", "noisy"):
            asked = [row | {"label": label} for row in chosen]
            replies = engine.search([request_of(row, (i,)) for i, row in enumerate(asked)])
            holds = [any(row["answers"][0] in text for text in reply)
                     for row, reply in zip(asked, replies, strict=True)]  # fmt: skip
            on_topic = [
                states(row["query"], reply) for row, reply in zip(asked, replies, strict=True)
            ]
            figures[f"{label}_{hop}"] = sum(holds) / len(holds)
            figures[f"{label}_{hop}_on_topic"] = sum(on_topic) / len(on_topic)
            shown += [
                row | {"documents": reply}
                for row, reply in list(zip(asked, replies, strict=True))[:2]
            ]
    return figures | {"n": len(chosen)}, shown


def states(query: str, documents: list[str]) -> bool:
    """Does a document state the fact (subject and relation) that a good query asks for?"""
    facts = [fact for fact in map(read_fact, documents) if fact]
    return any(
        RELATIONS[relation].query.format(s=subject) == query for subject, relation, _ in facts
    )


def describe(figures: dict[str, float], shown: list[dict]) -> str:
    """The report as text: what the figures mean, and examples."""
    n, out = figures["n"], []
    for label, hop in (
        ("useful", "final"),
        ("noisy", "final"),
        ("useful", "first"),
        ("noisy", "first"),
    ):
        name = f"{label}_{hop}"
        out.append(f"{label:>6} documents, {hop:>5} hop: {figures[name]:6.1%} contain the answer, "
                   f"{figures[name + '_on_topic']:6.1%} state the fact asked for")  # fmt: skip
    out.append(f"({n} queries of each kind, on worlds that nobody trained on. A first hop's fact "
               "is invented: only the final answer is in the prompt.)")  # fmt: skip
    for row in shown:
        out.append(f"\n{row['label']}: {row['query']}   [{row['question']} {row['answers'][0]}]")
        out += [f"    {text}" for text in row["documents"]]
    return "\n".join(out)
