"""Verdicts without a language model, beside those of a judge: the most frequent class, and logistic regressions on words.

Fitted on graded pairs, they give each further pair a probability of every class. The words of query and item are weighted by
TF-IDF (scikit-learn), and 16 features say how the words of the query lie in the title and in the item.

Letters of shapes: N pairs, C classes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from srpo.core.errors import MissingPackage, UserError
from srpo.data.examples import Example
from srpo.scores.tally import verdict_scores

Kind = Literal["majority", "words", "overlap", "words+overlap"]
KINDS: tuple[Kind, ...] = ("majority", "words", "overlap", "words+overlap")
_STRENGTH = {"words": 3.0, "overlap": 1.0, "words+overlap": 1.0}  # inverse of the weight decay
_MAX_ITERATIONS = 400
_NEGATIONS = {"without", "not", "no"}
_FAR = 30  # words: as far from the start of a title as none of the query's words
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Judged:
    """Verdicts of a baseline."""

    verdicts: Sequence[str]
    probs: NDArray[np.float64]  # [N, C] in the order of the classes, for instance to rank pairs by


def judge(
    kind: Kind, train: Sequence[Example], pairs: Sequence[Example], classes: Sequence[str], *, balanced: bool = False
) -> Judged:
    """The baseline's verdicts on `pairs`, fitted on the verdicts (last gold label) of `train`.

    classes: all verdicts, in order. balanced: every class weighs the same in the fit, however frequent it is. Raises UserError
    without training pairs and for a label that is no class, MissingPackage without scikit-learn.
    """
    labels = np.array(class_indices(train, classes))
    if not len(labels):
        raise UserError("there are no pairs to fit a baseline on: give at least one graded pair")
    present = np.unique(labels)
    probs = np.zeros((len(pairs), len(classes)))
    if kind == "majority" or len(present) == 1:
        probs[:] = np.bincount(labels, minlength=len(classes)) / len(labels)
    else:
        regression = _sklearn("linear_model").LogisticRegression(
            C=_STRENGTH[kind], max_iter=_MAX_ITERATIONS, class_weight="balanced" if balanced else None
        )
        fitted, unseen = _features(kind, train, pairs)
        probs[:, present] = regression.fit(fitted, labels).predict_proba(unseen)
    return Judged([str(classes[index]) for index in probs.argmax(1)], probs)


def class_indices(examples: Sequence[Example], classes: Sequence[str]) -> list[int]:
    """Index of the verdict of each pair in `classes`. Raises UserError for a pair whose last gold label is none of them."""
    place = {name: index for index, name in enumerate(classes)}
    indices = []
    for example in examples:
        label = example.gold[-1] if example.gold else None
        if label not in place:
            raise UserError(f"the verdict of {example.shown} is {label!r}: set it to one of {', '.join(classes)}")
        indices.append(place[label])
    return indices


def class_scores(examples: Sequence[Example], verdicts: Sequence[str | None], classes: Sequence[str]) -> dict[str, Any]:
    """`accuracy`, `macro_f1`, `class_f1` [C], `num_examples` and `confusion` [C][C + 1], as `results_dict` has them for four
    classes: a verdict that is none of the classes (last column) is never right, and the F1 of an absent class is 0."""
    place = {name: index for index, name in enumerate(classes)}
    confusion = np.zeros((len(classes), len(classes) + 1), dtype=np.int64)
    for true, verdict in zip(class_indices(examples, classes), verdicts, strict=True):
        confusion[true, len(classes) if verdict is None else place.get(verdict, len(classes))] += 1
    scores = verdict_scores(confusion, good=(len(classes) - 1,))
    return {
        **{key: scores[key].tolist() for key in ("macro_f1", "accuracy", "class_f1")},
        "num_examples": len(examples),
        "confusion": confusion.tolist(),
    }


def _features(kind: Kind, train: Sequence[Example], pairs: Sequence[Example]) -> tuple[Any, Any]:
    """Features of the training pairs and of the others."""
    overlap = _overlap(train, pairs)
    if kind == "overlap":
        return overlap
    words = _words_of(train, pairs)
    if kind == "words":
        return words
    from scipy import sparse  # a requirement of scikit-learn

    fitted, unseen = (sparse.hstack([w, sparse.csr_matrix(o)]).tocsr() for w, o in zip(words, overlap, strict=True))
    return fitted, unseen


def _words_of(train: Sequence[Example], pairs: Sequence[Example]) -> tuple[Any, Any]:
    """TF-IDF of the query's words beside that of the item's words and pairs of words."""
    from scipy import sparse

    vectorizer = _sklearn("feature_extraction.text").TfidfVectorizer
    columns = []
    for text_of, longest in ((_query, 1), (_item, 2)):
        words = vectorizer(sublinear_tf=True, min_df=2 if len(train) > 1 else 1, ngram_range=(1, longest))
        columns.append((words.fit_transform(map(text_of, train)), words.transform(map(text_of, pairs))))
    fitted, unseen = (sparse.hstack(parts).tocsr() for parts in zip(*columns, strict=True))
    return fitted, unseen


def _overlap(train: Sequence[Example], pairs: Sequence[Example]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`overlap_features` of both, scaled by mean and deviation of the training pairs."""
    weights = rarity([_item(example) for example in train])
    fitted, unseen = (np.array([overlap_features(example, weights) for example in some]) for some in (train, pairs))
    mean, deviation = fitted.mean(0), fitted.std(0) + 1e-9
    return (fitted - mean) / deviation, (unseen.reshape(-1, fitted.shape[1]) - mean) / deviation


def rarity(texts: Sequence[str]) -> dict[str, float]:
    """Inverse document frequency of each word of the texts, smoothed as scikit-learn does."""
    counts = Counter(word for text in texts for word in set(words_in(text)))
    return {word: math.log((1 + len(texts)) / (1 + count)) + 1 for word, count in counts.items()}


def overlap_features(example: Example, weights: dict[str, float]) -> list[float]:
    """How the words of the query lie in title and item: 16 numbers. weights: `rarity`; an unknown word is as rare as any."""
    query = words_in(example.query)
    stems = [_stem(word) for word in query]
    title = [_stem(word) for word in words_in(example.title)]
    in_title, in_item = set(title), {_stem(word) for word in words_in(_item(example))}
    rarest = max(weights.values(), default=1.0)
    weight = [weights.get(word, rarest) for word in query]
    num, total = max(1, len(query)), sum(weight) or 1.0
    share_title = sum(stem in in_title for stem in stems) / num
    share_item = sum(stem in in_item for stem in stems) / num
    weight_title = sum(w for w, stem in zip(weight, stems, strict=True) if stem in in_title) / total
    weight_item = sum(w for w, stem in zip(weight, stems, strict=True) if stem in in_item) / total
    brand, color = (words_in(example.fields.get(name, "")) for name in ("brand", "color"))
    first = min((place for place, stem in enumerate(title) if stem in stems), default=_FAR)
    return [
        share_title,
        share_item,
        weight_title,
        weight_item,
        float(bool(stems) and stems[-1] in in_title),
        float(bool(_NEGATIONS & set(query))),
        float(bool(brand) and " ".join(brand) in " ".join(query)),
        float(bool(set(color) & set(query))),
        first / _FAR,
        share_title**2,
        weight_title**2,
        float(share_title == 1),
        float(share_item == 1),
        float(share_item == 0),
        math.log(num),
        math.log(1 + len(in_title)),
    ]


def words_in(text: str) -> list[str]:
    """Words and numbers of a text in lower case."""
    return _WORD.findall(text.lower())


def _stem(word: str) -> str:
    """The word without the s of a plural."""
    return word[:-1] if len(word) > 3 and word.endswith("s") else word


def _query(example: Example) -> str:
    return example.query


def _item(example: Example) -> str:
    return " ".join((example.title, *example.fields.values()))


def _sklearn(name: str) -> Any:
    try:
        from importlib import import_module

        return import_module(f"sklearn.{name}")
    except ModuleNotFoundError as error:
        raise MissingPackage("the word baselines need scikit-learn: pip install 'scikit-learn>=1.5'") from error
