"""The benchmark of the losses: what its records hold, and that nothing is left out in silence."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdfuse.kernels.bench import gauges, plots, providers, report, timing
from kdfuse.kernels.bench import run as bench
from kdfuse.kernels.bench.peers import CASES
from kdfuse.kernels.bench.plan import Budget, Item, items

pytestmark = pytest.mark.slow(20)

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "docs/results/cpu/losses.jsonl"
TINY = ["--sizes", "6x12", "--dtypes", "float32", "--seconds", "0"]


def records(path: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_run_records_every_provider_in_every_turn(tmp_path, capsys) -> None:
    out = tmp_path / "losses.jsonl"
    words = ["--cases", "kd+ce", "slkd2", "kd_top64", "--turn", "warm", "cold", "--peers", "eager"]
    bench.main([*words, *TINY, "--out", str(out)])
    lines = records(out, "loss")
    own = [p for p in ("cpu", "reference") if not providers.why_not(p, "cpu")]
    found = {(r["case"], r["turn"], r["provider"]) for r in lines}
    assert found == {
        (case, turn, p)
        for case in ("kd+ce", "slkd2", "kd_top64")
        for turn in ("warm", "cold")
        for p in (*own, "eager", "copy")
    }
    assert len(lines) == len(found)
    copies = {(r["case"], r["turn"]): r for r in lines if r["provider"] == "copy"}
    for r in lines:
        elements = {"kd+ce": 3 * 12, "slkd2": 7 * 12, "kd_top64": 2 * 12 + 11 * (1 + 2)}
        assert r["model_bytes"] == 6 * 4 * elements[r["case"]]
        assert r["samples"] >= 15
        assert 0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"]
        assert r["gb_per_s"] * r["median_ms"] == pytest.approx(r["model_bytes"] / 1e6)
        copy = copies[r["case"], r["turn"]]
        assert r["share_of_copy"] == pytest.approx(copy["median_ms"] / r["median_ms"])
        if r["provider"] == "copy":
            assert r["forward_median_ms"] is None and "loss_error" not in r
            continue
        assert 0 < r["forward_median_ms"] < r["p80_ms"] and 0 < r["backward_median_ms"]
        assert r["loss_error"] < 1e-5 and r["gradient_error"] < 1e-5
        assert r["torch_ops"] > 0
        assert r["launches"] is None and r["host_us"] is None and r["peak_bytes"] is None
    printed = capsys.readouterr().out
    assert "cpu, warm turns, host clock" in printed and "cpu, cold turns, host clock" in printed


def test_facts_say_the_machine_the_models_and_who_is_absent(tmp_path) -> None:
    out = tmp_path / "losses.jsonl"
    bench.main(["--cases", "tf_nkd+ce", "--backends", "reference", *TINY, "--out", str(out)])
    (facts,) = records(out, "facts")
    assert facts["torch"] == torch.__version__ and facts["copy_gb_per_s"] > 0
    assert facts["byte_models"]["kd+ce"].startswith("3 elements a logit: reads the student")
    named = {line["peer"]: line["why_not"] for line in facts["absent"]}
    assert set(named) == {"cpu", "cuda", "triton", "compiled", "liger", "quack", "apex"}
    assert named["cpu"] == named["compiled"] == "not asked for"
    assert "device cpu" in named["cuda"]
    assert {r["provider"] for r in records(out, "loss")} == {"reference", "eager", "copy"}


@pytest.mark.parametrize("name", CASES)
def test_byte_models_read_every_input_and_write_every_gradient(name) -> None:
    case = CASES[name]
    assert case.elements >= 2 * case.trained + case.frozen
    rereads = {"tf_nkd+ce": 1, "uskd+ce": 2}  # for the batch mean
    assert case.elements == 2 * case.trained + case.frozen + rereads.get(name, 0)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.fused])
def test_the_fused_call_and_the_eager_form_are_the_same_loss(name) -> None:
    case = CASES[name]
    arguments = case.arguments(7, 11, torch.float64)
    exact = gauges.truth(case, arguments)
    found = gauges.errors(lambda *a: case.fused(*a, backend="reference"), exact, arguments)
    assert found["loss_error"] < 1e-12 and found["gradient_error"] < 1e-6


class Skewed(torch.autograd.Function):
    """Right value, gradient 1% too long."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return 1.01 * upstream


def test_the_error_columns_catch_a_wrong_gradient_and_a_wrong_loss() -> None:
    case = CASES["kd+ce"]
    arguments = case.arguments(5, 9, torch.float64)
    exact = gauges.truth(case, arguments)
    skewed = gauges.errors(lambda *a: Skewed.apply(case.eager(*a)), exact, arguments)
    assert skewed["gradient_error"] == pytest.approx(0.01) and skewed["loss_error"] < 1e-12
    shifted = gauges.errors(lambda *a: case.eager(*a) * 1.0 + 0.5 * exact.loss, exact, arguments)
    assert shifted["loss_error"] == pytest.approx(0.5) and shifted["gradient_error"] < 1e-12


def test_errors_are_judged_on_copies() -> None:
    case = CASES["ce"]
    arguments = case.arguments(5, 9, torch.float32)
    before = arguments[0].detach().clone()

    def overwriting(z, y):
        loss = case.eager(z, y)
        z.data.zero_()
        return loss

    found = gauges.errors(overwriting, gauges.truth(case, arguments), arguments)
    assert found["gradient_error"] < 1e-6 and torch.equal(arguments[0], before)


def test_torch_ops_are_counted_without_views_and_with_the_backward_pass() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    work = timing.of_loss(lambda z: z.exp().view(12).sum(), [[x]], 1)
    # exp and sum; then the gradient of the loss, its expansion (a view), and one product
    assert gauges.torch_ops(work) == 4


def test_the_plan_begins_with_what_stands_first() -> None:
    plan = items(["a", "b"], [(4, 5), (6, 7)], ["float32", "bfloat16"])
    assert len(set(plan)) == 8
    assert plan[0] == Item("a", 4, 5, "float32") and plan[-1] == Item("b", 6, 7, "bfloat16")
    assert set(plan[1:4]) == {
        Item("b", 4, 5, "float32"),
        Item("a", 6, 7, "float32"),
        Item("a", 4, 5, "bfloat16"),
    }


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_a_budget_is_shared_among_what_is_left() -> None:
    clock = Clock()
    budget = Budget(100.0, 4, 2.0, clock)
    assert budget.begin() and budget.share == 25.0
    clock.time = 40.0  # the first took too long
    assert budget.begin() and budget.share == 20.0
    clock.time = 51.0
    assert budget.spent() == 11.0
    budget.took("compiled", 7.0)
    assert budget.why_not("compiled") == ""
    budget.took("compiled", 7.5)
    why = budget.why_not("compiled")
    assert "of 20.0 s for this item 11.0 s" in why and "took 7.5 s" in why and "2.0 s are" in why
    clock.time = 60.0
    assert budget.why_not("reference") and not budget.why_not("cpu") and not budget.why_not("eager")
    assert budget.begin() and budget.share == 20.0
    clock.time = 100.0
    assert not budget.begin()
    endless = Budget(None, 3, 2.0, clock)
    assert endless.begin() and endless.why_not("compiled") == ""


def test_what_does_not_fit_the_budget_is_named(tmp_path) -> None:
    out = tmp_path / "losses.jsonl"
    with pytest.raises(SystemExit, match="no measurements to show"):
        bench.main(["--cases", "kd+ce", "nkd+ce", *TINY, "--budget", "0", "--out", str(out)])
    left = records(out, "absent")
    assert [(r["case"], r["provider"]) for r in left] == [("kd+ce", "all"), ("nkd+ce", "all")]
    assert all(r["why_not"] == "the budget was spent" for r in left)
    assert records(out, "loss") == []


def test_a_gpus_clock_is_refused_on_the_cpu(capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--cases", "kd+ce", *TINY, "--clock", "graph"])
    assert "--clock graph: a GPU's clock" in capsys.readouterr().err


def test_an_interrupt_leaves_what_was_measured(tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(CASES, "nkd+ce", replace(CASES["nkd+ce"], eager=interrupted))
    out = tmp_path / "losses.jsonl"
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--cases", "kd+ce", "nkd+ce", *TINY, "--out", str(out)])
    assert {r["case"] for r in report.read([out])} == {"kd+ce"}
    with out.open("a") as file:  # and killed in the middle of a line
        file.write('{"kind": "loss", "case": "nk')
    capsys.readouterr()
    assert {r["case"] for r in report.read([out])} == {"kd+ce"}
    assert "was cut off" in capsys.readouterr().err


def test_a_provider_that_fails_is_named_and_leaves_the_others_their_run(
    tmp_path, monkeypatch
) -> None:
    def failing(*_, backend):
        raise RuntimeError(f"{backend} is out of order")

    monkeypatch.setitem(CASES, "kd+ce", replace(CASES["kd+ce"], fused=failing))
    out = tmp_path / "losses.jsonl"
    words = ["--cases", "kd+ce", "--backends", "reference"]
    bench.main([*words, *TINY, "--out", str(out)])
    (lost,) = records(out, "absent")
    assert lost["provider"] == "reference"
    assert lost["why_not"] == "RuntimeError: reference is out of order"
    assert {r["provider"] for r in records(out, "loss")} == {"eager", "copy"}


def test_a_provider_that_fails_midway_leaves_no_record_of_its_first_rounds(
    tmp_path, monkeypatch
) -> None:
    calls = []

    def tiring(z, t, y, backend):
        calls.append(backend)
        if len(calls) > 12:  # beyond its set-up and its first turn
            raise RuntimeError("tired")
        return CASES["kd"].eager(z, t, y)

    monkeypatch.setitem(CASES, "kd+ce", replace(CASES["kd+ce"], fused=tiring))
    out = tmp_path / "losses.jsonl"
    bench.main(["--cases", "kd+ce", "--backends", "reference", *TINY, "--out", str(out)])
    (lost,) = records(out, "absent")
    assert (lost["provider"], lost["turn"], lost["clock"]) == ("reference", "warm", "host")
    assert {r["provider"] for r in records(out, "loss")} == {"eager", "copy"}
    assert all(r["samples"] >= 15 for r in records(out, "loss"))


@pytest.mark.parametrize("line", ("[1, 2]", '{"kind": "loss"}'))
def test_a_line_that_is_no_record_is_an_error(tmp_path, line) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"kind": "facts"}\n' + line + "\n")
    with pytest.raises(ValueError, match="other.jsonl:2"):
        report.read([path])


def test_what_follows_a_torn_line_is_read(tmp_path, capsys) -> None:
    path = tmp_path / "torn.jsonl"
    path.write_text('{"kind": "facts"}\n{"kind": "loss", "case": "k')
    report.append(path, {"kind": "loss", "case": "kd", "provider": "cpu"})
    (record,) = report.read([path])
    assert record["case"] == "kd" and "torn.jsonl:2 was cut off" in capsys.readouterr().err


def test_recorded_results_still_make_the_table(capsys) -> None:
    bench.main(["--from", str(RECORDED), "--markdown", "--turn", "warm", "--dtypes", "float32"])
    lines = capsys.readouterr().out.splitlines()
    head = "| loss | (N, C) | type | ours, ms | eager | compiled | of copy | gradient error |"
    assert head in lines
    assert "| kd+ce | (1024, 1000) | float32 | 0.4631 cpu | 11.2x | 4.4x | 15% | 2e-07 |" in lines
    assert "| nkd+ce | (4096, 1000) | float32 | 2.07 cpu | 50.9x | - | 37% | 5e-07 |" in lines


def test_of_several_runs_the_last_counts_and_ratios_stay_within_a_run(tmp_path) -> None:
    path = tmp_path / "runs.jsonl"
    size = {"kind": "loss", "case": "kd", "rows": 4, "classes": 8, "dtype": "float32"}

    def line(provider, ms, **more):
        times = {"median_ms": ms, "p20_ms": ms, "p80_ms": ms}
        return json.dumps({**size, **times, "provider": provider, **more})

    opening = json.dumps({"kind": "facts"})
    first = [opening, line("fused", 1.0), line("eager", 9.0)]
    second = [opening, line("cpu", 2.0, device="cpu", turn="warm", clock="host")]
    path.write_text("\n".join([*first, *second]) + "\n")
    table = report.tables(report.read([path]), markdown=True)
    assert "| kd | (4, 8) | float32 | 2 cpu |" in table and "eager" not in table


def test_the_plot_takes_the_size_with_the_most_others(tmp_path) -> None:
    read = report.read([RECORDED])
    wanted = ("dkd+ce", "float32", "warm")
    mine = [r for r in read if (r["case"], r["dtype"], r["turn"]) == wanted]
    fixed, lines = plots.series(mine, "rows", "classes", "median_ms")
    assert fixed == 1000 and [n for n, _ in lines["cpu"]] == [256, 1024, 4096]
    assert lines["cpu"][1][1] == pytest.approx(0.4181, abs=1e-4) and "copy" not in lines
    fixed, lines = plots.series(mine, "classes", "rows", "share_of_copy")
    assert fixed == 1024 and [c for c, _ in lines["eager"]] == [1000, 21841]
    plots.plot(read, tmp_path / "all.svg")
    assert (tmp_path / "all.svg").stat().st_size > 10_000


def bare(
    code: str, without: str, *, folder: Path, root: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Python without some modules, in an empty folder, running the benchmark's `main`."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({without.split()!r}))\n"
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", f"{hide}from kdfuse.kernels.bench.run import main\n{code}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_it_runs_on_the_reference_with_torch_alone(tmp_path) -> None:
    root = tmp_path / "uncompiled"
    leave = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "kernels", root / "kdfuse/kernels", ignore=leave)
    shutil.copy(ROOT / "kdfuse/__init__.py", root / "kdfuse")
    missing = "pydantic typer rich yaml matplotlib triton torchvision"
    words = ["--cases", "kd+ce", *TINY, "--out", "new.jsonl"]
    done = bare(f"main({words!r})", missing, folder=tmp_path, root=root)
    assert done.returncode == 0, done.stderr
    assert "cpu takes no part: kdfuse was built without its compiled losses" in done.stdout
    lines = records(tmp_path / "new.jsonl", "loss")
    assert {r["provider"] for r in lines} == {"reference", "eager", "copy"}


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(tmp_path) -> None:
    words = ["--cases", "kd+ce", *TINY, "--out", "new.jsonl", "--plot", "new.svg"]
    done = bare(f"main({words!r})", "matplotlib", folder=tmp_path)
    assert done.returncode == 2 and "--plot needs matplotlib" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_apex_of_another_project_is_told_apart(apex) -> None:
    apex.mkdir()
    (apex / "__init__.py").touch()
    assert "is not NVIDIA's" in providers.why_not("apex", "cuda")
    (apex / "contrib").mkdir()
    assert providers.why_not("apex", "cuda") == ""
    assert providers.why_not("apex", "cpu") == "its kernels need a GPU"
    assert "cannot be imported" in str(providers.loss_of("apex", "ce", CASES["ce"]))
    assert "it is measured in ce" in str(providers.loss_of("apex", "kd", CASES["kd"]))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--from", "nowhere.jsonl"], "there is no such file"),
        (["--from", str(RECORDED), "--budget", "3"], "--budget goes with measuring"),
        (["--sizes", "1024"], "not of the form 1024x1000"),
        (["--sizes", "4x2"], "at least 1 row and 3 classes"),
    ],
)
def test_mistakes_of_the_command_line(words, why, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(words)
    assert stop.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_a_gpu_every_clock_turn_and_gauge(tmp_path) -> None:
    out = tmp_path / "losses.jsonl"
    words = ["--device", "cuda", "--cases", "kd", "--sizes", "64x1000", "--dtypes", "bfloat16"]
    bench.main([*words, "--seconds", "0", "--peers", "all", "--out", str(out)])
    (facts,) = records(out, "facts")
    assert facts["gpu"] and facts["l2_bytes"] > 0 and facts["copy_gb_per_s"] > 10
    ways = {(turn, clock) for turn in ("cold", "warm") for clock in ("events", "graph")}
    own = [] if providers.why_not("cuda", "cuda") else ["cuda"]
    for provider in (*own, "eager", "copy"):
        mine = [r for r in records(out, "loss") if r["provider"] == provider]
        assert {(r["turn"], r["clock"]) for r in mine} == ways
        for r in mine:
            assert r["median_ms"] > 0
            if provider == "copy":
                continue
            assert r["launches"] > 0 and r["host_us"] > 0 and r["peak_bytes"] > 0
            assert (r["backward_median_ms"] is None) == (r["clock"] == "graph")
            assert r["forward_median_ms"] > 0
    launches = {r["provider"]: r.get("launches") for r in records(out, "loss")}
    assert launches["eager"] > 5


@pytest.mark.parametrize(
    "words, said",
    [
        (["--seconds", "nan"], "nan is no length of time"),
        (["--budget", "-3"], "-3 is no length of time"),
        (["--threads", "0"], "0 is fewer than 1"),
        (["--plot", "ratios.pdf"], "'ratios.pdf' does not end in .svg or .png"),
        (["--plot", "/nonexistent/ratios.svg"], "there is no folder '/nonexistent'"),
    ],
)
def test_options_are_checked_before_anything_is_measured(words, said, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
