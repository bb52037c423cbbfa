"""Which families of `transformers` this package computes as they compute themselves.

    python benchmarks/families.py                 # all of them; writes docs/models.md (two minutes)
    python benchmarks/families.py llama gemma2    # these alone; writes nothing

Of each family a random model of two layers is made, with the family's defaults but for the sizes.
Its own forward pass, of whole rows and without a cache, says which tokens come and how likely they
are. What is compared with that: greedy decoding of rows of different lengths, over two turns with a
document between them, and the log-probabilities of padded and of packed batches. Where a family has
a sliding window it is 8 tokens; the rows have up to 56. `refused` is said by `load_model`, too, in
the sentence that the table shows."""

import argparse
import inspect
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from minizs.generate import Decoder, check_decoding
from minizs.logprobs import score
from minizs.models.batches import attention, pad
from minizs.models.flash import keeps_apart
from minizs.models.support import FULL, SLIDING, check_supported, layer_kinds, row_limit

TARGET = Path(__file__).resolve().parent.parent / "docs" / "models.md"
VOCAB, WINDOW = 97, 8
PROMPTS = (3, 21, 12)  # tokens
DOCUMENT, TURN = 11, 12  # tokens between the turns, and in each
NEAR = 1e-3  # most difference of log-probabilities, in nats

# Sizes, by all the names that families have for them.
SIZES = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    "ffn_hidden_size": 48,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "window_size"), WINDOW),
    "use_sliding_window": True,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "index_topk": WINDOW,
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head"), 8),
    "max_window_layers": 1,
    **dict.fromkeys(("initializer_range", "init_std"), 0.25),
    "is_decoder": True,
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 1),
}
# The last two of four layers use the keys and values of those before.
SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
}
# What single families need besides.
SPECIAL = {
    "cohere_compass_text": {
        "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e4}},
        "logit_scale": 0.25,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": SHARED,
    "gemma4_text": SHARED,
    "gemma4_unified_text": SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "laguna": {"layer_types": [SLIDING, FULL]},
    "lfm2": {"layer_types": ["conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": [SLIDING, FULL]},
    "minimax_m3_vl_text": {"layer_types": [FULL, "minimax_m3_sparse"]},
    "qwen4_exp_text": {"layer_types": ["linear_attention"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
# These cannot be made small by sizes alone.
LEFT_OUT = (
    "blt",
    "dbrx",
    "phi4_multimodal",
    "prophetnet",
    "reformer",
    "xlnet",
    "xlstm",
    "zamba",
    "zamba2",
)


@dataclass
class Outcome:
    """What became of a family: `works`, or what is wrong; or why it is refused."""

    layers: str = ""  # what they see
    attention: str = ""
    is_packed: bool = False  # batches without padding
    refusal: str = ""
    errors: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        return not self.refusal and not self.errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="names of families; by default all")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    outcomes = {}
    for name in args.families or families():
        outcomes[name] = try_family(name)
        print(name, outcomes[name], flush=True)
    wrong = [name for name, outcome in outcomes.items() if outcome.errors]
    if not args.families:
        TARGET.write_text(page(outcomes), encoding="utf-8")
    if wrong:
        sys.exit(f"computed wrongly, and not refused: {', '.join(wrong)}")


def families() -> list[str]:
    """The causal families that are no composites, by the names in their configurations."""
    names = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(LEFT_OUT))
    return [name for name in names if is_language_model(CONFIG_MAPPING[name])]


def is_language_model(kind: type) -> bool:
    """Whether its configuration has no parts, such as an encoder or a vision model."""
    return not kind.sub_configs and not getattr(kind, "is_encoder_decoder", False)


def make_model(name: str):
    """A tiny random model of the family; one layer has a window and one has none, if it can."""
    kind = CONFIG_MAPPING[name]
    settings = {key: value for key, value in SIZES.items() if can_set(kind, key)}
    if "kv_lora_rank" in settings or name == "dots3_note_text":
        settings["num_key_value_heads"] = 4  # keys are made anew for each head
    settings |= SPECIAL.get(name, {})
    if can_set(kind, "layer_types") and "layer_types" not in settings:
        kinds = kinds_of_a_deep_model(kind, settings)
        if len(kinds) > 1 or SLIDING in kinds:
            settings["layer_types"] = [*kinds, FULL][:2]
    config = kind(**settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def kinds_of_a_deep_model(kind: type, settings: dict) -> list[str]:
    """The kinds of layers that such a model has with twelve layers; the unusual ones come first."""
    if not can_set(kind, "num_hidden_layers"):
        return []
    config = kind(**(settings | {"num_hidden_layers": 12}))
    usual = [SLIDING, FULL]
    kinds = layer_kinds(config)
    return sorted(kinds - set(usual)) + [kind for kind in usual if kind in kinds]


def can_set(kind: type, key: str) -> bool:
    """Whether this kind of configuration has such a setting."""
    key = kind.attribute_map.get(key, key)
    if isinstance(getattr(kind, key, None), property):
        return False
    return key in inspect.signature(kind.__init__).parameters or hasattr(kind, key)


def try_family(name: str) -> Outcome:
    """What `load_model` says of such a model, and if it takes it, whether it is computed right."""
    model = make_model(name)
    outcome = Outcome(attention=model.config._attn_implementation)
    try:
        row_limit(model)
        check_supported(model)
        check_decoding(model)
    except ValueError as error:
        outcome.refusal = str(error)
        return outcome
    kinds = layer_kinds(model.config)
    outcome.layers = " and ".join(sorted(kind.removesuffix("_attention") for kind in kinds))
    outcome.is_packed = keeps_apart(model)
    outcome.errors = errors_of(model, outcome.is_packed)
    return outcome


def errors_of(model, is_packed: bool) -> list[str]:
    """What this package computes otherwise than the model itself, in words."""
    rows = play(model)
    own = [own_logprobs(model, row.ids) for row in rows]
    errors = []
    gap = 0.0
    for row, (logprobs, best) in zip(rows, own, strict=True):
        for t in range(1, len(row.ids)):
            if row.mask[t]:
                gap = max(gap, abs(row.logprobs[t] - logprobs[t - 1].item()))
                gap = max(gap, (best[t - 1] - logprobs[t - 1]).item())
    if not gap <= NEAR:
        errors.append(f"decoding differs by {gap:.2g} nats")

    lengths = [len(row.ids) for row in rows]
    ids, mask = pad([row.ids for row in rows]), attention(lengths)
    marked = pad([[0] + [1] * (length - 1) for length in lengths])
    expected = torch.cat([logprobs for logprobs, _ in own])
    for packed in (False, True) if is_packed else (False,):
        with torch.no_grad():
            scored, _ = score(model, ids, mask, marked, packed=packed)
        gap = (scored[marked == 1] - expected).abs().max().item()
        if not gap <= NEAR:
            kind = "packed" if packed else "padded"
            errors.append(f"scoring of {kind} batches differs by {gap:.2g} nats")
    return errors


@dataclass
class Row:
    """A row's tokens; 1 where the model wrote one, and how likely it was then."""

    ids: list[int]
    mask: list[int]
    logprobs: list[float]

    def add(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        self.ids = self.ids + ids
        self.mask = self.mask + [int(logprobs is not None)] * len(ids)
        self.logprobs = self.logprobs + (logprobs or [0.0] * len(ids))


def play(model) -> list[Row]:
    """Two greedy turns with a document between them, for prompts of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> list[int]:
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    rows = [Row([], [], []) for _ in PROMPTS]
    for row, length in zip(rows, PROMPTS, strict=True):
        row.add(text(length))
    places = range(len(rows))
    decoder = Decoder(model, [row.ids for row in rows], temperature=0, eos_id=())
    for turn in range(2):
        results = decoder.turn(places, TURN, [(place, turn) for place in places])
        for row, result in zip(rows, results, strict=True):
            row.add(result.ids, result.logprobs)
        if turn == 0:
            documents = [text(DOCUMENT - place) for place in places]
            decoder.append(places, documents)
            for row, document in zip(rows, documents, strict=True):
                row.add(document)
    return rows


@torch.no_grad()
def own_logprobs(model, row: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a row's tokens but for the first, and of the likeliest at each place: (T - 1,) each."""
    logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
    logp = logits[:-1].log_softmax(-1)
    return logp.gather(1, torch.tensor(row[1:])[:, None]).squeeze(1), logp.amax(-1)


def page(outcomes: dict[str, Outcome]) -> str:
    """docs/models.md."""
    works = {name: outcome for name, outcome in outcomes.items() if outcome.works}
    refused = {name: outcome for name, outcome in outcomes.items() if outcome.refusal}
    lines = [
        "# Which models work",
        "",
        f"`python benchmarks/families.py` made a tiny random model of each causal family of "
        f"`transformers` {transformers.__version__} and compared generation and scoring with the "
        "model's own forward pass, on rows seven times as long as the sliding window.",
        "",
        f"## {len(works)} families work",
        "*Layers* says what attention sees: all tokens before (full), or a window of them. "
        "*Attention* is the one that the family is computed with on a CPU: eager where it adds "
        "sinks to the scores, caps them, or cannot do otherwise. *Packed* says whether training "
        "batches can be packed without padding, which needs flash-attn; others are padded.",
        "",
        "| `model_type` | layers | attention | packed |",
        "|---|---|---|---|",
    ]
    for name, outcome in works.items():
        packed = "yes" if outcome.is_packed else "no"
        lines.append(f"| {name} | {outcome.layers} | {outcome.attention} | {packed} |")
    lines += [
        "",
        f"## {len(refused)} families are refused",
        "The sentence is what the program says when such a model is loaded.",
        "",
        "| `model_type` | why |",
        "|---|---|",
    ]
    for name, outcome in refused.items():
        lines.append(f"| {name} | {outcome.refusal.replace('|', ' ')} |")
    wrong = [name for name, outcome in outcomes.items() if outcome.errors]
    if wrong:
        lines += ["", f"Wrong, and not refused: {', '.join(wrong)}."]
    lines += [
        "",
        "Not tried: models of several parts (the language model in one is of a family above), "
        f"encoder-decoders, and {', '.join(LEFT_OUT)}, which sizes alone do not make small.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
