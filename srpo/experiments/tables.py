"""The tables of the paper as data: rows, columns, printed numbers (percent), and the recipe of each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

CLASSES = ("class_1_f1", "class_2_f1", "class_3_f1", "class_4_f1")
SCORES = (*CLASSES, "good_f1", "accuracy", "macro_f1")
STEPS = ("step_1", "step_2", "step_3", "step_4")


@dataclass(frozen=True)
class Row:
    """One row; `paper` has a number per column of the table, or none for a row that is not in the paper."""

    name: str
    recipe: str  # a name in RECIPES; in Table 2 a stage of the judge's training
    paper: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """One table. test_set: wild (in-the-wild), balanced (by query type), or judge (held-out verdicts of annotators)."""

    title: str
    test_set: str
    columns: tuple[str, ...]  # the last one orders the rows
    rows: tuple[Row, ...]
    note: str = ""  # how the miniature differs from the paper


_MACRO = ("macro_f1",)

TABLES: Mapping[str, Table] = MappingProxyType(
    {
        "table1": Table(
            "Table 1: baselines and the whole method",
            "wild",
            SCORES,
            (
                Row("SFT", "sft", (43.15, 64.23, 43.83, 80.58, 84.31, 71.89, 57.95)),
                Row("DPO", "dpo", (44.59, 63.12, 46.03, 82.50, 86.32, 73.61, 59.06)),
                Row("GRPO", "grpo", (45.41, 62.95, 45.93, 82.72, 86.49, 73.83, 59.25)),
                Row("GRPO*", "grpo_star", (45.49, 63.56, 45.08, 82.76, 86.59, 73.95, 59.22)),
                Row("TaoSR-SHE", "srpo", (47.05, 64.48, 45.52, 82.83, 86.84, 74.15, 59.95)),
            ),
        ),
        "table2": Table(
            "Table 2: the generative step judge",
            "judge",
            STEPS,
            (
                Row("+SFT", "sft", (86.92, 86.21, 89.91, 83.60)),
                Row("+RL (GRPO)", "grpo", (89.84, 89.10, 90.22, 86.36)),
            ),
            "agreement with a simulated annotator who does not err; ordered by step 4",
        ),
        "table3": Table(
            "Table 3: step rewards",
            "wild",
            ("class_1_f1", "class_2_f1", "good_f1", "macro_f1"),
            (
                Row("GRPO (sequence-level reward)", "grpo", (45.41, 62.95, 86.49, 59.25)),
                Row("GRPO (stepwise reward)", "grpo_star", (45.49, 63.56, 86.59, 59.22)),
                Row("+ step reward (reward model only)", "step_reward_judged", (45.73, 63.82, 86.63, 59.25)),
                Row("+ SRPO (reward model only)", "srpo_judged", (46.60, 63.98, 86.68, 59.46)),
                Row("+ step reward (hybrid)", "step_reward", (46.40, 64.58, 86.47, 59.75)),
                Row("+ SRPO (hybrid)", "srpo", (47.05, 64.48, 86.84, 59.95)),
                Row("+ SRPO (hybrid), each step against its group", "srpo_group_step"),
                Row("+ SRPO (hybrid), each step against its group, gamma 0.5", "srpo_discounted"),
            ),
            "the last two rows are not the paper's; the reward model is a simulated annotator who errs in one verdict of ten",
        ),
        "table4": Table(
            "Table 4: diverse sampling",
            "balanced",
            _MACRO,
            (
                Row("Baseline", "dpo", (65.02,)),
                Row("GRPO w/o diverse sampling", "grpo", (65.64,)),
                Row("GRPO w diverse sampling", "grpo_diverse", (66.49,)),
            ),
        ),
        "table5": Table(
            "Table 5: easier, then harder",
            "balanced",
            _MACRO,
            (
                Row("Baseline", "dpo", (65.02,)),
                Row("1a: easier, label-balanced", "grpo_easier", (66.49,)),
                Row("1b: harder, label-balanced", "grpo_harder", (66.81,)),
                Row("1c: full, label-balanced", "grpo_labels", (66.52,)),
                Row("2: easier, then harder", "grpo_easier_harder", (67.12,)),
                Row("harder, half the steps", "grpo_harder_half_run"),
                Row("easier, then harder, twice the steps", "grpo_easier_harder_double"),
            ),
            "the paper's rows take as many optimizer steps, the last two are ours; harder pairs: what the world calls hard",
        ),
        "table6": Table(
            "Table 6: query types, then labels",
            "balanced",
            _MACRO,
            (
                Row("Baseline", "dpo", (60.01,)),
                Row("1a: diverse query types", "grpo_queries", (63.20,)),
                Row("1b: diverse labels", "grpo_labels", (65.84,)),
                Row("1c: full data", "grpo", (63.94,)),
                Row("2: query types, then labels", "grpo_queries_labels", (66.84,)),
            ),
            "all rows take as many optimizer steps",
        ),
        "table8": Table(
            "Table 8: data selected by the reward model",
            "balanced",
            _MACRO,
            (
                Row("GRPO w full data", "grpo", (65.64,)),
                Row("GRPO w RM-selected half", "grpo_selected", (65.54,)),
                Row("GRPO w random half", "grpo_random_half"),
            ),
            "half the data in half the optimizer steps; the random half is our control",
        ),
        "table9": Table(
            "Table 9: scalar and generative reward model",
            "wild",
            _MACRO,
            (
                Row("Vanilla GRPO", "grpo", (77.04,)),
                Row("+ Scalar Reward Model", "srpo_scalar", (77.31,)),
                Row("+ Generative Reward Model", "srpo_generative", (77.66,)),
            ),
            "hybrid step rewards under SRPO, S1 and S2 from a trained reward model",
        ),
    }
)
