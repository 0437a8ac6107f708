"""How well the evidence in silver responses predicts the grade of pairs of other queries: `python bench/silver.py DATA...`.

Two small classifiers get exactly what S3 and S4 of `srpo.data.silver` show (labels alone, or with marks, counts and checks), or
16 features of word overlap, which read the whole listing and the frequency of each word. All are trained on the training queries
of a split and scored on the held-out ones. DATA: judged pairs (docs/data.md). Figures are means over the splits.
"""

from __future__ import annotations

import argparse
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.data.readers import load_examples, split_by_query
from srpo.data.silver import Lexicon, silver_gold, silver_response

KINDS, OUTCOMES = ("brand", "color", "material", "for", "feature"), ("ok", "conflict", "unknown")
Features = Callable[[Example], list[float]]
MODELS = {
    "LR": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=400)),
    "tree": lambda: DecisionTreeClassifier(max_depth=5, min_samples_leaf=20, random_state=0),
}


def share(num: int, total: int) -> list[float]:
    """A count as the features of a linear model."""
    total = max(total, 1)
    return [num / total, (num / total) ** 2, float(num == total), float(num == 0)]


def labels_of(example: Example, lexicon: Lexicon) -> list[float]:
    """The labels of S3 and S4."""
    gold = silver_gold(example, lexicon, PAPER)
    return [float(gold[j] == option) for j in (2, 3) for option in PAPER.options[j][1:]]


def evidence_of(example: Example, lexicon: Lexicon) -> list[float]:
    """Everything that S3 and S4 show but the words themselves, read from the text of the response."""
    lines = silver_response(example, lexicon, PAPER).splitlines()
    marks = Counter(re.findall(r" (title|fields|no)(?=[,;])", lines[2]))
    checks = re.findall(r"(\w+) (ok|conflict|unknown)", lines[3])
    found, total = marks["title"] + marks["fields"], marks.total()
    return [
        *share(marks["title"], total),
        *share(found, total),
        math.log(max(total, 1)),
        *(float((kind, outcome) in checks) for kind in KINDS for outcome in OUTCOMES),
        *labels_of(example, lexicon),
    ]


def overlap(train: Sequence[Example]) -> Features:
    """16 features of the words that query and item share, weighted by their rarity in `train`."""

    def words(text: str) -> list[str]:
        return [w[:-1] if len(w) > 3 and w.endswith("s") else w for w in re.findall(r"[a-z0-9]+", text.lower())]

    def listing(example: Example) -> str:
        return f"{example.title} {' '.join(example.fields.values())}"

    num_items = Counter(word for e in train for word in set(words(listing(e))))
    rarity = {word: math.log((1 + len(train)) / (1 + n)) + 1 for word, n in num_items.items()}
    rarest = max(rarity.values())

    def features(example: Example) -> list[float]:
        query, title, item = words(example.query) or [""], words(example.title), set(words(listing(example)))
        weights = [rarity.get(word, rarest) for word in query]
        in_title, in_item = ([word in place for word in query] for place in (set(title), item))
        rare_title, rare_item = (float(np.dot(weights, found)) / sum(weights) for found in (in_title, in_item))
        brand, color = (words(example.fields.get(key, "")) for key in ("brand", "color"))
        first = next((i for i, word in enumerate(title) if word in query), 30) / 30
        t, f = float(np.mean(in_title)), float(np.mean(in_item))
        return [
            *(t, f, rare_title, rare_item, float(in_title[-1]), float(bool({"without", "not", "no"} & set(query)))),
            *(float(bool(brand) and " ".join(brand) in " ".join(query)), float(bool(set(color) & set(query))), first),
            *(t**2, rare_title**2, float(t == 1), float(f == 1), float(f == 0)),
            *(math.log(len(query)), math.log(1 + len(set(title)))),
        ]

    return features


def measure(examples: Sequence[Example], seed: int) -> dict[str, list[float]]:
    """Accuracy, macro F1 and AUC of the best grade on held-out queries, percent, by features and model."""
    train, test = split_by_query(examples, 0.2, seed)
    lexicon = Lexicon.from_examples(train)
    right, grades = [[e.grade for e in part] for part in (train, test)], PAPER.grades.names
    scores: dict[str, list[float]] = {}
    sets: dict[str, Features] = {
        "majority": lambda e: [0.0],
        "S3 and S4": lambda e: labels_of(e, lexicon),
        "S3 and S4 with evidence": lambda e: evidence_of(e, lexicon),
        "16 overlap features": overlap(train),
    }
    for name, features in sets.items():
        shown = [np.array([features(e) for e in part]) for part in (train, test)]
        for kind, new in MODELS.items():
            model = new().fit(shown[0], right[0])
            said, best = model.predict(shown[1]), model.predict_proba(shown[1])[:, list(model.classes_).index(grades[-1])]
            macro = f1_score(right[1], said, average="macro", labels=grades)
            auc = roc_auc_score([grade == grades[-1] for grade in right[1]], best)
            scores[f"{name}, {kind}"] = [100 * float(x) for x in (accuracy_score(right[1], said), macro, auc)]
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--splits", type=int, default=4)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="F-score is ill-defined")  # of a grade that is neither said nor right: 0
    for path in args.data:
        examples = load_examples(path, PAPER)
        lexicon = Lexicon.from_examples(examples)
        lengths = sorted(len(silver_response(e, lexicon, PAPER).split()) for e in examples)
        print(f"{path}: {len(lengths)} pairs, words of a response: mean {np.mean(lengths):.1f}, most {lengths[-1]}")
        runs = [measure(examples, seed) for seed in range(args.splits)]
        print(f"{'':32s}accuracy  macro F1  AUC of the best grade")
        for name in runs[0]:
            print(f"{name:32s}" + "".join(f"{x:8.1f}  " for x in np.mean([run[name] for run in runs], 0)))


if __name__ == "__main__":
    main()
