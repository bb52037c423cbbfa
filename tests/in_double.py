"""train_policy in float64, run by torchrun in tests: trajectories then do not hang on rounding.

After every step it checks that all processes hold the same weights, and at the end the main one
writes all trajectories and the policy's weights, whole, into the run's folder.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object

import train_policy
from minizs import learner, ppo
from minizs.models import loading, weights
from minizs.runs import build, run_folder
from minizs.runs.flags import run_script

load = loading.load_model
update = learner.Learner.update
make_accelerator = build.make_accelerator


def double(name, device="cpu", dtype=None, **options):
    return load(name, device, torch.float64, **options)


def checked(self, trajectories):
    last = self.accelerator.process_index == self.accelerator.num_processes - 1
    reward = trajectories[-1].reward
    if os.environ.get("SPOIL") == str(len(steps)) and last:  # for one process alone
        trajectories[-1].reward = float("nan")
    figures = update(self, trajectories)
    trajectories[-1].reward = reward
    layers = self.accelerator.unwrap_model(self.scorer).model.get_decoder().layers
    sharded = [hasattr(p, "full_tensor") for p in layers.parameters()]
    assert all(sharded) if self.accelerator.is_fsdp2 else not any(sharded)
    parameters = self.accelerator.unwrap_model(self.scorer).parameters()
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    flat = torch.cat([p.detach().flatten().double() for p in parameters])[None]
    everyone = self.accelerator.gather(flat)
    assert all(torch.equal(row, everyone[0]) for row in everyone), "ranks hold other weights"
    texts = gather_object([(t.ids, t.loss_mask) for t in trajectories])
    steps.append({"texts": sorted(texts), "weights": flat[0], "rewards": figures})
    return figures


def sharding(config):
    """Accelerate shards on GPUs alone; told that these two CPUs are sharded, it works on them."""
    from accelerate.state import AcceleratorState, PartialState

    accelerator = make_accelerator(config)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state = AcceleratorState()
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        assert accelerator.is_fsdp2
    return accelerator


class Critic(ppo.Critic):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.double()


def main(argv):
    train_policy.main(argv)
    if steps and os.environ.get("RANK", "0") == "0":
        torch.save(steps, Path(run_folder.RUNS, "steps.pt"))


if __name__ == "__main__":
    if "bfloat16" not in sys.argv:
        ppo.Critic, loading.load_model = Critic, double
        weights.named_dtype = lambda *_: torch.float64
    build.make_accelerator = sharding
    steps: list[dict] = []
    learner.Learner.update = checked
    run_script(main)
