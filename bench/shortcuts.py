"""Macro F1 of lexical shortcuts on the catalogue world: `python bench/shortcuts.py [--json FILE]`.

Compares a bag-of-words logistic regression on the pair's text (words and word pairs within a field, words of query and item kept
apart) with the rule-based oracle, which reads the true contents of S1 and S2 and applies the rule table, on held-out queries. If
words alone came near the oracle, a judge would not need to reason.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline

from srpo.data.examples import Example
from srpo.data.world import Facts, World, reason


def words(example: Example) -> str:
    """The pair's text with the words of the query marked: "q_red" in the query and "red" in the item are different words."""
    query = " ".join(f"q_{word}" for word in example.query.split())
    return f"{query} | {example.title} {' '.join(example.fields.values())}"


def oracle(example: Example) -> str:
    """The verdict that follows from the true contents of S1 and S2."""
    query, item = (Facts.parse(text or "") for text in example.truth[:2])
    return reason(query, item)[2]


def measure(seed: int, num_train: int, num_test: int) -> dict[str, float]:
    """Macro F1 of the oracle and of each bag of words on one world."""
    world = World(seed)
    train, test = list(world.examples("train", num_train)), list(world.examples("wild", num_test))
    gold = [example.gold[-1] for example in test]
    scores = {"oracle": f1_score(gold, [oracle(e) for e in test], average="macro")}
    for name, ngrams in {"words": (1, 1), "words_and_pairs": (1, 2)}.items():
        vectors = CountVectorizer(token_pattern=r"\S+", ngram_range=ngrams, min_df=3, binary=True)
        model = make_pipeline(vectors, LogisticRegression(max_iter=300, C=0.3))
        model.fit([words(e) for e in train], [e.gold[-1] for e in train])
        scores[name] = f1_score(gold, model.predict([words(e) for e in test]), average="macro")
    return {name: round(float(score), 4) for name, score in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-train", type=int, default=20_000)
    parser.add_argument("--num-test", type=int, default=4_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs = {seed: measure(seed, args.num_train, args.num_test) for seed in args.seeds}
    for seed, scores in runs.items():
        print(f"seed {seed}: " + ", ".join(f"{name} {100 * score:.1f}" for name, score in scores.items()))
    best = max(max(s["words"], s["words_and_pairs"]) for s in runs.values())
    gap = min(s["oracle"] for s in runs.values()) - best
    print(f"the best bag of words stays {100 * gap:.1f} points of macro F1 below the oracle")
    if args.json:
        result = {
            "command": "python bench/shortcuts.py",
            "num_train": args.num_train,
            "num_test": args.num_test,
            "macro_f1": {str(seed): scores for seed, scores in runs.items()},
            "gap": round(gap, 4),
            "versions": {"python": platform.python_version(), "scikit-learn": version("scikit-learn")},
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
