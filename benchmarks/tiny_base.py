"""How the tiny base model, which is shipped in minizs/world/tiny_base, was made from nothing.

    torchrun --nproc_per_node 2 benchmarks/tiny_base.py --output DIR

The base plays the part that Qwen2.5 plays in the paper: it can read, and it is a poor searcher. It
learns from five kinds of text (recitals, drills, look-ups, demonstrations and pages), with the loss
on what a model would write itself. The worlds that these are about have few names, so that half of
a name is seldom enough to tell people apart. The shipped model was made by two processes of one
thread each. It is a small Qwen3. Its matrices learn with Muon and all else with AdamW, which takes
half the steps of AdamW alone.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import bm25s
import torch
from accelerate import Accelerator
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minizs import protocol, require, sft
from minizs.engines.bm25 import BM25, WORDS
from minizs.models import loading
from minizs.runs import run_folder
from minizs.runs.flags import option, parse, run_script, save_settings, set_threads
from minizs.sft import Segment
from minizs.trajectory import SearchRequest
from minizs.world.facts import RELATIONS, TWO_HOP, Fact, Question, World, names, read_fact
from minizs.world.searchers import good_query, write_query

PROMPT = "Question: {question}"
SIMULATOR_PROMPT = (
    "Query: {query} Question: {question} Answer: {answers} Write {quality} documents:"
)
# What the searcher thinks before it searches, before it guesses, and after a useless reply.
SEARCH, GUESS, RETRY = "I should look this up", "I know this", "that does not help"
SPLIT = pre_tokenizers.BertPreTokenizer()  # into words and punctuation marks

# A search: query, question and the share of noisy replies give up to three documents.
Search = Callable[[str, Question, float], list[str]]

# How sloppy the searcher of the demonstrations is.
SEARCHES = 0.62  # the share of trajectories that search at all
GOOD_QUERY = 0.5
EMPTY_REPLY = 0.02
NOISY_REPLY = 0.35
READS_RIGHT = 0.88  # where the fact was found
TRIES_AGAIN = 0.45  # where it was not
GOES_ON = 0.38  # to the second hop of a question that has one
STOPS_AT_FIRST_HOP = 0.6  # of the others: answers with what it read, or else guesses
ANSWERS_CLEANLY = 0.4  # or else with one word of several, or a sentence around it

NAMES = 16  # given names in a world, as many family names, and words of companies
MISSING = 0.2  # the share of a drill's questions that its documents do not answer
NEAR = 0.5  # the share of these that are about somebody with half of the name
HONEST_WORD = 0.9  # how often a page's word of quality is right


def thought_of(thought: str) -> str:
    return f"<think> {thought} </think>"


def think(thought: str, tag: str, content: str) -> Segment:
    """A turn of a searcher, which the loss is on."""
    return f"{thought_of(thought)} <{tag}> {content} </{tag}>", True


def block(documents: list[str]) -> tuple[Segment, list[Fact]]:
    """What a searcher reads of these documents, and the facts in it."""
    text = protocol.wrap_documents(protocol.number_documents(documents))
    facts = [fact for fact in map(read_fact, documents) if fact]
    return (text, False), facts


def demonstration(world: World, question: Question, search: Search, rng: Random) -> list[Segment]:
    """A trajectory of at most six turns, of a searcher who is sloppy at each decision."""
    segments: list[Segment] = [(protocol.build_prompt(question.text, PROMPT), False)]
    answer_kind = RELATIONS[question.path[-1][1]].object
    if rng.random() > SEARCHES:
        return [*segments, think(GUESS, "answer", world.draw(answer_kind, rng))]
    thought = SEARCH
    step = 0
    subject = question.path[0][0]
    for _ in range(5):
        goal = (subject, question.path[step][1])
        query = write_query(world, goal, question, rng.random() >= GOOD_QUERY, rng)
        documents = search(query, question, NOISY_REPLY) if rng.random() > EMPTY_REPLY else []
        text, facts = block(documents)
        segments += [think(thought, "search", query), text]
        belief = read_sloppily(world, goal, facts, rng)
        if belief is None:
            thought = RETRY
            continue
        thought = RELATIONS[goal[1]].wordings[0].format(s=subject, o=belief)
        if step == len(question.path) - 1:
            return [*segments, think(thought, "answer", answer_sloppily(belief, rng))]
        if rng.random() > GOES_ON:
            if rng.random() >= STOPS_AT_FIRST_HOP:
                belief = world.draw(answer_kind, rng)
            return [*segments, think(thought, "answer", belief)]
        step += 1
        subject = belief
    return [*segments, think(thought, "answer", world.draw(answer_kind, rng))]


def read_sloppily(
    world: World, goal: tuple[str, str], facts: list[Fact], rng: Random
) -> str | None:
    """What the searcher takes for the object of the fact `goal`, a (subject, relation) pair; None
    where it sees that the documents do not help. A bad reader takes something of the right kind
    from another fact, or from nowhere."""
    right = {fact.object for fact in facts if (fact.subject, fact.relation) == goal}
    if right and rng.random() < READS_RIGHT:
        return right.pop()
    if not right and rng.random() < TRIES_AGAIN:
        return None
    kind = RELATIONS[goal[1]].object
    wrong = [
        fact.object
        for fact in facts
        if RELATIONS[fact.relation].object == kind and fact.object not in right
    ]
    return rng.choice(wrong) if wrong else world.draw(kind, rng)


def answer_sloppily(belief: str, rng: Random) -> str:
    """The answer as it should be, or one word of several, or a sentence around it."""
    if rng.random() < ANSWERS_CLEANLY:
        return belief
    words = belief.split()
    return words[-1] if len(words) > 1 else f"it must be {belief}"


def drill(world: World, question: Question, search: Search, rng: Random) -> list[Segment]:
    """Many questions about one block of documents, a fifth of them for a fact that is not there.

    Reading is the hard skill. Recitals are where it begins, and drills where it is learned.
    """
    subject, relation = rng.choice(question.path)
    documents = search(good_query(subject, relation), question, 0.1)
    documents = documents + rng.sample(world.documents, rng.randint(0, 3))
    rng.shuffle(documents)
    text, facts = block(documents)
    stated = {(fact.subject, fact.relation) for fact in facts}
    segments = [text]
    for fact in rng.sample(facts, len(facts)):
        goal = (fact.subject, fact.relation)
        if rng.random() < MISSING:
            goal = draw_missing(world, fact, stated, rng) or goal
        thought = note(fact) if goal in stated else RETRY
        segments += [(f"<search> {good_query(*goal)} </search>", True), (thought_of(thought), True)]
    return segments


def note(fact: Fact) -> str:
    """How a careful reader notes a fact."""
    return RELATIONS[fact.relation].wordings[0].format(s=fact.subject, o=fact.object)


def draw_missing(
    world: World, fact: Fact, stated: set[tuple[str, str]], rng: Random
) -> tuple[str, str] | None:
    """A (subject, relation) pair that is nearly this fact's, but not `stated`: of a subject with
    half of the name, or another relation of the same subject. None where there is none."""
    kind = RELATIONS[fact.relation].subject
    words = fact.subject.split()
    subjects = []
    if len(words) == 2:
        for _ in range(4):
            first, second = world.draw(kind, rng).split()
            subjects += [f"{words[0]} {second}", f"{first} {words[1]}"]
    near = [(name, fact.relation) for name in subjects if name != fact.subject]
    near = [goal for goal in near if goal not in stated]
    others = [(fact.subject, name) for name, form in RELATIONS.items() if form.subject == kind]
    others = [goal for goal in others if goal not in stated]
    if near and rng.random() < NEAR:
        return rng.choice(near)
    return rng.choice(others) if others else None


def look_ups(world: World, question: Question, search: Search, rng: Random) -> list[Segment]:
    """A few searches, half of which bring nothing of use, each read exactly. After a useless reply
    mostly the same is asked again.

    Here the question comes before the documents, as in a search: it is learned to see whether a
    reply holds what was asked for. The demonstrations seldom make use of that. All questions are
    drawn here: the `question` that each kind of text is given plays no part.
    """
    segments: list[Segment] = []
    questions = world.questions()[:200]
    goal = None
    for _ in range(rng.randint(2, 4)):
        if goal is None or rng.random() < 0.4:
            question = rng.choice(questions)
            goal = rng.choice(question.path)
        query = good_query(*goal)
        text, facts = block(search(query, question, 0.5))
        fact = next((fact for fact in facts if (fact.subject, fact.relation) == goal), None)
        segments += [(f"<search> {query} </search>", False), text]
        segments.append((thought_of(note(fact) if fact else RETRY), True))
        if fact:
            goal = None
    return segments


def recital(world: World, size: int, rng: Random) -> list[Segment]:
    """Random documents, then the same in another order: the plainest exercise in copying."""
    documents = rng.sample(world.documents, size)
    text, _ = block(documents)
    copies = [(thought_of(copy), True) for copy in rng.sample(documents, size)]
    return [text, *copies]


def page(world: World, question: Question, search: Search, rng: Random) -> list[Segment]:
    """Documents for a simulator's prompt, whose word of quality is mostly right."""
    query = write_query(world, rng.choice(question.path), question, rng.random() < 0.2, rng)
    documents = search(query, question, 0.5)
    useful = any(world.judge(text, SearchRequest(query, question.text)) for text in documents)
    word = "useful" if useful == (rng.random() < HONEST_WORD) else "noisy"
    prompt = SIMULATOR_PROMPT.format(
        query=query, question=question.text, answers=question.answer, quality=word
    )
    return [(prompt, False), (protocol.number_documents(documents), True)]


def searcher(world: World, rng: Random) -> Search:
    """BM25 over this world that gives three documents, noisy ones as often as it is told.

    The index is asked itself: `BM25.search` leaves out documents that share no word with the query,
    and the shipped model has read such documents where there was nothing better.
    """
    engine = BM25(world.documents)

    def search(query: str, question: Question, noise: float) -> list[str]:
        request = SearchRequest(query, question.text)
        words = bm25s.tokenize([query.lower()], return_ids=False, **WORDS)
        results = engine.index.retrieve(words, world.documents, k=8, show_progress=False)
        documents = [str(document) for document in results.documents[0]]
        if rng.random() < noise:
            documents = [text for text in documents if not world.judge(text, request)]
        return documents[:3]

    return search


def mixture(progress: float) -> dict[Callable, float]:
    """The shares of the kinds of text when so much of the training is done."""
    if progress < 0.1:
        return {recital: 1.0}
    if progress < 0.35:
        return {recital: 0.15, drill: 0.5, look_ups: 0.15, demonstration: 0.1, page: 0.1}
    return {drill: 0.15, look_ups: 0.25, demonstration: 0.4, page: 0.2}


def stream(seed: int, progress: Callable[[], float]) -> Iterator[tuple[list[Segment], bool]]:
    """Endless training texts over re-drawn worlds, each with whether it ends (in the eos token).

    `progress()` is the share of the training that is done: recitals grow with it, from two
    documents to eight.
    """
    rng = Random(f"base {seed}")
    for number in count(seed * 100_000):
        world = World(number, words=NAMES)
        search = searcher(world, rng)
        for question in world.questions()[:200]:
            shares = mixture(progress())
            [write] = rng.choices([*shares], [*shares.values()])
            if write is recital:
                size = min(8, 2 + int(progress() * 60))
                yield recital(world, size, rng), False
            else:
                yield write(world, question, search, rng), write is page


def vocabulary() -> list[str]:
    """Every word that a text of this world can have, in the order of the ids."""
    texts = [PROMPT, SIMULATOR_PROMPT, protocol.INVALID_ACTION, SEARCH, GUESS, RETRY, "it must be"]
    texts += ["useful noisy employer founder of ? . ,"]
    texts += [text for *_, text in TWO_HOP]
    for relation in RELATIONS.values():
        texts += [relation.question, relation.query, *relation.wordings]
    words = {word for text in texts for word, _ in SPLIT.pre_tokenize_str(text)}
    words -= set("{ } s o query question answers quality".split())
    ordered = ["<unk>", "<pad>", "<eos>", *sorted(words)]
    for role_names in names().values():
        ordered += role_names
    ordered += map(str, [*range(1, 32), *range(1900, 2000)])  # of dates
    return list(dict.fromkeys(ordered))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word and each tag, and for `Doc 1:` and its like."""
    tags = [
        f"<{slash}{name}>"
        for name in ("think", "search", "information", "answer")
        for slash in ("", "/")
    ]
    marks = [f"Doc {number}:" for number in range(1, 11)] + ["Query:", "Question:", "Answer:"]
    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = SPLIT
    added = [AddedToken(text, normalized=False, special=False) for text in tags + marks]
    tokenizer.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


@dataclass
class PretrainConfig:
    """The tiny base model: pre-trained on texts of the tiny world with made-up facts."""

    output: str = option("runs/base", "The model's folder.")
    overwrite: bool = option(False, "Delete what the output folder holds.")
    steps: int = option(3500, "The number of optimiser steps.", min=1)
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


def make_optimizers(model, lr: float) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices and AdamW for the embeddings and norms, each with its peak rate."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        is_matrix = weight.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(weight)
    muon = torch.optim.Muon(matrices, weight_decay=0.0)
    adam = torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.95))
    return [(muon, lr), (adam, lr / 4)]


class Progress:
    """The share of the training that is done, which decides what texts are written next."""

    def __init__(self) -> None:
        self.share = 0.0

    def __call__(self) -> float:
        return self.share


def make_batches(
    config: PretrainConfig, tokenizer, rank: int, progress: Progress
) -> Iterator[list]:
    """Endless batches for one process; each process has texts of its own."""
    rng = Random(f"pretrain {config.seed} {rank}")
    texts = stream(config.seed * 1000 + rank, progress)
    encoded = (sft.encode(tokenizer, segments, end) for segments, end in texts)
    return sft.batches(encoded, config.batch_tokens, rng, pool=256)


def train(config: PretrainConfig, accelerator: Accelerator, model, tokenizer, folder: Path) -> None:
    """All steps; the model is saved after every 500 of them and after the last."""
    rank = accelerator.process_index
    supervised = accelerator.prepare(sft.Supervised(model))
    optimizers = make_optimizers(model, config.lr)
    progress = Progress()
    batches = make_batches(config, tokenizer, rank, progress)
    steps = tqdm(range(1, config.steps + 1), disable=rank > 0, dynamic_ncols=True, mininterval=2)
    for step in steps:
        progress.share = step / config.steps
        loss, count = supervised(*sft.collate(next(batches), accelerator.device))
        accelerator.backward(loss / count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers:
            rise, fall = step / 30, (1.02 - progress.share) / 0.6
            optimizer.param_groups[0]["lr"] = peak * min(1.0, rise, fall)
            optimizer.step()
            optimizer.zero_grad()
        steps.set_postfix(loss=f"{(loss / count).item():.3f}", refresh=False)
        if rank == 0 and (step == config.steps or step % 500 == 0):
            loading.save_model(
                model, tokenizer, folder, prompt=PROMPT, simulator_prompt=SIMULATOR_PROMPT
            )
    accelerator.wait_for_everyone()


def check_output(config: PretrainConfig) -> None:
    """Raise UserError for an output in which something else than a base model would be lost."""
    folder = Path(config.output)
    is_empty = not folder.exists() or not any(folder.iterdir())
    is_base = (folder / "simulator_prompt.txt").is_file()
    require(
        is_empty or (is_base and config.overwrite),
        f"{folder} is not empty; choose another --output, or --overwrite a base model.",
    )


def main(argv: list[str] | None = None) -> None:
    config = parse(PretrainConfig, argv)
    require(config.hidden % 8 == 0, "--hidden must be a multiple of 8.")
    check_output(config)
    set_threads(config.threads)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, config.hidden, config.layers, config.seed)
    folder = Path(config.output)
    if accelerator.is_main_process:
        run_folder.begin(folder, overwrite=config.overwrite)
        save_settings(config, folder / "config.yaml")
    train(config, accelerator, model, tokenizer, folder)


if __name__ == "__main__":
    run_script(main)
