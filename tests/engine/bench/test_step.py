"""The benchmark of a training step: records that obey their laws, and a peer that is honest."""

import ast
import json
from pathlib import Path

import pytest
import torch

from kdfuse.engine.bench.step import gauges, measure, peer, plain
from kdfuse.engine.bench.step import run as step
from kdfuse.engine.bench.step.cases import Case, chosen, parts
from kdfuse.engine.bench.step.ours import Images, Step
from kdfuse.engine.bench.step.table import way
from kdfuse.engine.recipe.load import Recipe

pytestmark = pytest.mark.slow(20)

SMALL = ["student.name=resnet8", "teacher.name=resnet8", "data.size=16", "data.workers=1"]
WORDS = [*SMALL, "run.threads=1", "--batch", "4", "--seconds", "0", "--device", "cpu"]
PAIR = "cifar100/kd:resnet56-resnet20"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """The records of a short run of four cases."""
    path = tmp_path_factory.mktemp("bench") / "steps.jsonl"
    cases = ["student", "teacher", "kd", "cifar100/dkd:resnet56-resnet20"]
    step.main([*WORDS, "--out", str(path), "--cases", *cases])
    return path


@pytest.fixture(scope="module")
def records(recorded: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["facts", *["step"] * 4]
    return {line["case"].split(":")[0]: line for line in lines[1:]}


def case_of(name: str, *words: str) -> Case:
    (case,) = chosen(None, [*SMALL, "run.batch=8", *words], [name], "cpu")
    return case


def test_records_hold_what_was_measured(records) -> None:
    always = {
        "case", "recipe", "device", "batch", "size", "classes", "amp", "compile", "channels_last",
        "images_per_s", "images_per_s_p20", "images_per_s_p80", "step_ms", "step_ms_p20",
        "step_ms_p80", "blocks", "steps_of_block", "flops", "ops", "matmul_type", "matmul_tflops",
        "mfu", "host_ms", "memory_mb",
    }  # fmt: skip
    peers = {"peer", "peer_images_per_s", "peer_workers", "peer_waiting", "times_peer"}
    for name, record in records.items():
        assert always <= set(record), name
        assert (peers <= set(record)) == (name != "cifar100/dkd")
        assert (record["amp"], record["compile"], record["channels_last"]) == ("off", False, True)
        assert record["batch"] == 4 and record["size"] == 16 and record["classes"] == 100
        assert record["matmul_type"] == "float32" and record["blocks"] == measure.BLOCKS
        assert record["host_ms"] == record["step_ms"]
        assert "launches" not in record
    assert records["cifar100/dkd"]["peer_absent"] == "the plain loop knows no method dkd"
    assert records["student"]["recipe"] == records["kd"]["recipe"] == PAIR
    assert "teacher" not in records["student"] and "student" not in records["teacher"]


def test_numbers_follow_from_each_other(records) -> None:
    for record in records.values():
        seconds = record["step_ms"] / 1e3
        assert record["images_per_s"] == pytest.approx(record["batch"] / seconds)
        assert record["images_per_s_p20"] <= record["images_per_s"] <= record["images_per_s_p80"]
        rate = record["flops"] / seconds
        assert record["mfu"] == pytest.approx(rate / record["matmul_tflops"] / 1e12)
        if "peer" in record:
            assert record["times_peer"] * record["peer_images_per_s"] == pytest.approx(
                record["images_per_s"]
            )
            assert 0 < record["peer_waiting"] < 1
        assert record["memory_mb"] > 0
    kd, student, teacher = (records[name] for name in ("kd", "student", "teacher"))
    assert kd["parts_ms"] == {"student": student["step_ms"], "teacher": teacher["step_ms"]}
    assert kd["share_of_parts"] == pytest.approx(sum(kd["parts_ms"].values()) / kd["step_ms"])
    assert kd["loss_share"] == pytest.approx(kd["loss_ms"] / kd["step_ms"])
    # A convolution's backward pass is two of its forward pass, but for the first one's input.
    assert kd["flops"] == student["flops"] + teacher["flops"]
    assert 2.8 * teacher["flops"] < student["flops"] < 3 * teacher["flops"]
    assert teacher["ops"] < student["ops"] < kd["ops"]


def test_recorded_files_show_the_table_again(recorded, kd) -> None:
    code, out, _ = kd("bench", "step", "--from", recorded)
    assert code == 0
    assert f"{PAIR} (resnet8 -> resnet8): cpu, batch 4, 16 x 16, float32, eager" in out
    assert "times peer" in out and "the plain loop knows no method dkd" in out
    markdown = step.main(["--markdown", "--from", str(recorded)])
    lines = "\n".join(map(str, markdown)).splitlines()
    (head,) = [line for line in lines if line.startswith("| case") and "peer fp32" in line]
    rows = [line for line in lines if line.startswith(("| student |", "| teacher |", "| kd |"))]
    assert len(rows) == 3 and all(row.count("|") == head.count("|") for row in rows)


def test_parts_that_are_the_same_work_are_measured_once() -> None:
    kd, slkd = case_of("kd"), case_of("slkd2")
    found = [(part.name, count) for part, count in parts(slkd)]
    assert found == [("student", 1), ("teacher", 1), ("slt", 2)]
    assert [p.key for p, _ in parts(kd)] == [p.key for p, _ in parts(slkd)][:2]
    assert parts(kd)[1][0].key == case_of("teacher").key
    assert parts(case_of("student")) == parts(case_of("teacher")) == []
    assert slkd.recipe.method.model_dump(include={"temperature", "ce_weight", "kd_weight"}) == (
        kd.recipe.method.model_dump(include={"temperature", "ce_weight", "kd_weight"})
    )


@pytest.mark.parametrize(
    ("only", "student", "teacher", "slt"),
    [("student", 1, 0, 0), ("teacher", 0, 1, 0), ("slts", 0, 0, 1), ("student,slts", 1, 0, 1)],
)
def test_a_part_compiles_where_its_case_compiles_it(only, student, teacher, slt):
    words = [*SMALL, "method.name=slkd", "run.compile=true", f"run.compile_only=[{only}]"]
    (case,) = chosen(None, words, ["slkd2"], "cpu")
    assert case.recipe.run.compiled == tuple(only.split(","))
    found = {part.name: bool(part.recipe.run.compile) for part, _ in parts(case)}
    assert found == {"student": student, "teacher": teacher, "slt": slt}
    of_pair = chosen(None, words, ["student", "teacher", "kd"], "cpu")
    kept = tuple(role for role in only.split(",") if role != "slts")
    assert [one.recipe.run.compiled for one in of_pair] == [
        ("student", "teacher", "slts") if student else (),
        ("student", "teacher", "slts") if teacher else (),
        kept,
    ]


@pytest.mark.parametrize("name", ["student", "kd", "slkd2"])
def test_the_peer_computes_what_the_step_computes(name: str) -> None:
    """Its losses over three steps are the engine's: same weights, images, loss and optimiser."""
    case = case_of(name, "optim.lr=0.01")
    assert peer.why_not(case) is None
    made = Images(CPU)
    own, loop = Step(case, made), peer.peer_of(case, made, bf16=False, workers=0)
    for tolerance in (1e-5, 1e-3, 1e-2):  # rounding grows from step to step
        loss = own()["loss"].item()
        loop()
        assert loop.loss == pytest.approx(loss, rel=tolerance)
    assert loop.seen == 24


def test_the_peers_teacher_answers_as_the_engines() -> None:
    case = case_of("teacher")
    made = Images(CPU)
    whole = Step(Case("kd", case.recipe, PAIR), made)
    batch = next(whole.batches)
    teacher = whole.networks.teacher
    assert teacher is not None
    own = whole.networks.predict(teacher, "teacher", batch.images)
    loop = peer.peer_of(case, made, bf16=False, workers=0)
    assert not loop.trained and loop.teacher is not None
    images, target = loop.batches.take()
    assert torch.equal(target, batch.target)
    torch.testing.assert_close(loop.teacher((images - loop.mean) / loop.std), own)


def test_the_peer_shares_no_code() -> None:
    for node in ast.walk(ast.parse(Path(plain.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and not (node.module or "").startswith("kdfuse"), node.lineno
        elif isinstance(node, ast.Import):
            assert not any(name.name.startswith("kdfuse") for name in node.names), node.lineno


def test_ops_are_counted_without_views_and_allocations() -> None:
    x = torch.ones(3, 4)

    def once() -> None:
        torch.empty(2)
        torch.empty_like(x).t()
        x.view(12)[:2].add(1)

    assert gauges.ops(once) == 1
    assert gauges.flops(lambda: x @ x.t()) == 2 * 3 * 3 * 4


def test_the_peak_is_of_the_type_that_a_step_computes_in() -> None:
    assert gauges.matmul_types("off", CPU) == ("float32",)
    assert gauges.matmul_types("bf16", CPU) == ("bfloat16", "float32")
    assert gauges.matmul_types("bf16", torch.device("cuda")) == ("bfloat16",)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["method.standardise=true"], "method.standardise=True"),
        (["data.mixup=0.2"], "data.mixup"),
        (["optim.clip=1.0"], "optim.clip=1.0"),
        (["optim={name: adamw, lr: 0.1}"], "optim.name=adamw"),
        (["optim.layer_decay=0.7", "student.name=timm:test_vit"], "optim.layer_decay=0.7"),
    ],
)
def test_what_the_plain_loop_has_not_is_named(words, wanted) -> None:
    why = peer.why_not(case_of("kd", *words))
    assert why is not None and why.startswith("the plain loop knows no ") and wanted in why


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--cases", "kdd"], "--cases: got kdd, wants student, teacher, kd, slkd1, slkd2 or"),
        (["--cases", "kd", "run.amp=bf16"], "--cases: got run.amp=bf16; settings go before"),
        (["cifar100/ce:resnet20", "--cases", "kd"], "--cases kd: cifar100/ce:resnet20 has no"),
        (["cifar100/kdd:x"], "no recipe cifar100/kdd:x; did you mean cifar100/kd"),
        (["cifar100/kd:a", "cifar100/kd:b"], "several recipes; give one"),
        (["coco/kd:resnet101-resnet50"], "a recipe of detection"),
        (["run.bach=4"], "run.bach: unknown key; did you mean run.batch?"),
        (["data={source: folder, root: x}", "--cases", "student"], "data.classes: source folder"),
        (["--batch", "0"], "--batch: got 0, wants a whole number, 1 or more"),
        (["--workers", "-1"], "--workers"),
        (["--seconds", "inf"], "--seconds: got inf, wants a time in seconds, 0 or more"),
        (["--peer", "fp16"], "--peer"),
        (["--peer", "none", "--workers", "2"], "--workers 2: --peer none has no loader"),
        (["--batch", "4", "run.batch=8"], "--batch 4 and run.batch=8: give one of them"),
        (["--out", "nowhere/x.jsonl"], "--out nowhere/x.jsonl: its folder is not there"),
        (["--from", "nowhere.jsonl"], "--from nowhere.jsonl: there is no such file"),
        (["--from", __file__, "--batch", "4"], "--batch 4: goes with measuring"),
        (["run.amp=bf16", "--from", __file__], "run.amp=bf16: goes with measuring"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_message(words, wanted, capsys) -> None:
    with pytest.raises(ValueError) as caught:
        step.main([*words, *([] if "--from" in words else ["--device", "cpu"])])
    assert wanted in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="run.device = 'cuda', and this machine has no CUDA"):
        step.main(["--device", "cuda"])


def test_files_of_other_records_are_refused(tmp_path) -> None:
    other = tmp_path / "losses.jsonl"
    other.write_text('{"kind": "facts"}\n{"kind": "loss"}\n{"ki')
    with pytest.raises(ValueError, match="holds no record of kdfuse bench step"):
        step.main(["--from", str(other)])
    other.write_text("[]\n")
    with pytest.raises(ValueError, match="losses.jsonl:1 is not a record of a benchmark"):
        step.main(["--from", str(other)])


def test_the_default_pairs_are_recipes() -> None:
    for case in chosen(None, ["data.classes=100"], None, "cpu"):
        assert isinstance(case.recipe, Recipe)
    assert [c.name for c in chosen(PAIR, [], None, "cpu")] == [PAIR]
    gpu = chosen("imagenet/kd:resnet34-resnet18", [], ["kd", "slkd1"], None)
    assert gpu[0].recipe.data.size == 224 and gpu[1].recipe.method.slt_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_no_step_waits(tmp_path) -> None:
    path = tmp_path / "steps.jsonl"
    words = [*SMALL, "--batch", "8", "--seconds", "0", "--device", "cuda", "--out", str(path)]
    was = torch.cuda.get_sync_debug_mode()
    step.main([PAIR, *words, "--cases", "kd", "slkd2"])
    assert torch.cuda.get_sync_debug_mode() == was
    for line in path.read_text().splitlines()[1:]:
        record = json.loads(line)
        assert record["launches"] > 0 and record["memory_mb"] > 0 and record["host_ms"] > 0
    device = torch.device("cuda")
    with pytest.raises(RuntimeError), gauges.no_waiting(device):
        torch.ones(1, device=device).item()


def test_the_title_names_the_networks_that_are_compiled() -> None:
    (case,) = chosen(
        None, [*SMALL, "run.compile=true", "run.compile_only=[student]"], ["kd"], "cpu"
    )
    found = {"device": "cpu", "batch": 4, "size": 16} | measure.configured(case.recipe.run)
    assert "compiled student" in way(found)
    assert "compiled" in way(found | {"compile_only": []}) and "eager" in way(
        found | {"compile": 0}
    )
