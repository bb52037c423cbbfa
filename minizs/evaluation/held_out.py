"""The test of a policy while it trains, on questions that it is not trained on."""

from collections.abc import Callable
from functools import partial

from minizs.evaluation.scores import answer_all, summary
from minizs.rollout import rollout
from minizs.runs import build, data


def held_out_test(
    config, accelerator, writer, tokenizer, template: str
) -> Callable[[], dict] | None:
    """A function that tests the model, `writer()`, on held-out questions, greedily with BM25.

    It is None where `--eval_every` is 0, or where there are no held-out questions or no corpus: a
    test with the simulator, which sees the gold answers, would be none.
    """
    if not config.eval_every:
        return None
    examples = data.spread(data.load_examples(config.data, "dev"), config.eval_questions)
    if not examples or (config.data != "world" and not config.corpus):
        return accelerator.print("No evaluation while it trains: it takes questions and --corpus.")
    engine = build.build_bm25(config, "dev")

    def evaluate() -> dict[str, float]:
        policy = build.make_policy(config, writer(), tokenizer, template, temperature=0.0)
        answer = partial(rollout, policy, engine=engine)
        rows = answer_all(answer, examples, accelerator)
        if not rows:  # only the main process has them
            return {}
        return {f"held_out_{name}": value for name, value in summary(rows).items()}

    return evaluate
