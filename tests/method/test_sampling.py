"""Drawing a token, and seeing that the text it completes ends the turn."""

import pytest
import torch
from conftest import VOCAB, ScriptedHead, make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from minizs.generate import Decoder, generate
from minizs.randomness import hash64, uniform
from minizs.sampling import StopStrings, draw, uniforms

# ---- sampling -----------------------------------------------------------------------------------


def test_uniforms_agree_with_the_scalar_hash():
    """The vector version of the random function gives the same bits as the plain one."""
    keys = [(0, 0), (3, -1), (2**63, 5), (2**80 + 7, 2), (12345, 2**64 - 1)]
    for position in (0, 1, 17, 2**40):
        expected = [uniform(*key, position) for key in keys]
        assert uniforms([hash64(*key) for key in keys], position).tolist() == expected


def test_samples_follow_the_softmax():
    """A token is drawn as often as its probability says, and no id beyond `vocab_size` ever."""
    model = make_model()
    prompt = [5, 6, 7]
    n = 4000
    vocab_size = 20
    options = {"temperature": 1.5, "vocab_size": vocab_size}
    results = generate(model, [prompt] * n, 1, eos_id=(), **options)
    counts = torch.bincount(torch.tensor([r.ids[0] for r in results]), minlength=VOCAB)
    assert not counts[vocab_size:].any()
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1, :vocab_size]
    expected = (logits / options["temperature"]).softmax(-1) * n
    chi_square = ((counts[:vocab_size] - expected) ** 2 / expected).sum().item()
    assert chi_square < 43.8  # 19 degrees of freedom: 1 in 1,000


def test_draw_never_takes_an_impossible_token():
    """No token of probability 0 is drawn, not even at the ends of the cumulative distribution."""
    logp = torch.tensor([0, 0.5, 0, 0.5, 0, 0]).log()[None].repeat(5, 1)
    numbers = torch.tensor([0.0, 0.5, 1 - 2**-53, 0.499999, 1.0], dtype=torch.float64)
    assert draw(logp, numbers).tolist() == [1, 3, 3, 1, 3]  # in float32 a number can round to 1


def test_keys_seed_and_turns_change_the_numbers():
    """Equal prompts get different samples, and so do two seeds."""
    model = make_model()
    prompt = [5, 6, 7]
    a, b = generate(model, [prompt] * 2, 12, eos_id=())
    assert a.ids != b.ids
    assert generate(model, [prompt], 12, eos_id=(), keys=[1])[0].ids == b.ids
    assert generate(model, [prompt], 12, eos_id=(), keys=[(1, 0)])[0].ids != b.ids
    assert generate(model, [prompt], 12, eos_id=(), seed=1)[0].ids != a.ids


def test_nan_is_an_error():
    """A policy that has diverged raises an error instead of writing on."""
    model = make_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(FloatingPointError):
        generate(model, [[5]], 3)


# ---- stopping -----------------------------------------------------------------------------------

TOKENIZER = make_tokenizer(("</", "search", "</search>", ">\n", ">.", "é</answer> "))


def written(tokens: list[str], stop=("</search>", "</answer>"), prompt="a</search>", new=40):
    """The turn of a model that is made to write these tokens."""
    model = make_model(vocab_size=len(TOKENIZER))
    model.lm_head = ScriptedHead(TOKENIZER.convert_tokens_to_ids(tokens), len(TOKENIZER))
    prompt = TOKENIZER.encode(prompt)
    result = generate(model, [prompt], new, stop=stop, tokenizer=TOKENIZER)[0]
    assert len(result.ids) == len(result.logprobs)
    return TOKENIZER.convert_ids_to_tokens(result.ids), result.reason


@pytest.mark.parametrize(
    "tokens",
    [
        [*"<search>q", "</search>"],  # one token
        [*"q</search>"],  # a token a character
        ["q", "</", "search", ">"],  # several tokens
        ["q", "</", "search", ">\n"],  # the last one holds what follows
        ["</", "search", ">."],
        [">", "</", "s", "e", "a", "r", "c", "h", ">"],
        ["q", "é</answer> "],  # a tag inside a token, the second stop string
        [*"</sear</answer>"],
    ],
)
def test_the_first_closing_tag_ends_the_turn(tokens):
    """The turn ends with the token that completes the first closing tag, and that token is kept."""
    rest = [*"<answer>x</answer></search>"]
    assert written(tokens + rest) == (tokens, "stop")


def test_eos_and_budget():
    """The eos token is kept, and a tag that is split over the prompt and the turn is none."""
    assert written(["a", "<eos>", "b"]) == (["a", "<eos>"], "eos")
    assert written([*"abc"], new=2) == (["a", "b"], "length")
    assert written([*"ch>", "<eos>"], prompt="</sear") == ([*"ch>", "<eos>"], "eos")
    assert written([*"a</b>c", "<eos>"], stop="</b>") == ([*"a</b>"], "stop")


def test_a_document_cannot_close_a_tag():
    """Stop strings are looked for in what was sampled and not in what was appended."""
    model = make_model(vocab_size=len(TOKENIZER))
    script = [*"a</search>", *"h>b</search>"]
    model.lm_head = ScriptedHead(TOKENIZER.convert_tokens_to_ids(script), len(TOKENIZER))
    decoder = Decoder(model, [[5]], tokenizer=TOKENIZER, stop=("</search>",))
    decoder.turn([0], 30, [0])
    decoder.append([0], [TOKENIZER.encode("</searc")])
    assert TOKENIZER.decode(decoder.turn([0], 30, [(0, 1)])[0].ids) == "h>b</search>"


def test_characters_of_several_byte_tokens():
    """A stop string is found where a byte-level tokenizer cuts its last character in two."""
    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    stop = StopStrings(("答案→",), tokenizer)
    ids = tokenizer.encode("é 答案→x")
    assert [stop.complete(ids[: i + 1]) for i in range(len(ids))].index(True) == len(ids) - 2


def test_several_eos_ids():
    """Of several eos ids (Llama 3, Qwen) each ends a turn."""
    model = make_model()
    model.generation_config.eos_token_id = [1, 9]
    model.lm_head = ScriptedHead([5, 9, 1], VOCAB)
    assert generate(model, [[5]], 9)[0].ids == [5, 9]
    model.lm_head = ScriptedHead([5, 9, 1], VOCAB)
    assert generate(model, [[5]], 3, eos_id=())[0].reason == "length"
    model.generation_config.eos_token_id = None
    model.lm_head = ScriptedHead([5, 9, 1], VOCAB)
    assert generate(model, [[5]], 9)[0].ids == [5, 9, 1]
