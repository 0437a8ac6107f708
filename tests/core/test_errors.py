from __future__ import annotations

import errno
import pickle

import pytest

from srpo.core.errors import MissingPackage, UserError, explain_os_error


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é and 靴", "plain, é and 靴"),
        ("it has a\nb\r", r"it has a\nb\r"),
        ("\x1b[2Jgone\x00", r"\x1b[2Jgone\x00"),
        ("a\u2028b\u202ec\ud800", r"a\u2028b\u202ec\ud800"),
        (r"a\nb", r"a\nb"),
    ],
)
def test_an_error_is_one_line_that_a_terminal_can_show(text: str, shown: str) -> None:
    for error in (UserError(text), MissingPackage(text), pickle.loads(pickle.dumps(UserError(text)))):
        assert str(error) == shown and str(error).isprintable()
    assert explain_os_error(OSError(errno.EIO, "Input/output error", text)) == f"{shown}: input/output error: check the disk"
