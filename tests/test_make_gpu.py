"""`make gpu` (gpu/run.py): its stages, and what it reads out of their output."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow(4)

SCRIPT = Path(__file__).parent / "gpu" / "run.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_gpu"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_gpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_at_once_and_says_so(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out")}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "make gpu needs a GPU" in done.stderr and "sees no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def python(script, code: str, **more):
    return script.Stage("try", [sys.executable, "-c", code], 60, **more)


def test_a_stage_keeps_its_output_and_its_status(script, tmp_path):
    done = script.run(python(script, "print('seen')"), tmp_path, 100)
    assert done["status"] == "passed" and done["exit"] == 0
    assert (tmp_path / "try.log").read_text() == "seen\n"
    done = script.run(python(script, "raise SystemExit(3)"), tmp_path, 100)
    assert done["status"] == "failed" and done["exit"] == 3
    said = script.run(python(script, "print(7)", summary=lambda x: {"n": int(x)}), tmp_path, 100)
    assert said["n"] == 7


def test_a_stage_is_ended_with_all_its_children(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SHORTEST", 0.0)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    stage = python(script, code)
    stage.limit = 0.5
    assert script.run(stage, tmp_path, 100)["status"] == "out of time"


def test_a_stage_leaves_time_to_the_next_ones(script, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    done = script.run(python(script, code, reserve=90), tmp_path, 92)
    assert done["status"] == "out of time" and not (tmp_path / "ran").exists()


def test_a_missing_tool_is_said_and_is_no_failure(script, tmp_path):
    done = script.run(script.Stage("check", ["no-such-tool"], 60), tmp_path, 100)
    assert done["status"] == "skipped" and "no-such-tool" in done["why"]


CLEAN = "exercised\n========= ERROR SUMMARY: 0 errors\n"
RACES = "exercised\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"


def test_what_the_sanitizer_says(script):
    assert script.of_sanitizer(CLEAN) == {"said": "0 errors"}
    assert script.of_sanitizer(RACES)["status"] == "failed"
    none = "exercised\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert "status" not in script.of_sanitizer(none)
    # Nothing was checked.
    assert script.of_sanitizer("========= ERROR SUMMARY: 0 errors\n")["status"] == "failed"
    assert script.of_sanitizer("")["status"] == "failed"
    refused = script.of_sanitizer("========= Error: Device not supported.\n")
    assert refused["status"] == "skipped" and "Device not supported" in refused["why"]


def test_counts_of_a_test_run(script, tmp_path):
    report = tmp_path / "tests.xml"
    read = script.of_tests(report)
    assert read("a\nno module named pytest\n") == {"why": "no module named pytest"}
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="test_gpu" name="a"/>'
        '<testcase classname="test_gpu" name="b"><failure/></testcase>'
        '<testcase classname="test_gpu" name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    found = read("")
    assert found == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "bad": ["test_gpu::b"]}


def test_stages_and_their_files(script, tmp_path):
    stages = script.stages(tmp_path)
    losses = ["build", "tests", "memcheck", "racecheck", "bench"]
    assert [s.name for s in stages] == [*losses, "step", "data", "e2e", "compiled"]
    tests = next(s for s in stages if s.name == "tests")
    assert all((script.ROOT / word).is_file() for word in tests.command if word.endswith(".py"))
    assert sum(word.endswith(".py") for word in tests.command) >= 4


def test_a_missing_package_skips_the_engines_benchmarks(script, tmp_path):
    path = tmp_path / "step.jsonl"
    read = script.of_engine(path)
    lacks = read("Traceback ...\nModuleNotFoundError: No module named 'pydantic'\n")
    assert lacks == {"status": "skipped", "why": "this Python has no pydantic"}
    ours = read("ModuleNotFoundError: No module named 'kdfuse.engine.nothing'\n")
    assert ours["status"] == "failed" and read("oops\n")["status"] == "failed"
    path.write_text("{}\n{}\n")
    assert read("No module named 'sklearn'") == {"records": 2}


def test_the_engines_benchmarks_know_their_options(script, tmp_path):
    from kdfuse.engine.bench.data import run as data
    from kdfuse.engine.bench.e2e import run as e2e
    from kdfuse.engine.bench.step import run as step

    verbs = {"step": step, "data": data, "e2e": e2e}
    for stage in script.stages(tmp_path):
        if stage.name in verbs:
            words = stage.command[stage.command.index("bench") + 1 :]
            assert words[0] == stage.name
            chosen = verbs[stage.name].arguments(words[1:])
            assert chosen.out == tmp_path / f"{stage.name}.jsonl"


def test_a_copy_has_the_records_and_one_file_of_output(script, tmp_path, monkeypatch):
    logs, results, out = (tmp_path / name for name in ("logs", "results", "out"))
    for folder in (logs, results):
        folder.mkdir()
    for name in ("build", "tests"):
        (logs / f"{name}.log").write_text(f"of {name}\n")
    for name in ("run", "losses", "step", "data", "e2e"):
        (results / f"{name}.jsonl").write_text("{}\n")
    monkeypatch.setattr(script, "LOGS", logs)
    monkeypatch.setenv("OUT", str(out))
    script.copy_out(results)
    text = (out / "stages.log").read_text()
    assert "==== build\nof build\n" in text and "==== tests\nof tests\n" in text
    assert len(list(out.iterdir())) == 6


def test_the_table(script):
    records = [
        {"stage": "tests", "status": "failed", "seconds": 12.0, "tests": 5, "failures": 1},
        {"stage": "memcheck", "status": "skipped", "seconds": 0.0, "why": "no tool"},
    ]
    lines = script.table(records).split("\n")
    assert len(lines) == 3 and lines[1].endswith("5 tests, 1 failures")
    assert lines[2].endswith("no tool")


def test_the_benchmark_knows_its_options(script, tmp_path):
    from kdfuse.kernels.bench import run as bench

    for stage in script.stages(tmp_path):
        if "kdfuse.kernels.bench" in stage.command:
            words = ["30" if word == script.LEFT else word for word in stage.command[3:]]
            device = words.index("--device")
            chosen = bench.arguments(words[:device] + words[device + 2 :])
            assert chosen.budget == 30 and chosen.out == tmp_path / "losses.jsonl"
