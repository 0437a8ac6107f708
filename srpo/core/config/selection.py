"""Settings of `srpo.select` (4.1, 5.5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from srpo.core.config.train import Config
from srpo.core.errors import UserError
from srpo.core.ranges import Count, Finite, Fraction, NonNegative, Size


@dataclass(frozen=True)
class Criteria:
    """Which examples are kept. Raises UserError for settings that contradict each other."""

    difficulty_low: Finite = 0.01  # an example is kept if its solve rate lies strictly above this bound (5.1.5); -1: no bound ...
    difficulty_high: Finite = 0.90  # ... and strictly below this one; 2: no bound
    difficulty_score: Literal["total", "final"] = "total"  # solve rate: mean of total reward / maximum, or of verdict accuracy
    # Drop examples whose responses all have the same step rewards, or all right or all wrong verdicts; keep: drop neither
    uniform: Literal["reward", "verdict", "keep"] = "reward"
    # Order of preference if not all can be kept. best: the judge found most steps right; uncertain: about half of them;
    # disagree: verdict and earlier steps contradict each other most often; none: random
    score: Literal["none", "best", "uncertain", "disagree"] = "none"
    num_examples: Count = 0  # number of examples to keep; 0: as many as possible
    keep_frac: Fraction = 0.0  # instead of num_examples: share of the examples that rejection sampling leaves (Table 8: 0.5)
    balance: tuple[str, ...] = ()  # tags (query_type, grade, ...): keep equally many examples of each combination of their values
    # Share of num_examples for each stratum named here ("negation", with two tags "negation/L4"); other strata get none. Without
    # num_examples the number itself. Empty: equal shares
    quotas: dict[str, NonNegative] = field(default_factory=dict)
    short: Literal["error", "take_all"] = "error"  # a stratum with too few examples: stop, or take all it has and report that

    def __post_init__(self) -> None:
        if not self.difficulty_low < self.difficulty_high:
            raise UserError(
                f"no solve rate lies between {self.difficulty_low} and {self.difficulty_high}: set select.difficulty_low below "
                "select.difficulty_high"
            )
        if self.num_examples and self.keep_frac:
            raise UserError("select.num_examples and select.keep_frac both set how many examples are kept: set only one of them")
        if len(set(self.balance)) < len(self.balance):
            raise UserError(f"select.balance is {', '.join(self.balance)}: name each tag once")
        if self.quotas and not self.balance:
            raise UserError('select.quotas needs the tags of its strata: set them, as in select.balance = ["query_type"]')
        numbers = self.quotas.values()
        if numbers and not any(numbers):
            raise UserError(f"select.quotas is {self.quotas}: give numbers of 0 or more, not all 0")
        counted = not self.num_examples and not self.keep_frac
        if counted and any(q % 1 for q in numbers):
            raise UserError(
                "select.quotas has fractions, which are shares of a total: set select.num_examples or select.keep_frac, too"
            )


@dataclass(frozen=True)
class SelectConfig(Config):
    """`python -m srpo.select @ configs/x.toml --select.num-examples 20000`: the settings of the training run, and these."""

    records_dir: str = ""  # folder for the records of what was sampled; empty: run_dir/select
    shard_examples: Size = 256  # examples per engine call and per file of records; a killed process loses at most one shard
    out: str = ""  # folder for the selected examples and selection.json; empty: `selected` in records_dir
    format: Literal["parquet", "jsonl", "jsonl.gz"] = "parquet"  # file format of the selected examples
    select: Criteria = field(default_factory=Criteria)
