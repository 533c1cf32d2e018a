"""The files of engine/data: each can be imported first, the sampler needs no decoder, and DALI
is loaded where it is used."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from kdfuse.engine.data.loaders import LOADERS
from kdfuse.engine.data.sources import SOURCES
from kdfuse.engine.recipe.data import Data, Ours

pytestmark = pytest.mark.slow(10)

ROOT = Path(__file__).parents[3]

EACH_FIRST = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [m for m in sys.modules if m.startswith("kdfuse.engine")]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""

WITHOUT = """
import sys
import kdfuse.engine.data.plan, kdfuse.engine.data.manifest, kdfuse.engine.data.sources
print([name for name in ("nvidia.dali", "torchvision") if name in sys.modules])
import kdfuse.engine.data.loaders
print("nvidia.dali" in sys.modules)
"""


def run(code, *words):
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_each_file_can_be_imported_first():
    files = sorted((ROOT / "engine/data").rglob("*.py"))
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in files]
    names = [".".join(("kdfuse", *part)).removesuffix(".__init__") for part in parts]
    assert len(names) > 20
    run(EACH_FIRST, *names)


def test_plans_and_manifests_import_no_decoder_and_loaders_no_dali():
    assert run(WITHOUT).split("\n") == ["[]", "False"]


def test_every_source_and_loader_of_the_schema_is_there():
    assert set(SOURCES) == set(get_args(Ours))
    loaders = get_args(Data.model_fields["loader"].annotation)
    assert {"auto", *LOADERS} == set(loaders)
