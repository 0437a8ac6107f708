"""srpo.core.steps: the responses printed in the paper (Figures 4-7) parse."""

from __future__ import annotations

import pytest

from srpo.core.step_presets import PAPER

SCHEMA = PAPER

# Responses of the paper, as printed.
FIGURE_4 = """\
- Query intent identification** - Category: sandals ...
- Item information analysis** - Category intent: described as “sandals” ...
- Category match** - Category fully matches...
- Attribute match** - Function: ...
- Verdict - Reason:** Category and all attributes are ... **L4 – Excellent**
"""
FIGURE_5_GRPO = """\
4 - Excellent

1. Identify query intent - Category: Belt buckle ...
2. Analyze item text - Category intent: “belt buckle” ...
3. Category match - Both are belt buckle...
4. Attribute match - **Style detail: no slots vs pin-type fastening — pin-type fastening is a typical no-slot design, \
fully aligns**
5. Judgment Reason: ...**No-slot design and pin-type fastening are functionally identical...**
Relevance: L4
"""
FIGURE_5_SRPO = """\
2 - Mismatch

1. Identify query intent - Category: Belt buckle ...
 2. Analyze item text - For category intent ...
 3. Category match - Both are belt buckle category...
 4. Attribute match - Style detail: query says no slots...
 5. Judgment Reason: ...**Category is fully related, but the fastening type conflicts with “no slots” ...**
Relevance level: L2 - Partial Mismatch
-
"""
FIGURE_6_GRPO = """\
2 - Mismatch

1. Identify query intent – Category...
2. Analyze item text - For query category intent (tablet): item describes ...
3. Category match - Category: query “tablet” ...
4. Attribute match - Use-case: query “in-car” ...
5. Judgment Reason: ...**Category gap leads to partial mismatch, but key attributes align; overall level is L2 ..**
Relevance level: L2
"""
FIGURE_6_SRPO = """\
4 - Excellent

1. Identify query intent - Category: ...
 2. Analyze item text - For query category intent...
 3. Category match - Category: query intent “tablet” vs item “portable screen...”
 4. Attribute match - Function: query “replacement navigation” ...
 5. Judgment Reason: ...**Even with a partial category mismatch, key attributes align...**
Relevance level: L4
-
"""
FIGURE_7_GRPO = """\
4 - Excellent
1. Identify query intent – Category...
2. Analyze item text - Category intent: item lists ...
3. Category match - Promotional pen is ...
4. Attribute match - Colorfast: matches - Style: item's general pen styles align with the query's style...
5. Judgment Reason: ... L4 fully relevant for both category and attributes...
Relevance: L4
"""
FIGURE_7_SRPO = """\
2 - Mismatch
1. Identify query intent – Category...
2. Analyze item text - Category intent: item lists...
3. Category match - Both are pens...
4. Attribute match - Colorfast: fully matches - Style: item's style features do not reflect advertising-specific design ...
5. Judgment Reason: ... category difference and non-reflective advertising design...
Relevance: L2
"""
FIGURES = {
    "4": (FIGURE_4, "Category: sandals ...", "L4"),
    "5_grpo": (FIGURE_5_GRPO, "Category: Belt buckle ...", "L4"),
    "5_srpo": (FIGURE_5_SRPO, "Category: Belt buckle ...", "L2"),
    "6_grpo": (FIGURE_6_GRPO, "Category...", "L2"),
    "6_srpo": (FIGURE_6_SRPO, "Category: ...", "L4"),
    "7_grpo": (FIGURE_7_GRPO, "Category...", "L4"),
    "7_srpo": (FIGURE_7_SRPO, "Category...", "L2"),
}
FIGURE_HEADERS = (
    ("query intent",),
    ("item information", "analyze item"),
    ("category match",),
    ("attribute match",),
    ("verdict", "judgment"),
)


@pytest.mark.parametrize("name", FIGURES)
def test_the_figures_of_the_paper_parse_as_printed(name: str) -> None:
    text, intent, verdict = FIGURES[name]
    parsed = SCHEMA.parse_text(text)
    assert parsed.found == (True,) * 5
    assert parsed.answers[0] == intent
    assert parsed.answers[4] == verdict
    assert parsed.problems <= {"unanswered"}  # S3 and S4 are prose there
    cut = [text[a:b] for a, b in zip((0, *parsed.char_ends[:-1]), parsed.char_ends, strict=True)]
    assert "".join(cut) == text
    for span, names in zip(cut, FIGURE_HEADERS, strict=True):
        assert any(name in span.casefold() for name in names), span
        assert (
            sum(any(name in line.casefold()[:28] for group in FIGURE_HEADERS for name in group) for line in span.splitlines())
            == 1
        )
    assert all("\n" not in span.strip() for span in cut[1:4])
