"""Writes docs/results.md from bench/results/reproduce/*.json: `python tools/results_page.py [RUN_DIR]`.

RUN_DIR is a folder of `srpo.reproduce`: its tables are first copied to bench/results/reproduce, and its plots to docs/.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from srpo.experiments.plots import LABELS
from srpo.reproduce import NAMES

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "bench" / "results" / "reproduce", ROOT / "docs"
HEAD = """# The paper's tables in miniature

Written by `tools/results_page.py` from `bench/results/reproduce/*.json`, which `python -m srpo.reproduce TABLE` makes on the
catalogue world. Every row starts from the same 2 M-parameter mixture-of-experts policy, warmed up on an imperfect teacher and
then by DPO. The paper's numbers come from a 42 B-parameter policy on Taobao's logs, so only the order of rows can be compared,
not their levels. "Ours" is the mean and the standard deviation over seeds, in percent. A pair of rows *agrees* or *opposes* if
its difference, seed by seed, exceeds twice its standard error; otherwise it is undecided.

Each result names the command and the commit that produced it.
"""
REMARKS = {
    "table2": """\
Here GRPO on mined hard cases changes no step by more than 1.2 points on any seed. On a further seed, which is in no table, it
did the same at this learning rate; three times this rate cost S4 4 points and the verdict 3 points, because gaps in the judge's
knowledge became a bias (`bench/LOG.md`). The paper's judge starts from a large model with knowledge of goods. This judge has
learned only from the 15,000 judged responses of the SFT stage, and reinforcement adds nothing to that.""",
    "table3": """\
SRPO as printed whitens advantages over the whole batch, while GRPO and "+ step reward" compare a response with its group. This
difference puts SRPO below "+ step reward" here: if each step is compared with its group, and nothing else changes, SRPO scores as
high, and with gamma 0.5 above every other row on every seed (`advantage.normalize = "group_step"`, `advantage.gamma = 0.5`).""",
    "table5": """\
The last two rows show why the curriculum fails here: half as many steps on the harder half alone do about as well as a whole
run on it, and doubling the steps of the curriculum helps little. The world's easier half has almost no pairs with related
categories. Training on it removes the answer "related" from S3, and responses of the harder stage hardly sample it any more
(`bench/LOG.md`).""",
    "table9": """\
The means are in the paper's order; no difference exceeds its spread. The two models, which judge S1 and S2 here, err about
equally often (13 to 21 % and 12 to 15 % of held-out steps). Still, S1 of the policies is right more often than under GRPO on
every seed: by 0.7 to 8.0 points with the generative model, by 3.9 to 7.7 points with the scalar model.""",
}


def table_section(result: dict[str, Any]) -> list[str]:
    """Lines of a table: the paper's numbers next to ours, and the order of the rows."""
    columns = list(result["rows"][0]["ours"])
    lines = [f"## {result['title']}", ""]
    header = [cell for column in columns for cell in (f"{column}, paper", "ours")]
    lines += ["| | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for row in result["rows"]:
        cells = []
        for column in columns:
            ours = row["ours"][column]
            cells += ["-" if row["paper"] is None else f"{row['paper'][column]:.2f}", f"{ours['mean']:.1f} +- {ours['std']:.1f}"]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    order = result["order"]
    lines += [
        "",
        f"Pairs of rows by {order['column']}: {order['agree']} agree, {order['oppose']} oppose, {order['undecided']} undecided.",
    ]
    opposed = [f"{p['second']} against {p['first']} ({p['ours']:+.1f})" for p in order["pairs"] if p["verdict"] == "oppose"]
    lines += [f"Reversed compared with the paper: {'; '.join(opposed)}."] if opposed else []
    lines += [result["note"][:1].upper() + result["note"][1:] + "."] if result["note"] else []
    return lines


def headline_section(result: dict[str, Any]) -> list[str]:
    """Lines on the curves of SRPO and GRPO, and on the scores of the last policies on the whole test set."""
    pairs, whole = result["scale"]["eval_examples"], result["scale"]["num_eval"]
    lines = [
        "## SRPO against GRPO at equal samples",
        "",
        f"Macro F1 on {pairs} held-out pairs during training (the end of a curve is the mean of its last three points), and of "
        f"the final policies on all {whole:,}. *To reach it*: the share of GRPO's responses after which a curve reaches GRPO's "
        "end.",
        "",
    ]
    names = list(result["rivals"])
    header = ["seed", "GRPO ends at", *(f"{LABELS[name]}, to reach it" for name in names), "GRPO, all pairs"]
    header += [f"{LABELS[name]}, all pairs" for name in names]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for i, (seed, theirs) in enumerate(zip(result["seeds"], result["per_seed"], strict=True)):
        ours = [result["rivals"][name]["per_seed"][i] for name in names]
        shares = ["never" if of["share"] is None else f"{100 * of['share']:.0f} %" for of in ours]
        cells = [
            str(seed),
            f"{100 * theirs['end']:.1f}",
            *(f"{100 * of['end']:.1f}, {s}" for of, s in zip(ours, shares, strict=True)),
        ]
        cells += [f"{100 * theirs['test']:.1f}", *(f"{100 * of['test']:.1f}" for of in ours)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name in names:
        gap, margin = 100 * result["rivals"][name]["test_gap_mean"], 100 * result["rivals"][name]["margin"]
        verdict = "undecided" if abs(gap) <= margin else "beyond it"
        lines.append(
            f"- {LABELS[name]}: {gap:+.1f} points over GRPO on all pairs, twice its standard error {margin:.1f}: {verdict}."
        )
    return lines


def main() -> None:
    """Copy the results of a run folder, if one is given, then write the page."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in NAMES if len(sys.argv) > 1 else ():
        folder = Path(sys.argv[1])
        if (folder / f"{name}.json").is_file():
            shutil.copy(folder / f"{name}.json", RESULTS)
            shutil.copy(folder / f"{name}.png", DOCS / f"reproduce_{name}.png")
    page = [HEAD]
    for name in ("headline", *NAMES[:-1]):
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            page.append(f"`{name}` has not been run.\n")
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        lines = headline_section(result) if name == "headline" else table_section(result)
        lines += ["", REMARKS[name]] if name in REMARKS else []
        if (DOCS / f"reproduce_{name}.png").is_file():
            lines += ["", f"![{result.get('title', 'Curves')}](reproduce_{name}.png)"]
        seeds = ", ".join(map(str, result["seeds"]))
        lines += ["", f"`{result['command']}`, seeds {seeds}, commit `{(result['commit'] or 'unknown')[:12]}`.", ""]
        page.append("\n".join(lines))
    (DOCS / "results.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
