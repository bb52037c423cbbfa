"""How good a simulator of the tiny world is, in worlds that nobody trained on."""

from itertools import product
from statistics import fmean

from minizs.imitation.collect import LABELS, collect_from_worlds, request_of
from minizs.world.searchers import states_what_was_asked

WORLDS = 8


def measure_quality(engine, queries: int, seed: int) -> dict[str, float]:
    """Ask a simulator `queries` good queries of each kind (label and hop); print and return shares.

    `useful_final` is the share of useful replies to final-hop queries that hold the gold answer,
    and `useful_final_on_topic` the share that states the fact asked for; so for the other kinds.
    The gold answer alone is in the prompt, so that the fact of a first hop has to be invented.
    """
    rows = collect_from_worlds(WORLDS, 10**6, seed, engine.top_k, "test", good=1.0)
    figures: dict[str, float] = {}
    for kind, (hop, label) in enumerate(product(("final", "first"), LABELS)):
        tested = [{**row, "label": label} for row in rows if row["hop"] == hop][:queries]
        requests = [request_of(row, key=(kind, place)) for place, row in enumerate(tested)]
        replies = engine.search(requests)
        holds_gold = fmean(
            row["answers"][0] in "\n".join(documents)
            for row, documents in zip(tested, replies, strict=True)
        )
        on_topic = fmean(
            states_what_was_asked(row["query"], documents)
            for row, documents in zip(tested, replies, strict=True)
        )
        figures[f"{label}_{hop}"] = holds_gold
        figures[f"{label}_{hop}_on_topic"] = on_topic
        figures["n"] = len(tested)
        print(
            f"{label:>6} documents, {hop:>5} hop: {holds_gold:6.1%} contain the answer, "
            f"{on_topic:6.1%} state the fact asked for. {tested[0]['query']} {replies[0]}"
        )
    print("A first hop's fact is invented: only the final answer is in the prompt.")
    return figures
