"""`make test-variants`: the tests that compute numbers, as other machines would compute them.

One thing at a time differs from the machine as it is: PyTorch's vector code, oneDNN's, the SIMD
level of the losses, the number of threads, the order of the tests. Every run checks that it sees
what it is for (--sees, see conftest.py), and what the machine is anyway is not run again. Left
out are files about code, times, GPUs and resumed runs: what they say is not of numbers.

    python tests/variants.py [PART OF A NAME ...]     only the variants with such a name
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from conftest import facts

from kdfuse.kernels import backends

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["tests/kernels", *(f"tests/engine/{x}" for x in ("methods", "models", "training"))]
LEFT_OUT = [
    *("test_triton*", "test_cuda_build*", "test_instructions*", "test_bench*"),
    *("test_gpu*", "*_gpu.py", "test_resume*", "test_stop*", "test_compiled*", "test_begun*"),
    "test_durable*",
]


@dataclass
class Variant:
    name: str
    sees: str = ""  # FACT=VALUE of conftest.py
    environment: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    workers: int = 2


def of_pytorch(value: str) -> Variant:
    sees = f"capability={value.upper()}"
    return Variant(f"PyTorch's vectors: {value}", sees, {"ATEN_CPU_CAPABILITY": value})


def of_onednn(value: str, isa: str) -> Variant:
    return Variant(f"oneDNN up to {isa}", f"onednn={isa}", {"ONEDNN_MAX_CPU_ISA": value})


def variants() -> list[Variant]:
    x86 = [*map(of_pytorch, ("default", "avx2"))]
    x86 += [of_onednn("AVX2", "AVX2"), of_onednn("SSE41", "SSE4.1")]
    cpu = backends.compiled()[0]
    levels = cpu.levels() if cpu else []
    return [
        Variant("as it is"),
        *(x86 if platform.machine() in ("x86_64", "AMD64") else []),
        *(Variant(f"losses at {x}", f"level={x}", words=["--level", x]) for x in levels),
        Variant("2 threads", "threads=2", {"OMP_NUM_THREADS": "2"}, workers=1),
        *(Variant(f"order {n}", words=["--shuffle", str(n)]) for n in (1, 2)),
    ]


def is_the_machine(variant: Variant) -> bool:
    """Whether the variant is what this machine does anyway."""
    fact, _, value = variant.sees.partition("=")
    return fact in ("capability", "onednn", "level") and facts()[fact]() == value


def run(variant: Variant, report: Path) -> tuple[int, int, int, int]:
    """Tests that passed, failed and were skipped, and the status."""
    command = [sys.executable, "-m", "pytest", *FOLDERS, *variant.words, f"--junitxml={report}"]
    command += [word for glob in LEFT_OUT for word in ("--ignore-glob", f"**/{glob}")]
    command += ["-n", str(variant.workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    if variant.sees:
        command += ["--sees", variant.sees]
    # Inductor's cache does not know what its vector code was made for.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(report.with_suffix(".inductor"))}
    environment = {**os.environ, **cache, "OMP_NUM_THREADS": "1", **variant.environment}
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if not report.exists():
        return 0, 0, 0, status
    suite = next(iter(ElementTree.parse(report).getroot()))
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return tests - failed - skipped, failed, skipped, status


def main() -> int:
    wanted = sys.argv[1:]
    lines = [f"{'variant':30} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}"]
    bad = False
    with tempfile.TemporaryDirectory() as folder:
        for n, variant in enumerate(variants()):
            if wanted and not any(word in variant.name for word in wanted):
                continue
            if is_the_machine(variant):
                lines.append(f"{variant.name:30} is what this machine does anyway")
                continue
            print(f"\n=== {variant.name}", flush=True)
            start = time.monotonic()
            passed, failed, skipped, status = run(variant, Path(folder) / f"{n}.xml")
            seconds = time.monotonic() - start
            line = f"{variant.name:30} {passed:7} {failed:7} {skipped:8} {seconds:8.0f}"
            lines.append(line + ("" if status in (0, 1) else f"  pytest ended with {status}"))
            bad |= status != 0
    print("", *lines, sep="\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
