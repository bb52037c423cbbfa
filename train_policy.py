"""Stage 2: teach a language model to search, by reinforcement learning against a simulated engine.

    accelerate launch train_policy.py --algorithm ppo   # the tiny world, offline, on any machine

The loop in `train` is the method. `main` builds what it needs from the settings.
"""

from dataclasses import replace

from minizs import require
from minizs.curriculum import draw_questions, noise_probability
from minizs.reward import f1_score
from minizs.runs import run_folder
from minizs.runs.flags import may_change, parse, run_script, set_threads
from minizs.runs.settings import PolicyConfig, check_training


def train(config: PolicyConfig, examples, play, learner, test, run) -> None:
    """ZeroSearch (arXiv 2505.04588): search, be rewarded, learn, and meet ever noisier documents.

    `play` rolls out the policy as it is now, and `test`, unless it is None, evaluates it.
    """
    for step in run.steps():
        # Curriculum: how often a search is answered with noise (section 3.4 of the paper).
        noise = noise_at(step, config)

        # Questions are a function of seed and step. Each process plays its share of them.
        batch = draw_questions(step, len(examples), config.batch_questions, config.seed)
        places = run.share(len(batch))

        # Rollout: think, search, read, and again, until there is an answer (3.1).
        with run.phase("rollout"):
            trajectories = play(
                [examples[batch[place]] for place in places],
                keys=[(step, place) for place in places],
                noise=noise,
            )

        # Reward: F1 of the answer, and nothing for the format (3.5).
        for trajectory in trajectories:
            trajectory.reward = f1_score(trajectory.answer, trajectory.example.answers)

        # Update: advantages, loss and KL, on the policy's own tokens only (3.6).
        with run.phase("update"):
            set_learning_rates(config, learner, step)
            figures = learner.update(trajectories)

        # From here on we only watch and save.
        if test and run.due(config.eval_every):
            with run.phase("test"):
                figures |= test()
        run.log(noise, figures, trajectories, learner)
        run.save_if_due()


def noise_at(step: int, config: PolicyConfig) -> float:
    """The probability that a search is answered with noise in this step, counted from 1."""
    return noise_probability(
        step, config.steps, config.noise_start, config.noise_end, config.noise_base
    )


def set_learning_rates(config: PolicyConfig, learner, step: int) -> None:
    """Linear warm-up over the first `warmup` of the steps, under a line that falls to `lr_end`."""
    rise = min(1.0, step / max(1, round(config.warmup * config.steps)))
    fall = 1 - (1 - config.lr_end) * step / config.steps
    rates = [(learner.optimizer, config.lr)]
    if config.algorithm == "ppo":
        rates.append((learner.critic_optimizer, config.critic_lr))
    for optimizer, rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate * (rise * fall)


def read_config(argv: list[str]) -> PolicyConfig:
    """The settings from flags and a file; a run that is resumed keeps its own otherwise.

    Raises UserError for what cannot work, before anything expensive starts.
    """
    config = parse(PolicyConfig, argv)
    if config.resume:
        folder = run_folder.to_resume(config.output, config.resume)
        run_folder.check_run_or_settings(folder, argv, may_change(config))
        config = parse(PolicyConfig, argv, folder / "config.yaml")
        run_folder.keep_day(folder, config, argv)
        if run_folder.has_results(folder):
            run_folder.check_unchanged(folder, config, may_change(config))
        config.output = str(folder)
    check_training(config)
    return config


def check_shares(config: PolicyConfig, accelerator) -> None:
    """Raise UserError where the processes could not all play the same number of questions."""
    processes = accelerator.num_processes
    require(
        config.batch_questions % processes == 0,
        f"--batch_questions {config.batch_questions} does not split over {processes} processes.",
    )


def main(argv: list[str]) -> None:
    """Read the settings, build what they name, train, and write the policy."""
    config = read_config(argv)
    set_threads(config.threads)
    # These are slow to import: what is wrong with the flags has been said by now.
    from minizs.evaluation.held_out import held_out_test
    from minizs.imitation.demonstrations import check_warm_start
    from minizs.imitation.warm_start import warm_start
    from minizs.learner import build_learner
    from minizs.models.loading import load_prompt
    from minizs.models.weights import make_writer
    from minizs.protocol import vocabulary_size
    from minizs.runs import build, checkpoint, data, run

    check_warm_start(config)
    accelerator = build.make_accelerator(config)
    check_shares(config, accelerator)
    if run_folder.is_complete(config):
        accelerator.print(f"The run in {config.output} is complete.")
        return
    saved = checkpoint.checkpoint_of(config)
    examples = data.load_examples(config.data, "train", accelerator.print)
    build.check_lengths(config, [config.policy], examples)

    # The policy, and the engine that it searches with.
    start = config.policy
    model, tokenizer = build.load_trainable(config, accelerator)
    template = load_prompt(start)
    engine = build.build_engine(config, "train", accelerator, examples)
    if config.warm_start:
        # It imitates demonstrations first; then what comes of it is loaded as any policy is.
        with run.claimed_folder(config, accelerator, saved) as config:
            student = build.make_policy(config, model, tokenizer, template, temperature=0.0)
            start = warm_start(config, accelerator, student, engine, examples)
            del model, student  # or their memory stays taken
        model, tokenizer = build.load_trainable(replace(config, policy=start), accelerator)

    # What plays, what tests and what learns. `writer` gives the model to generate with.
    dtype = build.compute_dtype(config)
    writer = make_writer(model, dtype, accelerator.device, accelerator.is_fsdp2)
    play = build.make_player(config, writer, tokenizer, template, engine)
    test = held_out_test(config, accelerator, writer, tokenizer, template)
    learner = build_learner(accelerator, config, model, vocabulary_size(tokenizer), dtype)
    folder = build.agreed_folder(accelerator, config)
    last_step = checkpoint.load_checkpoint(accelerator, saved) if saved else 0
    with run.open_run(config, accelerator, folder, last_step, engine, tokenizer) as running:
        train(config, examples, play, learner, test, running)
    policy = writer()  # all processes take part, where the model is sharded
    if accelerator.is_main_process:
        running.finish(policy, template, start)


if __name__ == "__main__":
    run_script(main, settings=PolicyConfig)
