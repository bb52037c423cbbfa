"""Stage 1's data: what a real engine returned to a searcher, labelled useful or noisy.

Paper section 3.3. In tiny worlds scripted searchers ask BM25, and the judge is exact. On any other
data a policy searches; a reply that holds a gold answer is useful, or, as there, a model judges."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from random import Random
from statistics import fmean

from minizs import require
from minizs.engines.ranking import BM25, Judge, holds_answer
from minizs.sft import Segment
from minizs.simulator import training_text
from minizs.trajectory import Example, SearchRequest, Trajectory
from minizs.world.facts import RELATIONS, Question, World, read_fact

LABELS = ("useful", "noisy")


def write_query(world: World, goal: tuple, question: Question, sloppy: bool, rng: Random) -> str:
    """A good one for (subject, relation), or the question, half a name, another fact's query."""
    subject, form = goal[0], RELATIONS[goal[1]]
    if not sloppy:
        return form.query.format(s=subject)
    same_kind = [other.query for other in RELATIONS.values() if other.subject == form.subject]
    another = form.query.format(s=world.draw(form.subject, rng))
    return rng.choice(
        [
            question.text.removesuffix("?"),
            subject.split()[0],
            another,
            rng.choice(same_kind).format(s=subject),
        ]
    )


def collect(
    worlds: int, examples: int, seed: int, top_k: int = 3, split: str = "train", good: float = 0.75
) -> list[dict]:
    """Rows of query, question, answers, documents, label and hop, as many useful as noisy. A share
    `good` of the queries is good. Half of all ask BM25 for its best documents without what is
    needed: near misses. What is useless only because its query is about the wrong thing is left
    out: a simulator would learn to state, as noise, the very fact that was asked for."""
    rng, rows = Random(f"collect {split} {seed}"), []
    for number in range(worlds):
        world, asked = World(seed * 100_000 + 50_000 + number, split), {}
        for question in world.questions()[: 1 + 2 * examples // worlds]:
            step = rng.randrange(len(question.path))
            query = write_query(world, question.path[step], question, rng.random() > good, rng)
            request = SearchRequest(query, question.text, (question.answer,), rng.random() < 0.5)
            asked[request] = "final" if step == len(question.path) - 1 else "first"
        replies = BM25(world.documents, top_k, world.judge).search([*asked])
        found = [
            labelled(request, documents, world.judge) | {"hop": asked[request]}
            for request, documents in zip(asked, replies, strict=True)
        ]
        rows += [row for row in found if row["label"] == "useful" or not on_topic(row)]
    return [rows[i] for i in balanced(rows, examples, rng)]


def collect_with_policy(
    play: Callable[..., list[Trajectory]],
    examples: Sequence[Example],
    size: int,
    batch: int = 64,
    judge=None,
) -> Iterator[dict]:
    """Rows of a policy that searches with a real engine, each as it comes (it may have been paid
    for). `play(examples, keys=...)`, a rollout, gets `batch` questions at a time until `size` // 2
    rows are useful and as many noisy, or none is left. UserError, at the end, for one label."""
    counts = dict.fromkeys(LABELS, 0)
    for start in range(0, len(examples), batch):
        some = examples[start : start + batch]
        asked = [
            (SearchRequest(t.content, row.example.question, row.example.answers), t.documents)
            for row in play(some, keys=[(start + i,) for i in range(len(some))])
            for t in row.turns
            if t.documents
        ]  # searches that found some
        found = [labelled(*search, holds_answer) for search in asked]
        for row in judged(found, judge) if judge else found:
            yield row
            counts[row["label"]] += 1
        if min(counts.values()) >= size // 2:
            break
    require(
        min(counts.values()) > 0,
        "To learn from, both useful and noisy replies are needed; "
        f"there are {counts}: give more questions or another policy.",
    )


def labelled(request: SearchRequest, documents: list[str], judge: Judge) -> dict:
    """A row; its label is "useful" if one of its documents is."""
    label = "useful" if any(judge(text, request) for text in documents) else "noisy"
    return {
        "query": request.query,
        "question": request.question,
        "answers": list(request.answers),
        "documents": documents,
        "label": label,
    }


def judged(rows: list[dict], judge) -> list[dict]:
    """The rows with the word of `judge`, an engine (`stages.simulated` with the template `JUDGE`),
    for their label; any other word means noisy. Raises UserError if all its words are others."""
    words = ["".join(reply) for reply in judge.search([request_of(row) for row in rows])]
    neither = [word for word in words if word not in LABELS]
    print(f"The judge: {len(neither)} of {len(words)} words are neither useful nor noisy.")
    require(
        neither != words or not words,
        "The judge says neither useful nor noisy, but words as "
        f"{neither[:1]}; see --simulator_api, or give another --judge.",
    )
    return [row | {"label": LABELS[w != "useful"]} for row, w in zip(rows, words, strict=True)]


def balanced(rows: Sequence[dict], size: int, rng: Random) -> list[int]:
    """Indices of at most `size` rows, as many useful as noisy, drawn and mixed at random."""
    halves = [[i for i, row in enumerate(rows) if row["label"] == label] for label in LABELS]
    half = min(size // 2, *map(len, halves))
    kept = [i for indices in halves for i in rng.sample(indices, half)]
    rng.shuffle(kept)
    return kept


def request_of(row: dict, key: tuple[int, ...] = ()) -> SearchRequest:
    """The request that a simulator gets for a row: the row's label is the word it is asked with."""
    question, answers, documents = row["question"], tuple(row["answers"]), tuple(row["documents"])
    return SearchRequest(row["query"], question, answers, row["label"] == "noisy", key, documents)


def on_topic(row: dict) -> bool:
    """Does a document state the fact (subject and relation) that a good query asks for?"""
    return any(
        RELATIONS[fact[1]].query.format(s=fact[0]) == row["query"]
        for fact in map(read_fact, row["documents"])
        if fact
    )


def report(engine, queries: int, seed: int) -> dict[str, float]:
    """How often a simulator's documents, in worlds that nobody trained on, hold the gold answer and
    (`..._on_topic`) state the fact asked for, by label and hop. Printed, with an example each."""
    rows, figures = collect(8, 10**6, seed, engine.top_k, "test", good=1.0), {}
    for kind, (hop, label) in enumerate(product(("final", "first"), LABELS)):
        asked = [row | {"label": label} for row in rows if row["hop"] == hop][:queries]
        replies = engine.search([request_of(row, (kind, i)) for i, row in enumerate(asked)])
        asked = [row | {"documents": reply} for row, reply in zip(asked, replies, strict=True)]
        holds = fmean(row["answers"][0] in "\n".join(row["documents"]) for row in asked)
        states = fmean(map(on_topic, asked))
        figures |= {f"{label}_{hop}": holds, f"{label}_{hop}_on_topic": states, "n": len(asked)}
        print(
            f"{label:>6} documents, {hop:>5} hop: {holds:6.1%} contain the answer, {states:6.1%} "
            f"state the fact asked for. {asked[0]['query']} {asked[0]['documents']}"
        )
    print("A first hop's fact is invented: only the final answer is in the prompt.")
    return figures


def pairs(rows: Sequence[dict], template: str, seed: int = 0) -> list[list[Segment]]:
    """A prompt, and a reply with the loss on it, for each row; where all have a label, for as many
    useful as noisy ones, in their order. Raises UserError for a row of no layout."""
    found = []
    for number, row in enumerate(rows, 1):
        match row:
            case {
                "query": str(),
                "question": str(),
                "answers": list(),
                "documents": [str(), *_],
                "label": "useful" | "noisy",
            }:
                found.append(training_text(template, request_of(row), row["documents"]))
                continue
            case {"instruction": str(prompt), "output": str(reply)}:
                prompt += f"\n{row['input']}" if row.get("input") else ""
            case {
                "messages": [
                    {"role": "user", "content": str(prompt)},
                    {"role": "assistant", "content": str(reply)},
                ]
            }:
                pass
            case _:
                prompt = reply = ""
        require(
            bool(prompt.strip() and reply.strip()),
            f"Row {number} of --data lacks query, "
            "question, answers, documents and label (useful or noisy), or instruction and "
            f"output, or messages of user and assistant; it is {str(row)[:200]}",
        )
        found.append([(prompt, False), (reply, True)])  # its own wording, which use should repeat
    if all({"query", "label"} <= row.keys() for row in rows):
        found = [found[i] for i in sorted(balanced(rows, len(rows), Random(f"pairs {seed}")))]
    require(bool(found), "--data is empty, or its rows are all useful or all noisy.")
    return found
