"""train_policy.py with an engine that returns random documents: is a search worth its while?

    python benchmarks/random_engine.py --output runs/random

The documents are those of the training world, drawn anew for every search. `--engine` has no
effect.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_policy  # noqa: E402
from minizs.randomness import hash64  # noqa: E402
from minizs.runs import build  # noqa: E402
from minizs.runs.flags import run_script  # noqa: E402
from minizs.trajectory import SearchRequest  # noqa: E402
from minizs.world.facts import embedded  # noqa: E402


class RandomDocuments:
    """Answers every search with `top_k` documents that its seed and its key have drawn."""

    def __init__(self, documents: list[str], top_k: int, seed: int) -> None:
        self.documents = documents
        self.top_k = top_k
        self.seed = seed

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        return [[self.draw(request, place) for place in range(self.top_k)] for request in requests]

    def draw(self, request: SearchRequest, place: int) -> str:
        return self.documents[hash64(self.seed, *request.key, place) % len(self.documents)]


def main(argv: list[str]) -> None:
    build_engine = build.build_engine
    build.build_engine = build_random_engine
    try:
        train_policy.main(argv)
    finally:
        build.build_engine = build_engine


def build_random_engine(config, role: str, accelerator, examples=()) -> RandomDocuments:
    return RandomDocuments(embedded(role).documents, config.top_k, config.seed)


if __name__ == "__main__":
    run_script(main)
