"""Run by torchrun with two processes: `policy_ranks.py FOLDER` runs every lab, each in the subfolder of its name."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from srpo.policy.parallel import init_parallel

LABS = ("policy_lab", "ppo_lab", "loading_lab", "adapter_lab")


def main(out: Path) -> None:
    parallel = init_parallel()
    for name in LABS:
        import_module(name).main(out / name, parallel)
    parallel.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
