"""Compiling: every network of a class gets its graph, and the process is left as it was."""

from pathlib import Path

import pytest
import torch
import torch._dynamo.config as dynamo
from tiny import tiny
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from kdfuse.engine.run import log
from kdfuse.engine.training.compiled import compile_all, compiling
from kdfuse.engine.training.speed import settled
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(30)


class Layer(nn.Module):
    """Networks of one class, each of its own shape, as resnet8 to resnet110 are."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, x):
        return self.linear(x)


def numbered(networks):
    return {f"network{i}": network for i, network in enumerate(networks)}


def run(networks):
    x = torch.ones(2, 4)
    for mode in (True, False):
        for network in networks:
            network.train(mode)(x).sum().backward()


def test_the_fifth_network_of_a_class_is_compiled_too():
    networks = [Layer(3 + i) for i in range(6)]
    with compiling(True):
        counters.clear()
        compile_all(numbered(networks))
        run(networks)
        assert counters["stats"]["unique_graphs"] >= len(networks)
        graphs = dict(counters["stats"])
        run(networks)
        assert dict(counters["stats"]) == graphs  # nothing is compiled again


def test_a_network_that_would_run_as_it_is_is_an_error():
    networks = [Layer(3 + i) for i in range(4)]
    with compiling(True):
        compile_all(numbered(networks))
        dynamo.recompile_limit = 2
        with pytest.raises(FailOnRecompileLimitHit):
            run(networks)


def test_limits_are_those_of_before_afterwards():
    before = dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit
    with compiling(True):
        compile_all(numbered([Layer(3) for _ in range(50)]))
        assert dynamo.recompile_limit > before[0] and dynamo.fail_on_recompile_limit_hit
    assert (dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit) == before


class Broken(nn.Module):
    """A forward pass that dynamo cannot take as one graph."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.turn = 0

    def forward(self, x):
        x = self.linear(x)
        torch._dynamo.graph_break()
        return self.linear(x) + self.turn


def test_what_is_compiled_is_counted_by_network_and_said():
    said, noted = [], []
    one, two = Layer(3), Layer(5)
    with compiling(True) as compilations:
        compilations.say = said.append
        compile_all({"student": one, "teacher": two})
        with compilations.phase("training", noted.append):
            run([one, two])
            assert compilations.graphs == {"student": 1, "teacher": 1}
        seconds = compilations.seconds
        assert [text.split(",")[0] for text in said] == ["compiling student", "compiling teacher"]
        with compilations.phase("training", noted.append):
            run([one, two])
        assert compilations.seconds == seconds > 0 and len(said) == 2


def test_a_network_that_compiles_badly_is_named():
    noted = []
    with compiling(True) as compilations:
        compilations.say = lambda text: None
        whole, broken = Layer(3), Broken()
        compile_all({"student": whole, "teacher": broken})
        x = torch.ones(2, 4)
        with compilations.phase("training", noted.append):
            whole(x), broken(x)
    (text,) = noted
    assert text.startswith("teacher compiles badly: training takes 2 graphs of it")


def test_what_is_compiled_again_in_a_later_phase_is_named():
    noted = []
    with compiling(True) as compilations:
        compilations.say = lambda text: None
        network = Layer(3)
        compile_all({"student": network})
        for rows in (2, 2, 7):
            with compilations.phase("training", noted.append):
                network(torch.ones(rows, 4))
            assert len(noted) == (rows == 7)
        with compilations.phase("evaluation", noted.append), torch.no_grad():
            network(torch.ones(5, 4))
    (text,) = noted
    assert text.startswith("student was compiled 1 times again in a later training")


def test_a_run_compiles_in_its_first_epoch_alone(tmp_path, digits, capfd):
    """And those networks alone that are chosen."""
    run_of = {"compile": True, "compile_only": ["student"], "epochs": 3}
    train(tiny(digits, "kd", run=run_of), tmp_path / "run")
    told = [line for line in capfd.readouterr().out.splitlines() if "compiling" in line]
    # Training and evaluation; the teacher runs as it is.
    assert [line.split(",")[0] for line in told] == ["compiling student"] * 2
    records = log.read(tmp_path / "run/log.jsonl")
    assert not [record for record in records if record["kind"] == "note"]


@pytest.mark.parametrize(
    "only, method, message",
    [
        (["teacher"], "ce", "run.compile_only: teacher is not among this recipe's networks"),
        (["student", "slts"], "kd", "run.compile_only: slts is not among"),
        ([], "kd", r"run.compile_only: \[\] chooses none"),
        (["head"], "kd", "compile_only"),
    ],
)
def test_networks_that_are_not_there_cannot_be_chosen(only, method, message):
    with pytest.raises(ValueError, match=message):
        tiny(Path("digits"), method, run={"compile": True, "compile_only": only})


def test_a_choice_among_networks_that_do_not_compile_is_refused(digits):
    with pytest.raises(ValueError, match="no effect with run.compile=false"):
        tiny(digits, run={"compile": False, "compile_only": ["student"]})
    recipe = tiny(digits, run={"compile_only": ["student"], "speed": "exact"})
    with pytest.raises(ValueError, match="run.speed=exact compiles nothing on cpu; add"):
        settled(recipe, torch.device("cpu"))
