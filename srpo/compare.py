"""Comparison of two systems, with intervals: `python -m srpo.compare --a X --b Y --data FILE`.

On graded pairs: the difference of every score of 5.1.2 with a paired bootstrap interval over queries, and McNemar's exact test of
the verdicts. On ranked lists (`--pages.file`): GSB side by side, query goodrate and item goodrate, as in Table 7. Prints tables
and writes `comparison.json`.
"""

from __future__ import annotations

from srpo.core.config.evaluation import BootstrapConfig, CompareConfig
from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.settings import check_command_line, check_one_process, run_program

if __name__ == "__main__":
    check_command_line(CompareConfig)  # -h and mistakes answer before torch is imported

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo.core.files import write_whole
from srpo.core.jsonl import json_file
from srpo.core.run_dir import run_settings
from srpo.core.steps import StepSchema
from srpo.core.tables import percent, text_table
from srpo.data.examples import Example
from srpo.data.readers import load_examples
from srpo.scores.evaluation import Results, check_tags, consistency_rows, results_dict, score_rows
from srpo.scores.pages import Pages, judged_examples, read_judgments, read_pages, read_verdicts, shown_grades
from srpo.scores.paired import compare_systems
from srpo.scores.responses import Responses, from_file, verdicts_alone
from srpo.scores.side_by_side import side_by_side
from srpo.scores.tally import true_grades


def main(config: CompareConfig) -> None:
    """Compare as configured, print the tables and write the results. Raises UserError for bad settings, before it writes."""
    check_one_process("srpo.compare", "it only counts, which ranks cannot share")
    pages = config.pages
    if bool(config.a) != bool(config.b) or not (config.a or pages.file):
        raise UserError("give two systems, --a X --b Y, or their ranked lists, --pages.file FILE, or both")
    if (pages.judgments or pages.verdicts) and not pages.file:
        raise UserError("pages.judgments or pages.verdicts is set without pages.file: give ranked lists with --pages.file FILE")
    if config.limit and not config.a:
        raise UserError(f"limit is {config.limit}, but only pairs are limited: give two systems, --a X --b Y, or no --limit")
    if config.a and not config.data:
        raise UserError("no data: give graded examples with --data FILE")
    if config.name_a == config.name_b:
        raise UserError(f"both systems are called {config.name_a!r}: set --name-a or --name-b")
    for name in (config.a, config.b, pages.file, pages.judgments, pages.verdicts):
        if name and not Path(name).exists():
            raise UserError(f"no such file or folder: {name}")
    source = Path(config.b or pages.file)
    out = Path(config.out) if config.out else (source if source.is_dir() else source.parent) / "comparison.json"
    if out.is_dir():
        raise UserError(f"out is {out}, which is a folder: name a file, such as {out / 'comparison.json'}")

    read = (config.a, config.b, config.data, config.config, pages.file, pages.judgments, pages.verdicts)
    sources = {Path(name).resolve() for name in read if name}
    if out.resolve() in sources or (out.suffix != ".json" and out.resolve().parent in sources):
        raise UserError(f"out is {out}, which is read and would be replaced: name another file")
    if out.exists() and not _is_comparison(out):
        raise UserError(f"out is {out}, which exists and is no result of srpo.compare: name another file")

    examples: list[Example] = []
    results: dict[str, Any] = {"names": {"a": config.name_a, "b": config.name_b}}
    tables: list[str] = []
    run = run_settings(source, config.config, say=bool(config.data))
    schema = run.schema
    if config.data:
        examples = load_examples(config.data, schema, columns=config.columns or run.data.columns)
        if config.a:
            compared_examples = examples[: config.limit or None]
            check_tags((example.tags for example in compared_examples), config.by)
            true_grades(compared_examples, schema.grades)
            a, b = (from_file(Path(file), examples, schema, config.limit) for file in (config.a, config.b))
            results["offline"], compared = offline(a, b, config)
            tables += [offline_table(results["offline"], config, compared), *parts_tables(results["offline"], config)]
    if pages.file:
        results["online"] = online(read_pages(Path(pages.file), config.name_a, config.name_b), examples, schema.grades, config)
        tables.append(online_table(results["online"], config))
    print("\n\n".join(tables))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(results, indent=2) + "\n")
    print(f"written to {out}")


def _is_comparison(path: Path) -> bool:
    try:
        return json_file(path).get("names", {}).keys() == {"a", "b"}
    except (UserError, AttributeError):
        return False


def offline(a: Responses, b: Responses, config: CompareConfig) -> tuple[dict[str, Any], StepSchema]:
    """(`compare_systems` of two systems, plus the results of each as `a` and `b`; the step schema of the comparison).

    If one system has only verdicts, both are compared by their verdicts alone. Prints this, and how many rollouts are left out.
    """
    for name, responses in ((config.name_a, a), (config.name_b, b)):
        if responses.num_others:
            print(f"{name}: left out {responses.num_others:,} rollouts of pairs that are not compared")
    if a.schema.num_steps != b.schema.num_steps:
        print("one system has only verdicts: the steps of the other are not compared")
        a, b = verdicts_alone(a), verdicts_alone(b)
    options = {"by": config.by, "bootstrap": config.bootstrap}
    single = {key: results_dict(r.rollouts, r.examples, r.schema, **options) for key, r in (("a", a), ("b", b))}
    return {**single, **compare_systems(a.rollouts, b.rollouts, a.examples, a.schema, **options)}, a.schema


def online(pages: Pages, examples: Sequence[Example], grades: Grades, config: CompareConfig) -> dict[str, Any]:
    """`side_by_side` of the pages, plus `num_unjudged`, the number of shown items without a class, which are left out."""
    settings = config.pages
    if pages.key == "item_ids" and not settings.judgments:
        raise UserError(f"{settings.file} lists item_ids: give their classes with --pages.judgments FILE")
    if pages.key == "example_ids" and (settings.judgments or not examples):
        raise UserError(
            f"{settings.file} lists example_ids: their classes are the grades of --data FILE: give it, and no pages.judgments"
        )
    if pages.num_others:
        print(f"{settings.file}: left out {pages.num_others:,} lists of other systems")
    judgments = read_judgments(Path(settings.judgments), grades) if settings.judgments else judged_examples(examples, grades)
    verdicts = read_verdicts(Path(settings.verdicts), list(pages.a)) if settings.verdicts else None
    grades_a, grades_b, num_unjudged = shown_grades(pages, judgments, settings.top_n, settings.unjudged)
    tags = tags_of_queries(pages, examples)
    check_tags(tags.values(), config.by)
    options = {"scale": grades, "by": config.by, "bootstrap": config.bootstrap}
    return {**side_by_side(pages, grades_a, grades_b, verdicts, settings, tags, **options), "num_unjudged": num_unjudged}


def tags_of_queries(pages: Pages, examples: Sequence[Example]) -> dict[str, dict[str, str]]:
    """query_id -> tags: those of its pages, and those that have one value in all examples of the query."""
    tags: dict[str, dict[str, str]] = {}
    for example in examples:
        known = tags.setdefault(example.query_id, dict(example.tags))
        tags[example.query_id] = {tag: value for tag, value in known.items() if example.tags.get(tag) == value}
    return {query_id: {**tags.get(query_id, {}), **pages.b[query_id].tags, **page.tags} for query_id, page in pages.a.items()}


def offline_table(results: Results, config: CompareConfig, schema: StepSchema) -> str:
    """Every score of A and B, the change in points with its interval, and the percentage of draws in which B is higher."""
    rows = []
    scores = [
        (name, values, change)
        for name, (*values, change) in score_rows(schema, results["a"], results["b"], results["difference"])
    ]
    shares = consistency_rows(results["a"], results["b"])
    changes = [change for _, (change,) in consistency_rows(results["difference"])] if shares else []
    scores += [(name, values, change) for (name, values), change in zip(shares, changes, strict=True)]
    for name, values, change in scores:
        rows.append((name, *map(percent, values), *_change(change)))
    num_verdict = len(schema.grades.names) + 3
    num_scores = num_verdict + schema.num_steps + 1
    test = results["mcnemar"]
    notes = [
        f"percent, {results['num_examples']:,} pairs of {results['num_queries']:,} queries; {_draws(config.bootstrap)}",
        f"verdicts: {test['num_only_a_right']:,} right by {config.name_a} alone, {test['num_only_b_right']:,} by {config.name_b} "
        f"alone; McNemar's exact test: p = {test['p_value']:.2g}",
    ]
    header = ("", config.name_a, config.name_b, "change", f"{config.name_b} higher")
    return text_table(header, [rows[:num_verdict], rows[num_verdict:num_scores], rows[num_scores:]], notes)


def parts_tables(results: Results, config: CompareConfig) -> list[str]:
    """One table per tag: the changes of macro F1, accuracy and Good F1 for each value of the tag."""
    tables = []
    for tag, parts in results["by"].items():
        rows = []
        for value, part in parts.items():
            changes = [_change(part["difference"][key]) for key in ("macro_f1", "accuracy", "good_f1")]
            rows.append((value, f"{part['num_examples']:,}", *(c for change in changes for c in change)))
        higher = f"{config.name_b} higher"
        header = (tag, "pairs", "Macro F1", higher, "Accuracy", higher, "Good F1", higher)
        tables.append(text_table(header, [rows], [f"change in points from {config.name_a} to {config.name_b}"]))
    return tables


def online_table(results: Results, config: CompareConfig) -> str:
    """GSB and goodrates of all queries and of each value of a tag, as in Table 7."""
    rows = [_online_row("all", results)]
    rows += [_online_row(value, part) for parts in results["by"].values() for value, part in parts.items()]
    header = ("", "queries", "GSB")
    for name in ("query goodrate", "item goodrate"):
        header += (f"{name} {config.name_a}", config.name_b, "change")
    shares = results["gsb"]
    counted = "no comparisons"
    if shares:
        parts = ", ".join(f"{percent(shares[name])} {name}" for name in ("good", "same", "bad"))
        counted = f"{shares['num_comparisons']:,} comparisons: {parts} ({results['verdicts_by']})"
    notes = [
        f"percent and points; {_draws(config.bootstrap)}",
        f"GSB: (good - bad) / comparisons of {config.name_b} against {config.name_a}; {counted}",
        f"query goodrate: pages rated good or mid ({results['ratings_by']}); item goodrate: items of a good grade",
    ]
    if results["num_short_pages"]:
        notes.append(f"{results['num_short_pages']:,} pages have fewer than {config.pages.top_n} items")
    if results["num_unjudged"]:
        notes.append(f"{results['num_unjudged']:,} shown items have no class and are left out")
    return text_table(header, [rows[:1], rows[1:]], notes)


def _online_row(name: str, part: Results) -> tuple[str, ...]:
    gsb = part["gsb"]
    cells = [percent(gsb["gsb"], gsb["interval"], signed=True) if gsb else "-"]
    for key in ("query_goodrate", "item_goodrate"):
        cells += [percent(part[key]["a"]), percent(part[key]["b"]), _change(part[key])[0]]
    return (name, f"{part['num_queries']:,}", *cells)


def _change(summary: Mapping[str, Any] | None) -> tuple[str, str]:
    """(difference with its interval, share of draws in which B is higher)."""
    if summary is None:
        return "-", "-"
    return percent(summary["difference"], summary["interval"], signed=True), percent(summary["b_higher_frac"])


def _draws(settings: BootstrapConfig) -> str:
    drawn = f"in brackets {100 * settings.level:g} % intervals, paired, from {settings.num_draws:,} draws of the queries"
    return drawn if settings.num_draws else "no draws, no intervals"


if __name__ == "__main__":
    run_program(main, CompareConfig)
