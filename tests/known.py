"""Marks for tests of behaviour that is not there yet."""

from __future__ import annotations

import pytest


def known_bug(reason: str, where: bool = True) -> pytest.MarkDecorator:
    """The test states what should be; it fails today. Strict: once the bug is fixed the test errs until this mark is taken off.

    where: False on machines that do not have the bug.
    """
    return pytest.mark.xfail(where, strict=True, reason=f"known bug: {reason}")
