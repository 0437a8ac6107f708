"""Baselines without a language model: their scores, their features, and the published numbers on judged pairs."""

from __future__ import annotations

import math
import os
import random
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score, f1_score

from srpo.core.errors import MissingPackage, UserError
from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.data.readers import load_examples, split_by_query
from srpo.scores import baselines
from srpo.scores.baselines import KINDS, class_scores, judge, overlap_features, rarity
from srpo.scores.tally import verdict_scores

GRADES = ("L1", "L2", "L3", "L4")
SHARED = Path(os.environ.get("SRPO_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
COLORS, THINGS = ("red", "blue", "green", "black"), ("shoes", "cable", "lamp", "phone", "table")


def pair(query: str, title: str, verdict: str | None = None, **fields: str) -> Example:
    return Example(f"{query}|{title}", query, query, title, fields, gold=(None, verdict))


def made_up(num: int, classes: tuple[str, ...]) -> list[Example]:
    """Pairs whose verdict is the number of words of the query that are in the title, as far as there are classes."""
    pairs = []
    for i in range(num):
        query, title = ([random.choice(COLORS), random.choice(THINGS), str(random.randrange(3))] for _ in range(2))
        shared = sum(a == b for a, b in zip(query, title, strict=True))
        pairs.append(pair(" ".join(query), f"{' '.join(title)} no{i}", classes[min(shared, len(classes) - 1)]))
    return pairs


@pytest.mark.parametrize("classes", [("no", "yes"), ("Bad", "Fair", "Good"), GRADES])
def test_words_that_decide_are_found(classes: tuple[str, ...]) -> None:
    train, unseen = made_up(400, classes), made_up(200, classes)
    scores = {}
    for kind in KINDS:
        judged = judge(kind, train, unseen, classes)
        assert judged.probs.shape == (200, len(classes)) and np.allclose(judged.probs.sum(1), 1)
        assert judged.verdicts == [classes[i] for i in judged.probs.argmax(1)]
        scores[kind] = class_scores(unseen, judged.verdicts, classes)
    assert len({tuple(row) for row in judge("majority", train, unseen, classes).probs.tolist()}) == 1
    assert scores["overlap"]["accuracy"] > scores["majority"]["accuracy"] + 0.1
    assert scores["overlap"]["macro_f1"] > scores["words"]["macro_f1"] > 0


def test_class_weights_help_the_rare_class() -> None:
    pairs = [pair("red shoes", f"blue shoes {i}", "rare" if random.random() < 0.1 else "common") for i in range(300)]
    assert set(judge("overlap", pairs, pairs, ("rare", "common")).verdicts) == {"common"}
    # The features say nothing: with class weights both classes are as likely.
    assert judge("overlap", pairs, pairs, ("rare", "common"), balanced=True).probs == pytest.approx(0.5, abs=0.02)


def test_a_class_that_is_not_in_training_has_no_probability() -> None:
    train = [pair("red shoes", "red shoes", "L4"), pair("red shoes", "lamp", "L1"), pair("lamp", "red lamp", "L4")]
    probs = judge("words+overlap", train, train, GRADES).probs
    assert not probs[:, 1:3].any() and probs[:, [0, 3]].min() > 0
    one = [pair("lamp", "lamp", "L3")] * 4
    assert judge("overlap", one, train, GRADES).verdicts == ["L3"] * 3


@pytest.mark.parametrize("classes", [GRADES, ("a", "b")])
def test_scores_are_those_of_scikit_learn_and_of_results(classes: tuple[str, ...]) -> None:
    true = [random.choice(classes) for _ in range(60)]
    said: list[Any] = [random.choice([*classes, None, "other"]) for _ in true]
    scores, zero = class_scores([pair("q", "t", verdict) for verdict in true], said, classes), cast(Any, 0)
    known = [verdict if verdict in classes else "none" for verdict in said]
    assert scores["accuracy"] == pytest.approx(accuracy_score(true, known))
    assert scores["macro_f1"] == pytest.approx(f1_score(true, known, labels=list(classes), average="macro", zero_division=zero))
    if classes == GRADES:
        want = verdict_scores(np.array(scores["confusion"]))
        assert all(np.allclose(want[name], scores[name]) for name in ("accuracy", "macro_f1", "class_f1"))


def test_features_of_one_pair() -> None:
    weights = rarity(["red running shoes nike", "blue shoes", "lamp"])
    features = overlap_features(pair("Nike shoes without laces", "Running shoe, red", brand="Nike", color="Red"), weights)
    assert len(features) == 16
    nike, shoes, rarest = weights["nike"], weights["shoes"], max(weights.values())
    total = nike + shoes + 2 * rarest
    want = [0.25, 0.5, shoes / total, (nike + shoes) / total, 0, 1, 1, 0, 1 / 30, 0.0625, (shoes / total) ** 2, 0, 0, 0]
    assert features == pytest.approx([*want, math.log(4), math.log(4)])
    assert all(map(math.isfinite, overlap_features(pair("", ""), weights)))


def test_rarity_is_that_of_scikit_learn() -> None:
    texts = [" ".join(random.choices(THINGS + COLORS, k=5)) for _ in range(20)]
    theirs = TfidfVectorizer().fit(texts)
    assert rarity(texts) == pytest.approx(dict(zip(theirs.get_feature_names_out(), theirs.idf_, strict=True)))


def test_what_cannot_be_fitted_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = made_up(20, GRADES)
    with pytest.raises(UserError, match="no pairs to fit"):
        judge("majority", [], pairs, GRADES)
    with pytest.raises(UserError, match=r"the verdict of example q\|t is None: set it to one of L1, L2, L3, L4"):
        judge("majority", [pair("q", "t")], pairs, GRADES)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingPackage, match=r"pip install 'scikit-learn>=1\.5'"):
        judge("overlap", pairs, pairs, GRADES)
    assert judge("majority", pairs, pairs, GRADES).verdicts


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("esci_us", {"majority": (55.6, 17.9), "overlap": (55.4, 30.1), "words+overlap": (56.6, 31.7)}),
        ("chorus_icecat", {"majority": (49.9, 16.7), "overlap": (77.0, 41.8), "words+overlap": (76.2, 47.9)}),
    ],
)
def test_numbers_on_judged_pairs(name: str, published: dict[Any, tuple[float, float]]) -> None:
    """A solver's last digits may move a few of the 800 held-out pairs."""
    path = SHARED / name / "pairs.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"needs the judged pairs {name}")
    train, held_out = split_by_query(load_examples(path, PAPER), 0.2, 0)
    for kind, (accuracy, macro_f1) in published.items():
        scores = class_scores(held_out, judge(kind, train, held_out, PAPER.grades.names).verdicts, GRADES)
        assert 100 * scores["accuracy"] == pytest.approx(accuracy, abs=0.6), kind
        assert 100 * scores["macro_f1"] == pytest.approx(macro_f1, abs=0.8), kind
    assert baselines.class_indices(held_out, GRADES) == [PAPER.grades.index(e.grade) for e in held_out]
