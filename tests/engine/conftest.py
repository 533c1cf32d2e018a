"""The images that short runs train on."""

import pytest

from kdfuse.engine.data.sources.digits import write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of scikit-learn's digits, which nothing may change."""
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root)
    return root
