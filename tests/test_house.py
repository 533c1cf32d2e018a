"""The house: which part may import which, and what every checkout must keep."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = {"kernels": set(), "engine": {"kernels"}}


SHARED = {"recipe"}
OPS = {"kd", "dkd", "nkd", "tf_nkd", "uskd", "slkd"}


def modules(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports from kdfuse, relative ones resolved."""
    package = ["kdfuse", *path.relative_to(ROOT).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_engine_folders_import_only_themselves_and_the_schema():
    for folder in ("data", "models", "methods"):
        for path in modules(f"engine/{folder}"):
            for name in imports(path):
                parts = name.split(".")
                if parts[1:2] == ["engine"] and len(parts) > 2:
                    assert parts[2] in {folder, *SHARED}, f"{path} may not import {name}"


def test_runs_know_nothing_of_what_shows_them():
    arrows = {"run": {"report", "cli"}, "report": {"training", "detection", "cli"}}
    for folder, forbidden in arrows.items():
        for path in modules(f"engine/{folder}"):
            for name in imports(path):
                parts = name.split(".")
                if parts[1:2] == ["engine"] and len(parts) > 2:
                    assert parts[2] not in forbidden, f"{path} may not import {name}"


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
