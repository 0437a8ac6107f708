"""The best evaluation of a run so far (`train.best`), and the end of a run that no longer gets better (`train.patience`)."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from srpo.core.config.train import Config, TrainConfig
from srpo.core.errors import UserError
from srpo.core.metrics import SCORES, filled
from srpo.data.examples import Example
from srpo.scores.tally import reference


@dataclass(frozen=True)
class Best:
    """The evaluation with the largest value of a metric; of equal values the earliest. A checkpoint stores it."""

    metric: str
    step: int  # optimizer step after which the policy was evaluated
    value: float
    num_stalled: int = 0  # number of evaluations since then

    def metrics(self) -> dict[str, float]:
        """The `best/*` metrics."""
        return {"best/step": self.step, "best/value": self.value, "best/num_stalled": self.num_stalled}

    def ends(self, cfg: TrainConfig) -> bool:
        """Whether the run ends here."""
        return 0 < cfg.patience <= self.num_stalled


def evaluated(best: Best | None, metric: str, step: int, value: float) -> Best:
    """The best evaluation after one more."""
    if best is None or value > best.value:
        return Best(metric, step, value)
    return replace(best, num_stalled=best.num_stalled + 1)


def best_of(rows: Iterable[Mapping[str, float]], metric: str, steps: Collection[int]) -> Best | None:
    """The best evaluation in lines of metrics.jsonl after one of `steps`, whose checkpoints are there: for a run whose
    `train.best` is new. None if there is none."""
    values = {int(row["step"]): row[metric] for row in rows if metric in row}
    step = max((step for step in values if step in steps), key=lambda step: values[step], default=None)
    return None if step is None else Best(metric, step, values[step], sum(other > step for other in values))


def check_best(cfg: Config) -> None:
    """Raise UserError, with the fix, for a `train.best` that is no score, or that never has a value, and for `train.patience`
    without it."""
    name, patience = cfg.train.best, cfg.train.patience
    if not name:
        if patience:
            raise UserError(
                f"train.patience is {patience} and train.best is not set: name the score that has to rise, such as "
                "'eval/macro_f1', or set train.patience to 0"
            )
        return
    known = [key for score in SCORES for key in filled(score, cfg.schema.names, len(cfg.grades.names))]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise UserError(f"train.best is {name!r}, which is no score of an evaluation{hint}: take one of {', '.join(known)}")
    if not (cfg.data.eval or cfg.data.eval_frac):
        raise UserError(
            f"train.best is {name!r}, and neither data.eval nor data.eval_frac is set: name a file of held-out pairs or a share "
            "of the queries, or remove train.best"
        )
    if patience and not cfg.train.eval_every:
        raise UserError(
            f"train.patience is {patience} and train.eval_every 0, so that only the last step is evaluated: set train.eval_every "
            "to the number of optimizer steps between evaluations, or train.patience to 0"
        )


def check_best_has_values(cfg: Config, examples: Sequence[Example]) -> None:
    """Raise UserError if `train.best` is the accuracy of a reasoning step to which no evaluated example has a right answer."""
    for j, spec in enumerate(cfg.schema.specs):
        if cfg.train.best == f"eval/step_accuracy/{spec.name}" and all(reference(example, j) is None for example in examples):
            raise UserError(
                f"train.best is {cfg.train.best!r}, but no evaluated example has a right answer to that step: "
                "name another score, or add labels"
            )
