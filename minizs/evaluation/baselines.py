"""What a searching policy is compared with (section 4.2 of the paper): a single generation.

direct    the question alone
cot       the question, and to think step by step before the answer
rag       the question and the documents of one search for it

The wording of each is in `prompts/`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from minizs.protocol import build_prompt, neutralize, number_documents, reply_ids
from minizs.rollout import ENGINE, Limits, Policy, rollout
from minizs.trajectory import Example, SearchRequest, Trajectory, Turn

PROMPTS = Path(__file__).parent.parent / "prompts"


def answer_at_once(
    method: str,
    policy: Policy,
    examples: Sequence[Example],
    engine,
    *,
    keys: Sequence[tuple[int, ...]] | None = None,
    on_turn: Callable[[Turn], None] = lambda turn: None,
) -> list[Trajectory]:
    """Let the policy answer each example in one turn, in the wording of a method.

    `keys` and `on_turn` are those of `rollout`. With "rag" the turn holds the documents that were
    read before it was written.
    """
    wording = (PROMPTS / f"{method}.txt").read_text(encoding="utf-8")
    replies: list[list[str] | None] = [None] * len(examples)
    if method == "rag":
        replies = search_for_questions(policy, examples, engine, keys)
    prompts = [
        build_prompt(
            example.question,
            wording.replace("{documents}", document_text(policy, reply or [])),
            policy.tokenizer,
        )
        for example, reply in zip(examples, replies, strict=True)
    ]
    one_turn = Limits(turns=1, turn_tokens=policy.limits.turn_tokens, context=math.inf)
    policy = replace(policy, limits=one_turn)
    trajectories = rollout(policy, examples, engine, keys=keys, prompts=prompts, on_turn=on_turn)
    for trajectory, reply in zip(trajectories, replies, strict=True):
        [turn] = trajectory.turns
        turn.documents = reply
        if method == "rag":
            on_turn(turn)
    return trajectories


def search_for_questions(
    policy: Policy,
    examples: Sequence[Example],
    engine,
    keys: Sequence[tuple[int, ...]] | None,
) -> list[list[str]]:
    """The documents that the engine has for each question itself, made harmless."""
    requests = []
    for example, key in zip(examples, keys or [(i,) for i in range(len(examples))], strict=True):
        question = neutralize(example.question, policy.tokenizer)
        request = SearchRequest(question, question, example.answers, key=(ENGINE, *key))
        requests.append(request)
    replies = engine.search(requests)
    return [[neutralize(text, policy.tokenizer) for text in reply] for reply in replies]


def document_text(policy: Policy, documents: list[str]) -> str:
    """Documents as a policy reads them, cut to its limit for a reply."""
    text = number_documents(documents)
    [ids] = reply_ids(policy.tokenizer, [text])
    limit = policy.limits.document_tokens
    return text if len(ids) <= limit else policy.tokenizer.decode(ids[:limit])
