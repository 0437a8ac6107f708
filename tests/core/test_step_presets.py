"""Step presets: what is written is read in every preset, form and scale; changes by name; what cannot work is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo.core.config.train import Config
from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.settings import dump_toml, load
from srpo.core.step_presets import PAPER, PAPER_STEPS, StepChange, StepsConfig
from srpo.core.steps import StepSchema


def one_line(text: str) -> str:
    return " ".join(text.replace("**", " ").split())


FREE = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=30)
# Names that contain one another, begin alike, or are numbers.
TRICKY = (
    "relevant", "not relevant", "irrelevant", "partly relevant", "non-relevant", "highly relevant", "not highly relevant", "not",
    "L1", "L10", "L2", "l-1", "1", "10", "1.5", "5", "15", "no", "no match", "match", "mismatch", "Verdict", "item: shoes", "a/b",
    "sehr gut", "gut", "\u00fcbel", "\u4e0d\u76f8\u5173", "\u76f8\u5173", "yes (sure) it is", "yes", "x.y", "x", "very very good",
    "very good",
)  # fmt: skip
NAMES = st.lists(
    st.sampled_from(TRICKY)
    | st.from_regex(r"[a-z][a-z 0-9'+/-]{0,8}[a-z0-9]", fullmatch=True).map(lambda t: " ".join(t.split())),
    min_size=2,
    max_size=10,
    unique_by=str.casefold,
).map(tuple)
JUNK = ('"', "\\", '\\"', "\\u", "\\ud800", "\\x", "{", "}", ",", ":", "\n", '"item":', "[1,", "null")
FORMS = st.sampled_from(["text", "json"])
OWN = {
    "colour": StepChange(),
    "fit": StepChange(options=("good fit", "no fit", "not a good fit at all")),
    "last_word": StepChange(sources=("gold",), reward=1.0),
}


def schema_of(preset: Any, form: Any, grades: Grades, sources: Literal["preset", "labels"] = "preset") -> StepSchema:
    return StepsConfig(preset, form, sources, OWN if preset == "own" else {}).schema(grades)


@given(st.data(), st.sampled_from(["paper", "verdict", "own"]), FORMS, NAMES, st.booleans())
def test_what_is_written_is_read(data: st.DataObject, preset: str, form: str, names: tuple[str, ...], paper: bool) -> None:
    grades = Grades() if paper else Grades(names)
    schema = schema_of(preset, form, grades, data.draw(st.sampled_from(["preset", "labels"])))
    assert schema.options[-1] == grades.names
    answers = [data.draw(st.sampled_from(options) if options else FREE.map(one_line).filter(bool)) for options in schema.options]
    if form == "text":  # colons and dashes are part of the header
        answers = [answer.lstrip(":=-\uff1a\u2010\u2011\u2012\u2013\u2014\u2015*_`]) ") or "x" for answer in answers]
    text = schema.write(answers)
    parsed = schema.parse_text(text)
    assert parsed.answers == tuple(answers) and all(parsed.found) and not parsed.problems, text


@given(st.data(), NAMES)
def test_a_verdict_is_read_within_a_sentence(data: st.DataObject, names: tuple[str, ...]) -> None:
    """The name on its own, in any case, with other words around; never the name that another one ends in."""
    grades = Grades(names)
    name = data.draw(st.sampled_from(names))
    text = f"5. Verdict: {data.draw(st.sampled_from(['so the pair is', 'I say:', '']))} {name.upper()}."
    assert schema_of("paper", "text", grades).parse_text(text).answers[-1] == name


def test_a_verdict_after_not_is_no_verdict() -> None:
    schema = schema_of("verdict", "text", Grades(("irrelevant", "relevant")))
    for text, verdict in {
        "Verdict: not relevant": None, "Verdict: non-relevant": None, "Verdict: irrelevant": "irrelevant",
        "Verdict: relevant": "relevant", "Verdict: relevance": None, "Verdict: not irrelevant, relevant": "relevant",
    }.items():  # fmt: skip
        assert schema.parse_text(text).answers == (verdict,), text


@given(st.data(), st.sampled_from(["paper", "verdict", "own"]))
def test_malformed_json_never_raises(data: st.DataObject, preset: str) -> None:
    schema = schema_of(preset, "json", Grades(("no", "not sure", "yes")))
    text = schema.write([data.draw(FREE) for _ in schema.names])
    for _ in range(data.draw(st.integers(1, 4))):
        at, width = data.draw(st.integers(0, len(text))), data.draw(st.sampled_from([0, 1, 5, 100]))
        junk = data.draw(
            st.sampled_from(['"', "\\", '\\"', "\\u", "\\ud800", "\\x", "{", "}", ",", ":", "\n", '"item":', "[1,", "null"])
            | FREE
        )
        text = text[:at] + junk + text[at + width :]
    parsed = schema.parse_text(text)
    assert parsed.char_ends[-1] == len(text) and len(parsed.answers) == schema.num_steps
    for answer, options in zip(parsed.answers, schema.options, strict=True):
        assert answer is None or ((answer in options) if options else bool(answer.encode("utf-8")))


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (r'"sneaker \"x\""', 'sneaker "x"'),
        (r'"two\nlines\tand  more"', "two lines and more"),
        (r'"back\\slash"', r"back\slash"),
        (r'"\u00e4 \ud83d\ude00"', "\u00e4 \U0001f600"),
        (r'"half \ud83d"', "half ?"),  # half of a surrogate pair could not be written to a file
        ('"a raw\nline"', "a raw line"),
        (r'"no \x escape"', r"no \x escape"),  # no JSON: as it stands
        (r'"short \u12"', r"short \u12"),
        (r'"the key \"item\": is text"', 'the key "item": is text'),
        ('""', None),
        ('" \\n "', None),
        ("5", None),
        ("null", None),
        ('["a"]', None),
        ('"cut off', None),
    ],
)
def test_free_text_in_json_comes_back_unescaped(value: str, answer: str | None) -> None:
    parsed = schema_of("paper", "json", Grades()).parse_text(f'{{"query_intent": {value}, "item": "boots"}}')
    assert parsed.answers[:2] == (answer, None if value.startswith('"cut') and answer else "boots")


def test_the_value_of_a_step_is_its_string_alone() -> None:
    schema = schema_of("verdict", "json", Grades())
    assert schema.parse_text('{"verdict": "L3", "why": "not L1"}').answers == ("L3",)
    assert schema.parse_text('```json\n{"VERDICT" : "so l3"}\n```').answers == ("L3",)
    assert schema_of("verdict", "json", Grades(("1", "2", "3"))).parse_text('{"verdict": 3}').answers == ("3",)
    odd = Grades(('"'.join("ab").replace('"', "'"), "c/d"))
    assert schema_of("verdict", "json", odd).parse_text('{"verdict": "c\\/d"}').answers == ("c/d",)  # an escape that JSON allows


def test_the_default_is_the_papers_schema() -> None:
    assert Config().schema.specs == PAPER_STEPS == PAPER.specs and Config().schema.grades == Grades()
    verdict = StepsConfig("verdict").schema(Grades())
    assert verdict.specs == PAPER_STEPS[-1:] and verdict.max_reward == 1.0
    labels = StepsConfig(sources="labels").schema(Grades())
    assert labels.specs == tuple(replace(spec, sources=("gold", "skip")) for spec in PAPER_STEPS)
    mixed = {"item": StepChange(sources=("judge",)), "colour": StepChange(), "fit": StepChange(sources=("judge",))}
    sources = {spec.name: spec.sources for spec in StepsConfig(sources="labels", named=mixed).schema(Grades()).specs}
    assert (sources["item"], sources["colour"], sources["fit"]) == (("judge",), ("gold", "skip"), ("judge",))
    other = StepsConfig().schema(Grades(("no", "yes")))
    assert other.specs[:-1] == PAPER_STEPS[:-1] and other.options[-1] == ("no", "yes")


def load_text(folder: Path, *texts: str, flags: tuple[str, ...] = ()) -> Config:
    argv = []
    for i, text in enumerate(texts):
        (folder / f"{i}.toml").write_text(text, encoding="utf-8")
        argv += ["@", str(folder / f"{i}.toml")]
    return load(Config, [*argv, *flags])


def test_tables_change_single_steps_and_add_steps_before_the_verdict(tmp_path: Path) -> None:
    cfg = load_text(
        tmp_path,
        '[steps.item]\nreward = 0.5\nsources = ["skip"]\n[steps.colour]\n[steps.verdict]\nmissing_verdict = 0.25\n',
        "[steps.item]\nreward = 0\n[steps.colour]\nreward = 0.1",
    )
    specs = dict(zip(cfg.schema.names, cfg.schema.specs, strict=True))
    assert list(specs) == ["query_intent", "item", "category_match", "attribute_match", "colour", "verdict"]
    assert specs["item"] == replace(PAPER_STEPS[1], reward=0.0, sources=("skip",))  # the second file keeps what it does not name
    assert specs["verdict"] == replace(PAPER_STEPS[-1], missing_verdict=0.25)
    assert (specs["colour"].sources, specs["colour"].options, specs["colour"].reward) == (("judge",), (), 0.1)
    assert cfg.schema.parse_text("3) Colour: red").answers[4] == "red"
    assert specs["query_intent"] == PAPER_STEPS[0]


@pytest.mark.parametrize("form", ["text", "json"])
def test_other_options_of_a_step_are_read_by_the_options(form: Any) -> None:
    steps = StepsConfig(form=form, named={"category_match": StepChange(options=("same", "not the same"))})
    answers = ("a", "b", "not the same", "match", "L2")
    schema = steps.schema(Grades())
    assert schema.parse_text(schema.write(answers)).answers == answers
    free = StepsConfig(form=form, named={"category_match": StepChange(options=())}).schema(Grades())
    assert free.parse_text(free.write(("a", "b", "any text", "match", "L2"))).answers[2] == "any text"
    own = replace(steps, named={"category_match": StepChange(options=("same", "other"), answer=r"=> (\w+)")}).schema(Grades())
    assert own.parse_text(own.write(("a", "b", "other => same", "match", "L2"))).answers[2] == "same"


def test_layers_and_flags_meet_before_the_schema_is_made(tmp_path: Path) -> None:
    """Grades in one file, the steps that answer with them in another, the form on the command line."""
    own = '[steps]\npreset = "own"\n[steps.why]\n[steps.relevance]\noptions = ["no", "yes"]\nsources = ["gold"]\n'
    cfg = load_text(tmp_path, own, '[grades]\nnames = ["no", "yes"]\n', flags=("--steps.form", "json"))
    assert cfg.schema.names == ("why", "relevance") and cfg.schema.form == "json"
    assert cfg.schema.write(("because", "yes")) == '{"why": "because", "relevance": "yes"}'
    assert cfg.schema.parse_text('{"why": "because", "relevance": "Yes"}').answers == ("because", "yes")


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[steps]\npreset = "verdict"\nform = "json"\n[grades]\nnames = ["no", "not sure", "yes"]\ngood = ["yes"]',
        "[grades]\ngains = [0, 1, 4, 8]",
        '[steps]\nsources = "labels"\n[steps.item]\nanswer = \'"(.*)"\'\n[grades]\nlabels = { "0" = "L1", "a = b" = "L2" }',
        '[steps]\npreset = "own"\n[steps.named]\n[steps.v]\noptions = ["L1", "L2", "L3", "L4"]\nheader = \'^v\\s*:\'',
    ],
)
def test_settings_are_dumped_and_loaded_to_the_same(text: str, tmp_path: Path) -> None:
    cfg = load_text(tmp_path, text)
    again = load_text(tmp_path, dump_toml(cfg))
    assert again == cfg and again.schema.specs == cfg.schema.specs and again.schema.grades == cfg.schema.grades


def test_of_gives_exactly_the_steps() -> None:
    specs = (*PAPER_STEPS[1:3], replace(PAPER_STEPS[-1], missing_verdict=0.5, options=("no", "yes"), answer="(no|yes)"))
    assert StepsConfig.of(specs).schema(Grades(("no", "yes"))).specs == specs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[steps.verdit]\nreward = 2", r"steps\.verdit is no step of the preset 'paper': the nearest is 'verdict'"),
        ("[steps.categry_match]\nreward = 2", r"steps\.categry_match is no step of .*: the nearest is 'category_match'"),
        ("[steps]\nprest = 'own'", r"0\.toml: unknown key 'steps\.prest'; the nearest is 'steps\.preset'"),
        ("[steps.item]\nrewrd = 2", r"0\.toml: unknown key 'steps\.item\.rewrd'; the nearest is 'steps\.item\.reward'"),
        ("[steps.item]\nreward = -1", r"0\.toml: steps\.item\.reward"),
        ("[steps]\npreset = 'pape'", r"steps\.preset must be one of 'paper', 'verdict', 'own'.*nearest is 'paper'"),
        ("[steps]\npreset = 'own'", r"steps\.preset is 'own' and there is no step: add tables \[steps\.NAME\]"),
        (
            "[steps]\npreset = 'own'\n[steps.a]\noptions = ['x', 'y']",
            r"the last step, 'a', has the options x, y and grades\.names is L1",
        ),
        ("[steps]\npreset = 'own'\n[steps.a]\noptions = []", "the last step, 'a', has the options of free text"),
        ("[steps.verdict]\noptions = ['no', 'yes']", r"set grades\.names to its options, from the worst to the best"),
        ("[steps.Bad-Name]", "step 'Bad-Name': rename it"),
        ("[steps.item]\nsources = ['rule']", "step 'item': source 'rule' compares the answer with options"),
        ("[grades]\nnames = ['x']", r"0\.toml: grades: grades\.names has 1 names"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_text(tmp_path, text)
    assert str(refused.value).isprintable()


def test_an_array_of_steps_of_an_older_file_is_told_how_to_move(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_text(tmp_path, '[[steps]]\nname = "verdict"\nheader = "v:"')
    assert str(refused.value) == (
        f'{tmp_path / "0.toml"}: [[steps]] is no array of tables any more: write preset = "own" under [steps], and each step as '
        "a table [steps.NAME] without the key name"
    )


def test_json_is_written_as_json() -> None:
    answers = ('say "x"\n\u00e4', "b", "match", "unclear", "L1")
    text = schema_of("paper", "json", Grades()).write(answers)
    assert list(json.loads(text).items()) == list(zip(PAPER.names, answers, strict=True)) and "\u00e4" in text
    assert PAPER.write(answers[1:] + answers[:1]).startswith("1. Query intent: b\n2. Item: match\n")


def test_the_place_of_an_answer_is_where_it_is_written() -> None:
    for form in ("text", "json"):
        schema = StepsConfig(form=form).schema(Grades(("no", "maybe", "yes")))
        text = schema.write(["a", 'an "item"', 'no "mismatch" -> match', "-> unclear", "maybe"])
        parsed = schema.parse_text(text)
        for j, word in ((2, "match"), (3, "unclear"), (4, "maybe")):
            span = parsed.answer_spans[j]
            assert span is not None and text[slice(*span)] == word == parsed.answers[j]
        assert schema.parse_text("nothing").answer_spans == (None,) * 5
