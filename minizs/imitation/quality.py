"""How good a simulator of the tiny world is, in worlds that nobody trained on."""

from itertools import product
from statistics import fmean

from minizs.imitation.collect import LABELS, collect_from_worlds, request_of
from minizs.world.searchers import kinds_of_near_misses, states_what_was_asked

WORLDS = 2
NEAR_MISSES = {  # and how they are called
    "half_name": "the same relation of somebody with half of the name",
    "other_fact": "another fact about the same subject",
}


def measure_quality(engine, queries: int, seed: int) -> dict[str, float]:
    """Ask a simulator `queries` good queries of each kind (label and hop); print and return shares.

    `useful_final` is the share of useful replies to final-hop queries that hold the gold answer,
    and `useful_final_on_topic` the share that states the fact asked for; so for the other kinds.
    The gold answer alone is in the prompt, so that the fact of a first hop has to be invented.
    `noisy_final_half_name` and `noisy_final_other_fact` are the shares with a near miss of that
    kind (see `kinds_of_near_misses`); those that begin with `bm25_` are of BM25's own replies.
    """
    rows = collect_from_worlds(WORLDS, 10**6, seed, engine.top_k, "test", good=1.0)
    figures: dict[str, float] = {}
    for kind, (hop, label) in enumerate(product(("final", "first"), LABELS)):
        of_hop = [row for row in rows if row["hop"] == hop]
        tested = [{**row, "label": label} for row in of_hop][:queries]
        requests = [request_of(row, key=(kind, place)) for place, row in enumerate(tested)]
        replies = engine.search(requests)
        answered = [{**row, "documents": reply} for row, reply in zip(tested, replies, strict=True)]
        figures[f"{label}_{hop}"] = fmean(
            row["answers"][0] in "\n".join(row["documents"]) for row in answered
        )
        figures[f"{label}_{hop}_on_topic"] = fmean(
            states_what_was_asked(row["query"], row["documents"]) for row in answered
        )
        figures["n"] = len(tested)
        print(
            f"{label:>6} documents, {hop:>5} hop: {figures[f'{label}_{hop}']:6.1%} contain the "
            f"answer, {figures[f'{label}_{hop}_on_topic']:6.1%} state the fact asked for. "
            f"{tested[0]['query']} {replies[0]}"
        )
        if label == "noisy":
            real = [row for row in of_hop if row["label"] == label][:queries]
            figures |= near_miss_shares(f"noisy_{hop}", answered)
            figures |= near_miss_shares(f"bm25_{hop}", real)
    print("A first hop's fact is invented: only the final answer is in the prompt.")
    print_kinds_of_near_misses(figures)
    return figures


def near_miss_shares(name: str, rows: list[dict]) -> dict[str, float]:
    """The share of rows with a near miss of each kind, in keys that begin with `name`."""
    kinds_by_row = [kinds_of_near_misses(row["query"], row["documents"]) for row in rows]
    return {
        f"{name}_{kind}": fmean(kind in kinds for kinds in kinds_by_row) for kind in NEAR_MISSES
    }


def print_kinds_of_near_misses(figures: dict[str, float]) -> None:
    print("Noisy replies with a near miss, beside those of BM25 (final, first hop):")
    for kind, words in NEAR_MISSES.items():
        pairs = [
            f"{figures[f'noisy_{hop}_{kind}']:.1%} (BM25 {figures[f'bm25_{hop}_{kind}']:.1%})"
            for hop in ("final", "first")
        ]
        print(f"  {words}: {', '.join(pairs)}")
