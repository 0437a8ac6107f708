"""Do two checkouts compute the same numbers?   python tools/same_numbers.py BASE NEW [--only NAME ...]

BASE and NEW are folders of checkouts, or git revisions, which are checked out aside. Every program runs at its smallest size
(`SCENARIOS`) in both, with one thread and the same relative paths, and the digests of all files that it writes are compared:
parameters, metrics, rollouts, selections, verdicts, scores. Clock readings and pictures are left out.
Exit code 0: the same files, byte for byte, and the same exit codes. About four minutes for both sides.

A refactoring commit quotes the last line that this prints. `tests/test_golden.py` runs the same scenarios against stored values.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_MODEL = (
    "--{0}hidden-size 32 --{0}num-layers 2 --{0}num-heads 2 --{0}num-kv-heads 1 --{0}head-dim 16 "
    "--{0}num-experts 4 --{0}expert-size 32 --{0}max-context 1024"
)
# Few candidates a token: a rounding then seldom moves a draw from one to the next, and golden values hold on other CPUs.
_RL = (
    "--policy.path demo/sft/policy --data.train demo/data/train.jsonl --num-steps 2 --seed 1 --rollout.num-prompts 8 "
    "--rollout.group-size 4 --rollout.max-new-tokens 80 --rollout.top-k 4 --train.micro-batch-tokens 2048 --reward.judge oracle "
    "--optimizer.lr 1e-4 --data.prompt 'Query: {{query}}\nItem: {{item}}\n'"
)
_JUDGE = (
    "srpo.train_judge --data demo/data/train.jsonl --rollouts demo/rollouts.jsonl --held-out 8 --sft.batch-size 8 "
    "--sft.policy.path demo/sft/policy --sft.optimizer.lr 2e-3"
)
# Name -> command; {configs} is the folder of the checkout. Each runs in the same folder, in this order: `demo` makes the data and
# the checkpoint that all others start from.
SCENARIOS = {
    "demo": "srpo.demo --run-dir demo --num-demonstrations 600 --num-train 96 --num-eval 24 --vocab-size 700 "
    f"{_MODEL.format('model.')} --sft-steps 150 --sft-batch 16 --sft-lr 1e-2 --rl-steps 3 --num-prompts 8 --group-size 4 "
    "--eval-every 2",
    "sft": "srpo.sft --data demo/data/sft.jsonl --policy.path demo/base --run-dir sft --num-steps 5 --batch-size 16 "
    "--inputs hidden --optimizer.lr 2e-3",
    "grpo": f"srpo.train @ {{configs}}/baselines/grpo.toml {_RL} --run-dir grpo",
    "ppo": f"srpo.train @ {{configs}}/baselines/ppo.toml {_RL} --run-dir ppo",
    "gspo": f"srpo.train @ {{configs}}/baselines/gspo.toml {_RL} --run-dir gspo --loss.num-updates 2",
    "dapo": f"srpo.train @ {{configs}}/baselines/dapo.toml {_RL} --run-dir dapo",
    "replay": f"srpo.train {_RL} --run-dir replay --loss.inputs hidden --loss.num-updates 2 --loss.importance truncate "
    "--rollout.support replay --rollout.routing replay",
    "off_policy": f"srpo.train {_RL} --run-dir off_policy --rollout.off-policy-steps 1 --loss.importance mask",
    "dpo": "srpo.dpo --rollouts demo/rollouts.jsonl --policy.path demo/policy --policy.reference demo/sft/policy --run-dir dpo "
    "--num-steps 3 --batch-size 4 --optimizer.lr 1e-4 --rules.prefer total",
    "select": f"srpo.select {_RL} --data.train demo/data/eval.jsonl --run-dir select --format jsonl --shard-examples 8 "
    "--select.uniform keep --select.difficulty-low -1 --select.difficulty-high 2 --select.num-examples 12",
    "judge": f"{_JUDGE} --run-dir judge --num-votes 2 --sft.num-steps 20 --mine.num-votes 2 --mine.num-responses 32 "
    "--mine.num-cases 24 --mine.solve-low -1 --mine.solve-high 2 --max-new-tokens 64 --grpo.num-steps 1 "
    "--grpo.rollout.num-prompts 4 --grpo.rollout.group-size 2",
    "scalar": f"{_JUDGE} --run-dir scalar --kind scalar --sft.num-steps 10",
    "evaluate": "srpo.evaluate --checkpoint demo/policy --data demo/data/eval.jsonl --out evaluation",
    "evaluate_start": "srpo.evaluate --checkpoint demo/sft/policy --data demo/data/eval.jsonl --out evaluation_start",
    "compare": "srpo.compare --a evaluation_start --b evaluation --data demo/data/eval.jsonl",
    "report": "srpo.report demo",
    "reproduce": "srpo.reproduce table8 --run-dir reproduce --seeds 0 --scale.num-demonstrations 400 --scale.sft-steps 60 "
    "--scale.sft-lr 1e-2 --scale.num-train 64 --scale.num-steps 2 --scale.num-prompts 8 --scale.group-size 4 "
    "--scale.eval-every 2 --scale.eval-examples 8 --scale.num-eval 16 --scale.dpo-prompts 24 --scale.dpo-steps 2 "
    f"{_MODEL.format('scale.model.')}",
}
CLOCKED = re.compile(r"(^|/)(timing\.jsonl|\.metadata|lock|inputs\.json|step_\d+/COMPLETE)$|\.png$|(^|/)plots/|\.printed$")
_CLOCKS = re.compile(rb'"(minutes|command|commit)": ("[^"]*"|[^,\n}]+)')  # in results.json and in the tables of srpo.reproduce


def run_scenarios(root: Path, out: Path, names: Sequence[str]) -> dict[str, int]:
    """Run scenarios with the code of the checkout `root` in the folder `out`; returns their exit codes.

    Their output is in `out/NAME.printed`.
    """
    out.mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SRPO"))}
    env |= {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    codes = {}
    for name in names:
        command = [sys.executable, "-m", *shlex.split(SCENARIOS[name].format(configs=root / "configs"))]
        start = time.monotonic()
        with (out / f"{name}.printed").open("w") as printed:
            codes[name] = subprocess.run(command, cwd=out, env=env, stdout=printed, stderr=printed, check=False).returncode
        print(f"{name}: exit code {codes[name]}, {time.monotonic() - start:.0f} s", flush=True)
    return codes


def written_files(out: Path) -> Iterator[tuple[str, bytes]]:
    """(relative path, content without clock readings) of every file in the folder that is worth comparing."""
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not path.is_symlink() and not CLOCKED.search(name):
            data = path.read_bytes()
            yield name, _CLOCKS.sub(b"", data) if path.suffix == ".json" else data


def digests(out: Path) -> dict[str, str]:
    """{relative path: digest} of `written_files`."""
    return {name: hashlib.blake2b(data, digest_size=12).hexdigest() for name, data in written_files(out)}


@contextmanager
def checkout(name: str) -> Iterator[Path]:
    """The folder `name`, or a temporary worktree of the git revision of that name."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), name], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def main() -> int:
    """Run both sides and compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", help="checkout or git revision to compare with")
    parser.add_argument("new", help="checkout or git revision under test")
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, help="run these scenarios alone; most need `demo` before them")
    parser.add_argument("--keep", type=Path, help="folder that keeps what both sides wrote, in base/ and new/, for a closer look")
    args = parser.parse_args()
    names = [name for name in SCENARIOS if not args.only or name in args.only]
    with ExitStack() as stack:
        out = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = {side: stack.enter_context(checkout(revision)) for side, revision in (("base", args.base), ("new", args.new))}
        codes, written = {}, {}
        for side, root in sides.items():
            print(f"{side}: {root}", flush=True)
            codes[side] = run_scenarios(root, out / side, names)
            written[side] = digests(out / side)
    files = written["base"].keys() | written["new"].keys()
    differ = sorted(name for name in files if written["base"].get(name) != written["new"].get(name))
    print("\n".join(f"differs: {name}" for name in differ))
    same = "the same" if not differ else f"{len(differ)} differ"
    ended = "equal" if codes["base"] == codes["new"] else f"{codes['base']} and {codes['new']}"
    print(f"same_numbers: {len(names)} scenarios, {len(files)} files, {same}; exit codes {ended}")
    return int(bool(differ) or codes["base"] != codes["new"])


if __name__ == "__main__":
    sys.exit(main())
