"""Comparison of short texts."""

from __future__ import annotations


def fold(text: str) -> str:
    """The text without case and extra spaces, as answers, grades and labels are compared."""
    return " ".join(text.split()).casefold()
