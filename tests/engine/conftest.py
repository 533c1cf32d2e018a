"""What tests of the engine leave out because other tests do it."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def charts(request):
    """The charts of a report take half the time of a short run; tests of reports draw them."""
    if request.path.parent.name == "report" or request.path.name == "test_cli.py":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdfuse.engine.report.curves._draw", lambda chart: "")
        yield
