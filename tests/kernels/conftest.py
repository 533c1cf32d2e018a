"""What several files of kernel tests need, made once."""

import ctypes
import fcntl
import os

import host_rows
import pytest


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    """The CUDA row pass on the host. Workers of one run share it: the first compiles it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "host_rows.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return host_rows.built(folder)
