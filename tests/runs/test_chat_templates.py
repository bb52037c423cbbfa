"""What chat templates are given besides the messages: arguments of the settings, and the day."""

import shutil
from dataclasses import asdict
from datetime import date

import pytest
import yaml
from conftest import make_tokenizer
from scripts import COLLECTED, EVAL, FILE, metrics, policy, simulator
from servers import serving
from transformers import AutoTokenizer

import evaluate
import train_policy
import train_sim
from minizs import UserError
from minizs.imitation import stage1
from minizs.models import loading
from minizs.models.chat import fix_day
from minizs.protocol import prompt_ids
from minizs.runs import build, flags, settings
from minizs.runs.settings import PolicyConfig
from minizs.trajectory import SearchRequest

# As Qwen3's has an argument, and as Llama 3.2's and SmolLM3's print the day.
TEMPLATE = (
    "{{ date_string }} {{ strftime_now('%B %d %Y') }} {% if not thinking %}no {% endif %}thoughts "
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture
def chat(work):
    """A folder with the tiny policy, whose tokenizer has that template."""
    tokenizer = AutoTokenizer.from_pretrained("../base")
    tokenizer.chat_template = TEMPLATE
    shutil.copytree("../base", "chat")
    tokenizer.save_pretrained("chat")
    return work / "chat"


def start_of_prompt(config) -> str:
    """The words that the policy's prompt begins with, without the spaces that some tokens lose."""
    name = config.policy
    tokenizer = loading.load_tokenizer(name, **build.template_options(config))
    seen = []
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *a, **k: seen.append(apply(*a, **k)) or seen[-1]
    prompt_ids(tokenizer, ["x"])
    return seen[-1][0]


def test_the_template_gets_its_arguments_and_the_day(chat):
    """Both ways of asking for the day give the run's day, and a mapping gives the rest."""
    config = PolicyConfig(policy=str(chat), day="2026-02-03")
    assert start_of_prompt(config) == "03 Feb 2026 February 03 2026 no thoughts x"
    for text in ("{thinking: true}", '{"thinking": true}', "thinking: yes"):
        config = PolicyConfig(policy=str(chat), day="2026-02-03", chat_template_args=text)
        assert start_of_prompt(config) == "03 Feb 2026 February 03 2026 thoughts x"
    config.chat_template_args = "{date_string: '1 May 2025'}"
    assert start_of_prompt(config).startswith("1 May 2025 February 03")


def test_a_file_of_settings_may_hold_a_mapping(chat, work):
    """And a bare date. Both mean what they mean as a flag."""
    lines = f"policy: {chat}\nday: 2026-02-03\nchat_template_args:\n  thinking: true\n"
    (work / "settings.yaml").write_text(lines)
    config = flags.parse(PolicyConfig, ["--config", "settings.yaml"])
    assert start_of_prompt(config) == "03 Feb 2026 February 03 2026 thoughts x"
    (work / "settings.yaml").write_text("seed:\n  thinking: true\n")
    with pytest.raises(UserError, match="gives seed no value or many"):
        flags.parse(PolicyConfig, ["--config", "settings.yaml"])


@pytest.mark.parametrize(
    "directives",
    ["%A, %B %-d, %Y", "%F", "%D", "%e %h %y", "%I:%M %p", "%j %U %u", "%d/%m %H:%M:%S"],
)
def test_every_way_to_print_the_day(directives):
    """A template may ask for any form of it, and gets what Python prints."""
    tokenizer = make_tokenizer()
    template = "{% set day = strftime_now('" + directives + "') %}{{ day }}"
    tokenizer.chat_template = fix_day(template, date(2026, 2, 3))
    [text] = tokenizer.apply_chat_template([[{"role": "user", "content": ""}]], tokenize=False)
    assert text == date(2026, 2, 3).strftime(directives)


@pytest.mark.parametrize(
    "template, args, words",
    [
        (
            TEMPLATE,
            "{tokenize: true}",
            "takes no question .*multiple values.*mend --chat_template_",
        ),
        (TEMPLATE, "{messages: []}", "takes no question"),
        ("{{ raise_exception('system first') }}", "", "takes no question .system first"),
        ("{{ bos_token }}", "", "leaves the question out; .*--chat_template none"),
    ],
)
def test_a_template_that_takes_no_question_is_told(chat, work, template, args, words):
    """In one sentence, before a run has a folder."""
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(chat)
    with pytest.raises(UserError, match=words):
        policy("--policy", "chat", "--chat_template_args", args, "--output", "run")
    assert not (work / "run").exists()
    policy_tokenizer = loading.load_tokenizer(str(chat), "none")
    assert prompt_ids(policy_tokenizer, ["who"]) == policy_tokenizer(["who"])["input_ids"]


@pytest.mark.parametrize("text", ["x", "[1]", "{1: 2}", "{a: ", "{day: 2026-02-03}"])
def test_what_is_no_mapping_is_refused(work, text):
    """In one sentence, before anything is made. A bare date could not be sent to a server."""
    with pytest.raises(UserError, match="--chat_template_args .* is no mapping"):
        policy("--chat_template_args", text)
    with pytest.raises(UserError, match="--day 'tomorrow' is no date"):
        policy("--day", "tomorrow")
    assert not list(work.iterdir())


@pytest.fixture
def days(monkeypatch):
    """The days on which things happen; today is the last of them."""
    days = ["2026-02-03"]

    class Day(settings.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(days[-1])

    monkeypatch.setattr(settings, "date", Day)
    return days


def test_a_resumed_run_keeps_its_day(chat, work, days):
    """A run that goes on after midnight has the prompts that it began with."""
    flags = ["--policy", "chat", "--save_every", "1"]
    policy(*flags, "--steps", "2", "--output", "whole")
    shutil.copytree(work / "whole", work / "cut")
    shutil.rmtree(work / "cut" / "policy")
    shutil.rmtree(work / "cut" / "checkpoints" / "step-2")
    days.append("2026-02-04")
    train_policy.main(["--output", "cut", "--resume"])
    saved = yaml.safe_load((work / "cut" / "config.yaml").read_text())
    assert saved["day"] == "2026-02-03"
    assert metrics(work / "cut") == metrics(work / "whole")
    policy(*flags, "--steps", "2", "--output", "later")
    assert yaml.safe_load((work / "later" / "config.yaml").read_text())["day"] == "2026-02-04"
    # The policy is tested with the prompts that it was trained on.
    config, _ = evaluate.read_settings([*EVAL, "--policy", str(work / "whole" / "policy")])
    assert config.day == "2026-02-03"


def test_a_file_of_settings_does_not_change_the_day(chat, work, days):
    """A run that is resumed with its own file again has the day that it began with, too; with
    another day as a flag it would be another run."""
    (work / "settings.yaml").write_text("lr_end: 0.5\n")
    flags = ["--config", "settings.yaml", "--policy", "chat", "--save_every", "1"]
    flags += ["--output", "run"]
    policy(*flags)
    shutil.rmtree(work / "run" / "policy")
    shutil.rmtree(work / "run" / "checkpoints" / "step-2")
    days.append("2026-02-04")
    policy(*flags, "--resume")
    assert yaml.safe_load((work / "run" / "config.yaml").read_text())["day"] == "2026-02-03"
    with pytest.raises(UserError, match="--day was '2026-02-03' and is '2026-02-05'"):
        policy(*flags, "--resume", "--day", "2026-02-05")


@pytest.mark.parametrize(
    "stage", [["--data", COLLECTED], ["--collect", *FILE, "--engine_noise", "0.5"]]
)
def test_the_same_command_goes_on_after_midnight(stage, work, collected, days, monkeypatch):
    """Stage 1 goes on by the same command, with the day on which it began."""

    def killed(*arguments, **texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "save_model", killed)
    monkeypatch.setattr(stage1, "collect_from_sources", killed)
    with pytest.raises(KeyboardInterrupt):
        simulator(*stage, "--save_every", "1", "--output", "out")
    monkeypatch.undo()
    monkeypatch.chdir(work)
    config = train_sim.read_settings([*stage, "--output", "out"])
    assert config.day == days[0] != settings.date.today().isoformat()
    simulator(*stage, "--save_every", "1", "--output", "out")
    assert yaml.safe_load((work / "out" / "config.yaml").read_text())["day"] == days[0]


def test_processes_agree_on_the_day(monkeypatch):
    """Of two that start around midnight, the second takes the day of the first."""
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda values: ["2026-02-03"])
    config = PolicyConfig(day="2026-02-04")
    build.make_accelerator(config)
    assert config.day == "2026-02-03"


def test_a_served_simulator_gets_the_arguments(monkeypatch):
    """As `chat_template_kwargs`, with the day; without arguments it gets none."""
    message = {"message": {"content": "Doc 1: a fact"}, "finish_reason": "stop"}
    answer = lambda path, body, _: (200, {"choices": [message]}) if body else (404, "")  # noqa: E731
    with serving(answer) as (url, seen):
        served = {"simulator": url, "simulator_model": "m", "simulator_api": "chat"}
        for text in ("{enable_thinking: false}", ""):
            config = PolicyConfig(**served, chat_template_args=text, day="2026-02-03")
            engine = build.build_engine(config, "train", None)
            assert engine.search([SearchRequest("a", "b?", ("c",))]) == [["a fact"]]
    first, second = [body for _, body in seen if body]
    expected = {"enable_thinking": False, "date_string": "03 Feb 2026"}
    assert first["chat_template_kwargs"] == expected
    assert "chat_template_kwargs" not in second


def test_settings_without_a_day_are_of_today():
    """The day is decided where the settings are made, so that it is saved with them."""
    assert asdict(PolicyConfig())["day"] == settings.date.today().isoformat()
