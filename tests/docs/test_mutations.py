"""The tests are tested: every known defect is put in, and the test that guards it has to fail.

The defects D1 ... D20 are those found in the paper's code and its relatives:

D1 another row's question, D2 KL with the wrong sign, D3 answers read from prompt and documents, D4
EM that is a substring test, D5 validation that samples and loses questions, D6 a minibatch divided
by another's size, D7 another distribution sampled than scored, D8 documents in GAE, whitening and
the critic's loss, D9 each turn generates beyond its tag and starts again from the whole text, D10
decoded and encoded again, D11 padding guessed from ids, D12 contexts cut at an end, D13 text cut at
a later tag than the first, D14 infinity times a mask of 0, D15 a simulator asked for ever and
trusted, D16 groups by an id that is not unique, D17 settings by their place, D18 metrics of some
steps and parts, D19 a second rollout for inference, D20 no evaluation without a service.

Each row of `DEFECTS` is one as a wrong line: in this function, these words become those. Not here,
because there is no code in which they could be made:

- D5 drops the last validation batch, D18 logs metrics in some steps only: a matter of the scripts,
  whose own tests count questions and lines. (D5's sampling and D18's last micro-batch are here.)
- D15 retries a dead server for ever and swallows errors: no server is called.
- D17 reads shell arguments by position: there are no shell scripts. (Unknown flags are here.)
- D19 has a second rollout for inference: evaluation calls the same one. (Its second BOS is here.)
- D20 has no offline evaluation: BM25 is the default.
"""

import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
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

from minizs import (
    grpo,
    learner,
    logprobs,
    losses,
    ppo,
    protocol,
    reinforce,
    reward,
    rollout,
    sampling,
    sft,
    simulator,
)
from minizs.engines import ranking
from minizs.models import batches
from minizs.runs import flags


@dataclass
class Defect:
    name: str
    function: Callable
    right: str
    wrong: str
    test: Callable


def rewrite(monkeypatch, function: Callable, right: str, wrong: str) -> None:
    """Put `wrong` in the place of `right` in this function, for everyone who has imported it."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{function.__qualname__} no longer reads {right!r} once"
    names = {}
    exec(compile(source.replace(right, wrong), "defect", "exec"), function.__globals__, names)
    changed = inspect.unwrap(names[function.__name__])
    monkeypatch.setattr(function, "__code__", changed.__code__)


LEARN = learner.Learner
PLAY = rollout.rollout
GRPO, PPO = test_learner.OPTIONS[0], test_learner.OPTIONS[3]

DEFECTS = [
    Defect(
        "D1 another row's question",
        PLAY,
        "question, row.example.answers",
        "question, rows[len(requests)].example.answers",
        test_rollout.test_a_request_carries_its_own_question,
    ),
    Defect(
        "D2 KL with the wrong sign",
        LEARN._policy_loss,
        "loss + s.kl_coef *",
        "loss - s.kl_coef *",
        partial(test_learner.test_kl_moves_the_policy_towards_the_reference, "k3"),
    ),
    Defect(
        "D2 KL with the wrong sign, in PPO's reward",
        ppo.token_rewards,
        "outcome - beta",
        "outcome + beta",
        test_learner.test_ppo_puts_the_kl_into_the_reward,
    ),
    *[
        Defect(
            f"D3 answers read from prompt and documents: {test.__name__}",
            PLAY,
            "row.reward = f1_score(row.answer,",
            "row.reward = f1_score(protocol._ACTION.findall(tokenizer.decode(row.ids))[-1][1],",
            test,
        )
        for test in (
            test_rollout.test_the_prompts_example_is_no_answer,
            test_rollout.test_documents_cannot_answer,
        )
    ],
    Defect(
        "D3 actions read from the whole context",
        PLAY,
        "parse_action(text)",
        "parse_action(tokenizer.decode(row.ids))",
        test_rollout.test_an_unclosed_answer_is_none,
    ),
    Defect(
        "D4 EM is a substring test",
        reward.exact_match,
        "operator.eq",
        "operator.contains",
        test_reward.test_exact_match_is_not_substring_match,
    ),
    Defect(
        "D4 an empty gold answer is in everything",
        reward._best,
        "if predicted and gold",
        "if True",
        partial(test_reward.test_no_answer_scores_zero, reward.substring_match, "the"),
    ),
    Defect(
        "D5 validation is not greedy",
        sampling.sample,
        "if temperature == 0",
        "if False",
        partial(test_generate.test_greedy_equals_transformers, "llama"),
    ),
    Defect(
        "D6 a micro-batch normalises by itself",
        LEARN._policy_loss,
        "s.clip_high,\n        normalizer,",
        "s.clip_high,\n        batch.mask.sum().clamp(min=1),",
        partial(test_learner.test_the_split_into_micro_batches_changes_nothing, GRPO),
    ),
    Defect(
        "D6 padding counts",
        losses.token_weights,
        "return weights, lengths.sum()",
        "return weights, torch.tensor(mask.numel())",
        partial(test_learner.test_the_order_of_groups_changes_nothing, GRPO),
    ),
    Defect(
        "D7 log-probabilities without the sampling temperature",
        logprobs.score,
        "log_distribution(logits, temperature,",
        "log_distribution(logits, 1.0,",
        test_rollout.test_rollout_logprobs_equal_training_logprobs,
    ),
    Defect(
        "D7 log-probabilities over ids that are never sampled",
        logprobs.score,
        "temperature, vocab_size)\n        chosen",
        "temperature, None)\n        chosen",
        test_rollout.test_rollout_logprobs_equal_training_logprobs,
    ),
    Defect(
        "D8 GAE walks through documents",
        ppo.gae,
        "torch.where(sampled[:, t], advantage, next_advantage)",
        "advantage",
        test_ppo.test_gae_with_a_document_equals_gae_without_it,
    ),
    Defect(
        "D8 whitening over documents and padding",
        ppo.moments,
        "mask.sum().to(values.dtype)",
        "values.new_tensor(float(mask.numel()))",
        test_ppo.test_whiten_sees_sampled_tokens_only,
    ),
    Defect(
        "D8 the critic learns documents",
        ppo.value_loss,
        "average(0.5 * torch.maximum(unclipped, clipped), mask, normalizer)",
        "(0.5 * torch.maximum(unclipped, clipped)).mean()",
        test_ppo.test_value_loss_against_loops_and_finite_differences,
    ),
    Defect(
        "D8 whitening of a micro-batch's own",
        learner.PPOLearner._set_advantages,
        "batch.mask, totals)",
        "batch.mask)",
        partial(test_learner.test_the_split_into_micro_batches_changes_nothing, PPO),
    ),
    Defect(
        "D9 the last turn's search is executed",
        PLAY,
        "elif turn == limits.turns - 1:",
        "elif turn == limits.turns:",
        test_rollout.test_turns_count_generations_and_the_last_search_is_not_executed,
    ),
    Defect(
        "D9 no stop strings",
        PLAY,
        "stop=protocol.STOP",
        "stop=()",
        test_rollout.test_a_turn_ends_at_its_first_closing_tag,
    ),
    Defect(
        "D9 one search call a query",
        PLAY,
        "engine.search(list(requests.values()))",
        "[engine.search([request])[0] for request in requests.values()]",
        test_rollout.test_all_searches_of_a_turn_are_one_call,
    ),
    Defect(
        "D10 sampled ids are decoded and encoded",
        PLAY,
        "row.append(out.ids, out.logprobs)",
        "out.ids = tokenizer.encode(tokenizer.decode(out.ids, skip_special_tokens=True)); "
        "row.append(out.ids, [0.0] * len(out.ids))",
        test_rollout.test_sampled_ids_are_never_tokenised_again,
    ),
    Defect(
        "D10 eos is dropped",
        PLAY,
        "row.append(out.ids, out.logprobs)",
        "n = len(out.ids) - (out.reason == 'eos'); row.append(out.ids[:n], out.logprobs[:n])",
        test_rollout.test_only_what_the_policy_sampled_is_trained_on,
    ),
    Defect(
        "D11 attention guessed from ids",
        batches.make_batch,
        "attention(lengths)",
        "pad([trajectory.ids for trajectory in chosen]).ne(0).long()",
        test_learner.test_masks_are_never_guessed_from_ids,
    ),
    Defect(
        "D11 padding is attended to",
        batches.attention,
        "(positions < torch.tensor(lengths)[:, None]).long()",
        "torch.ones(len(lengths), max(lengths)).long()",
        test_learner.test_masks_are_never_guessed_from_ids,
    ),
    Defect(
        "D12 an overlong reply loses its end",
        PLAY,
        "ids = ids[: limits.document_tokens - len(closing)] + closing",
        "ids = ids[: limits.document_tokens]",
        partial(
            test_rollout.test_an_overlong_reply_is_cut_before_its_closing_tag,
            test_rollout.BLOCK_TOKENS - 1,
        ),
    ),
    Defect(
        "D12 the context limit is not looked at",
        PLAY,
        "if len(rows[i].ids) + len(ids) >= limits.context:",
        "if False:",
        partial(
            test_rollout.test_each_limit_ends_a_trajectory_cleanly,
            rollout.Limits(context=test_rollout.EXACT - len(test_rollout.ANSWER)),
            "context",
            (test_rollout.SEARCH, 1),
        ),
    ),
    Defect(
        "D13 a search counts before an earlier answer",
        protocol.parse_action,
        "_ACTION.search(text)",
        "re.search(r'<(search)>(.*?)</search>', text) or _ACTION.search(text)",
        test_protocol.test_the_first_closed_pair_decides,
    ),
    Defect(
        "D13 only a search ends a turn",
        PLAY,
        "stop=protocol.STOP",
        "stop=protocol.STOP[:1]",
        test_rollout.test_a_turn_ends_at_its_first_closing_tag,
    ),
    Defect(
        "D14 the mask is multiplied in afterwards",
        losses.keep,
        "torch.where(mask.bool(), values, torch.zeros_like(values))",
        "values * mask",
        partial(test_losses.test_masked_positions_can_hold_anything, math.inf),
    ),
    Defect(
        "D14 the same, seen by a whole update",
        losses.keep,
        "torch.where(mask.bool(), values, torch.zeros_like(values))",
        "values * mask",
        partial(test_learner.test_masked_positions_can_hold_anything, "grpo", math.inf),
    ),
    Defect(
        "D15 only the first gold answer",
        simulator.prompt,
        '" or ".join(request.answers)',
        "request.answers[0]",
        test_simulator.test_all_gold_answers_are_named,
    ),
    Defect(
        "D15 a fixed number of documents",
        simulator.prompt,
        "str(top_k)",
        "'5'",
        test_simulator.test_the_number_of_documents_is_the_one_asked_for,
    ),
    Defect(
        "D15 documents write control tokens",
        protocol.reply_ids,
        "split_special_tokens=True",
        "split_special_tokens=False",
        test_rollout.test_documents_cannot_write_control_tokens,
    ),
    Defect(
        "documents speak for the policy",
        PLAY,
        "[neutralize(text, tokenizer) for text in documents]",
        "documents",
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
        protocol.build_prompt,
        "neutralize(question, tokenizer)",
        "question",
        partial(
            test_hostile.test_a_question_cannot_add_to_the_prompt.hypothesis.inner_test,
            "<|im_end|>",
            test_hostile.TOKENIZERS[1],
        ),
    ),
    Defect(
        "tags in wide letters",
        protocol.neutralize,
        "if marks.search(bare) else text",
        "if False else text",
        partial(test_hostile.test_examples, "café ＜answer＞", "cafe (answer>"),
    ),
    Defect(
        "D16 the whole batch is one group",
        LEARN._outcome_advantages,
        "everyone, s.group_size,",
        "everyone, len(everyone),",
        partial(test_learner.test_equal_rewards_change_nothing, "grpo"),
    ),
    Defect(
        "D16 a group of one has advantage r",
        grpo.center,
        "group_size < 2 or",
        "False or",
        test_grpo.test_wrong_groups_are_refused,
    ),
    Defect(
        "D16 no baseline at all",
        reinforce.advantages,
        'if baseline == "none":',
        "if True:",
        partial(test_reinforce.test_equal_rewards_are_exactly_zero, "mean"),
    ),
    Defect(
        "D17 unknown flags are dropped",
        flags.parse,
        "parser.parse_args([*flags, *argv])",
        "parser.parse_known_args([*flags, *argv])[0]",
        test_config.test_an_unknown_flag_is_refused,
    ),
    Defect(
        "D18 metrics of the last micro-batch",
        LEARN._merge,
        "losses.merge_stats(stats)",
        "stats[-1]",
        partial(test_learner.test_the_split_into_micro_batches_changes_nothing, GRPO),
    ),
    Defect(
        "D19 a BOS before every document",
        protocol.reply_ids,
        "add_special_tokens=False",
        "add_special_tokens=True",
        test_rollout.test_only_the_prompt_gets_a_bos,
    ),
    # ---- of others, and what could go wrong here ----
    Defect(
        "noise drawn by place in the batch",
        PLAY,
        "uniform(seed, NOISE, *row_keys[i], turn)",
        "uniform(seed, NOISE, len(requests), turn)",
        test_rollout.test_noise_is_drawn_once_a_search,
    ),
    Defect(
        "noise drawn once a trajectory",
        PLAY,
        "uniform(seed, NOISE, *row_keys[i], turn)",
        "uniform(seed, NOISE, *row_keys[i])",
        test_rollout.test_noise_is_drawn_once_a_search,
    ),
    Defect(
        "the same random numbers in every turn",
        PLAY,
        "(TOKENS, *row_keys[i], turn)",
        "(TOKENS, live.index(i), turn)",
        test_rollout.test_trajectories_do_not_depend_on_the_batch,
    ),
    Defect(
        "no filler micro-batches",
        LEARN._split,
        "range(int(counts.max()) - len(batches))",
        "range(0)",
        partial(test_learner.test_fillers_change_nothing, GRPO),
    ),
    Defect(
        "fillers that teach",
        LEARN._split,
        "filler.mask.zero_()",
        "pass",
        partial(test_learner.test_fillers_change_nothing, GRPO),
    ),
    Defect(
        "old log-probabilities from the sampler",
        LEARN._policy_loss,
        "old_logprobs = logprobs.detach() if",
        "old_logprobs = batch.sampled_logprobs if",
        test_learner.test_ratio_is_exactly_one_on_policy,
    ),
    Defect(
        "low and high clip exchanged",
        losses.policy_loss,
        "clamp(1 - clip_low, 1 + clip_high)",
        "clamp(1 - clip_high, 1 + clip_low)",
        test_losses.test_loss_and_stats_against_loops,
    ),
    Defect(
        "tokens without their weights",
        losses.policy_loss,
        " * weights",
        "",
        test_losses.test_loss_and_stats_against_loops,
    ),
    Defect(
        "a maximum for the minimum",
        losses.policy_loss,
        "torch.minimum(unclipped, clipped)",
        "torch.maximum(unclipped, clipped)",
        partial(test_losses.test_one_token_by_hand, 1.5, 1.0, -1.28, 0.0),
    ),
    Defect(
        "trained on prompts of the simulator",
        simulator.training_text,
        "(text, False)",
        "(text, True)",
        test_simulator.test_the_loss_is_on_the_documents_and_eos_alone,
    ),
    Defect(
        "no eos to learn",
        sft.encode,
        "[*marks, True]",
        "[*marks, False]",
        test_simulator.test_the_loss_is_on_the_documents_and_eos_alone,
    ),
    Defect(
        "a text tokenised as one piece",
        protocol.reply_ids,
        "add_special_tokens=False",
        "add_special_tokens=True",
        test_sft.test_only_the_opening_piece_gets_a_bos,
    ),
    Defect(
        "loss of the next but one token",
        sft.nll,
        "input_ids[marked]",
        "input_ids.roll(-1, 1)[marked]",
        test_sft.test_nll_against_loops,
    ),
    Defect(
        "packed sequences whose positions run on",
        logprobs.run_packed,
        "positions[real][None]",
        "torch.arange(int(real.sum()))[None]",
        partial(test_packed.test_a_sequence_cannot_see_its_neighbours, "llama"),
    ),
    Defect(
        "a chat template around the simulator's prompt in use alone",
        sft.encode,
        "prompt_ids(tokenizer, texts[:1])",
        'tokenizer(texts[:1])["input_ids"]',
        test_families.test_training_and_use_open_alike,
    ),
    Defect(
        "documents are trained on",
        PLAY,
        "rows[i].append(ids)",
        "rows[i].append(ids, [0.0] * len(ids))",
        test_rollout.test_only_what_the_policy_sampled_is_trained_on,
    ),
    Defect(
        "PPO's KL in the reward and in the loss",
        LEARN._policy_loss,
        "self.kl_in_loss and ",
        "",
        test_learner.test_ppo_puts_the_kl_into_the_reward,
    ),
    Defect(
        "noisy replies that hold the answer",
        ranking.Ranking._reply,
        "if request.noisy:",
        "if False:",
        test_ranking.test_noise_takes_the_useful_documents_out,
    ),
]


@pytest.mark.filterwarnings("ignore:std")  # of a group of one
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "_"))
def test_a_defect_is_found(defect, monkeypatch):
    """Guards the guards: green without the defect, red with it."""
    defect.test()
    rewrite(monkeypatch, defect.function, defect.right, defect.wrong)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        defect.test()
