"""Stage pytest: the committed tests that need a GPU, eight files at once. junit.xml goes to OUT, too."""

from __future__ import annotations

import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from gpu_proof import lab
from gpu_proof.parts import ROOT, Cut, Found, Wrong, figure, needs, small, state, time_for
from gpu_proof.processes import run_capped

LIMIT_S, TEST_LIMIT_S = 141, 60
_MARKED = re.compile(r"\bmark\.gpu\b")


def files() -> list[str]:
    """The test files that have a test for a GPU: they use the mark, or a helper that does. Read, because pytest itself takes many
    seconds to collect all tests."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    helpers = [path.stem for path, text in texts.items() if path.parent.name == "helpers" and _MARKED.search(text)]
    uses = re.compile(rf"^(?:from|import) (?:{'|'.join(helpers)})\b", re.MULTILINE) if helpers else _MARKED
    paths = [
        path for path, text in texts.items() if path.name.startswith("test_") and (_MARKED.search(text) or uses.search(text))
    ]
    return [str(path.relative_to(ROOT)) for path in sorted(paths, key=lambda path: path.stat().st_size)]


def outcome(junit: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """(number of tests by outcome, the failed ones with the end of what they say) from pytest's junit.xml."""
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        trouble = [child for child in case if child.tag in ("failure", "error")]
        word = "failed" if trouble else "skipped" if case.find("skipped") is not None else "passed"
        counts[word] += 1
        if trouble:
            test = f"{case.get('classname', '')}.{case.get('name', '')}"
            failed.append({"test": test, "message": (trouble[0].get("message") or "")[:300]})
    return counts, failed


def run_tests() -> Found:
    junit, log = state() / "junit.xml", state() / "pytest_output.txt"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-m", "gpu and not slow and not nightly"]
    command += ["--timeout", str(TEST_LIMIT_S), "--junitxml", str(junit), *([] if small() else ["-n", "8"])]
    command += files()[:1] if small() else files()  # in a dry run the shortest, whose tests skip
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    limit_s, shortened = time_for(LIMIT_S)
    end = run_capped(command, limit_s, log, env=env, folder=ROOT)
    output = log.read_text(encoding="utf-8", errors="replace")
    print(output, flush=True)
    if not junit.is_file():
        words = "did not end" if end.killed else f"ended with {end.code}"
        raise (Cut if end.killed and shortened else Wrong)(f"pytest {words} and left no result", output="\n" + output[-1500:])
    counts, failed = outcome(junit)
    found = {"figures": [figure(word, number, "tests") for word, number in counts.items()]}
    if failed or end.code or end.killed:
        words = "the tests were cut" if end.killed else f"{counts['failed']} tests failed, exit code {end.code}"
        raise Wrong(words, **found, failed_tests=failed[:20], output="\n" + output[-1500:])
    if not small() and not counts["passed"]:
        raise Wrong(f"all {counts['skipped']} tests were skipped", **found, output="\n" + output[-1500:])
    return found


def main() -> None:
    needs("pytest_timeout", "hypothesis", *(() if small() else ("xdist",)))
    lab.run({"pytest": run_tests})
