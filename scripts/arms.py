"""Several arms of one recipe over several seeds: `python scripts/arms.py docs/results/arms.yaml`.

The file names a config, settings shared by all arms, seeds, and each arm's own settings. Every arm and seed is an
`upturn run` into `<output_dir>/<arm>/seed-<s>`, with one store, so that stages which arms have in common are done once,
and a stopped sweep goes on where it stopped. In the end the arms are compared with the first one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

UPTURN = [sys.executable, "-m", "upturn.cli.main"]


def runs(plan: dict[str, Any]) -> dict[str, list[tuple[Path, list[str]]]]:
    """By arm: the run folder and the command of each seed."""
    root = Path(plan["output_dir"])
    found: dict[str, list[tuple[Path, list[str]]]] = {}
    for arm, settings in plan["arms"].items():
        for seed in plan["seeds"]:
            folder = root / arm / f"seed-{seed}"
            own = [f"seed={seed}", f"task.seed={seed}", f"output_dir={folder}", f"store={root / 'store'}"]
            command = [*UPTURN, "run", plan["config"], *plan.get("shared", []), *settings, *own]
            found.setdefault(arm, []).append((folder, command))
    return found


def main(path: str) -> None:
    """Run what is missing, then compare."""
    plan = yaml.safe_load(Path(path).read_text())
    found = runs(plan)
    for seed in range(len(plan["seeds"])):  # all arms of one seed first: a stopped sweep is whole for some seeds
        for arm, commands in found.items():
            print(f"--- {arm}, seed {plan['seeds'][seed]}", flush=True)
            subprocess.run(commands[seed][1], check=True)
    arms = [f"--arm={arm}={','.join(str(folder) for folder, _ in commands)}" for arm, commands in found.items()]
    page = Path(plan["output_dir"]) / "compare.html"
    subprocess.run([*UPTURN, "compare", *arms, f"--output={page}"], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
