"""Generation against `transformers`, against the scored log-probabilities, and against itself."""

import random

import pytest
import torch
from conftest import EOS, VOCAB, ScriptedHead, make_model
from transformers import BloomConfig, BloomForCausalLM

from minizs.generate import FORWARD_TOKENS, Decoder, generate
from minizs.logprobs import token_logprobs


def make_prompts(lengths=(9, 1, 17, 4), seed=0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(n)] for n in lengths]


def library_greedy(model, prompt, new):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def uncached_greedy(model, prompt, new):
    """From the model's forward on the whole text, once a token."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits
        ids.append(logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def rescored(model, prefix, pieces, **options):
    """`token_logprobs` of prefix + pieces, (ids, mask) each: what the masked tokens score."""
    ids = prefix + [i for piece, _ in pieces for i in piece]
    mask = [0] * len(prefix) + [m for piece, m in pieces for _ in piece]
    ids, mask = torch.tensor([ids]), torch.tensor([mask])
    return token_logprobs(model, ids, torch.ones_like(ids), mask, **options)[mask == 1].tolist()


# ---- the model is run rightly -------------------------------------------------------------------


def test_greedy_equals_transformers(family):
    """Rows of different lengths write, greedily, what `transformers` writes for each alone."""
    model = make_model(family)
    prompts = make_prompts()
    for prompt, result in zip(prompts, generate(model, prompts, 24, temperature=0), strict=True):
        assert result.ids == library_greedy(model, prompt, 24)
        assert result.logprobs == pytest.approx(
            rescored(model, prompt, [(result.ids, 1)]), abs=1e-4
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_train_mode_and_attention_are_the_callers(attention):
    """Generation has no dropout and a right mask, and leaves the model as it was."""
    model = make_model(attention_dropout=0.5)
    prompts = make_prompts()
    expected = generate(model, prompts, 8)
    model.train()
    model.set_attn_implementation(attention)
    assert generate(model, prompts, 8) == expected
    assert model.training and model.model.layers[0].training
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("temperature, vocab_size", [(1.0, None), (0.6, 90)])
def test_logprobs_of_several_turns_equal_rescoring(family, temperature, vocab_size):
    """Sampled log-probabilities are those that training computes, over turns with documents, with
    a temperature, a cut vocabulary, and a pad id that equals eos and occurs in a prompt."""
    model = make_model(family)
    prompts = make_prompts()
    prompts[0][3] = EOS
    options = {"temperature": temperature, "vocab_size": vocab_size}
    decoder = Decoder(model, prompts, seed=3, **options)
    pieces, sampled = [[] for _ in prompts], [[] for _ in prompts]
    documents = make_prompts((5, 12, 1, 8), seed=1)
    for turn, rows in enumerate([[0, 1, 2, 3], [3, 0, 2], [2, 0]]):
        for row, result in zip(rows, decoder.turn(rows, 7, [(r, turn) for r in rows]), strict=True):
            pieces[row] += [(result.ids, 1), (documents[row], 0)]
            sampled[row] += result.logprobs
        decoder.append(rows, [documents[row] for row in rows])
    for row, prompt in enumerate(prompts):
        assert len(sampled[row]) > 0
        expected = rescored(model, prompt, pieces[row], **options)
        assert sampled[row] == pytest.approx(expected, abs=1e-4)
        held = decoder.length[row] + len(decoder.pending[row])
        assert held == len(prompt) + sum(len(piece) for piece, _ in pieces[row])


def test_replaced_head_works():
    """The head is called as a module, so that another one has its effect."""
    model = make_model()
    model.lm_head = ScriptedHead([7, 8, EOS], VOCAB)
    assert generate(model, [[5, 6]], 9)[0].ids == [7, 8, EOS]


# ---- batch layout changes nothing ---------------------------------------------------------------


def test_a_batch_of_one_equals_a_batch_of_many():
    """A row is the same whatever other rows there are: order, groups, early leavers."""
    model = make_model(dtype=torch.float64)
    prompts = [prompt for prompt in make_prompts() for _ in range(3)]
    keys = [(i // 3, i % 3) for i in range(len(prompts))]
    together = generate(model, prompts, 40, keys=keys)
    assert len({result.reason for result in together}) == 2  # some rows left early, some did not
    for prompt, key, expected in zip(prompts, keys, together, strict=True):
        assert generate(model, [prompt], 40, keys=[key])[0].ids == expected.ids
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    shuffled = generate(model, [prompts[i] for i in order], 40, keys=[keys[i] for i in order])
    assert [result.ids for result in shuffled] == [together[i].ids for i in order]


def test_turns_do_not_depend_on_the_other_rows():
    """Swapping rows and growing the cache change no row."""
    model = make_model(dtype=torch.float64)
    prompts = make_prompts((9, 2, 17, 4, 6))

    def play(rows):
        decoder = Decoder(model, prompts, seed=5, eos_id=range(20))
        texts = {row: [] for row in rows}
        for turn in range(4):
            active = [row for row in rows if turn < 3 or row % 2 == 0]
            keys = [(row, turn) for row in active]
            for row, result in zip(active, decoder.turn(active, 12, keys), strict=True):
                texts[row] += result.ids
            decoder.append(active, [prompts[row] for row in active])
        return texts

    together = play([4, 0, 3, 2, 1])
    assert together == play([0, 1, 2, 3, 4])
    for row, text in together.items():
        assert play([row])[row] == text


def test_chunks_in_groups_of_rows(monkeypatch):
    """A forward pass that is split into groups of rows gives the same tokens."""
    model = make_model(dtype=torch.float64)
    prompts = make_prompts((9, 8, 17, 4, 6))
    expected = generate(model, prompts, 10)
    monkeypatch.setitem(FORWARD_TOKENS, "cpu", 20)
    assert [r.ids for r in generate(model, prompts, 10)] == [r.ids for r in expected]


def test_every_token_is_computed_once():
    """A group computes its prompt once, and no turn computes a token again."""
    model = make_model()
    prompt = make_prompts((30,))[0]
    group = 4
    new = 5
    fed = []
    generate(model, [prompt], 1)  # a new model is tried on a few tokens first
    model.model.embed_tokens.register_forward_hook(lambda _m, ids, _o: fed.append(ids[0].numel()))
    decoder = Decoder(model, [prompt] * group, eos_id=())
    rows = range(group)
    assert decoder.positions == sum(fed) == len(prompt) - 1
    decoder.turn(rows, new, rows)
    # The prompt's last token, and all sampled ones but the last, which is pending.
    assert decoder.positions == sum(fed) == len(prompt) - 1 + group * new
    decoder.append(rows, [[7, 8, 9]] * group)
    decoder.turn(rows, new, [(row, 1) for row in rows])
    total = len(prompt) - 1 + group * (1 + new + 3 + new - 1)
    assert decoder.positions == sum(fed) == total


def test_prompts_of_mixed_lengths_are_computed_with_little_padding(monkeypatch):
    """Prompts of like length are computed together, with little padding, and each row has its own
    prompt afterwards."""
    model = make_model(dtype=torch.float64)
    prompts = make_prompts((3, 21, 2, 20, 3, 21, 2))
    prompts += prompts[:2]  # two of them are shared
    computed = []
    expected = [generate(model, [p], 5, keys=[i])[0].ids for i, p in enumerate(prompts)]
    monkeypatch.setitem(FORWARD_TOKENS, "cpu", 60)
    model.model.embed_tokens.register_forward_hook(lambda _m, x, _o: computed.append(x[0].numel()))
    assert [result.ids for result in generate(model, prompts, 5)] == expected
    decoder = Decoder(model, prompts)
    assert sum(computed[-3:]) == 3 * 20 + 3 * 2 + 1 and decoder.positions == 20 + 20 + 19 + 6


def test_a_model_can_learn_after_it_has_written():
    """Generation leaves no tensors of inference mode in the model, which autograd would refuse."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = make_model(rope_parameters=rope, max_position_embeddings=16)
    model.config.max_position_embeddings = 64
    generate(model, make_prompts((30,)), 5)
    ids = torch.tensor(make_prompts((20,)))
    ones = torch.ones_like(ids)
    mask = (torch.arange(20) > 0).long()[None]  # nothing precedes the first
    token_logprobs(model, ids, ones, mask).sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_rows_that_have_stopped_are_not_computed():
    """Finished rows leave the batch."""
    model = make_model()
    decoder = Decoder(model, make_prompts(), eos_id=())
    before = decoder.positions
    results = decoder.turn(range(4), [1, 2, 3, 0], range(4))
    assert [len(result.ids) for result in results] == [1, 2, 3, 0]
    assert {result.reason for result in results} == {"length"}
    assert decoder.positions - before == 1 + 2 + 3


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, options, sentence",
    [
        ([[5], []], {}, "empty"),
        ([[5, VOCAB]], {}, "outside the model's vocabulary"),
        ([[5] * 250], {}, "exceed"),
        ([[5]], {"stop": ("</search>",)}, "tokenizer"),
    ],
)
def test_refusals(prompts, options, sentence):
    """Prompts that are empty, too long or outside the vocabulary are refused."""
    with pytest.raises(ValueError, match=sentence):
        generate(make_model(), prompts, 10, **options)


def test_unsupported_models_are_refused():
    """A family that the cache of rows does not fit is refused in a sentence, not computed wrongly:
    BLOOM makes its own masks, and XLNet has no cache."""
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="BloomForCausalLM is not supported"):
        generate(BloomForCausalLM(config).eval(), [[5]], 2)


@pytest.mark.parametrize("cuda_graphs", ["off", "on"])
@pytest.mark.parametrize("full_layers", [0, 1])
def test_sliding_windows(full_layers, cuda_graphs):
    """Layers of both kinds see what `transformers` lets them see, each row at its own length, far
    beyond the window and over turns."""
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": full_layers}
    model = make_model("qwen2", torch.float64, eos_token_id=None, **window)
    prompts = make_prompts()
    model.generation_config.eos_token_id = None
    decoder = Decoder(model, prompts, temperature=0, cuda_graphs=cuda_graphs)
    texts = list(prompts)
    for turn, documents in enumerate([make_prompts((5, 12, 1, 8), seed=1), [[]] * 4]):
        results = decoder.turn(range(4), 20, [(row, turn) for row in range(4)])
        for row, result in enumerate(results):
            assert result.ids == uncached_greedy(model, texts[row], 20)
            texts[row] = texts[row] + result.ids + documents[row]
        decoder.append(range(4), documents)


def test_no_prompts():
    """An empty batch gives an empty list."""
    assert generate(make_model(), [], 5) == []
