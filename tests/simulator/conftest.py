"""The simulator, of which a run has one."""

from pathlib import Path

import pytest
import simulator


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return simulator.of_run(tmp_path_factory)
