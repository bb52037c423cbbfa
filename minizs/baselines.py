"""What a policy is compared with: a model that answers at once, thinks first, or reads first.

Paper section 4.2: direct answer, chain of thought, and retrieval-augmented generation with one
search for the question itself. One generation each; the wording lies in `prompts/`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from minizs import protocol
from minizs.generate import generate
from minizs.reward import f1_score
from minizs.trajectory import Example, SearchRequest, Trajectory, Turn

METHODS = ("direct", "cot", "rag")


def answer(method: str, model, tokenizer, examples: Sequence[Example], engine, *,
           keys: Sequence[tuple[int, ...]], max_new_tokens: int, temperature: float = 0.0,
           seed: int = 0, on_turn: Callable[[Turn], None] | None = None,
           ) -> list[Trajectory]:  # fmt: skip
    """One trajectory of one answer for each example; its prompt is left out, none is trained on."""
    template = (Path(__file__).parent / "prompts" / f"{method}.txt").read_text()
    found: list[list[str] | None] = [None for _ in examples]
    if method == "rag":
        found = engine.search([SearchRequest(e.question, e.question, e.answers) for e in examples])
    texts = [protocol.build_prompt(e.question, template) for e in examples]
    texts = [text.replace("{documents}", protocol.number_documents(docs or []))
             for text, docs in zip(texts, found, strict=True)]  # fmt: skip
    written = generate(model, protocol.prompt_ids(tokenizer, texts), max_new_tokens, temperature,
                       stop=protocol.STOP, seed=seed, keys=keys, tokenizer=tokenizer,
                       vocab_size=protocol.vocabulary_size(tokenizer))  # fmt: skip
    rows = []
    for example, docs, out in zip(examples, found, written, strict=True):
        text = tokenizer.decode(out.ids, skip_special_tokens=False)
        action = protocol.parse_action(text)
        row = Trajectory(example, turns=[Turn(text, action.kind, action.content, docs)])
        if action.kind == "answer":
            row.answer = action.content
        else:
            row.truncated = "turns"
        row.reward = f1_score(row.answer, example.answers)
        rows.append(row)
        if on_turn:
            on_turn(row.turns[0])
    return rows
