"""Stage 1: fine-tune a language model into a search engine that writes useful or noisy documents.

    accelerate launch train_sim.py                      # the tiny world's, in runs/simulator
    python train_sim.py --collect --data FILE --corpus FILE --output runs/collected
    python train_sim.py --base MODEL --data runs/collected/collected.jsonl --output runs/sim

The model learns to write what a real engine returned, from the query, the question, its gold
answers and one word, "useful" or "noisy" (paper section 3.3). Whatever is made grows in
OUTPUT.partial, which is renamed when it is whole: after a kill the same command, or `--resume` with
the same `--output`, goes on there and ends with the same result.
"""

from dataclasses import replace
from pathlib import Path

from minizs import require
from minizs.runs import run_folder
from minizs.runs.flags import parse, run_script, set_threads
from minizs.runs.settings import URL, SimConfig, check_search, check_trainable

SIMULATOR_FOLDER = run_folder.RUNS / "simulator"
COLLECTED_FOLDER = run_folder.RUNS / "collected"


def main(argv: list[str]) -> None:
    config = read_settings(argv)
    # Without any flag this makes the simulator that stage 2 makes where it finds none.
    makes_default = not argv
    if is_finished(config) and (config.resume or makes_default):
        print(f"{product(config)} is in {config.output} already; --overwrite makes it anew.")
        return
    check_settings(config)
    set_threads(config.threads)
    # These are slow to import: what is wrong with the flags has been said by now.
    from minizs.imitation import stage1
    from minizs.runs import build

    accelerator = build.make_accelerator(config)
    output = Path(config.output)

    if config.collect:
        require(accelerator.num_processes == 1, "--collect: use one process.")
        sources = None if config.data == "world" else stage1.build_sources(config, accelerator)
        with stage1.alone(accelerator, output):
            if is_finished(config):
                return accelerator.print(f"Another run has made {output} meanwhile.")
            stage1.collect(config, sources)
        return

    rows = stage1.load_rows(config)
    base = stage1.load_base(config, accelerator)
    texts = stage1.encode_rows(config, accelerator, rows, base)

    with stage1.alone(accelerator, output):
        if is_finished(config):
            accelerator.print(f"Another run has made {output} meanwhile.")
            return
        # Stage 2 waits for the default simulator: it must not fail over an older attempt.
        begin_anew = not config.resume and (config.overwrite or makes_default)
        model = stage1.fine_tune(config, accelerator, base, texts, begin_anew)
        if accelerator.is_main_process:
            stage1.save_simulator(config, model, base)
            if config.data == "world" and config.report_queries:
                stage1.write_report(config, model, base)


def read_settings(argv: list[str]) -> SimConfig:
    """The settings of these flags; a resumed run has its own where the flags are silent, and any
    run that goes on has its day."""
    config = parse(SimConfig, argv)
    config.output = config.output or str(COLLECTED_FOLDER if config.collect else SIMULATOR_FOLDER)
    partial = run_folder.partial_folder(Path(config.output))
    if config.resume:
        config = parse(SimConfig, [*argv, "--output", config.output], partial / "config.yaml")
    if argv and not config.overwrite:
        run_folder.keep_day(partial, config, argv)
    return config


def product(config: SimConfig) -> str:
    return "The collection" if config.collect else "The simulator"


def is_finished(config: SimConfig) -> bool:
    """Whether the result is there, whole, and is not to be made anew."""
    name = "collected.jsonl" if config.collect else "simulator_prompt.txt"  # written last
    return Path(config.output, name).is_file() and not config.overwrite


def check_settings(config: SimConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    from minizs.models import loading

    loading.check_model(config.base)
    check_trainable(config.base)
    if config.judge != "gold":
        require(
            config.collect and config.data != "world",
            f"--judge {config.judge} is for --collect with --data; leave it out.",
        )
        if not config.judge.startswith(URL):
            loading.check_model(config.judge)
    check_search(config if config.collect else replace(config, engine="none"))
    check_output(config)


def check_output(config: SimConfig) -> None:
    """Raise UserError for an output in which something would be lost, and for a run to resume that
    is not there."""
    from minizs.runs import checkpoint

    output = Path(config.output)
    partial = run_folder.partial_folder(output)
    if output.is_dir() and any(output.iterdir()) and not config.overwrite:
        advice = "give another --output"
        if run_folder.is_run(output):
            advice += ", or --overwrite to lose what is there"
        require(False, f"{output} is not empty; {advice}.")
    run_folder.check_free(output, resume=False, overwrite=config.overwrite)
    require(
        config.collect or run_folder.can_be_made(partial),
        f"{partial}, where the simulator grows, cannot be made; choose another --output.",
    )
    gives_settings = replace(config, output="", resume="", collect=False) != SimConfig()
    require(
        not config.resume or gives_settings or partial.is_dir(),
        f"There is nothing to go on with in {partial}; check --output, or leave --resume out.",
    )
    if config.resume not in ("", "latest"):
        checkpoint.find_checkpoint(config.resume, partial)


if __name__ == "__main__":
    run_script(main, settings=SimConfig)
