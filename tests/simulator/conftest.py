"""The simulator, compiled once for all workers of a run."""

import fcntl
import os
from pathlib import Path

import pytest
import simulator


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "simulator"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "simulator.so"
        return made if made.exists() else simulator.build(folder)
