"""The house: which part may import which, and what every checkout must keep."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = {"kernels": set(), "engine": {"kernels"}}
OPS = set(re.findall(r"^KDFUSE_\w+\((\w+)", (ROOT / "csrc/losses/all.def").read_text(), re.M))

# What a folder of the engine may import beside itself. cli and bench stand on top.
ARROWS = {
    "recipe": {"methods", "detection"},  # their options are sections of a recipe
    "cache": {"recipe", "methods", "data"},
    "methods": {"recipe"},
    "data": {"recipe"},
    "run": {"recipe"},
    "models": {"recipe", "run"},
    "report": {"recipe", "run"},
    "training": {"recipe", "methods", "data", "cache", "models", "run", "report", "detection"},
    "detection": {"recipe", "data", "models", "run", "training"},
    "export": {"recipe", "data", "models", "run", "training"},
    "bench": {"recipe", "methods", "data", "cache", "models", "run", "training"},
    "cli": {"recipe", "cache", "data", "models", "run", "report", "training", "detection", "bench"}
    | {"export"},
}
# A file of training may import those before it.
TRAINING = (
    "rendezvous alive ranks peers process speed compiled scalars ema rate groups largebatch "
    "optim faults meters guard step captured learner frozen networks build known identity beside "
    "state alarms trajectories evaluate outputs task objects inputs recorded slt_record "
    "classification rollback resumption stop loop session start recording distill"
).split()
# What a file leaves to others, by folder or file.
NEVER = {
    "recipe/schema": {"methods", "detection"},
    "methods/method": {"recipe.load"},
    "training/learner": {"run", "recipe", "report"},  # networks know no folders of runs
    "training/networks": {"run", "recipe", "report"},
    "training/build": {"training.optim", "training.state", "report"},
    "training/state": {"training.build", "training.networks", "models", "data"},
    "training/evaluate": {"training.optim", "training.state", "report"},
    "training/outputs": {"training.optim", "training.state"},
    "training/loop": {"data", "models", "methods", "detection", "training.classification"},
    "training/classification": {"detection", "report"},
    "cli/export": {"training.optim", "training.state"},
    "export/chosen": {"training.optim", "training.state"},
    "export/check": {"training.optim", "training.state"},
    "detection/evaluate": {"training.optim", "training.state"},
    "detection/export": {"training.optim", "training.state"},
}


def modules(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports from kdfuse, relative ones resolved."""
    return named(ast.parse(path.read_text()), path)


def named(tree: ast.AST, path: Path) -> set[str]:
    """The same of what stands in a part of a file."""
    package = ["kdfuse", *path.relative_to(ROOT).with_suffix("").parts]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("kdfuse")}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            stem = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            if stem.startswith("kdfuse"):
                found.add(stem)
                found |= {f"{stem}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("path", modules("kernels") + modules("engine"), ids=str)
def test_arrows(path: Path):
    part = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        parts = name.split(".")
        if len(parts) > 1 and parts[1] in LIBRARY and parts[1] != part:
            assert parts[1] in LIBRARY[part], f"{path.name} may not import {name}"


@pytest.mark.parametrize("name", sorted(OPS))
def test_ops_do_not_import_each_other(name):
    found = {n.split(".")[2] for n in imports(ROOT / f"kernels/{name}.py") if n.count(".") >= 2}
    assert not found & (OPS - {name})


def inside(path: Path) -> str:
    """The file's place in the engine, as training.loop."""
    return ".".join(path.relative_to(ROOT / "engine").with_suffix("").parts)


def engine_imports(path: Path) -> set[str]:
    """Files and folders of the engine that a file imports from, as training.loop."""
    return {n.removeprefix("kdfuse.engine.") for n in imports(path) if ".engine." in n}


FILES = [path for path in modules("engine") if path.parent != ROOT / "engine"]


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_arrows_between_the_folders_of_the_engine(path: Path):
    own = inside(path)
    folder = own.split(".")[0]
    for name in engine_imports(path):
        other = name.split(".")[0]
        assert other == folder or other in ARROWS[folder], f"{own} may not import {name}"
    for shunned in NEVER.get(own.replace(".", "/"), set()):
        found = [n for n in engine_imports(path) if f"{n}.".startswith(f"{shunned}.")]
        assert not found, f"{own} may not import {found}"


def test_what_is_never_imported_is_there():
    for name, shunned in NEVER.items():
        assert (ROOT / f"engine/{name}.py").is_file(), name
        for other in shunned:
            place = ROOT / "engine" / other.replace(".", "/")
            assert place.is_dir() or place.with_suffix(".py").is_file(), other


def test_training_reads_from_the_bottom_up():
    assert {path.stem for path in modules("engine/training")} == set(TRAINING)
    for at, name in enumerate(TRAINING):
        names = engine_imports(ROOT / f"engine/training/{name}.py")
        used = {n.split(".")[1] for n in names if n.startswith("training.")}
        assert used <= set(TRAINING[:at]), f"{name} may not import {used - set(TRAINING[:at])}"


def test_detection_is_named_where_a_recipe_becomes_a_run_and_nowhere_else():
    for path in FILES:
        own = inside(path)
        if own.startswith("detection.") or not any(
            n.startswith("detection.") for n in engine_imports(path)
        ):
            continue
        assert own in {"recipe.load", "training.start", "cli.main", "cli.export"}, own


def test_no_file_imports_itself_by_way_of_others():
    """Over what is imported when a file is, not later or for types alone."""
    graph = {}
    for path in modules("engine"):
        tree = ast.parse(path.read_text())
        tree.body = [s for s in tree.body if isinstance(s, ast.Import | ast.ImportFrom)]
        graph[inside(path).removesuffix(".__init__")] = {
            n.removeprefix("kdfuse.engine.") for n in named(tree, path) if ".engine." in n
        }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name in done or name not in graph:
            return
        for other in graph[name] - {name}:
            visit(other, (*way, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", modules("engine"), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_of_the_engine_are_read_in_one_sitting(path: Path):
    most = {"training/loop": 200}
    name = path.relative_to(ROOT / "engine").with_suffix("").as_posix()
    assert len(path.read_text().splitlines()) <= most.get(name, 260), name


def test_links_are_relative_and_whole():
    for name in ("engine", "kernels", "recipes"):
        link = ROOT / "kdfuse" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


def test_no_init_that_would_hide_other_packages():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_hugging_face_kernels_stays_importable_from_the_checkout():
    code = "import kernels, kdfuse.kernels.kd as kd; print(kernels.__file__, kd.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    hub, own = done.stdout.split()
    assert "site-packages" in hub and not hub.startswith(str(ROOT / "kernels"))
    assert own.startswith(str(ROOT))


def test_import_of_the_losses_leaves_the_engine_out():
    code = "import sys, kdfuse; print([m for m in sys.modules if m.startswith('kdfuse.engine')])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_sources_are_ascii_and_name_no_machine():
    for part in ("kernels", "engine", "csrc", "recipes", "kdfuse"):
        for path in (ROOT / part).rglob("*"):
            if path.suffix in {".py", ".h", ".cpp", ".cu", ".yaml", ".pyi"}:
                text = path.read_text()
                assert text.isascii(), path
                assert "/home/" not in text and "/root/" not in text, path
