"""The tiny base model is made from nothing, through `main(argv)`."""

import pytest
import torch
from scripts import weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from minizs import base, pretrain
from minizs.config import UserError

TINY = "--steps 2 --hidden 16 --layers 1 --batch_tokens 200 --threads 1".split()


def test_it_leaves_a_model_with_both_prompts(work):
    """Guards a base model that neither script could start from, or that is another each time."""
    for folder, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        pretrain.main([*TINY, "--output", folder, "--seed", seed])
    assert weights(work / "one") == weights(work / "same") != weights(work / "other")
    assert (work / "one" / "prompt.txt").read_text() == base.PROMPT
    assert (work / "one" / "simulator_prompt.txt").read_text() == base.SIMULATOR_PROMPT
    pretrain.main([*TINY, "--output", "one", "--seed", "2", "--overwrite"])
    assert weights(work / "one") == weights(work / "other")
    model = AutoModelForCausalLM.from_pretrained(work / "one")
    tokenizer = AutoTokenizer.from_pretrained(work / "one")
    logits = model(torch.tensor([tokenizer("Question: ?")["input_ids"]])).logits
    assert logits.isfinite().all() and logits.shape[-1] == len(tokenizer)


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.2, 0.6, 1.0])
def test_the_mixture_never_runs_dry(progress):
    """Guards a stage of the training that has no text to learn from."""
    weights = pretrain.mixture(progress)
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--stepz 5", "--stepz"),
        ("--steps 0", "--steps"),
        ("--hidden 12", "--hidden"),
        ("--batch_tokens 0", "--batch_tokens"),
        ("--output ../base", "not empty"),
    ],
)
def test_bad_input_is_refused(work, flags, names):
    """Guards a traceback from deep inside a model."""
    with pytest.raises(UserError, match=names):
        pretrain.main([*TINY, *flags.split()])
    assert not list(work.iterdir())
