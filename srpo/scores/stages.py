"""Scores of a model before and after each stage of its training, beside those of systems without a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from srpo.core.config.evaluation import BootstrapConfig
from srpo.core.errors import MissingPackage
from srpo.core.grades import Grades
from srpo.core.tables import percent, text_table
from srpo.data.examples import Example
from srpo.scores.baselines import Judged, judge
from srpo.scores.evaluation import results_dict
from srpo.scores.ranking import ranking_scores
from srpo.scores.responses import from_predictions, verdict_only

NAMES = {"words": "regression on words", "before": "the model as it is", "sft": "after SFT", "after": "after SRPO"}


def words(pairs: Sequence[Example], held_out: Sequence[Example], grades: Grades) -> dict[str, Any] | None:
    """Results, with `ranking`, of a logistic regression on words, fitted on `pairs` with every grade weighing the same.

    None, after a line that says so, if scikit-learn is not installed.
    """
    try:
        judged = judge("words+overlap", pairs, held_out, grades.names, balanced=True)
    except MissingPackage as error:
        print(f"the report has no regression on words beside the model: {error}", flush=True)
        return None
    return scores_of_verdicts(judged, held_out, grades)


def scores_of_verdicts(judged: Judged, held_out: Sequence[Example], grades: Grades) -> dict[str, Any]:
    """Results, with `ranking`, of a baseline's verdicts on the held-out pairs."""
    answers = {example.example_id: (verdict,) for example, verdict in zip(held_out, judged.verdicts, strict=True)}
    said = from_predictions(answers, held_out, verdict_only(grades))
    results = results_dict(said.rollouts, said.examples, said.schema, by=(), bootstrap=BootstrapConfig())
    return results | {"ranking": ranking_scores(judged.probs.tolist(), held_out, grades)}


def stages_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy, macro F1 and ranking of always answering the most common grade, and of each of NAMES that is in `results`.

    All are results of the same pairs, with `confidence` and `ranking`; those of "after" must be there.
    """
    last = results["after"]
    majority, known = last["majority"], last["confidence"]
    rows = [(f"always {majority['grade']}", percent(majority["accuracy"]), percent(majority["macro_f1"]), "-", "50.0", "-")]
    for key, name in NAMES.items():
        if scores := results.get(key):
            accuracy, macro_f1 = (percent(scores[score], scores["confidence"][score]) for score in ("accuracy", "macro_f1"))
            ndcg, auc = (percent(scores["ranking"][score]) for score in ("ndcg_expected", "auc_best"))
            rows.append((name, accuracy, macro_f1, ndcg, auc, percent(scores["parse_rate"])))
    header = ("", "accuracy", "macro F1", "NDCG", "AUC of the best grade", "responses that parse")
    pairs = f"{last['num_examples']:,} held-out pairs of {known['num_queries']:,} queries"
    ranked = f"NDCG over the {last['ranking']['num_ranked_queries']:,} queries whose items have different grades"
    return text_table(header, [rows], [f"percent, {pairs}; in brackets 95 % intervals over queries; {ranked}"])
