"""Stage 1's data: what a real engine returned to a searcher, labelled useful or noisy.

Paper section 3.3: a language model searches with a real engine, and a judge decides of each reply
whether it suffices for its query. In the tiny world scripted searchers put good and sloppy queries
to BM25 over many worlds, and the judge is exact. With any other data a policy searches, and a reply
is useful if it holds a gold answer; a language model as the judge, as in the paper, is left out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random
from statistics import fmean

from minizs.config import require
from minizs.engines import BM25, Judge, holds_answer
from minizs.sft import Segment
from minizs.simulator import training_text
from minizs.trajectory import Example, SearchRequest, Trajectory
from minizs.world import RELATIONS, Question, World, read_fact

LABELS = ("useful", "noisy")


def write_query(world: World, goal: tuple[str, str], question: Question, sloppy: bool,
                rng: Random) -> str:  # fmt: skip
    """A good one for (subject, relation), or the question, half a name, another fact's query."""
    subject, form = goal[0], RELATIONS[goal[1]]
    if not sloppy:
        return form.query.format(s=subject)
    same_kind = [other.query for other in RELATIONS.values() if other.subject == form.subject]
    another = form.query.format(s=world.draw(form.subject, rng))
    return rng.choice([question.text.removesuffix("?"), subject.split()[0], another,
                       rng.choice(same_kind).format(s=subject)])  # fmt: skip


def collect(worlds: int, examples: int, seed: int, top_k: int = 3, split: str = "train",
            good: float = 0.75) -> list[dict]:  # fmt: skip
    """Rows of query, question, answers, documents, label and hop, as many useful as noisy.

    A share `good` of the queries is good. Half of them ask BM25 for its best documents without what
    is needed: noise is near misses, such as the right subject and another relation. A reply that is
    useless only because its query is about the wrong thing is left out: a simulator would learn to
    state, as noise, the very fact that was asked for."""
    rng, rows = Random(f"collect {split} {seed}"), []
    for number in range(worlds):
        world = World(seed * 100_000 + 50_000 + number, split)
        asked = []
        for question in world.questions()[: 1 + 2 * examples // worlds]:
            step = rng.randrange(len(question.path))
            query = write_query(world, question.path[step], question, rng.random() > good, rng)
            noisy = rng.random() < 0.5
            hop = "final" if step == len(question.path) - 1 else "first"
            asked.append((SearchRequest(query, question.text, (question.answer,), noisy), hop))
        replies = BM25(world.documents, top_k, world.judge).search([r for r, _ in asked])
        for (request, hop), documents in zip(asked, replies, strict=True):
            row = labelled(request, documents, world.judge) | {"hop": hop}
            if row["label"] == "useful" or not states(request.query, documents):
                rows.append(row)
    return [rows[i] for i in balanced(rows, examples, rng)]


def collect_with_policy(play: Callable[..., list[Trajectory]], examples: Sequence[Example],
                        size: int, batch: int = 64,
                        say: Callable[[str], None] = print) -> Iterator[dict]:  # fmt: skip
    """Rows of a policy that searches with a real engine, as they come (they may have been paid for)
    and so in no balance, which `pairs` sees to. `play(examples, keys=...)` is a rollout; it gets
    `batch` questions at a time until `size` // 2 rows are useful and as many noisy, or none is
    left. A reply to a first hop seldom holds the final answer, so that most of these count as
    noisy; empty ones are left out. Raises UserError, at the end, where there is one label."""
    counts = Counter()
    for start in range(0, len(examples), batch):
        some = examples[start : start + batch]
        for row in play(some, keys=[(start + i,) for i in range(len(some))]):
            for turn in row.turns:
                if turn.documents is not None:  # a search, and it was executed
                    request = SearchRequest(turn.content, row.example.question, row.example.answers)
                    found = labelled(request, turn.documents, holds_answer)
                    counts[found["label"]] += 1
                    if turn.documents:
                        yield found
        if min(counts[label] for label in LABELS) >= size // 2:
            break
    there = ", ".join(f"{n} {label}" for label, n in sorted(counts.items())) or "none"
    say(f"Replies: {there}.")
    require(all(counts[label] for label in LABELS), "To learn from, both useful and noisy replies "
            f"are needed; there are {there}: give more questions or another policy.")  # fmt: skip


def labelled(request: SearchRequest, documents: list[str], judge: Judge) -> dict:
    """A row; its label is "useful" if one of its documents is, else "noisy", or "empty"."""
    useful = any(judge(text, request) for text in documents)
    label = "useful" if useful else "noisy" if documents else "empty"
    return {"query": request.query, "question": request.question, "answers": list(request.answers),
            "documents": documents, "label": label}  # fmt: skip


def balanced(rows: Sequence[dict], size: int, rng: Random) -> list[int]:
    """Indices of at most `size` rows, as many useful as noisy, drawn and mixed at random."""
    halves = [[i for i, row in enumerate(rows) if row["label"] == label] for label in LABELS]
    half = min(size // 2, *map(len, halves))
    kept = [i for indices in halves for i in rng.sample(indices, half)]
    rng.shuffle(kept)
    return kept


def request_of(row: dict, key: tuple[int, ...] = ()) -> SearchRequest:
    """The request that a simulator gets for a row: the row's label is the word it is asked with."""
    noisy = row["label"] == "noisy"
    return SearchRequest(row["query"], row["question"], tuple(row["answers"]), noisy, key)


def states(query: str, documents: list[str]) -> bool:
    """Does a document state the fact (subject and relation) that a good query asks for?"""
    return any(RELATIONS[fact[1]].query.format(s=fact[0]) == query
               for fact in map(read_fact, documents) if fact)  # fmt: skip


def report(engine, queries: int, seed: int) -> dict:
    """How a simulator does on worlds that nobody trained on, printed: figures, and a few examples.
    `useful_final` is how often useful documents for a last-hop query hold the gold answer, and so
    on; `..._on_topic` how often they state the fact asked for: noisy ones should not."""
    rows = collect(8, 10**6, seed, engine.top_k, "test", good=1.0)
    figures, shown = {}, []
    kinds = [(label, hop) for hop in ("final", "first") for label in LABELS]
    for kind, (label, hop) in enumerate(kinds):
        asked = [row | {"label": label} for row in rows if row["hop"] == hop][:queries]
        replies = engine.search([request_of(row, (kind, i)) for i, row in enumerate(asked)])
        asked = [row | {"documents": reply} for row, reply in zip(asked, replies, strict=True)]
        holds = fmean(row["answers"][0] in "\n".join(row["documents"]) for row in asked)
        on_topic = fmean(states(row["query"], row["documents"]) for row in asked)
        figures |= {f"{label}_{hop}": holds, f"{label}_{hop}_on_topic": on_topic, "n": len(asked)}
        shown += asked[:2]
        print(f"{label:>6} documents, {hop:>5} hop: {holds:6.1%} contain the answer, "
              f"{on_topic:6.1%} state the fact asked for. {asked[0]['query']}: "
              f"{' / '.join(asked[0]['documents'])}")  # fmt: skip
    print("A first hop's fact is invented: only the final answer is in the prompt.")
    return {"figures": figures, "examples": shown}


def pairs(rows: Sequence[dict], template: str, seed: int = 0,
          say: Callable[[str], None] = print) -> list[list[Segment]]:  # fmt: skip
    """A prompt, and a reply with the loss on it, for each row. If all rows have a label, as many
    useful as noisy ones are taken, in their order. Raises UserError for a row of no layout."""
    texts = [_pair(row, template) for row in rows]
    for number, (row, text) in enumerate(zip(rows, texts, strict=True), 1):
        require(bool(text), f"Row {number} of --data has neither query, question, answers, "
                "documents and a label, useful or noisy, nor instruction and output, nor messages "
                f"of (system,) user and assistant; it is {str(row)[:200]}")  # fmt: skip
    kept = range(len(rows))
    if all({"query", "label"} <= row.keys() for row in rows):
        kept = sorted(balanced(rows, len(rows), Random(f"pairs {seed}")))
    require(bool(kept), "--data is empty, or its rows are all useful or all noisy.")
    say(f"{len(kept)} of {len(rows)} pairs are taken.")
    return [texts[i] for i in kept]


def _pair(row: dict, template: str) -> list[Segment]:
    """The segments of a row, none where it fits no layout. A row of --collect is asked with the
    template; others bring their own wording, which the template should repeat for use. A chat
    template, where there is one, comes around all of them later."""
    match row:
        case {"query": str(), "question": str(), "answers": list(), "documents": [str(), *_],
              "label": "useful" | "noisy"}:  # fmt: skip
            return training_text(template, request_of(row), row["documents"])
        case {"instruction": str(prompt), "output": str(reply)}:
            prompt += f"\n{row['input']}" if row.get("input") else ""
        case {"messages": [{"role": "system", "content": str(system)}, *said]}:
            texts = _pair({"messages": said}, template)
            return [(f"{system}\n\n{texts[0][0]}".strip(), False), *texts[1:]] if texts else []
        case {"messages": [{"role": "user", "content": str(prompt)},
                           {"role": "assistant", "content": str(reply)}]}:  # fmt: skip
            pass
        case _:
            return []
    return [(prompt, False), (reply, True)] if prompt.strip() and reply.strip() else []
