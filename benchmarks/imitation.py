"""Supervised learning instead of RL: the base imitates its own successful trajectories.

    python benchmarks/imitation.py --config configs/claims/reference.yaml --output runs/imitation

The base samples as many trajectories as RL would in --steps (one batch after the other, with the
curriculum's noise), those that searched and have reward 1 are kept, and the model is fine-tuned on
them for --epochs with the loss on its own tokens. The rest is train_policy.py's.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_policy  # noqa: E402
from minizs import require  # noqa: E402
from minizs.runs.flags import option, parse, run_script, save_settings, set_threads  # noqa: E402


@dataclass
class ImitationConfig(train_policy.PolicyConfig):
    """Supervised learning on the successful trajectories of the starting model."""

    epochs: int = option(6, "The number of passes over the successful trajectories.", min=1)


def main(argv: list[str]) -> None:
    config = parse(ImitationConfig, argv)
    train_policy.check_training(config)
    require(not config.resume, "Imitation takes minutes and does not resume; start it anew.")
    set_threads(config.threads)
    import_what_is_slow()

    accelerator = build.make_accelerator(config)
    examples = data.load_examples(config.data, "train")
    model, tokenizer = build.load_configured_model(
        config, config.policy, accelerator.device, torch.float32
    )
    template = loading.load_prompt(config.policy)
    engine = build.build_engine(config, "train", accelerator)
    policy = build.make_policy(config, model, tokenizer, template, config.temperature)

    successes = sample_successes(config, policy, examples, engine)
    require(bool(successes), "No trajectory was successful, so there is nothing to imitate.")
    imitate(config, model, successes)

    folder = Path(config.output or "runs/imitation")
    run_folder.begin(folder, overwrite=config.overwrite)
    save_settings(config, folder / "config.yaml")
    loading.save_model(model.eval(), tokenizer, folder / "policy", prompt=template)


def import_what_is_slow() -> None:
    """Import what needs torch, once the flags are known to be right."""
    global torch, sft, draw_questions, noise_probability, loading, f1_score, rollout
    global build, data, run_folder
    import torch

    from minizs import sft
    from minizs.curriculum import draw_questions, noise_probability
    from minizs.models import loading
    from minizs.reward import f1_score
    from minizs.rollout import rollout
    from minizs.runs import build, data, run_folder


def sample_successes(config: ImitationConfig, policy, examples: list, engine) -> list:
    """Ids and loss mask of each trajectory that searched and has reward 1."""
    successes = []
    for step in range(1, config.steps + 1):
        batch = draw_questions(step, len(examples), config.batch_questions, config.seed)
        noise = noise_probability(step, config.steps, config.noise_start, config.noise_end)
        trajectories = rollout(
            policy,
            [examples[i] for i in batch],
            engine,
            group_size=config.group_size,
            noise=noise,
            keys=[(step, place) for place in range(len(batch))],
        )
        for trajectory in trajectories:
            score = f1_score(trajectory.answer, trajectory.example.answers)
            if trajectory.searches and score == 1:
                successes.append((trajectory.ids, trajectory.loss_mask))
        print(f"batch {step}: {len(successes)} successful trajectories so far", flush=True)
    return successes


def imitate(config: ImitationConfig, model, successes: list) -> None:
    """Fine-tune the model on the successes for `--epochs`, the loss on its own tokens."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    rng = random.Random(f"imitation {config.seed}")
    batches = []
    for _ in range(config.epochs):
        batches += sft.batches(rng.sample(successes, len(successes)), 3000, rng)
    for number, batch in enumerate(batches):
        warmup = (number + 1) / (0.05 * len(batches))
        for group in optimizer.param_groups:  # 5 % warm-up, then down to nothing
            group["lr"] = config.lr * min(1.0, warmup, 1 - number / len(batches))
        loss, count = sft.nll(model, *sft.collate(batch))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{len(batches)} steps on {len(successes)} trajectories, last loss {loss / count:.3f}")


if __name__ == "__main__":
    run_script(main)
