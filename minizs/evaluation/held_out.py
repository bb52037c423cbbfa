"""The tests of a policy while it trains, on questions that it is not trained on."""

from collections.abc import Callable, Sequence
from functools import partial

from minizs.evaluation.scores import answer_all, summary
from minizs.rollout import rollout
from minizs.runs import build, data, metrics
from minizs.trajectory import Trajectory


def held_out_test(
    config, accelerator, writer, tokenizer, template: str
) -> Callable[[], dict] | None:
    """A function that tests the model, `writer()`, on held-out questions, greedily with BM25: once
    as it is, and once with replies that are noisy with the probability `--eval_noise`.

    It is None where `--eval_every` is 0, or where there are no held-out questions or no corpus: a
    test with the simulator, which sees the gold answers, would be none.
    """
    if not config.eval_every:
        return None
    examples = data.spread(data.load_examples(config.data, "dev"), config.eval_questions)
    if not examples or (config.data != "world" and not config.corpus):
        return accelerator.print("No evaluation while it trains: it takes questions and --corpus.")
    engine = build.build_bm25(config, "dev")
    noise_by_test = {"held_out": 0.0}
    if config.eval_noise:
        noise_by_test["held_out_noisy"] = config.eval_noise

    def evaluate() -> dict[str, float]:
        policy = build.make_policy(config, writer(), tokenizer, template, temperature=0.0)
        figures = {}
        for name, noise in noise_by_test.items():
            answer = partial(rollout, policy, engine=engine, noise=noise)
            rows = answer_all(answer, examples, accelerator)
            if rows:  # only the main process has them
                figures |= {f"{name}_{key}": value for key, value in figures_of(rows).items()}
        return figures

    return evaluate


def figures_of(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Scores, and how often a policy searched again."""
    return summary(trajectories) | metrics.means(metrics.again_counts(trajectories))
