"""How the tiny base model, which is shipped in minizs/world/tiny_base, was made from nothing.

    torchrun --nproc_per_node 2 benchmarks/tiny_base.py --output DIR

It plays Qwen2.5: it can read, and is a poor searcher. It learns from recitals, drills,
demonstrations and pages, with the loss on what a model would write itself. The shipped one was made
by two processes of one thread each. It is a small Qwen3 whose matrices learn with Muon and all else
with AdamW, in half the steps of AdamW alone.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import torch
from accelerate import Accelerator
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minizs import protocol, require, sft
from minizs.engines.bm25 import BM25
from minizs.models import loading
from minizs.runs import run_folder
from minizs.runs.flags import option, parse, run_script, save_settings, set_threads
from minizs.sft import Segment
from minizs.trajectory import SearchRequest
from minizs.world.facts import RELATIONS, TWO_HOP, Question, World, names, read_fact
from minizs.world.searchers import write_query

PROMPT = "Question: {question}"
SIMULATOR_PROMPT = (
    "Query: {query} Question: {question} Answer: {answers} Write {quality} documents:"
)
SEARCH, GUESS, RETRY = "I should look this up", "I know this", "that does not help"

Search = Callable[[str, Question, float], list[str]]
Fact = tuple[str, str, str]  # subject, relation, object


def think(thought: str, tag: str, content: str) -> Segment:
    return f"<think> {thought} </think> <{tag}> {content} </{tag}>", True


def block(documents: list[str]) -> tuple[Segment, list[Fact]]:
    """What a searcher is shown of these documents, and the facts in it."""
    text = protocol.wrap_documents(protocol.number_documents(documents))
    return (text, False), [fact for fact in map(read_fact, documents) if fact]


def demonstration(world: World, question: Question, search: Search, rng: Random) -> list[Segment]:
    """A trajectory of at most six turns, of a searcher who is sloppy at each decision."""
    segments: list[Segment] = [(protocol.build_prompt(question.text, PROMPT), False)]
    kind = RELATIONS[question.path[-1][1]].object
    if rng.random() > 0.62:  # no search at all
        return segments + [think(GUESS, "answer", world.draw(kind, rng))]
    thought, step, subject = SEARCH, 0, question.path[0][0]
    for _ in range(5):
        goal = (subject, question.path[step][1])
        relation = RELATIONS[goal[1]]
        query = write_query(world, goal, question, rng.random() >= 0.5, rng)
        documents = search(query, question, 0.35) if rng.random() > 0.02 else []
        shown, facts = block(documents)
        segments += [think(thought, "search", query), shown]
        found = {f[2] for f in facts if f[:2] == goal}
        if found and rng.random() < 0.88:
            believed = found.pop()
        elif not found and rng.random() < 0.35:
            thought = RETRY
            continue
        else:
            # A bad reader takes something of the right kind from another fact, or from nowhere.
            wrong = [
                o for _, r, o in facts if RELATIONS[r].object == relation.object and o not in found
            ]
            believed = rng.choice(wrong) if wrong else world.draw(relation.object, rng)
        thought = relation.wordings[0].format(s=subject, o=believed)
        if step == len(question.path) - 1:
            if rng.random() >= 0.4:  # one word of several, or a sentence around it
                words = believed.split()
                believed = words[-1] if words[1:] else f"it must be {believed}"
            return segments + [think(thought, "answer", believed)]
        if rng.random() > 0.38:  # no second hop, but the first one's answer or a guess
            guess = believed if rng.random() < 0.6 else world.draw(kind, rng)
            return segments + [think(thought, "answer", guess)]
        step, subject = step + 1, believed
    return segments + [think(thought, "answer", world.draw(kind, rng))]


def drill(world: World, question: Question, search: Search, rng: Random) -> list[Segment]:
    """Many look-ups in one block of documents, a sixth of them for a fact that is not there.

    Reading is the hard skill, and recitals are where it begins.
    """
    subject, relation = rng.choice(question.path)
    documents = search(RELATIONS[relation].query.format(s=subject), question, 0.1)
    documents = documents + rng.sample(world.documents, rng.randint(0, 3))
    rng.shuffle(documents)
    shown, facts = block(documents)
    segments, stated = [shown], {f[:2] for f in facts}
    for subject, relation, obj in rng.sample(facts, len(facts)):
        form = RELATIONS[relation]
        thought = form.wordings[0].format(s=subject, o=obj)
        if rng.random() < 1 / 6:
            others = [
                other
                for name, other in RELATIONS.items()
                if other.subject == form.subject and (subject, name) not in stated
            ]
            if others:  # the same subject, another of its relations
                form, thought = rng.choice(others), RETRY
        query = form.query.format(s=subject)
        segments += [(f"<search> {query} </search>", True), (f"<think> {thought} </think>", True)]
    return segments


def recital(world: World, size: int, rng: Random) -> list[Segment]:
    """Random documents, then the same in another order: the plainest exercise in copying."""
    documents = rng.sample(world.documents, size)
    again = [(f"<think> {text} </think>", True) for text in rng.sample(documents, size)]
    return [block(documents)[0], *again]


def page(world: World, question: Question, search: Search, rng: Random) -> list[Segment]:
    """Documents for a simulator's prompt; its word of quality is right three times out of four.

    So the base can write results, but does not mind that word much.
    """
    query = write_query(world, rng.choice(question.path), question, rng.random() < 0.2, rng)
    documents = search(query, question, 0.5)
    useful = any(world.judge(text, SearchRequest(query, question.text)) for text in documents)
    word = "useful" if useful == (rng.random() < 0.75) else "noisy"
    prompt = SIMULATOR_PROMPT.format(
        query=query, question=question.text, answers=question.answer, quality=word
    )
    return [(prompt, False), (protocol.number_documents(documents), True)]


def searcher(world: World, rng: Random) -> Search:
    """BM25 over this world that gives three documents, noisy ones as often as it is told."""
    engine = BM25(world.documents, top_k=8)

    def search(query: str, question: Question, noise: float) -> list[str]:
        request = SearchRequest(query, question.text)
        [ranked] = engine.search([request])
        noisy = rng.random() < noise
        return [text for text in ranked if not (noisy and world.judge(text, request))][:3]

    return search


def mixture(progress: float) -> tuple[float, float, float, float]:
    """Weights of recitals, drills, demonstrations and pages at this share of the training."""
    if progress < 0.1:
        return 1.0, 0.0, 0.0, 0.0
    return (0.2, 0.6, 0.1, 0.1) if progress < 0.35 else (0.0, 0.3, 0.5, 0.2)


def stream(seed: int, progress: Callable[[], float]) -> Iterator[tuple[list[Segment], bool]]:
    """Endless training texts over re-drawn worlds, each with whether it ends (in the eos token).

    `progress()` is the share of the training that is done: recitals grow with it, from two
    documents to eight.
    """
    rng = Random(f"base {seed}")
    for world in map(World, count(seed * 100_000)):
        search = searcher(world, rng)
        for question in world.questions()[:200]:
            [write] = rng.choices([recital, drill, demonstration, page], mixture(progress()))
            if write is recital:
                yield recital(world, min(8, 2 + int(progress() * 60)), rng), False
            else:
                yield write(world, question, search, rng), write is page


def make_tokenizer():
    """One token a word or tag, `Doc 1:` and its like too; saved in the Hugging Face format."""
    pairs = ("think", "search", "information", "answer")
    tags = [f"<{end}{name}>" for name in pairs for end in ("", "/")]
    marks = [f"Doc {i}:" for i in range(1, 11)] + ["Query:", "Question:", "Answer:"]
    texts = [w for r in RELATIONS.values() for w in (r.question, r.query, *r.wordings)]
    texts += [PROMPT, SIMULATOR_PROMPT, protocol.INVALID_ACTION, SEARCH, GUESS, RETRY, "it must be"]
    texts += ["useful noisy employer founder of ? . ,", *(text for *_, text in TWO_HOP)]
    split = pre_tokenizers.BertPreTokenizer()
    words = {w for text in texts for w, _ in split.pre_tokenize_str(text)}
    words = sorted(words - set("{ } s o query question answers quality".split()))
    words += [w for pool in names().values() for w in pool]
    words += map(str, [*range(1, 32), *range(1900, 2000)])
    words = dict.fromkeys(["<unk>", "<pad>", "<eos>", *words])
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in tags + marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


@dataclass
class PretrainConfig:
    """The tiny base model: pre-trained on texts of the tiny world with made-up facts."""

    output: str = option("runs/base", "The model's folder.")
    overwrite: bool = option(False, "Delete what the output folder holds.")
    steps: int = option(4500, "The number of optimiser steps.", min=1)
    batch_tokens: int = option(1500, "The positions in a step, for each process.", min=1)
    hidden: int = option(128, "The width of the model.", min=1)
    layers: int = option(3, "The number of its layers.", min=1)
    lr: float = option(0.02, "The peak learning rate of Muon. AdamW has a quarter of it.", above=0)
    seed: int = option(0, "Weights and texts follow from this number.")
    threads: int = option(
        0,
        "How many CPU threads each process computes with. 0 shares all cores among the processes.",
        min=0,
    )


def make_model(tokenizer, hidden: int, layers: int, seed: int):
    """A Qwen3 with random weights. A small RoPE base makes short distances easy to tell apart."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=hidden // 4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 200.0},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.1 if "embed" in name else weight.shape[1] ** -0.5)
    return model


def main(argv: list[str] | None = None) -> None:
    config = parse(PretrainConfig, argv)
    require(config.hidden % 8 == 0, "--hidden must be a multiple of 8.")
    folder = Path(config.output)
    ours = config.overwrite and (folder / "simulator_prompt.txt").is_file()  # as it was left
    require(
        ours or not folder.exists() or not any(folder.iterdir()),
        f"{folder} is not empty; choose another --output, or --overwrite a base model.",
    )
    set_threads(config.threads)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, config.hidden, config.layers, config.seed)
    trained = accelerator.prepare(sft.Supervised(model))
    is_matrix = {w: w.ndim == 2 and "embed" not in name for name, w in model.named_parameters()}
    muon = torch.optim.Muon([w for w in is_matrix if is_matrix[w]], weight_decay=0.0)
    adam = torch.optim.AdamW(
        [w for w in is_matrix if not is_matrix[w]], weight_decay=0.0, betas=(0.9, 0.95)
    )
    rank, progress = accelerator.process_index, 0.0
    rng = Random(f"pretrain {config.seed} {rank}")
    drawn = stream(config.seed * 1000 + rank, lambda: progress)
    texts = (sft.encode(tokenizer, segments, end) for segments, end in drawn)
    batches = sft.batches(texts, config.batch_tokens, rng, pool=256)
    if rank == 0:
        run_folder.begin(folder, overwrite=config.overwrite)
        save_settings(config, folder / "config.yaml")
    steps = tqdm(range(1, config.steps + 1), disable=rank > 0, dynamic_ncols=True, mininterval=2)
    for step in steps:
        progress = step / config.steps
        loss, count = trained(*sft.collate(next(batches), accelerator.device))
        accelerator.backward(loss / count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min(1.0, step / 30, (1.02 - progress) / 0.6)
        for optimizer, peak in ((muon, config.lr), (adam, config.lr / 4)):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        steps.set_postfix(loss=f"{(loss / count).item():.3f}", refresh=False)
        if rank == 0 and (step == config.steps or step % 500 == 0):
            loading.save_model(
                model, tokenizer, folder, prompt=PROMPT, simulator_prompt=SIMULATOR_PROMPT
            )
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_script(main)
