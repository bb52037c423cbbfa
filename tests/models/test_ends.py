"""Which tokens end a reply: all that the model, its generation configuration, its tokenizer and its
chat template name."""

import pytest
from conftest import EOS, ScriptedHead, make_model, make_tokenizer

from minizs.models.ends import closing_ids, end_ids
from minizs.rollout import Limits, Policy, rollout
from minizs.simulator import SimulatedSearch
from minizs.trajectory import Example, SearchRequest

EXTRA = ("<|im_start|>", "<|im_end|>", "<|end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(template):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(EXTRA)})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template, names",
    [
        (None, []),
        (CHATML, ["<|im_end|>"]),
        ("{% for m in messages %}{{ m['content'] }} <eos>{% endfor %}", ["<eos>"]),
        ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}", []),
        (
            "{% for m in messages %}{{ m['content'].strip() }}<|end|>\n<eos>{% endfor %}",
            ["<|end|>"],
        ),
        ("{{ raise_exception('no assistant, please') }}", []),
        (  # closes a reply that something follows
            "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}<|end|>{% endif %}"
            "{% endfor %}",
            ["<|end|>"],
        ),
        (  # leaves out what is no list of parts
            "{% for m in messages %}<|im_start|>{% for part in m['content'] %}"
            "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
            "{% endfor %}",
            ["<|im_end|>"],
        ),
    ],
)
def test_the_token_that_closes_a_reply(template, names):
    """It is the special token that the template puts right behind what an assistant says."""
    tokenizer = with_template(template)
    assert closing_ids(tokenizer) == tokenizer.convert_tokens_to_ids(names)


def test_all_that_name_an_end_count():
    """A base model's template and an instruct model's generation configuration are both heard."""
    tokenizer = with_template(CHATML)
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = make_model(vocab_size=len(tokenizer), eos_token_id=7)
    model.generation_config.eos_token_id = [8, 9]
    assert end_ids(model, tokenizer) == tuple(sorted({EOS, 7, 8, 9, closing}))
    tokenizer.chat_template = None
    model.generation_config.eos_token_id = None
    assert end_ids(model, tokenizer) == (EOS, 7)


def test_the_policy_stops_where_its_message_ends():
    """After `<|im_end|>` it does not write the user's next message, nor a second answer."""
    tokenizer = with_template(CHATML)
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    text = "hm<|im_end|>\n<|im_start|>user<answer>no</answer>"
    model.lm_head = ScriptedHead(tokenizer.encode(text) + [5] * 99, len(tokenizer))
    policy = Policy(model, tokenizer, limits=Limits(turns=1))
    [trajectory] = rollout(policy, [Example("Why?", ("because",))], None)
    assert trajectory.answer is None
    assert trajectory.turns[0].text.startswith("hm") and "user" not in trajectory.turns[0].text


def test_the_simulator_stops_where_its_message_ends():
    """The user's next message does not become a part of the last document."""
    tokenizer = with_template(CHATML)
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    script = tokenizer.encode("Doc 1: a fact<|im_end|>\n<|im_start|>user\nThanks!") + [5] * 999
    model.lm_head = ScriptedHead(script, len(tokenizer))
    engine = SimulatedSearch(model, tokenizer, "{query}", max_new_tokens=60)
    assert engine.search([SearchRequest("a", "b?", ("c",))]) == [["a fact"]]
