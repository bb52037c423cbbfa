"""The multi-turn loop: the policy thinks and searches, an engine replies, until there is an answer.

Paper sections 3.1 and 3.6. All trajectories advance together. One turn is one batched generation of
the policy, followed by one call of the engine for all queries of that turn. What the policy sampled
is never tokenised again: its ids go from the sampler into the trajectory.

A trajectory without an answer says in `truncated` what ended it:

- "turns": its last turn did not answer. A search in that turn is not executed.
- "turn_tokens": a turn reached its limit before it closed a tag.
- "context": the next piece does not fit into the context. Nothing is cut out to make room.

Such a trajectory scores 0 like a wrong answer, and its tokens stay in the loss. Rewards are not
given here: whoever calls `rollout` scores the answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minizs import protocol, require
from minizs.generate import Decoder, Generated
from minizs.models.ends import end_ids
from minizs.protocol import neutralize
from minizs.randomness import uniform
from minizs.trajectory import Example, SearchRequest, Trajectory, Turn

# What a random number is for is the first part of its key, so that no two uses share a number.
TOKENS, NOISE, ENGINE = 0, 1, 2


@dataclass(frozen=True)
class Limits:
    """How much a trajectory may hold, in tokens. `turns` counts generations, so that there are at
    most `turns - 1` searches. The defaults are close to the paper's; the scripts have their own."""

    turns: int = 5
    turn_tokens: int = 500
    document_tokens: int = 600
    context: int = 4096


@dataclass(frozen=True)
class Policy:
    """The model that searches, and how it is asked to: its prompt, its limits, its sampling."""

    model: Any
    tokenizer: Any
    template: str = protocol.PROMPT  # the prompt, with {question} where the question goes
    limits: Limits = Limits()
    temperature: float = 1.0  # 0 is greedy
    seed: int = 0
    cuda_graphs: str = "auto"  # see `Decoder`


@dataclass
class Row:
    """A growing trajectory, its row in the decoder, and the key of its random numbers."""

    index: int
    key: tuple[int, ...]
    trajectory: Trajectory

    @property
    def turn(self) -> Turn:
        """The newest turn."""
        return self.trajectory.turns[-1]


def rollout(
    policy: Policy,
    examples: Sequence[Example],
    engine,
    *,
    group_size: int = 1,
    noise: float = 0.0,
    keys: Sequence[tuple[int, ...]] | None = None,
    prompts: Sequence[str] | None = None,
    on_turn: Callable[[Turn], None] | None = None,
) -> list[Trajectory]:
    """Let the policy answer every example `group_size` times, searching with `engine` as it likes.

    Returns the trajectories in the order of the examples, those of one example side by side.

    - `noise` is the probability that a search asks for noisy documents (equation 1 of the paper).
    - `keys` has a tuple of integers for each example, on which its random numbers depend. Without
      it an example's place in `examples` is its key.
    - `prompts` replaces the prompts that the policy's template would give.
    - `on_turn` is called with each turn once it is written, and again once it has its documents.

    Raises UserError if the limits leave no room for a prompt or for an empty block of documents.
    """
    notify = on_turn or (lambda turn: None)
    rows = start_rows(policy, examples, group_size, keys, prompts)
    decoder = start_decoder(policy, rows)
    for turn in range(policy.limits.turns):
        live = [row for row in rows if not row.trajectory.ended]
        if not live:
            break
        turns = write_turn(policy, decoder, live, turn)
        for row, generated in zip(live, turns, strict=True):
            read_turn(policy, row, generated, is_last=turn == policy.limits.turns - 1)
            notify(row.turn)
        going_on = [row for row in live if not row.trajectory.ended]
        searching = [row for row in going_on if row.turn.action == "search"]
        if searching:
            requests = [make_request(policy, row, turn, noise) for row in searching]
            search(policy, engine, searching, requests)
            for row in searching:
                notify(row.turn)
        if going_on:
            append_replies(policy, decoder, going_on)
    return [row.trajectory for row in rows]


def start_rows(
    policy: Policy,
    examples: Sequence[Example],
    group_size: int,
    keys: Sequence[tuple[int, ...]] | None,
    prompts: Sequence[str] | None,
) -> list[Row]:
    """`group_size` rows for each example, each of them holding its prompt and nothing else yet."""
    tokenizer = policy.tokenizer
    limits = policy.limits
    if keys is None:
        keys = [(number,) for number in range(len(examples))]
    if prompts is None:
        prompts = [
            protocol.build_prompt(example.question, policy.template, tokenizer)
            for example in examples
        ]
    prompt_ids = protocol.prompt_ids(tokenizer, list(prompts))
    longest = max(map(len, prompt_ids), default=0)
    require(longest < limits.context, f"--max_context must be more than a prompt's {longest}.")
    [empty_block] = protocol.reply_ids(tokenizer, [protocol.wrap_documents("")])
    require(
        len(empty_block) <= limits.document_tokens,
        f"--max_document_tokens must be {len(empty_block)} or more: so many tokens has an empty "
        "block of documents.",
    )
    rows = []
    for example, key, ids in zip(examples, keys, prompt_ids, strict=True):
        for sample in range(group_size):
            trajectory = Trajectory(example)
            trajectory.append(ids)
            rows.append(Row(len(rows), (*key, sample), trajectory))
    return rows


def start_decoder(policy: Policy, rows: Sequence[Row]) -> Decoder:
    """A decoder with a row for each of these. It reads the prompts, each different one once."""
    return Decoder(
        policy.model,
        [row.trajectory.ids for row in rows],
        temperature=policy.temperature,
        seed=policy.seed,
        vocab_size=protocol.vocabulary_size(policy.tokenizer),
        eos_id=end_ids(policy.model, policy.tokenizer),
        tokenizer=policy.tokenizer,
        stop=protocol.STOP,
        ends_turn=protocol.completes_action,
        cuda_graphs=policy.cuda_graphs,
    )


def write_turn(policy: Policy, decoder: Decoder, rows: Sequence[Row], turn: int) -> list[Generated]:
    """The policy writes on each row until it closes a tag, ends its reply or runs out of room."""
    limits = policy.limits
    budgets = [min(limits.turn_tokens, limits.context - len(row.trajectory.ids)) for row in rows]
    return decoder.turn(
        [row.index for row in rows], budgets, [(TOKENS, *row.key, turn) for row in rows]
    )


def read_turn(policy: Policy, row: Row, generated: Generated, is_last: bool) -> None:
    """Add what was written to the trajectory, and see whether it answers or has to end."""
    trajectory = row.trajectory
    limits = policy.limits
    trajectory.append(generated.ids, generated.logprobs)
    text = protocol.turn_text(policy.tokenizer, generated.ids)
    action = protocol.parse_action(text)
    trajectory.turns.append(Turn(text, action.kind, action.content))
    if action.kind == "answer":
        trajectory.answer = action.content
    elif generated.reason == "length" and len(trajectory.ids) >= limits.context:
        trajectory.truncated = "context"
    elif generated.reason == "length":
        trajectory.truncated = "turn_tokens"
    elif is_last:
        trajectory.truncated = "turns"


def make_request(policy: Policy, row: Row, turn: int, noise: float) -> SearchRequest:
    """What the engine needs to know about this row's query, and whether to reply with noise."""
    example = row.trajectory.example
    return SearchRequest(
        query=neutralize(row.turn.content, policy.tokenizer),
        question=neutralize(example.question, policy.tokenizer),
        answers=example.answers,
        noisy=uniform(policy.seed, NOISE, *row.key, turn) < noise,
        key=(ENGINE, *row.key, turn),
    )


def search(policy: Policy, engine, rows: Sequence[Row], requests: Sequence[SearchRequest]) -> None:
    """Ask the engine for all requests at once, and note the documents in each row's turn."""
    replies = engine.search(list(requests))
    for row, request, documents in zip(rows, requests, replies, strict=True):
        row.turn.noisy = request.noisy
        row.turn.documents = [neutralize(text, policy.tokenizer) for text in documents]


def append_replies(policy: Policy, decoder: Decoder, rows: Sequence[Row]) -> None:
    """Append to each row what its turn brought, documents or a complaint, if the context allows."""
    tokenizer = policy.tokenizer
    limits = policy.limits
    texts = [reply_text(row.turn) for row in rows]
    for row, ids in zip(rows, protocol.reply_ids(tokenizer, texts), strict=True):
        if row.turn.documents is not None:
            ids = cut_reply(tokenizer, ids, limits.document_tokens)
        if len(row.trajectory.ids) + len(ids) >= limits.context:
            row.trajectory.truncated = "context"
        else:
            row.trajectory.append(ids)
            decoder.append([row.index], [ids])


def reply_text(turn: Turn) -> str:
    """What the policy reads after this turn."""
    if turn.documents is None:
        return protocol.INVALID_ACTION
    return protocol.wrap_documents(protocol.number_documents(turn.documents))


def cut_reply(tokenizer, ids: list[int], limit: int) -> list[int]:
    """A block of documents in at most `limit` tokens: cut at its end, but closed again."""
    if len(ids) <= limit:
        return ids
    [closing] = protocol.reply_ids(tokenizer, [protocol.CLOSING])
    return ids[: limit - len(closing)] + closing
