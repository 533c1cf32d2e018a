"""Cases beside themselves with further words: taking turns, the ratio, what compiling is worth."""

import json

import pytest
import torch

from kdfuse.engine.bench.step import beside, peer
from kdfuse.engine.bench.step import run as step
from kdfuse.engine.bench.step.measure import Bench
from kdfuse.engine.bench.step.player import BLOCKS
from kdfuse.engine.bench.step.table import panels, shown
from kdfuse.engine.bench.step.worth import sentence
from kdfuse.engine.recipe.data import Data
from kdfuse.engine.recipe.run import Run
from kdfuse.engine.recipe.schema import SLT, Network
from kdfuse.engine.training.compiled import Compilations

pytestmark = pytest.mark.slow(40)

SMALL = ["student.name=resnet8", "teacher.name=resnet8", "data.size=16", "run.threads=1"]
WORDS = [*SMALL, "data.workers=1", "--batch", "4", "--seconds", "0", "--device", "cpu"]
PAIR = "cifar100/kd:resnet56-resnet20"


def both(names, *further):
    return beside.with_words(None, [*SMALL, "run.batch=4"], names, "cpu", further)


def records_of(path):
    facts, *found = [json.loads(line) for line in path.read_text().splitlines()]
    assert facts["kind"] == "facts"
    return found


def test_each_case_is_recorded_without_the_words_and_with_them(tmp_path, kd):
    path = tmp_path / "steps.jsonl"
    words = ["--cases", "student", "kd", "--beside", "run.channels_last=false"]
    done = kd("bench", "step", *WORDS, *words, "--out", path)
    assert done.code == 0, done.err
    found = records_of(path)
    assert [r["case"] for r in found] == ["student", "student", "kd", "kd"]
    for without, record in (found[:2], found[2:]):
        assert "beside" not in without and "times_without" not in without
        assert record["beside"] == ["run.channels_last=false"]
        assert (without["channels_last"], record["channels_last"]) == (True, False)
        assert without["blocks"] == record["blocks"] == BLOCKS
        rate = record["images_per_s"] / without["images_per_s"]
        assert record["times_without"] == pytest.approx(rate)
        # The plain loop is the same beside both.
        assert record["peer_images_per_s"] == without["peer_images_per_s"]
        times = record["images_per_s"] / record["peer_images_per_s"]
        assert record["times_peer"] == pytest.approx(times)
        assert "compile_s" not in record
    student, of_kd = found[1], found[3]
    for ending in ("", "_p20", "_p80"):  # the parts have the words, too
        assert of_kd[f"parts_ms{ending}"]["student"] == student[f"step_ms{ending}"]
    shown_again = kd("bench", "step", "--from", path)
    for out in (done.out, shown_again.out):
        assert "times without" in out and "kd with run.channels_last=false" in out
        assert out.count(PAIR) == 1 and "pay" not in out  # one table, no word about compiling


def test_a_ratio_is_of_images_where_the_batch_differs():
    cases = both(["teacher"], "run.batch=8")
    bench = Bench(torch.device("cpu"), "fp32", 0, Compilations())
    for case in cases:
        bench.enter(case, 0, whole=True)
    bench.play()
    without, record = map(bench.record, cases)
    assert (without["batch"], record["batch"]) == (4, 8)
    assert record["times_without"] == pytest.approx(2 * without["step_ms"] / record["step_ms"])
    assert record["peer_absent"] == "no plain loop was measured with run.batch=8"
    assert "peer" in without and "times_peer" not in record


def test_blocks_alternate_each_in_its_own_process_settings():
    cases = both(["teacher"], "run.threads=2")
    bench = Bench(torch.device("cpu"), None, None, Compilations())
    seen = []
    for case in cases:
        bench.enter(case, 0, whole=True)
        player = bench.cases[case.key]

        def noted(label=case.label, work=player.step):
            seen.append((label, torch.get_num_threads()))
            return work()

        player.step, player.alone = noted, 1.0  # no step before a block
    bench.play()
    assert seen == BLOCKS * [("teacher", 1), ("teacher with run.threads=2", 2)]
    record = bench.record(cases[1])
    first, second = (bench.cases[case.key].median for case in cases)
    assert record["times_without"] == pytest.approx(first / second)


def test_a_case_that_the_words_leave_as_it_is_is_measured_once(capsys):
    found = both(["student", "kd"], "method.temperature=2")
    assert [case.label for case in found] == ["student", "kd", "kd with method.temperature=2"]
    assert found[2].without is found[1] and found[1].without is None
    assert capsys.readouterr().out == "method.temperature=2: changes nothing of student\n"
    with pytest.raises(ValueError, match="changes nothing of student, kd; give words that do"):
        both(["student", "kd"], "run.compile=false")


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["run.compile=true"], True),
        (["run.channels_last=false", "run.amp=bf16"], True),
        (["run.batch=8"], False),
        (["run.threads=2"], False),
        (["optim.name=lars"], False),
        (["method.standardise=true"], False),
    ],
)
def test_the_plain_loop_is_shared_where_the_engine_alone_computes_otherwise(words, same):
    case, other = both(["kd"], *words)
    assert peer.same(case, other) is same


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            ["run.device=cuda"],
            "--beside run.device=cuda: both sides have the same images, student",
        ),
        (["data.size=32"], "--beside data.size=32: both sides have the same"),
        (["data.workers=4"], "--beside data.workers=4: both sides have the same"),
        (["student.name=resnet20"], "--beside student.name=resnet20: both sides have the same"),
        (["run.compile=true", "kd"], "--beside kd: both sides have the same"),
        (["run={batch: 8}"], "what may differ is method.*, optim.*, data.cutmix"),
        (["run.amp"], "run.amp: wants the form key=value"),
        (["optim.nam=lars"], "optim.nam: unknown key; did you mean optim.name?"),
        (["run.threads=null"], "--beside run.threads=null: kd takes run.threads=1"),
        (
            ["run.compile=true", "--from", __file__],
            "--beside run.compile=true: goes with measuring",
        ),
    ],
)
def test_words_that_leave_nothing_to_compare_are_refused(words, wanted, capsys):
    own = [] if "--from" in words else [*WORDS, "--cases", "kd"]
    with pytest.raises(ValueError) as caught:
        step.main([*own, "--beside", *words])
    assert wanted in str(caught.value)
    assert capsys.readouterr().out == ""


def test_what_may_differ_are_settings():
    of = {"run": Run, "data": Data, "teacher": Network, "slt": SLT}
    for key in beside.KEYS:
        section, _, field = key.partition(".")
        assert field in of[section].model_fields, key


def test_compiled_beside_eager(tmp_path, capsys):
    path = tmp_path / "steps.jsonl"
    words = ["--cases", "teacher", "--beside", "run.compile=true", "--peer", "none"]
    step.main([*WORDS, *words, "--out", str(path)])
    eager, compiled = records_of(path)
    assert (eager["compile"], compiled["compile"]) == (False, True)
    assert compiled["compile_s"] > 0 and "compile_s" not in eager
    assert compiled["flops"] == eager["flops"]
    said = sentence([eager, compiled])
    assert said is not None and shown([eager, compiled], markdown=True)[-1] == f"\n{said}"
    wanted = {
        True: "pays here: run.compile=true run.compile_only=[teacher]; ",
        False: "run.compile=true does not pay here; ",
    }
    assert said.startswith(wanted[compiled["step_ms_p80"] < eager["step_ms_p20"]])


# Milliseconds of a step (p20, median, p80) of eager blocks, and of compiled ones beside them.
EAGER, FASTER, ABOUT, SLOWER = (90, 100, 110), (45, 50, 55), (80, 90, 95), (120, 125, 130)
ENDINGS = ("_p20", "", "_p80")


def made(case, eager, compiled, parts=None, key="run.compile"):
    """Two records of a case; `parts`: compiled times of its networks; eager ones are EAGER."""
    base = {"kind": "step", "case": case, "recipe": "r", "batch": 4, "size": 16, "device": "cpu"}
    base |= {"amp": "off", "channels_last": True, "matmul_type": "float32", "matmul_tflops": 1.0}
    first = base | {"compile": False, "images_per_s": 40.0, "peer": "fp32", "peer_images_per_s": 30}
    second = first | {"compile": True, "beside": [f"{key}=true"], "times_without": 2.0}
    for record, times in ((first, eager), (second, compiled)):
        record |= {f"step_ms{q}": t for q, t in zip(ENDINGS, times, strict=True)}
        for i, q in enumerate(ENDINGS) if parts else ():
            of = {name: own[i] if record is second else EAGER[i] for name, own in parts.items()}
            record[f"parts_ms{q}"] = of
    return [first, second]


@pytest.mark.parametrize(
    ("group", "wanted"),
    [
        (made("student", EAGER, FASTER), "pays here: run.compile=true run.compile_only=[student]"),
        (made("student", EAGER, ABOUT), "run.compile=true does not pay here"),
        (made("student", EAGER, SLOWER), "run.compile=true does not pay here"),
        (
            made("student", EAGER, FASTER) + made("teacher", EAGER, SLOWER),
            "pays here: run.compile=true run.compile_only=[student]",
        ),
        (
            made("slkd1", EAGER, SLOWER, {"student": FASTER, "teacher": ABOUT, "slt": FASTER}),
            "pays here: run.compile=true run.compile_only=[student,slts]",
        ),
        (
            made("kd", EAGER, FASTER, {"student": FASTER, "teacher": FASTER}),
            "pays here: run.compile=true",
        ),
        # Each network alone is faster, and what a recipe would train with them is not.
        (
            made("kd", EAGER, ABOUT, {"student": FASTER, "teacher": FASTER}),
            "run.compile=true does not pay here",
        ),
        # No network alone is clearly faster, and all of them together are.
        (
            made("kd", EAGER, FASTER, {"student": ABOUT, "teacher": ABOUT}),
            "pays here: run.compile=true",
        ),
        (made("cifar100/dml:x", EAGER, FASTER), "pays here: run.compile=true"),
    ],
)
def test_it_pays_where_the_blocks_lie_apart(group, wanted):
    said = sentence(group)
    assert said is not None and said.partition("; ")[0] == wanted
    base, other = group[:2]  # the same measured from the other side, as where compiled is usual
    swapped = [base | {"beside": ["run.compile=false"]}, *group[2:]]
    del other["beside"]
    assert sentence([other, *swapped]) == said


def test_the_numbers_stand_behind_it():
    group = made("kd", EAGER, FASTER, {"teacher": ABOUT, "student": SLOWER})
    said = sentence(made("student", EAGER, SLOWER) + group)
    assert said is not None and said.endswith(
        "once compiled, over eager: student 0.80, teacher 1.11 (p20-p80 overlap), kd 2.00"
    )


def test_nothing_is_said_of_other_words():
    assert sentence(made("kd", EAGER, FASTER, key="run.channels_last")) is None
    without, record = made("kd", EAGER, FASTER)
    assert sentence([without]) is None and sentence([record]) is None
    both_words = [*record["beside"], "run.amp=bf16"]
    assert sentence([without, record | {"beside": both_words}]) is None


def test_records_with_words_stand_in_the_table_of_those_without():
    facts = {"kind": "facts"}
    records = [facts, *made("kd", EAGER, FASTER), facts, *made("student", EAGER, ABOUT)]
    lines = "\n".join(map(str, shown(records, markdown=True))).splitlines()
    rows = [line for line in lines if line.startswith(("| kd ", "| student "))]
    assert [row.split(" | ")[0][2:] for row in rows] == [
        "kd", "kd with run.compile=true", "student", "student with run.compile=true",
    ]  # fmt: skip
    assert sum("times without" in line for line in lines) == 2
    assert sum("pays here" in line or "does not pay here" in line for line in lines) == 2


def test_a_shared_peer_is_drawn_once():
    (panel,) = panels([{"kind": "facts"}, *made("kd", EAGER, FASTER)])
    assert panel.cases == ["kd", "kd\nrun.compile=true"]
    assert panel.sides == {"kdfuse": [40.0, 40.0], "plain loop, fp32": [30, None]}
