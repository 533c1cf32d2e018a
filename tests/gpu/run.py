"""`make gpu`: builds for this machine's GPU, tests, checks memory and races, measures; one call.

Stages follow each other, each with a limit; all of them end within LIMIT seconds. One that fails
does not stop the next ones. Run it with the Python that has PyTorch; beside that pytest, numpy,
hypothesis and setuptools are needed, no other package. The engine's own benchmarks need its
packages; without them they are skipped, and the record says which is missing.

Written are docs/results/<gpu>/run.jsonl (a record of the machine, then one for each stage),
losses.jsonl, step.jsonl, e2e.jsonl and data.jsonl (the benchmarks' records), and the output of each
stage to build/gpu/<stage>.log. With OUT set, that folder gets a copy of the records, and all output
in one file, stages.log.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build" / "gpu"
LIMIT = 560.0  # seconds, of all stages
SHORTEST = 5.0  # with less left a stage is not begun
LEFT = "LEFT"  # a word of a command: the seconds after which the benchmark begins no case
NO_SANITIZER = re.compile(r"Device not supported|not supported on this|Unable to find", re.I)
Record = dict[str, Any]

LOOK = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} of {sys.executable} sees no CUDA device")
print(torch.cuda.get_device_name())
"""
FACTS = """
import json
from kdfuse.kernels.bench import report, timing
found = report.facts("cuda")
found["copy_gb_per_s"] = timing.copy_speed("cuda")
print(json.dumps(found))
"""


@dataclass
class Stage:
    """A command and what its output says. limit: seconds, at most what is left of the whole."""

    name: str
    command: list[str]
    limit: float
    summary: Callable[[str], Record] = lambda text: {}
    environment: dict[str, str] = field(default_factory=dict)
    reserve: float = 0.0  # seconds that it leaves to the stages behind it


def run(stage: Stage, logs: Path, left: float) -> Record:
    """The stage's record: status is passed, failed, out of time or, without its tool, skipped."""
    log = logs / f"{stage.name}.log"
    limit = min(stage.limit, left - stage.reserve)
    record: Record = {"kind": "stage", "stage": stage.name, "seconds": 0.0}
    if limit < SHORTEST:
        return record | {"status": "out of time", "why": "the stages before it took all"}
    if shutil.which(stage.command[0]) is None:
        return record | {"status": "skipped", "why": f"{stage.command[0]} is not on PATH"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("w") as out:
        child = subprocess.Popen(
            [str(int(limit * 0.8)) if word == LEFT else word for word in stage.command],
            cwd=ROOT,
            env=environment | stage.environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "passed" if child.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = "out of time"
    record["seconds"] = round(time.monotonic() - start, 1)
    said = stage.summary(log.read_text(errors="replace"))
    return record | {"status": status, "exit": child.returncode} | said


def of_tests(report: Path) -> Callable[[str], Record]:
    def read(text: str) -> Record:
        if not report.is_file():
            return {"why": last_line(text)}
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        bad = []
        root = xml.parse(report).getroot()
        for suite in root.iter("testsuite"):
            for name in counts:
                counts[name] += int(suite.get(name, "0"))
        for case in root.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                bad.append(f"{case.get('classname')}::{case.get('name')}")
        return counts | {"bad": bad[:40]}

    return read


def of_sanitizer(text: str) -> Record:
    """A device that the tool refuses is no failure of the kernels."""
    found = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.+)$", text, re.MULTILINE)
    refused = NO_SANITIZER.search(text)
    if refused and "exercised" not in text:
        return {"status": "skipped", "why": f"compute-sanitizer: {refused[0]}"}
    clean = bool(found) and re.match(r"0 (?:errors|hazards)", found[-1]) and "exercised" in text
    more = {} if clean else {"status": "failed", "why": last_line(text)}
    return {"said": found[-1] if found else ""} | more


def last_line(text: str) -> str:
    lines = [line for line in text.split("\n") if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"


def of_engine(path: Path) -> Callable[[str], Record]:
    """A package that this Python lacks is no failure of the engine."""
    read = of_bench(path)

    def said(text: str) -> Record:
        found = read(text)
        lacks = re.search(r"No module named '(?!kdfuse)([\w.]+)'", text)
        if lacks and not found["records"]:
            return {"status": "skipped", "why": f"this Python has no {lacks[1]}"}
        return found

    return said


def of_bench(path: Path) -> Callable[[str], Record]:
    def read(text: str) -> Record:
        lines = path.read_text().count("\n") if path.is_file() else 0
        return {"records": lines} | ({} if lines else {"status": "failed", "why": last_line(text)})

    return read


def stages(results: Path) -> list[Stage]:
    python, here = sys.executable, Path(__file__).parent
    native = {"KDFUSE_CUDA": "1", "KDFUSE_CUDA_ARCHS": "native", "KDFUSE_REQUIRE_BUILD": "1"}
    tests = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("test_*gpu*.py"))]
    pytest = [python, "-m", "pytest", "-m", "gpu", "--tb=short", "-rfE", "-p", "no:cacheprovider"]
    parallel = subprocess.run([python, "-c", "import xdist"], capture_output=True).returncode == 0
    if parallel:
        pytest += ["-n", str(min(8, os.cpu_count() or 1))]
    junit, losses = LOGS / "tests.xml", results / "losses.jsonl"
    check = ["compute-sanitizer", "--print-limit", "20", "--kernel-regex", "kns=kdfuse", "--tool"]
    drive = [python, str(here / "exercise.py")]
    bench = [python, "-m", "kdfuse.kernels.bench", "--device", "cuda", "--out", str(losses)]
    bench += ["--seconds", "0.5", "--budget", LEFT, "--dtypes", "bfloat16", "float32"]
    bench += ["--cases", "kd+ce", "dkd+ce", "slkd2", "kd"]
    own = ["nkd+ce", "tf_nkd+ce", "uskd+ce", "--backends", "cuda", "triton", "--peers", "eager"]
    own += ["--sizes", "4096x1000", "256x1000", "1024x21841", "8192x32000"]
    # Compiling takes longer than measuring.
    compiled = ["--backends", "cuda", "--peers", "compiled", "--sizes", "4096x1000", "1024x21841"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    engine = [python, "-c", "from kdfuse.engine.cli.main import main; main()", "bench"]
    made, workers = ["--images", "2000"], ["--workers", str(os.cpu_count() or 1)]

    def of_verb(verb: str, *words: str) -> tuple[list[str], Callable[[str], Record]]:
        path = results / f"{verb}.jsonl"
        return [*engine, verb, *words, "--out", str(path)], of_engine(path)

    step, of_step = of_verb("step", "--device", "cuda", "--seconds", "2", "--peer", "bf16")
    e2e, of_e2e = of_verb("e2e", *made, *workers, "--device", "cuda", "--peer", "bf16")
    data, of_data = of_verb("data", *made, *workers, "--seconds", "5")
    return [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 200, environment=native),
        Stage("tests", [*pytest, f"--junitxml={junit}", *tests], 200, of_tests(junit), reserve=220),
        Stage("memcheck", [*check, "memcheck", *drive], 60, of_sanitizer, uncached, reserve=200),
        Stage("racecheck", [*check, "racecheck", *drive], 60, of_sanitizer, reserve=200),
        Stage("bench", [*bench, *own], LIMIT, of_bench(losses), reserve=160),
        Stage("step", step, 150, of_step, reserve=60),
        Stage("data", data, 60, of_data, reserve=40),
        Stage("e2e", e2e, 90, of_e2e, reserve=20),
        Stage("compiled", [*bench, *compiled], LIMIT, of_bench(losses)),
    ]


def write(record: Record, path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def copy_out(results: Path) -> None:
    if "OUT" not in os.environ:
        return
    target = Path(os.environ["OUT"])
    target.mkdir(parents=True, exist_ok=True)
    for path in results.glob("*.jsonl"):
        shutil.copyfile(path, target / path.name)
    logs = sorted(LOGS.glob("*.log"), key=lambda path: path.stat().st_mtime)
    texts = [f"==== {log.stem}\n{log.read_text(errors='replace')}" for log in logs]
    (target / "stages.log").write_text("\n".join(texts))


def facts() -> Record:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FACTS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        return {"kind": "facts", "why_not": last_line(done.stderr)}
    return {"kind": "facts", **json.loads(last_line(done.stdout))}


def table(records: list[Record]) -> str:
    lines = [f"{'stage':<10} {'status':<12} {'seconds':>8}  "]
    for r in records:
        counted = [f"{r[k]} {k}" for k in ("tests", "failures", "errors", "skipped") if k in r]
        said = ", ".join([*counted, *(str(r[k]) for k in ("said", "why") if r.get(k))])
        said += f"{r['records']} records" if "records" in r else ""
        lines.append(f"{r['stage']:<10} {r['status']:<12} {r['seconds']:>8.1f}  {said}".rstrip())
    return "\n".join(lines)


def main() -> int:
    start = time.monotonic()
    look = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
    if look.returncode:
        print(
            f"make gpu needs a GPU and a Python whose PyTorch sees it: {last_line(look.stderr)}; "
            "name another one with `make gpu GPU_PYTHON=...`",
            file=sys.stderr,
        )
        return 2
    gpu = look.stdout.strip()
    results = ROOT / "docs/results" / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    results.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    journal = results / "run.jsonl"
    for path in (*results.glob("*.jsonl"), LOGS / "tests.xml", *LOGS.glob("*.log")):
        path.unlink(missing_ok=True)
    found: list[Record] = []
    print(f"{gpu}: records go to {results.relative_to(ROOT)}, logs to {LOGS.relative_to(ROOT)}")
    for stage in stages(results):
        record = run(stage, LOGS, LIMIT - (time.monotonic() - start))
        if stage.name == "build":  # the module's facts are there from now on
            write(facts(), journal)
        write(record, journal)
        found.append(record)
        copy_out(results)
        print(f"{stage.name}: {record['status']}, {record['seconds']:.0f} s", flush=True)
        if record["status"] in ("failed", "out of time") and (LOGS / f"{stage.name}.log").is_file():
            log = (LOGS / f"{stage.name}.log").read_text(errors="replace")
            print("    " + "\n    ".join(log.split("\n")[-16:]), flush=True)
    print("\n" + table(found))
    return int(any(r["status"] not in ("passed", "skipped") for r in found))


if __name__ == "__main__":
    sys.exit(main())
