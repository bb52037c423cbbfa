"""Commands that a message can tell a user to run: they work when they are pasted into a shell."""

import os
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]  # where the scripts are


def command(script: str, *arguments: object) -> str:
    """The command line that runs one of our scripts from the current folder.

    `command("train_policy.py", "--output", run, "--resume")` names the script by a path that is
    right in the current folder, and quotes what the shell would take apart, such as a path with
    a space. Where several processes are running, they are started in the same way.
    """
    path = ROOT / script
    if Path.cwd() == ROOT:
        path = Path(script)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    launcher = ["accelerate", "launch"] if several else ["python"]
    return shlex.join([*launcher, str(path), *map(str, arguments)])
