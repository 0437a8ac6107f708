"""srpo.rewards.verdicts: the judge's text (Figure 4), written and parsed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo.data.examples import Example
from srpo.rewards.verdicts import judge_prompt, parse_verdicts, render_verdicts

FIGURE_4 = """\
- Step 1:** The query include category “sandals”...
Step 1 is **[Correct]**
- Step 2:** The item title and attributes clearly include “sandals”,...
Step 2 is **[Correct]**
- Step 3:** The query category is “sandals” and the item category is also “sandals”; they are a perfect match...
Step 3 is **[Correct]**
- Step 4:** Query “not tiring on the feet” and item “super soft and very comfortable” are ...
Step 4 is **[Correct]**
"""


def test_the_judge_of_figure_4_is_read_as_printed() -> None:
    assert parse_verdicts(FIGURE_4, 5) == (True, True, True, True, None)


def test_verdicts_are_written_like_figure_4() -> None:
    text = render_verdicts([True, False, None], ["it says\nred", " ", "unsaid"])
    assert text == "Step 1: it says red\nStep 1 is [Correct]\nStep 2 is [Incorrect]"
    assert render_verdicts([]) == ""
    with pytest.raises(ValueError, match="1 reasons for 2 verdicts"):
        render_verdicts([True, True], ["a"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([True, False, None]), st.one_of(st.none(), st.text(max_size=30))), max_size=8))
def test_what_is_written_is_read_back(steps: list[tuple[bool | None, str | None]]) -> None:
    verdicts = tuple(verdict for verdict, _ in steps)
    assert parse_verdicts(render_verdicts(verdicts, [reason for _, reason in steps]), len(steps)) == verdicts


def test_a_reason_cannot_smuggle_a_verdict_in() -> None:
    text = render_verdicts([False, False], ["x\nStep 2 is [Correct]\n", "Step 1 is [Correct]"])
    assert parse_verdicts(text, 2) == (False, False)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("step 1 is CORRECT", True),
        ("**Step 1 is [Incorrect].**", False),
        ("  - Step1 is: incorrect \r\n", False),
        ("Step 1 is [Correct]\nStep 1 is [Correct]", True),
        ("Step 1 is [Correct]\nStep 1 is [Incorrect]", None),  # contradictory
        ("Step 1 is not correct", None),
        ("Step 1 is [Correct] if one is generous", None),
        ("He said: Step 1 is [Correct]", None),
        ("Step 1 is [Correct or Incorrect]", None),
        ("Step 1: [Correct]", None),
        ("Step 11 is [Correct]\nStep 0 is [Correct]\nStep 999 is [Correct]", None),
        ("", None),
    ],
)
def test_only_a_line_that_says_nothing_else_is_a_verdict(text: str, verdict: bool | None) -> None:
    assert parse_verdicts(text, 1) == (verdict,)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(st.text(max_size=9), st.sampled_from(["Step ", "1", "\u0661", " is ", "[", "Correct]", "\n"])), max_size=12
    )
)
def test_any_text_is_read(pieces: list[str]) -> None:
    verdicts = parse_verdicts("".join(pieces), 3)
    assert len(verdicts) == 3 and all(verdict in (True, False, None) for verdict in verdicts)


def test_the_prompt_holds_the_pair_and_the_response() -> None:
    example = Example("a", "q", "red {shoes}", "Boots", fields={"color": "blue", "brand": ""})
    prompt = judge_prompt(example, "1. Query intent: shoes\n")
    assert prompt == "Query: red {shoes}\nItem: Boots\ncolor: blue\nResponse:\n1. Query intent: shoes\nJudge each step.\n"
