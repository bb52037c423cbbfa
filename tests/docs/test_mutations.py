"""The tests are tested: each known defect is put in, and the test that guards it has to fail.

The defects D1 to D20 are those found in the paper's code and its relatives:

D1 another row's question, D2 KL with the wrong sign, D3 answers read from prompt and documents, D4
EM that is a substring test, D5 validation that samples and loses questions, D6 a minibatch divided
by another's size, D7 another distribution sampled than scored, D8 documents in GAE, whitening and
the critic's loss, D9 each turn generates beyond its tag and starts again from the whole text, D10
decoded and encoded again, D11 padding guessed from ids, D12 contexts cut at an end, D13 text cut at
a later tag than the first, D14 infinity times a mask of 0, D15 a simulator asked for ever and
trusted, D16 groups by an id that is not unique, D17 settings by their place, D18 metrics of some
steps and parts, D19 a second rollout for inference, D20 no evaluation without a service.

A defect is a change of behaviour. A function is replaced, wherever it has been imported, by one
that calls it with other arguments or does something else with its result. How a function is
written inside does not matter here, so that renaming a local variable breaks nothing.

Some defects are not here, because there is no code in which they could be made:

- D5 drops the last validation batch, and D18 logs metrics in some steps only. These are a matter of
  the scripts, whose own tests count questions and lines. (D5's sampling, D18's last micro-batch and
  D17's unknown flags are here.)
- D15 retries a dead server for ever and swallows errors; D17 reads shell arguments by position;
  D19 has a second rollout for inference; D20 has no offline evaluation.
"""

import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import test_config
import test_families
import test_generate
import test_grpo
import test_hostile
import test_learner
import test_losses
import test_packed
import test_ppo
import test_protocol
import test_ranking
import test_reinforce
import test_reward
import test_rollout
import test_sft
import test_simulator
import torch

from minizs import (
    generate,
    grpo,
    learner,
    logprobs,
    losses,
    ppo,
    protocol,
    reinforce,
    reward,
    rollout,
    sft,
    simulator,
)
from minizs.engines import ranking
from minizs.models import batches
from minizs.runs import flags
from minizs.trajectory import Trajectory

Put = Callable[[pytest.MonkeyPatch], None]  # puts a defect in

# ---- How a defect is put in ----------------------------------------------------------------------


def replaced(function: Callable, defective: Callable) -> Put:
    """`defective` in the place of a function, in every module that has imported it."""

    def put(patch: pytest.MonkeyPatch) -> None:
        for module in list(sys.modules.values()):
            name = getattr(module, "__name__", "")
            if not name.startswith(("minizs", "test_")):
                continue
            for attribute, value in list(vars(module).items()):
                if value is function:
                    patch.setattr(module, attribute, defective)

    return put


def with_arguments(function: Callable, **changes) -> Put:
    """The function gets other arguments. A change is a value, or a function of all arguments."""
    return replaced(function, changed_arguments(function, changes))


def changed_arguments(function: Callable, changes: dict) -> Callable:
    signature = inspect.signature(function)

    def defective(*args, **options):
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        original = dict(bound.arguments)
        for name, change in changes.items():
            bound.arguments[name] = change(original) if callable(change) else change
        return function(*bound.args, **bound.kwargs)

    return defective


def with_result(function: Callable, change: Callable) -> Put:
    """The function gives `change(result)`."""
    return replaced(function, lambda *args, **options: change(function(*args, **options)))


def method(kind: type, name: str, make: Callable[[Callable], Callable]) -> Put:
    """The method is replaced by `make(method)`."""
    return lambda patch: patch.setattr(kind, name, make(getattr(kind, name)))


def value(holder, name: str, defective) -> Put:
    """A constant has another value."""
    return lambda patch: patch.setattr(holder, name, defective)


# ---- Defects that take more than a line ----------------------------------------------------------


def questions_by_place(patch: pytest.MonkeyPatch) -> None:
    """The k-th query of a turn gets the question of the k-th row of the whole batch."""
    start_rows, search = rollout.start_rows, rollout.search
    everyone: list = []

    def start(*args):
        everyone[:] = start_rows(*args)
        return everyone

    def search_by_place(policy, engine, rows, requests):
        examples = [row.trajectory.example for row in everyone]
        wrong = [
            replace(request, question=example.question, answers=example.answers)
            for request, example in zip(requests, examples, strict=False)
        ]
        search(policy, engine, rows, wrong)

    patch.setattr(rollout, "start_rows", start)
    patch.setattr(rollout, "search", search_by_place)


def answers_of_the_whole_text(policy, examples, engine, **options):
    """A rollout whose answer is the last one anywhere in the context."""
    rows = rollout.rollout(policy, examples, engine, **options)
    for row in rows:
        text = policy.tokenizer.decode(row.ids)
        answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        row.answer = answers[-1].strip() if answers else None
    return rows


def actions_of_the_whole_text(patch: pytest.MonkeyPatch) -> None:
    """An action is read from all that has been written since the prompt."""
    read_turn = rollout.read_turn
    parse_action = protocol.parse_action

    def read(policy, row, generated, is_last):
        trajectory = row.trajectory
        start = trajectory.loss_mask.index(1) if 1 in trajectory.loss_mask else len(trajectory.ids)
        text = policy.tokenizer.decode(trajectory.ids[start:] + generated.ids)
        patch.setattr(protocol, "parse_action", lambda _: parse_action(text))
        read_turn(policy, row, generated, is_last)

    patch.setattr(rollout, "read_turn", read)


def search_first(text: str) -> protocol.Action:
    """Reads a search even behind an earlier answer."""
    match = re.search(r"<search>(.*?)</search>", text)
    return protocol.Action("search", match[1]) if match else protocol.Action("invalid")


def one_search_a_query(patch: pytest.MonkeyPatch) -> None:
    search = rollout.search

    def one_by_one(policy, engine, rows, requests):
        for row, request in zip(rows, requests, strict=True):
            search(policy, engine, [row], [request])

    patch.setattr(rollout, "search", one_by_one)


def encoded_again(arguments: dict):
    """What was sampled, decoded and encoded."""
    generated = arguments["generated"]
    tokenizer = arguments["policy"].tokenizer
    ids = tokenizer.encode(tokenizer.decode(generated.ids, skip_special_tokens=True))
    return replace(generated, ids=ids, logprobs=[0.0] * len(ids))


def without_eos(arguments: dict):
    generated = arguments["generated"]
    end = len(generated.ids) - (generated.reason == "eos")
    return replace(generated, ids=generated.ids[:end], logprobs=generated.logprobs[:end])


def without_context(arguments: dict):
    policy = arguments["policy"]
    return replace(policy, limits=replace(policy.limits, context=math.inf))


def raw_documents(patch: pytest.MonkeyPatch) -> None:
    """Documents come into the context as they are; requests are made neutral all the same."""
    search = rollout.search

    def search_raw(*args):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(rollout, "neutralize", lambda text, tokenizer: text)
            search(*args)

    patch.setattr(rollout, "search", search_raw)


def documents_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    append_replies = rollout.append_replies
    append = Trajectory.append

    def append_as_own(self, ids, logprobs=None):
        append(self, ids, logprobs or [0.0] * len(ids))

    def replies(*args):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Trajectory, "append", append_as_own)
            append_replies(*args)

    patch.setattr(rollout, "append_replies", replies)


def noise_by_place(patch: pytest.MonkeyPatch) -> None:
    """The number behind a noise draw depends on how many searches have been made before."""
    numbers = itertools.count()
    uniform = rollout.uniform
    patch.setattr(rollout, "uniform", lambda seed, use, *key: uniform(seed, use, next(numbers)))


def keys_by_place(turn: Callable) -> Callable:
    """The random numbers of a row depend on its place in the batch."""
    return lambda self, rows, budgets, keys: turn(self, rows, budgets, range(len(rows)))


def neutralize_in_parts(text: str, tokenizer=None) -> str:
    """Looks at ASCII and other letters apart, so that a tag may hide in their mixture."""
    parts = re.findall(r"[\x00-\x7f]+|[^\x00-\x7f]+", text)
    return "".join(protocol.neutralize(part, tokenizer) for part in parts)


def loss_with_the_maximum(
    logprobs, old_logprobs, advantages, *rest, policy_loss=losses.policy_loss, **options
):
    """max(x, y) = -min(-x, -y)"""
    loss, stats = policy_loss(logprobs, old_logprobs, -advantages, *rest, **options)
    return -loss, stats


def attention_from_ids(batch: batches.Batch) -> batches.Batch:
    batch.attention = batch.ids.ne(0).long()
    return batch


def without_fillers(split: Callable) -> Callable:
    def defective(self, trajectories):
        parts = split(self, trajectories)
        return [[batch for batch in part if batch.mask.any()] for part in parts]

    return defective


def fillers_that_teach(split: Callable) -> Callable:
    def defective(self, trajectories):
        parts = split(self, trajectories)
        for batch in (batch for part in parts for batch in part):
            batch.mask = batches.make_batch(trajectories, batch.rows).mask
        return parts

    return defective


def sampled_as_old(score: Callable) -> Callable:
    def defective(self, parts):
        score(self, parts)
        for batch in parts:
            batch.old_logprobs = batch.sampled_logprobs

    return defective


def positions_that_run_on(arguments: dict) -> Callable:
    """A decoder that counts through all packed sequences."""
    decoder = arguments["decoder"]

    def run_on(input_ids, position_ids, **options):
        return decoder(
            input_ids=input_ids,
            position_ids=torch.arange(input_ids.shape[1])[None],
            **options,
        )

    run_on.config = decoder.config
    return run_on


def everything(name: str) -> Callable:
    """A mask that is 1 everywhere, in the place of the argument `name`."""
    return lambda arguments: torch.ones_like(arguments[name])


# ---- The defects ---------------------------------------------------------------------------------


@dataclass
class Defect:
    name: str
    put: Put
    test: Callable


LEARNER = learner.Learner
GRPO, PPO = test_learner.OPTIONS[0], test_learner.OPTIONS[3]

DEFECTS = [
    Defect(
        "D1 another row's question",
        questions_by_place,
        test_rollout.test_a_request_carries_its_own_question,
    ),
    Defect(
        "D2 KL with the wrong sign",
        with_result(losses.kl, torch.neg),
        partial(test_learner.test_kl_moves_the_policy_towards_the_reference, "k3"),
    ),
    Defect(
        "D2 KL with the wrong sign, in PPO's reward",
        with_arguments(ppo.token_rewards, kl=lambda arguments: -arguments["kl"]),
        test_learner.test_ppo_puts_the_kl_into_the_reward,
    ),
    Defect(
        "D3 answers read from the prompt",
        value(test_rollout, "rollout", answers_of_the_whole_text),
        test_rollout.test_an_example_in_the_prompt_is_no_answer,
    ),
    Defect(
        "D3 answers read from documents",
        value(test_rollout, "rollout", answers_of_the_whole_text),
        test_rollout.test_documents_cannot_answer,
    ),
    Defect(
        "D3 actions read from the whole context",
        actions_of_the_whole_text,
        test_rollout.test_an_unclosed_answer_is_none,
    ),
    Defect(
        "tags in a thought act",
        value(protocol, "THOUGHT", re.compile("(?!)")),
        test_rollout.test_tags_in_a_thought_do_not_end_the_turn,
    ),
    Defect(
        "D4 EM is a substring test",
        replaced(reward.exact_match, reward.substring_match),
        test_reward.test_exact_match_is_not_substring_match,
    ),
    Defect(
        "D4 an empty gold answer is in everything",
        replaced(
            reward.substring_match,
            lambda prediction, answers: any(a.lower() in str(prediction).lower() for a in answers),
        ),
        lambda: test_reward.test_no_answer_scores_zero(test_reward.substring_match, ""),
    ),
    Defect(
        "D5 validation is not greedy",
        method(
            generate.Decoder,
            "__init__",
            lambda start: changed_arguments(
                start, {"temperature": lambda arguments: arguments["temperature"] or 1.0}
            ),
        ),
        partial(test_generate.test_greedy_equals_transformers, "llama"),
    ),
    Defect(
        "D6 a micro-batch normalises by itself",
        with_arguments(losses.policy_loss, normalizer=None),
        partial(test_learner.test_the_split_into_micro_batches_changes_nothing, GRPO),
    ),
    Defect(
        "D6 padding counts",
        replaced(
            losses.token_weights,
            lambda mask, *_: (mask.float(), torch.tensor(mask.numel())),
        ),
        partial(test_learner.test_the_order_of_groups_changes_nothing, GRPO),
    ),
    Defect(
        "D7 log-probabilities without the sampling temperature",
        with_arguments(logprobs.score, temperature=1.0),
        test_rollout.test_rollout_logprobs_equal_training_logprobs,
    ),
    Defect(
        "D7 log-probabilities over ids that are never sampled",
        with_arguments(logprobs.score, vocab_size=None),
        test_rollout.test_rollout_logprobs_equal_training_logprobs,
    ),
    Defect(
        "D8 GAE walks through documents",
        with_arguments(ppo.gae, mask=everything("mask")),
        test_ppo.test_gae_with_a_document_equals_gae_without_it,
    ),
    Defect(
        "D8 whitening over documents and padding",
        with_arguments(ppo.moments, mask=everything("mask")),
        test_ppo.test_whiten_sees_sampled_tokens_only,
    ),
    Defect(
        "D8 the critic learns documents",
        with_arguments(ppo.value_loss, mask=everything("mask")),
        test_ppo.test_value_loss_against_loops_and_finite_differences,
    ),
    Defect(
        "D8 whitening of a micro-batch's own",
        with_arguments(ppo.whiten, totals=None),
        partial(test_learner.test_the_split_into_micro_batches_changes_nothing, PPO),
    ),
    Defect(
        "D9 the last turn's search is executed",
        with_arguments(rollout.read_turn, is_last=False),
        test_rollout.test_turns_count_generations_and_the_last_search_is_not_executed,
    ),
    Defect(
        "D9 no stop strings",
        value(protocol, "STOP", ()),
        test_rollout.test_a_turn_ends_at_its_first_closing_tag,
    ),
    Defect(
        "D9 one search call a query",
        one_search_a_query,
        test_rollout.test_all_searches_of_a_turn_are_one_call,
    ),
    Defect(
        "D10 sampled ids are decoded and encoded",
        with_arguments(rollout.read_turn, generated=encoded_again),
        test_rollout.test_sampled_ids_are_never_tokenised_again,
    ),
    Defect(
        "D10 eos is dropped",
        with_arguments(rollout.read_turn, generated=without_eos),
        test_rollout.test_only_what_the_policy_sampled_is_trained_on,
    ),
    Defect(
        "D11 attention guessed from ids",
        with_result(batches.make_batch, attention_from_ids),
        test_learner.test_masks_are_never_guessed_from_ids,
    ),
    Defect(
        "D11 padding is attended to",
        replaced(batches.attention, lambda lengths: torch.ones(len(lengths), max(lengths)).long()),
        test_learner.test_masks_are_never_guessed_from_ids,
    ),
    Defect(
        "D12 an overlong reply loses its end",
        replaced(rollout.cut_reply, lambda tokenizer, ids, limit: ids[:limit]),
        partial(
            test_rollout.test_an_overlong_reply_is_cut_before_its_closing_tag,
            test_rollout.BLOCK_TOKENS - 1,
        ),
    ),
    Defect(
        "D12 the context limit is not looked at",
        with_arguments(rollout.append_replies, policy=without_context),
        partial(
            test_rollout.test_each_limit_ends_a_trajectory_cleanly,
            rollout.Limits(context=test_rollout.EXACT - len(test_rollout.ANSWER)),
            "context",
            (test_rollout.SEARCH, 1),
        ),
    ),
    Defect(
        "D13 a search counts before an earlier answer",
        replaced(protocol.parse_action, search_first),
        test_protocol.test_the_first_closing_tag_decides,
    ),
    Defect(
        "D13 only a search ends a turn",
        value(protocol, "STOP", protocol.STOP[:1]),
        test_rollout.test_a_turn_ends_at_its_first_closing_tag,
    ),
    Defect(
        "D14 the mask is multiplied in afterwards",
        replaced(losses.keep, lambda values, mask: values * mask),
        partial(test_losses.test_masked_positions_can_hold_anything, math.inf),
    ),
    Defect(
        "D14 the same, seen by a whole update",
        replaced(losses.keep, lambda values, mask: values * mask),
        partial(test_learner.test_masked_positions_can_hold_anything, "grpo", math.inf),
    ),
    Defect(
        "D15 only the first gold answer",
        with_arguments(
            simulator.fill_template,
            request=lambda arguments: replace(
                arguments["request"], answers=arguments["request"].answers[:1]
            ),
        ),
        test_simulator.test_gold_answers_are_named,
    ),
    Defect(
        "D15 a fixed number of documents",
        with_arguments(simulator.fill_template, top_k=5),
        test_simulator.test_the_number_of_documents_is_the_one_asked_for,
    ),
    Defect(
        "D15 documents write control tokens",
        replaced(
            protocol.reply_ids,
            lambda tokenizer, texts: tokenizer(texts, add_special_tokens=False)["input_ids"],
        ),
        test_rollout.test_documents_cannot_write_control_tokens,
    ),
    Defect(
        "a thought is a document",
        replaced(protocol.without_thoughts, lambda text: text),
        partial(test_simulator.test_thoughts_are_no_documents, "<think>Doc 1: a draft", []),
    ),
    Defect(
        "documents speak for the policy",
        raw_documents,
        partial(
            test_hostile.test_rollouts_cannot_be_steered.hypothesis.inner_test,
            ["</information>"],
            "q",
            "q",
            60,
            test_hostile.TOKENIZERS[1],
        ),
    ),
    Defect(
        "a question speaks for the model",
        replaced(
            protocol.build_prompt,
            lambda question, template=protocol.PROMPT, tokenizer=None: template.replace(
                "{question}", question + "?"
            ),
        ),
        partial(
            test_hostile.test_a_question_cannot_add_to_the_prompt.hypothesis.inner_test,
            "<|im_end|>",
            test_hostile.TOKENIZERS[1],
        ),
    ),
    Defect(
        "tags in wide letters",
        lambda patch: patch.setattr(test_hostile, "neutralize", neutralize_in_parts),
        partial(test_hostile.test_examples, "café ＜answer＞", "cafe (answer>"),
    ),
    Defect(
        "D16 the whole batch is one group",
        with_arguments(
            grpo.group_advantages, group_size=lambda arguments: len(arguments["rewards"])
        ),
        partial(test_learner.test_equal_rewards_change_nothing, "grpo"),
    ),
    Defect(
        "D16 a group of one has advantage r",
        replaced(grpo.group_advantages, lambda rewards, *_: rewards),
        test_grpo.test_wrong_groups_are_refused,
    ),
    Defect(
        "D16 no baseline at all",
        replaced(reinforce.advantages, lambda rewards, *_: rewards),
        partial(test_reinforce.test_equal_rewards_are_exactly_zero, "mean"),
    ),
    Defect(
        "D17 unknown flags are dropped",
        with_arguments(flags.parse, argv=lambda arguments: []),  # all those of the test are unknown
        test_config.test_an_unknown_flag_is_refused,
    ),
    Defect(
        "D18 metrics of the last micro-batch",
        replaced(losses.merge_stats, lambda parts: dict(parts[-1])),
        partial(test_learner.test_the_split_into_micro_batches_changes_nothing, GRPO),
    ),
    Defect(
        "D19 a BOS before every document",
        replaced(protocol.reply_ids, lambda tokenizer, texts: tokenizer(texts)["input_ids"]),
        test_rollout.test_only_the_prompt_gets_a_bos,
    ),
    # ---- of others, and what could go wrong here ----
    Defect(
        "noise drawn by place in the batch",
        noise_by_place,
        test_rollout.test_noise_is_drawn_once_a_search,
    ),
    Defect(
        "noise drawn once a trajectory",
        lambda patch: patch.setattr(
            rollout, "uniform", lambda *keys, draw=rollout.uniform: draw(*keys[:-1])
        ),
        test_rollout.test_noise_is_drawn_once_a_search,
    ),
    Defect(
        "random numbers by place in the batch",
        method(generate.Decoder, "turn", keys_by_place),
        test_rollout.test_trajectories_do_not_depend_on_the_batch,
    ),
    Defect(
        "no filler micro-batches",
        method(LEARNER, "_split", without_fillers),
        partial(test_learner.test_fillers_change_nothing, GRPO),
    ),
    Defect(
        "fillers that teach",
        method(LEARNER, "_split", fillers_that_teach),
        partial(test_learner.test_fillers_change_nothing, GRPO),
    ),
    Defect(
        "old log-probabilities from the sampler",
        method(LEARNER, "_score", sampled_as_old),
        test_learner.test_ratio_is_exactly_one_on_policy,
    ),
    Defect(
        "low and high clip exchanged",
        with_arguments(
            losses.policy_loss,
            clip_low=lambda arguments: arguments["clip_high"],
            clip_high=lambda arguments: arguments["clip_low"],
        ),
        test_losses.test_loss_and_stats_against_loops,
    ),
    Defect(
        "tokens without their weights",
        with_arguments(losses.policy_loss, weights=None),
        test_losses.test_loss_and_stats_against_loops,
    ),
    Defect(
        "a maximum for the minimum",
        replaced(losses.policy_loss, loss_with_the_maximum),
        partial(test_losses.test_one_token_by_hand, 1.5, 1.0, -1.28, 0.0),
    ),
    Defect(
        "trained on prompts of the simulator",
        with_result(
            simulator.training_text, lambda segments: [(text, True) for text, _ in segments]
        ),
        test_simulator.test_the_loss_is_on_the_documents_and_eos_alone,
    ),
    Defect(
        "no eos to learn",
        with_result(sft.encode, lambda tokens: (tokens[0], [*tokens[1][:-1], 0])),
        test_simulator.test_the_loss_is_on_the_documents_and_eos_alone,
    ),
    Defect(
        "a text tokenised as one piece",
        replaced(protocol.reply_ids, lambda tokenizer, texts: tokenizer(texts)["input_ids"]),
        test_sft.test_only_the_opening_piece_gets_a_bos,
    ),
    Defect(
        "loss of the next but one token",
        with_arguments(
            sft.nll, loss_mask=lambda arguments: arguments["loss_mask"].roll(-1, dims=1)
        ),
        test_sft.test_nll_against_loops,
    ),
    Defect(
        "packed sequences whose positions run on",
        with_arguments(logprobs.run_packed, decoder=positions_that_run_on),
        partial(test_packed.test_a_sequence_cannot_see_its_neighbours, "llama"),
    ),
    Defect(
        "a chat template around the simulator's prompt in use alone",
        lambda patch: patch.setattr(
            sft, "prompt_ids", lambda tokenizer, texts: tokenizer(texts)["input_ids"]
        ),
        test_families.test_training_and_use_open_alike,
    ),
    Defect(
        "documents are trained on",
        documents_in_the_loss,
        test_rollout.test_only_what_the_policy_sampled_is_trained_on,
    ),
    Defect(
        "PPO's KL in the reward and in the loss",
        value(learner.PPOLearner, "kl_in_loss", True),
        test_learner.test_ppo_puts_the_kl_into_the_reward,
    ),
    Defect(
        "noisy replies that hold the answer",
        method(
            ranking.Engine,
            "search",
            lambda search: (
                lambda self, requests: search(
                    self, [replace(request, noisy=False) for request in requests]
                )
            ),
        ),
        test_ranking.test_noise_takes_the_useful_documents_out,
    ),
]


@pytest.mark.filterwarnings("ignore:std")  # of a group of one
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "_"))
def test_a_defect_is_found(defect, monkeypatch):
    """The test passes as the code is, and fails with the defect."""
    defect.test()
    defect.put(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        defect.test()
