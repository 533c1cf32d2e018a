"""How often a fault is tried: a few times in `make test`, many in `make test-faults` (--long)."""


def pytest_generate_tests(metafunc):
    for mark in metafunc.definition.iter_markers("cases"):
        short, long = mark.args
        metafunc.parametrize("case", range(long if metafunc.config.getoption("--long") else short))
