"""The images that short runs train on, and the command line as a user calls it."""

import sys
from typing import NamedTuple

import pytest

from kdfuse.engine.data.sources.digits import write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of scikit-learn's digits, which nothing may change."""
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root)
    return root


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def kd(monkeypatch, capsys):
    """Runs `kdfuse WORDS...` through the program's entry point."""
    from kdfuse.engine.cli import main as cli

    monkeypatch.delenv("KDFUSE_TRACEBACK", raising=False)

    def call(*words: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["kdfuse", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        return Result(code, *capsys.readouterr())

    return call
