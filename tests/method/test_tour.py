"""`python -m minizs.tour` runs anywhere, in seconds, and what it prints is true."""

import re

from minizs import tour


def test_the_tour(capsys):
    """Every chapter is there and fits the page; its numbers are those of the method."""
    tour.main()
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) < 150 and max(map(len, lines)) <= tour.WIDTH
    titles = re.findall(r"^-- (.*?) -+$", text, re.MULTILINE)
    assert titles == [
        "The prompt",
        "A turn, token by token",
        "The request",
        "The documents",
        "Ids and mask",
        "The reward",
        "Rewards and advantages of a group",
        "The loss before and after one update",
    ]
    # Rewards differ, or the question would be a bad example; advantages add up to nothing.
    rows = re.findall(r"^    (\d) .* (\d\.\d\d) +([+-]\d\.\d\d)$", text, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(tour.GROUP))
    assert len({reward for _, reward, _ in rows}) >= 3
    assert abs(sum(float(advantage) for *_, advantage in rows)) < 0.05
    # One step in the direction of the gradient makes the loss smaller.
    [before] = re.findall(r"loss before +([+-][\d.]+)", text)
    [after] = re.findall(r"loss after +([+-][\d.]+)", text)
    assert float(after) < float(before)


def test_the_mask_stands_below_the_policys_tokens(capsys):
    """Prompt and documents have mask 0, and the policy's words and tags have mask 1."""
    tour.main()
    text = capsys.readouterr().out.split("-- Ids and mask")[1].split("-- The reward")[0]
    lines = text.splitlines()
    masks = {}
    for number, line in enumerate(lines):
        if line.startswith("    mask"):
            pieces = re.split(r" {2,}", lines[number - 2].strip())
            masks |= dict(zip(pieces, line.split()[1:], strict=True))
    for piece in ("<think>", "<search>", "</search>", "<answer>", "</answer>"):
        assert masks[piece] == "1"
    for piece in ("Question:", "<information>", "Doc 1:", "</information>"):
        assert masks[piece] == "0"
