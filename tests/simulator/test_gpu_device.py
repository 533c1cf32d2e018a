"""The instructions of csrc/core/device.h on a GPU, beside their host twins (device.cu)."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
]


def test_a_gpu_agrees_with_the_host_twins(tmp_path):
    program = tmp_path / "twins"
    source = Path(__file__).with_name("device.cu")
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    subprocess.run(["nvcc", "-std=c++17", f"-arch={arch}", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": 0 of ") == 10
