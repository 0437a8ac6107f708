"""Markup goes from product texts, and nothing else."""

from __future__ import annotations

import time

import pytest

from srpo.data.product_text import plain_text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x<br/>y<BR CLEAR=all/>z", "x y z"),
        ("<b>bold</b> <3 hearts>", "bold <3 hearts>"),
        ('<p class="a>b">x</p >', "x"),
        ("<a href='x'class=\"y\" target=_blank>l</a><td nowrap>q", "l q"),
        ("<!DOCTYPE html><!-- a <b>x</b>\n --><h1>z", "z"),
        ("<p class=>a<img src = 'b' />", "a"),
        ("one\n\n  two <li>three", "one | two three"),
        ("5&gt;3 &#x27;a&#39;&nbsp;&AMP;&eacute;", "5>3 'a' &\u00e9"),
    ],
)
def test_markup_is_removed(text: str, wanted: str) -> None:
    assert plain_text(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("Monitor <27 inch, >=144Hz & 5ms", "a < b > c", "size <M or >L", "size <b or >c", "TV <Samsung 55> x", "<S or <s> >L"),
        *("Size</ 5 cm>", "<!wow> x", "pen&notebook set", "Bath&regular", "5&gt3", "&notit; &unknown; &#99999999;", "R&D; &lt"),
    ],
)
def test_other_text_stays(text: str) -> None:
    assert plain_text(text) == text


@pytest.mark.parametrize("piece", ['<p a="', "<p a='\"", "<!--", "<p a=b ", "<p" + " " * 50, "a= ", '<p a="b"c="d"', "&a", "&#"])
def test_no_text_takes_long(piece: str) -> None:
    start = time.process_time()
    plain_text("<p " + piece * (20_000 // len(piece)))
    assert time.process_time() - start < 1.0
