"""Loading and saving models."""

import pytest
import torch
from conftest import make_model, make_tokenizer

from minizs import models
from minizs.config import UserError
from minizs.protocol import PROMPT


@pytest.fixture
def folder(tmp_path):
    tokenizer = make_tokenizer()
    models.save(make_model(vocab_size=len(tokenizer)), tokenizer, tmp_path, prompt="Q: {question}")
    return tmp_path


def test_what_is_saved_is_loaded(folder):
    """Guards weights, tokenizer or wording that differ after a run from what was trained."""
    model, tokenizer = models.load(str(folder))
    expected = make_model(vocab_size=len(tokenizer))
    assert not model.training and model.dtype == torch.float32
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert tokenizer.encode("ab<eos>") == make_tokenizer().encode("ab<eos>")
    assert models.load_prompt(str(folder)) == "Q: {question}"
    assert models.load(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_folder_without_a_wording_gets_the_papers(folder):
    """Guards a crash on any model but the tiny one."""
    (folder / models.PROMPT_FILE).unlink()
    assert models.load_prompt(str(folder)) == PROMPT


@pytest.mark.parametrize(
    "missing, words",
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no .*weights"),
        ("tokenizer", "no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_refused(folder, missing, words):
    """Guards an error from deep inside a library, after the minutes that came before it."""
    for path in folder.glob(missing + "*"):
        path.unlink()
    for function in (models.check_model, models.load):
        with pytest.raises(UserError, match=words):
            function(str(folder))


def test_names(folder):
    """Guards a wrong path that is looked up on the hub, and a hub name that is taken for a path."""
    models.check_model("org/model")
    for name in ("./no", "/no/where", "a/b/c", ""):
        with pytest.raises(UserError, match="no model folder"):
            models.check_model(name)
    models.check_model(str(folder))
    assert models.resolve("tiny") == str(models.TINY_BASE)


def test_broken_and_unsupported_models_are_refused(folder):
    """Guards a traceback for a truncated file, and families whose logits would be wrong."""
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("{", '{"logits_scaling": 8.0,', 1)
    )
    with pytest.raises(UserError, match="logits_scaling"):
        models.load(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(str(folder))
    with pytest.raises(UserError, match="not JSON"):
        models.check_positions(str(folder), 5)


def test_truncated_weights_are_refused(folder):
    """Guards a traceback for a file that was copied or downloaded in part."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(str(folder))


def test_too_long_a_context_is_refused(folder):
    """Guards a run that fails at its first long trajectory, hours in."""
    models.check_positions(str(folder), 256)
    with pytest.raises(UserError, match="256 positions"):
        models.check_positions(str(folder), 257)
