"""Settings of `srpo.evaluate`, `srpo.compare` and `srpo.report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import Positional

from srpo.core.config.train import VllmConfig
from srpo.core.errors import UserError
from srpo.core.mappings import Texts
from srpo.core.ranges import Count, Fraction, NonNegative, OpenFraction, Seed, Size


@dataclass(frozen=True)
class BootstrapConfig:
    """How confidence intervals are drawn."""

    num_draws: Count = 2000  # resamples of the queries, with replacement; 0: no intervals
    level: OpenFraction = 0.95  # coverage: an interval goes from the (1 - level) / 2 to the (1 + level) / 2 quantile of the draws
    seed: Seed = 0  # seed of the draws


@dataclass(frozen=True)
class EvaluateConfig:
    """`python -m srpo.evaluate --checkpoint runs/demo/policy --data held_out.jsonl`"""

    checkpoint: str = ""  # folder of a Hugging Face checkpoint, whose responses are decoded greedily
    rollouts: str = ""  # instead of a checkpoint: a rollouts.jsonl to score
    # Instead of a checkpoint: JSON Lines of example_id, prediction (a grade or null) and, optionally, answers [J]
    predictions: str = ""
    data: str = ""  # graded examples (docs/data.md); empty: data.eval, or the part held out by data.eval_frac, of the run
    # Columns of the files of data, by the key that each fills; empty: data.columns of the run's settings
    columns: Texts = field(default_factory=dict)
    # TOML file with steps, grades, data.prompt and rollout.max_new_tokens; empty: config.toml of the checkpoint's run
    config: str = ""
    out: str = ""  # folder for the results; empty: `evaluation` next to the checkpoint or file
    limit: Count = 0  # number of examples to evaluate, from the start; 0: all
    batch_size: Size = 256  # examples that are decoded at once
    max_new_tokens: Count = 0  # longest response, in tokens; 0: rollout.max_new_tokens of the run's settings
    engine: Literal["local", "vllm"] = "local"  # what decodes the checkpoint: this process, or vLLM in its own process
    vllm: VllmConfig = field(default_factory=lambda: VllmConfig(gpu_memory_frac=0.85))
    ranking: bool = True  # with a checkpoint: also rank the items of each query by the probabilities of the grades
    by: tuple[str, ...] = ("query_type",)  # tags of the examples: repeat all scores for each value of each tag
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)


@dataclass(frozen=True)
class PagesConfig:
    """Ranked lists of two systems and how they are compared (5.1.2, Table 7). Raises UserError for bounds that do not fall."""

    file: str = ""  # JSON Lines of system, query_id and item_ids (or example_ids of data), best first; optionally rating and tags
    judgments: str = ""  # JSON Lines of query_id, item_id and grade; not needed for lists of example_ids
    # JSON Lines of query_id and verdict (good, same, bad: B against A), optionally assessor; empty: compare mean classes
    verdicts: str = ""
    top_n: Size = 10  # number of items of a list that count, from its top
    unjudged: Literal["refuse", "leave_out"] = "refuse"  # a listed item without a grade: an error, or counted and left out
    # For pages without a rating: least share of items of a good grade on a good, a mid and a poor page
    rating_bounds: tuple[Fraction, Fraction, Fraction] = (0.8, 0.6, 0.3)
    verdict_margin: NonNegative = 0.0  # without verdicts: a page wins if its mean class is higher by more than this

    def __post_init__(self) -> None:
        if not self.rating_bounds[0] >= self.rating_bounds[1] >= self.rating_bounds[2]:
            raise UserError(f"pages.rating_bounds is {self.rating_bounds}: give three falling shares from 1 to 0")


@dataclass(frozen=True)
class CompareConfig:
    """`python -m srpo.compare --a runs/sft/evaluation --b runs/demo/evaluation --data held_out.jsonl`"""

    a: str = ""  # the baseline: a rollouts.jsonl, predictions (JSON Lines), or the folder of an evaluation
    b: str = ""  # the system under test, in the same formats
    data: str = ""  # graded examples (docs/data.md); each needs exactly one response of each system
    # Columns of the files of data, by the key that each fills; empty: data.columns of the run's settings
    columns: Texts = field(default_factory=dict)
    name_a: str = "A"  # name of the baseline in tables and in pages.file
    name_b: str = "B"  # name of the system under test in tables and in pages.file
    config: str = ""  # TOML file with steps and grades; empty: config.toml of the run that b lies in
    limit: Count = 0  # number of examples to evaluate, from the start; 0: all
    out: str = ""  # file for the results; empty: comparison.json next to b, or next to pages.file
    by: tuple[str, ...] = ("query_type",)  # tags of examples and queries: repeat the comparison for each value of each tag
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    pages: PagesConfig = field(default_factory=PagesConfig)


@dataclass(frozen=True)
class ReportConfig:
    """`python -m srpo.report runs/demo`"""

    run_dir: Positional[str] = ""  # run folder of srpo.train or srpo.start, with or without results.json
