"""The scale of grades: which values of the data name which grade, and what a scale that cannot work is told."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo.core.errors import UserError
from srpo.core.grades import PAPER_GRADES, Grades, of_options, spelled

THREE = Grades(("bad", "so so", "good"))
NO_YES = Grades(("no", "yes"), labels={"0": "no", "1": "yes", "true": "yes", "false": "no"})


@pytest.mark.parametrize("value", ["so so", "SO SO", "  So   so ", "so\tso", 2, 2.0, "2", "2.0", "2.00", " 2 "])
def test_a_grade_is_read_from_its_name_in_any_case_and_spacing_and_from_its_number(value: Any) -> None:
    assert THREE.read(value) == "so so"


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, "", " ", "soso", "0", 0, 4, "4", "-1", -1, 2.5, "2.5", "02", "E", "good bad", "2.0.0", "\u0662"),
        *(math.nan, math.inf, -math.inf, [2], ["good"], {"good": 1}, b"good", 10**30, 1e30),
    ],
)
def test_any_other_value_is_no_grade(value: Any) -> None:
    assert THREE.read(value) is None


def test_labels_are_other_spellings() -> None:
    for grade, values in {"no": (0, 0.0, "0", "0.0", False, "False", "NO"), "yes": (1, 1.0, "1", True, "TRUE", " yes")}.items():
        assert [NO_YES.read(value) for value in values] == [grade] * len(values)
    assert NO_YES.read(2) is NO_YES.read("E") is None
    assert Grades(("no", "yes"), labels={"true": "yes"}).read(2) == "yes"
    assert Grades(("a", "b"), labels={"Not  At All": "a", "1.0": "b"}).read("not at all") == "a"
    assert Grades(("a", "b"), labels={"1.0": "b"}).read(1) == "b"  # label and value lose their ".0" alike


def test_names_that_are_numbers_are_no_class_numbers() -> None:
    """On the scale 0 to 3 the value 1 is the grade 1, the second, and never the first class."""
    scale = Grades(("0", "1", "2", "3"))
    for values in (range(4), map(float, range(4)), "0123", ("0.0", "1.0", "2.0", "3.0")):
        assert [scale.read(value) for value in values] == ["0", "1", "2", "3"]
    assert scale.read(4) is scale.read("4") is scale.read("E") is None
    halves = Grades(("0.0", "0.5", "1.0"))
    assert [halves.read(value) for value in (0, 0.5, 1, 1.0, "1", "0.50", 2, 3)] == ["0.0", "0.5", "1.0", "1.0", "1.0"] + [
        None
    ] * 3
    for scale in (Grades(("bad", "3")), Grades(labels={"0": "L1"}), Grades(labels={"-1": "L1"}), Grades(labels={"2.5": "L1"})):
        assert scale.read(1) is None  # one name or label is a number: a class number could be meant otherwise


def test_esci_labels_name_the_paper_s_grades_alone() -> None:
    assert [Grades().read(value) for value in "ICSE"] == [Grades().read(value) for value in "icse"] == list(PAPER_GRADES)
    assert Grades().read("X") is Grades().read("ES") is None
    assert not any(Grades(("D", "C", "B", "A")).read(value) for value in "ESI")  # E is no grade of a scale that ends at D
    assert not any(Grades(("bad", "poor", "fair", "great")).read(value) for value in "ESCI")
    assert Grades(("S", "C", "I", "E")).read("S") == "S"  # a name comes first
    assert THREE.read("E") is Grades(PAPER_GRADES, labels={"best": "L4"}).read("E") is None


@given(st.data())
def test_every_name_and_number_of_a_random_scale_is_read_as_its_grade(data: st.DataObject) -> None:
    words = st.text("abcxyz \u00e4\u00df", min_size=1, max_size=6).map(lambda t: " ".join(t.split())).filter(bool)
    names = tuple(data.draw(st.lists(words, min_size=2, max_size=10, unique_by=lambda n: "".join(n.casefold()))))
    scale = Grades(names)
    for i, name in enumerate(names):
        assert scale.read(name) == scale.read(f" {name.upper()} ") == scale.read(i + 1) == scale.read(float(i + 1)) == name
        assert scale.index(name) == scale.index(f"{name.upper()}.") == i
    assert scale.index(None) is scale.index("") is scale.read(0) is scale.read(len(names) + 1) is None


def test_values_as_texts() -> None:
    assert [spelled(v) for v in (True, False, 3, 3.0, 2.5, " x ", "4.00", "", " ")] == [
        "true", "false", "3", "3", "2.5", "x", "4", None, None,
    ]  # fmt: skip
    assert [spelled(v) for v in (None, math.nan, -math.inf, [], {}, b"x", (1,))] == [None] * 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ("one",)}, r"grades\.names has 1 names: give 2 to 10, from the worst to the best"),
        ({"names": ()}, r"grades\.names has 0 names"),
        ({"names": tuple("abcdefghijk")}, r"grades\.names has 11 names"),
        *(
            ({"names": ("good", bad)}, r"grades\.names has .*: a name is on one line, begins and ends with a letter or digit")
            for bad in ("", " ", "-1", "a\nb", "a\rb", "a;b", "a,b", 'say "x"', "{a}", "a ", ".", "very **good** x", "a\\b")
        ),
        ({"names": ("good", "GOOD")}, "the names must differ by more than case and spaces"),
        ({"names": ("very good", "very  good")}, "the names must differ by more than case and spaces"),
        ({"names": ("1", "1.0")}, "the names must differ"),
        ({"good": ("L5",)}, r"grades\.good has 'L5': name some of L1, L2, L3, L4"),
        ({"good": PAPER_GRADES}, r"grades\.good has all grades: leave out those that are not good"),
        ({"labels": {"0": "L0"}}, r"grades\.labels has 'L0': name some of L1, L2, L3, L4"),
        ({"labels": {"Yes": "L4", "yes": "L1"}}, r"grades\.labels says that 'yes' is L1, but it is L4: keep one of them"),
        ({"labels": {"0": "L1", "0.0": "L2"}}, r"grades\.labels says that '0\.0' is L2, but it is L1"),
        ({"labels": {"l1": "L4"}}, r"grades\.labels says that 'l1' is L4, but it is L1"),
        ({"gains": (1.0, 2.0)}, r"grades\.gains is \[1\.0, 2\.0\]: give one rising number for each of L1, L2, L3, L4"),
        ({"gains": (0.0, 2.0, 1.0, 3.0)}, r"grades\.gains is .*: give one rising number"),
    ],
)
def test_a_scale_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        Grades(**settings)
    assert str(refused.value).isprintable()


def test_the_upper_half_is_good_unless_named() -> None:
    halves = {n: Grades(tuple("abcdefghij"[:n])).good_classes for n in range(2, 11)}
    assert halves == {
        2: (1,), 3: (2,), 4: (2, 3), 5: (3, 4), 6: (3, 4, 5), 7: (4, 5, 6), 8: (4, 5, 6, 7), 9: (5, 6, 7, 8), 10: (5, 6, 7, 8, 9),
    }  # fmt: skip
    names = tuple("abcdefghij"[: random.randint(2, 10)])
    good = random.sample(names, random.randint(1, len(names) - 1))
    assert Grades(names, good=tuple(good)).good_classes == tuple(sorted(map(names.index, good)))


def test_gains_count_from_0_unless_given() -> None:
    assert Grades().gain == (0.0, 1.0, 2.0, 3.0) and Grades(gains=(0.0, 1.0, 3.0, 7.0)).gain == (0.0, 1.0, 3.0, 7.0)


def test_options_of_a_step_are_a_scale() -> None:
    assert of_options(("no", "yes")).names == ("no", "yes")
    assert of_options(()) == Grades()
    with pytest.raises(UserError, match="has 1 names"):
        of_options(("yes",))


def test_what_a_message_says_of_an_unknown_value() -> None:
    assert NO_YES.expected("yess") == (
        "the grades are no, yes, also spelled 0, 1, true, false; the nearest is 'yes'; give other spellings in grades.labels "
        "(--grades.labels yess=no)"
    )
    listed = "the grades are bad, so so, good; give other spellings in grades.labels"
    assert THREE.expected([3]) == f"{listed} (--grades.labels VALUE=bad)"
    from_0 = "--grades.labels 0=bad 1=so so 2=good"
    assert THREE.expected(0) == f"{listed} ({from_0}; without it numbers count from 1, and not at all if a name or label is one)"


def test_titles_are_class_numbers_on_the_papers_scale_alone() -> None:
    assert [Grades().title(i) for i in range(4)] == ["1", "2", "3", "4"]
    assert [THREE.title(i) for i in range(3)] == list(THREE.names)
