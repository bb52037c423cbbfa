"""The multi-turn loop: the policy generates, an engine answers, and again until there is an answer.

Paper sections 3.1 and 3.6. All rows advance together: one batched generation of the policy, then
one `search` for all queries of that turn. Sampled ids are never tokenised again (defect D10).

A trajectory can end without an answer, with reward 0 and its tokens in the loss; `truncated` says
why: "turns" (its last turn did not answer; a search in it is not executed), "turn_tokens" (a turn
ran out of them before it closed a tag), "context" (the next piece does not fit: none is cut out).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minizs import protocol, require
from minizs.generate import Decoder
from minizs.protocol import neutralize
from minizs.randomness import uniform
from minizs.reward import f1_score
from minizs.trajectory import Example, SearchRequest, Trajectory, Turn

TOKENS, NOISE, ENGINE = 0, 1, 2  # a random number's use is part of its key: no two uses share one


@dataclass(frozen=True)
class Limits:
    """In tokens, but for `turns`, which counts generations: at most `turns - 1` searches. These are
    about the paper's; a run has those of `settings`, which fit the tiny world."""

    turns: int = 5
    turn_tokens: int = 500
    document_tokens: int = 600
    context: int = 4096


def rollout(
    model,
    tokenizer,
    examples: Sequence[Example],
    engine,
    *,
    group_size: int = 1,
    limits: Limits = Limits(),
    noise: float = 0.0,
    temperature: float = 1.0,
    seed: int = 0,
    keys: Sequence[tuple[int, ...]] | None = None,
    template: str = protocol.PROMPT,
    prompts: list[str] | None = None,
    on_turn: Callable[[Turn], None] = lambda turn: None,
) -> list[Trajectory]:
    """`group_size` trajectories for each example, the rows of a group adjacent, from the `template`
    with its question or from `prompts`. `noise`: how probably a search asks for noisy documents
    (paper equation 1). `keys`: what each example's random numbers hang on, by default its index.
    `on_turn` sees each turn, then with documents. Raises UserError if a limit leaves no room."""
    keys = keys or [(i,) for i in range(len(examples))]
    row_keys = [(*key, sample) for key in keys for sample in range(group_size)]
    texts = prompts or [protocol.build_prompt(e.question, template, tokenizer) for e in examples]
    starts = protocol.prompt_ids(tokenizer, texts)
    longest = max(map(len, starts), default=0)
    require(longest < limits.context, f"--max_context must be more than a prompt's {longest}.")
    tags, closing = protocol.reply_ids(tokenizer, [protocol.wrap_documents(""), protocol.CLOSING])
    require(len(tags) <= limits.document_tokens, f"--max_document_tokens < {len(tags)}: raise it.")
    rows = [Trajectory(example) for example in examples for _ in range(group_size)]
    for i, row in enumerate(rows):
        row.append(starts[i // group_size])
    decoder = Decoder(
        model,
        [row.ids for row in rows],
        temperature=temperature,
        seed=seed,
        vocab_size=protocol.vocabulary_size(tokenizer),
        tokenizer=tokenizer,
        stop=protocol.STOP,
    )
    live = list(range(len(rows)))
    for turn in range(limits.turns):
        room = [min(limits.turn_tokens, limits.context - len(rows[i].ids)) for i in live]
        written = decoder.turn(live, room, [(TOKENS, *row_keys[i], turn) for i in live])
        requests: dict[int, SearchRequest] = {}
        replies: dict[int, str] = {}  # what is appended to a row that goes on
        for i, out in zip(live, written, strict=True):
            row = rows[i]
            row.append(out.ids, out.logprobs)
            text = tokenizer.decode(out.ids, skip_special_tokens=False)  # a tag may be one
            action = protocol.parse_action(text)
            row.turns.append(Turn(text, action.kind, action.content))
            on_turn(row.turns[-1])
            if action.kind == "answer":
                row.answer = action.content
            elif out.reason == "length":
                row.truncated = "context" if len(row.ids) >= limits.context else "turn_tokens"
            elif turn == limits.turns - 1:
                row.truncated = "turns"
            elif action.kind == "search":
                query = neutralize(action.content, tokenizer)
                question = neutralize(row.example.question, tokenizer)
                noisy = uniform(seed, NOISE, *row_keys[i], turn) < noise
                requests[i] = SearchRequest(
                    query, question, row.example.answers, noisy, key=(ENGINE, *row_keys[i], turn)
                )
            else:
                replies[i] = protocol.INVALID_ACTION
        found = engine.search(list(requests.values())) if requests else []
        for (i, request), documents in zip(requests.items(), found, strict=True):
            last = rows[i].turns[-1]
            last.noisy = request.noisy
            last.documents = [neutralize(text, tokenizer) for text in documents]
            replies[i] = protocol.wrap_documents(protocol.number_documents(last.documents))
            on_turn(last)
        if not replies:
            break
        for i, ids in zip(replies, protocol.reply_ids(tokenizer, [*replies.values()]), strict=True):
            if i in requests and len(ids) > limits.document_tokens:
                ids = ids[: limits.document_tokens - len(closing)] + closing
            if len(rows[i].ids) + len(ids) >= limits.context:
                rows[i].truncated = "context"
            else:
                rows[i].append(ids)
                decoder.append([i], [ids])
        live = [i for i in live if i in replies and not rows[i].truncated]
    for row in rows:
        row.reward = f1_score(row.answer, row.example.answers)
    return rows
