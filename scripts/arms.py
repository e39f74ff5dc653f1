"""Several arms over several seeds: `python scripts/arms.py docs/results/arms.yaml`.

The file names seeds, settings shared by all arms, and each arm: its own settings over the file's config, or a config
of its own with settings. Every arm and seed is an `upturn run` into `<output_dir>/<arm>/seed-<s>`, with one store, so
that stages which arms have in common are done once, and a stopped sweep goes on where it stopped. In the end the arms
are compared with the first one: a page, and `table.md`. `--seeds 0 1` runs only these and leaves the comparison out,
`--table` only compares.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import arms_table
import yaml

UPTURN = [sys.executable, "-m", "upturn.cli.main"]


def runs(plan: dict[str, Any]) -> dict[str, dict[int, tuple[Path, list[str]]]]:
    """By arm and seed: the run folder and the command."""
    root = Path(plan["output_dir"])
    found: dict[str, dict[int, tuple[Path, list[str]]]] = {}
    for arm, told in plan["arms"].items():
        own = told if isinstance(told, dict) else {"config": plan["config"], "settings": told}
        for seed in plan["seeds"]:
            folder = root / arm / f"seed-{seed}"
            settings = [*plan.get("shared", []), *own.get("settings", [])]
            place = [f"seed={seed}", f"task.seed={seed}", f"output_dir={folder}", f"store={root / 'store'}"]
            found.setdefault(arm, {})[seed] = folder, [*UPTURN, "run", own["config"], *settings, *place]
    return found


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", help="only these, and no comparison")
    parser.add_argument("--table", action="store_true", help="only the comparison")
    args = parser.parse_args()
    plan = yaml.safe_load(args.plan.read_text())
    found = runs(plan)
    for seed in [] if args.table else args.seeds or plan["seeds"]:  # a stopped sweep is whole for some seeds
        for arm, commands in found.items():
            print(f"--- {arm}, seed {seed}", flush=True)
            subprocess.run(commands[seed][1], check=True)
    if args.seeds:
        return
    folders = {arm: [folder for folder, _ in commands.values()] for arm, commands in found.items()}
    arms = [f"--arm={arm}={','.join(map(str, paths))}" for arm, paths in folders.items()]
    page = Path(plan["output_dir"]) / "compare.html"
    subprocess.run([*UPTURN, "compare", *arms, f"--output={page}"], check=True)
    (Path(plan["output_dir"]) / "table.md").write_text(arms_table.table(folders))


if __name__ == "__main__":
    main()
