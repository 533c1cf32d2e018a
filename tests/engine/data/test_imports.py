"""The files of engine/data: the sampler needs no decoder, and DALI is loaded where it is used."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from kdfuse.engine.data.loaders import LOADERS
from kdfuse.engine.data.sources import SOURCES
from kdfuse.engine.recipe.data import Data, Source

pytestmark = pytest.mark.slow(5)

ROOT = Path(__file__).parents[3]

WITHOUT = """
import sys
import kdfuse.engine.data.plan, kdfuse.engine.data.manifest, kdfuse.engine.data.sources
print([name for name in ("nvidia.dali", "torchvision") if name in sys.modules])
import kdfuse.engine.data.loaders
print("nvidia.dali" in sys.modules)
"""


def test_plans_and_manifests_import_no_decoder_and_loaders_no_dali():
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_every_source_and_loader_of_the_schema_is_there():
    assert set(SOURCES) == set(get_args(Source))
    loaders = get_args(Data.model_fields["loader"].annotation)
    assert {"auto", *LOADERS} == set(loaders)
