"""Fixtures of the command line's tests."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest


@pytest.fixture
def refused(capsys):
    """One line on stderr that matches, and exit code 2."""

    @contextmanager
    def check(match):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            yield
        said = capsys.readouterr().err
        assert stop.value.code == 2 and re.search(match, said) and "Traceback" not in said, said

    return check
