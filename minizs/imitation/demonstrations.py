"""Demonstrations: trajectories for a policy to imitate, before it learns from rewards.

They come from three sources and have one form, that of the lines of `evaluation.jsonl` and
`trajectories.jsonl`: an `example` (question and answers) and `turns` (the text of each, and the
documents that it brought). The plain searcher writes them without a model; a file can hold those of
another model; and a policy can imitate its own right answers. Text is all that is taken over:
prompt and tokens are made anew for the policy that learns, exactly as its own rollouts make them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minizs import protocol, require
from minizs.engines import files
from minizs.randomness import uniform
from minizs.reward import f1_score
from minizs.rollout import Policy, cut_reply, reply_text
from minizs.runs.settings import OWN, SCRIPTED, PolicyConfig
from minizs.sft import Tokens
from minizs.trajectory import Example, Trajectory, Turn

LAYOUT = (
    "an 'example' with its 'question' and 'answers', and 'turns' with their 'text' and, after a "
    "search, 'documents', as evaluation.jsonl and trajectories.jsonl have"
)


def read_demonstrations(path: Path) -> list[Trajectory]:
    """The trajectories of a file, scored anew, without tokens. Raises UserError for a file that is
    not there or cannot be read, and for a row of another layout."""
    require(path.is_file(), f"There is no file {path} of demonstrations; check --warm_start.")
    trajectories = []
    for number, row in enumerate(files.read_rows(path), 1):
        trajectory = read_trajectory(row)
        require(
            trajectory is not None,
            f"Row {number} of {path} is no demonstration, which has {LAYOUT}; "
            f"it is {str(row)[:200]}",
        )
        trajectories.append(trajectory)
    require(bool(trajectories), f"{path} holds no demonstration.")
    return trajectories


def read_trajectory(row: dict) -> Trajectory | None:
    """The trajectory in a row; None for a row of another layout. What a turn did is read from its
    text, and the reward is computed, whatever else the row says."""
    match row:
        case {
            "example": {"question": str(question), "answers": [str(), *_] as answers},
            "turns": [dict(), *_] as turns,
        }:
            pass
        case _:
            return None
    source = str(row["example"].get("source", "demonstrations"))
    trajectory = Trajectory(Example(question, tuple(map(str, answers)), source))
    for turn_row in turns:
        turn = read_turn_row(turn_row)
        if turn is None:
            return None
        trajectory.turns.append(turn)
    last = trajectory.turns[-1]
    if last.action == "answer":
        trajectory.answer = last.content
    trajectory.reward = f1_score(trajectory.answer, trajectory.example.answers)
    return trajectory


def read_turn_row(row: Any) -> Turn | None:
    match row:
        case {"text": str(text)}:
            documents = row.get("documents")
        case _:
            return None
    is_list = isinstance(documents, list) and all(isinstance(text, str) for text in documents)
    if documents is not None and not is_list:
        return None
    action = protocol.parse_action(text)
    return Turn(text, action.kind, action.content, documents, bool(row.get("noisy")))


def is_exemplary(trajectory: Trajectory, min_reward: float) -> bool:
    """Whether a trajectory is worth imitating: it searched, did nothing invalid, and its last turn
    gave an answer that scores `min_reward` or more."""
    *searches, last = trajectory.turns
    if last.action != "answer" or trajectory.reward < min_reward:
        return False
    return bool(searches) and all(
        turn.action == "search" and turn.documents is not None for turn in searches
    )


def encode_demonstration(trajectory: Trajectory, policy: Policy) -> Tokens | None:
    """The ids of a demonstration for this policy and the mask of its own tokens; None if it does
    not fit the policy's limits.

    The loss is on what the policy would have to write: each turn up to its closing tag, where
    generation stops. Nothing follows the tag, not even an end-of-sequence token. Prompt, documents
    and their cuts are those of a rollout.
    """
    tokenizer = policy.tokenizer
    limits = policy.limits
    if len(trajectory.turns) > limits.turns:
        return None
    prompt = protocol.build_prompt(trajectory.example.question, policy.template, tokenizer)
    [ids] = protocol.prompt_ids(tokenizer, [prompt])
    mask = [0] * len(ids)
    for turn in trajectory.turns:
        [turn_ids] = protocol.reply_ids(tokenizer, [protocol.up_to_action(turn.text).strip()])
        if len(turn_ids) > limits.turn_tokens:
            return None
        ids = ids + turn_ids
        mask = mask + [1] * len(turn_ids)
        if turn.documents is not None:
            documents = [protocol.neutralize(text, tokenizer) for text in turn.documents]
            [reply] = protocol.reply_ids(
                tokenizer, [reply_text(replace(turn, documents=documents))]
            )
            reply = cut_reply(tokenizer, reply, limits.document_tokens)
            ids = ids + reply
            mask = mask + [0] * len(reply)
    if len(ids) > limits.context:
        return None
    return ids, mask


def select(
    trajectories: Iterable[Trajectory], policy: Policy, min_reward: float
) -> list[Trajectory]:
    """The exemplary trajectories that fit the policy's limits, with their tokens. Prints how many
    are left out, and why. Raises UserError if none is left."""
    demonstrations = []
    total = 0
    unworthy = 0
    too_long = 0
    for trajectory in trajectories:
        total += 1
        if not is_exemplary(trajectory, min_reward):
            unworthy += 1
            continue
        tokens = encode_demonstration(trajectory, policy)
        if tokens is None:
            too_long += 1
            continue
        trajectory.ids, trajectory.loss_mask = tokens
        trajectory.logprobs = [0.0] * len(trajectory.ids)
        demonstrations.append(trajectory)
    sentence = (
        f"{len(demonstrations)} of {total} demonstrations are taken. {unworthy} did not search and "
        f"answer with a reward of {min_reward:g} or more; {too_long} exceed --max_turns, "
        "--max_turn_tokens or --max_context."
    )
    require(bool(demonstrations), f"There is nothing to imitate: {sentence}")
    print(sentence)
    return demonstrations


def split_held_out(
    trajectories: Sequence[Trajectory], share: float
) -> tuple[list[Trajectory], list[Trajectory]]:
    """(to learn from, held out): about `share` of the questions are held out, told by a hash, so
    that all demonstrations of a question are on the same side. Some are left to learn from."""
    train: list[Trajectory] = []
    held_out: list[Trajectory] = []
    for trajectory in trajectories:
        question = trajectory.example.question.encode("utf-8", "replace")
        side = held_out if uniform(*question) < share else train
        side.append(trajectory)
    if not train:
        return held_out, []
    return train, held_out


def check_warm_start(config: PolicyConfig) -> None:
    """Raise UserError for a file that cannot be imitated, unless its demonstrations are in the run
    already."""
    copy = Path(config.output, "warm_start", "demonstrations.jsonl")
    is_read_already = bool(config.resume) and copy.is_file()
    if config.warm_start not in ("", SCRIPTED, OWN) and not is_read_already:
        read_demonstrations(Path(config.warm_start))
