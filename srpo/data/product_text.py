"""Product texts of shops without their HTML. Only what is certainly markup goes: other uses of "<" and "&" are text."""

from __future__ import annotations

import html
import re
from html.entities import html5

# HTML elements that product texts have; <s> is not among them: here it is a size.
_ELEMENTS = (
    "a|abbr|address|article|aside|b|big|blockquote|body|br|caption|center|cite|code|col|colgroup|dd|del|div|dl|dt|em"
    "|figcaption|figure|font|footer|h[1-6]|head|header|hr|html|i|iframe|img|ins|kbd|li|main|nav|nobr|ol|p|picture|pre"
    "|script|section|small|span|strike|strong|style|sub|sup|table|tbody|td|tfoot|th|thead|tr|tt|u|ul|var|video|wbr"
)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"'<>]*)"""
# A word alone is an attribute only if HTML has it: "size <b or >c" holds no tag
_ATTRIBUTE = rf"""(?:\s+|(?<=["']))(?:[\w:.-]+\s*=\s*{_VALUE}|(?:nowrap|noshade|compact|hidden|controls)(?=[\s/>]))"""
_MARKUP = re.compile(
    rf"<(?:{_ELEMENTS})(?>{_ATTRIBUTE})*+\s*/?>|</(?:{_ELEMENTS})\s*>"
    r"|<!--(?:(?!<!--|-->).)*-->|<!doctype\b[^<>]*>",
    re.IGNORECASE | re.DOTALL,
)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});", re.IGNORECASE)


def plain_text(text: str, limit: int = 0) -> str:
    """The text on one line, without markup: lines joined by " | ", at most `limit` characters, cut at a word (0: no limit).

    Removed are tags of HTML elements, comments and the doctype; decoded are entities that end in a semicolon.
    """
    if limit:
        text = text[: 8 * limit]  # bounds the work for very long descriptions
    text = _ENTITY.sub(_character, _MARKUP.sub(" ", text))
    text = " | ".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))
    if not limit or len(text) <= limit:
        return text
    cut = text[: limit + 1].rpartition(" ")[0]
    return (cut if len(cut) > limit // 2 else text[:limit]).rstrip(" |")


def _character(entity: re.Match[str]) -> str:
    known = entity[0][1] == "#" or entity[0][1:] in html5
    return html.unescape(entity[0]) if known else entity[0]
