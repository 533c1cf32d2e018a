"""The predictions of docs/results/model.md: what they rest on, and laws that they keep."""

from dataclasses import replace
from pathlib import Path

import launches
import model
import prediction
import pytest
import sass
import simulator
from gpus import GPUS
from launches import Launch, Size
from prediction import Prediction, Row
from sass import Instruction, Kernel

from kdfuse.kernels import backends

pytestmark = pytest.mark.slow(15)

PAGE = (model.ROOT / "docs/results/model.md").read_text()
KERNELS = backends.compiled_cuda()[0]
H100 = GPUS["H100"]
IN_FLIGHT = 64  # KB that an SM of an H100 has on their way at least, of rows beyond a warp


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return simulator.of_run(tmp_path_factory)


def shipped(kernel: Kernel) -> tuple[int, int]:
    used = sass.resources(KERNELS.file, H100.arch)[kernel]
    return used["REG"], used["SHARED"]


@pytest.mark.skipif(
    KERNELS is None or H100.arch not in KERNELS.archs, reason="no CUDA kernels for an H100"
)
@pytest.mark.skipif(sass.tool("cuobjdump") is None, reason="no cuobjdump")
@pytest.mark.parametrize("size", [s for s in model.SIZES if s.classes > 1024], ids=str)
def test_long_rows_keep_bytes_on_their_way(library, size):
    launch = launches.ask(library, "H100", size, shipped)
    assert launch.kernel.kind == "fast_clusters"
    blocks = prediction.blocks_of_sm(H100, launch)
    assert blocks * launch.threads * launch.staged >= IN_FLIGHT << 10


@pytest.mark.parametrize(
    "registers, threads, bytes, blocks",
    [(168, 128, 20_000, 3), (194, 256, 40_000, 1), (128, 256, 40_000, 2), (32, 256, 100_000, 2)],
)
def test_occupancy(registers, threads, bytes, blocks):
    assert launches.resident(H100, registers, threads, bytes) == blocks


def made(size: Size, all: float = 4.0, stages: int = 1, issue: float = 3000.0) -> Prediction:
    """Of clusters of 4, without a compiler; issue: instructions of a row."""
    launch = Launch(Kernel("fast_clusters", "kd", "bf16"), 132, 256, 4, 33_000, 1)
    row = Row(1.0, all, {"issue": issue, "alu": issue / 3}, stages, 32 << 10)
    return prediction.predicted(H100, size, launch, row)


LONG = Size("kd", 8192, 32000, "bf16")


def test_by_hand():
    p = made(LONG)
    assert prediction.needed(LONG) == 3 * 8192 * 32000 * 2  # 1.573 GB: 524 us at 3 TB/s
    assert p.limits["memory"] == pytest.approx(524.3, abs=0.1)
    assert p.rounds == 249  # 8192 rows by 33 teams
    assert p.limits["issue"] == pytest.approx(249 * 2 * 3000 / 1750)
    assert p.limits["latency"] == pytest.approx(249 * 4.0)
    # Three more turns of labels, of 8 for each of 256 threads; 5 columns of 132 blocks.
    first = 0.5 + (3 * 270 + 200) / 1750
    tail = (3 + 2 + 1) * 270 / 1750
    assert p.forward == pytest.approx(2.0 + first + 249 * 4.0 + tail)
    assert p.share == pytest.approx((2.0 + 0.5 + 524.288) / p.forward)


def test_time_grows_with_bytes():
    def bound(size: Size) -> float:
        """By memory."""
        p = made(size, all=0.1, stages=4, issue=100.0)
        assert p.binds == "memory"
        return p.forward

    for shape in ((1024, 32000), (8192, 16000)):
        assert bound(Size("kd", *shape, "bf16")) < bound(LONG)
    assert bound(replace(LONG, type="f32")) > 1.9 * bound(LONG)
    assert made(LONG, all=5.0).forward > made(LONG).forward > bound(LONG)


def test_a_copy_is_never_slower():
    for size in model.SIZES:
        for all in (0.01, 4.0):
            p = made(size, all=all, stages=2)
            assert 0 < p.share_of_both < p.share <= 1


def test_more_rows_on_their_way_hide_memory_and_no_work():
    period = {s: prediction.period(H100, made(LONG, all=1.2, stages=s).row) for s in (1, 2)}
    assert period[1] > period[2] == 1.2


def test_a_path_goes_round_moves_of_single_classes():
    """A turn of A100's second reads was taken for the longer way of a row's last chunk."""
    names = ["LDG.E.128", "BRA", *["LDG.E.U16"] * 8, "STG.E.128", "BRA"]
    to = {1: ("@P0", 160), 11: ("@P1", 0)}
    code = [Instruction(16 * n, name, *to.get(n, ())) for n, name in enumerate(names)]
    assert [i.name for i in sass.row_path(code, set())] == names
    path = sass.row_path(code, set(), sass.moves_one)
    assert [i.name for i in path] == ["LDG.E.128", "BRA", "STG.E.128", "BRA"]


def test_the_page_names_every_goal_and_gpu():
    for name in GPUS:
        section = PAGE.split(f"### {name}\n")[1].split("\n#")[0]
        for size in model.SIZES:
            assert section.count(f"| {size} |") == 1, f"{name}: {size}"
    assert "Predictions, written before any measurement" in PAGE
    assert "@" not in PAGE
