"""The Triton kernels, run by Triton's interpreter on CPU tensors (triton_interpreted.py).

Triton decides for the interpreter when it is imported: hence a process of its own for each loss.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from calls import NAMES

from kdfuse.kernels import triton_lang

HERE = Path(__file__).parent
KERNELS = HERE.parent / "kernels"
needs_triton = pytest.mark.skipif(bool(triton_lang.MISSING), reason=triton_lang.MISSING)


@needs_triton
@pytest.mark.parametrize("name", (*NAMES, ""))
def test_interpreted(name):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "KDFUSE_TEST_LOSS": name}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x"]
    done = subprocess.run(
        [*command, str(HERE / "triton_interpreted.py")],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-500:]


def test_nothing_on_the_way_of_a_call_waits_for_the_device():
    waits = {"item", "cpu", "tolist", "numpy", "synchronize", "nonzero", "is_nonzero"}
    for path in (KERNELS / "rows.py", *KERNELS.glob("triton_*.py")):
        called = {
            node.func.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not called & waits, f"{path.name}: {called & waits}"


def test_losses_need_no_triton():
    """Without it the ops import, and backends() says what is missing."""
    code = (
        "import sys; sys.modules['triton'] = None; import kdfuse, torch;"
        "z = torch.randn(4, 9); assert kdfuse.kd_loss(z, z).item() == 0;"
        "print(kdfuse.backends()['triton'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True, check=True
    )
    assert "pip install triton" in done.stdout
