"""The code blocks of a page, and its Python run in order and in one namespace."""

import ast
import re
from importlib.util import find_spec

# What a page takes for granted.
PRELUDES = {
    "README.md": """
import torch
from torch import nn
student, slt1, slt2 = (torch.randn(8, 100, requires_grad=True) for _ in range(3))
teacher = torch.randn(8, 100)
target = torch.randint(100, (8,))
network, large = (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)) for _ in range(2))
large[1].weight.data.copy_(10 * torch.eye(10, 192))
pixels = torch.eye(10, 192).view(10, 3, 8, 8)
train_set = val_set = [(pixels[row % 10], row % 10) for row in range(80)]
""",
    "python.md": """
from pathlib import Path
from kdfuse.engine.data.sources.digits import write_digits
write_digits(Path("photos"))
""",
}
NEEDED = re.compile(r"^(?:import|from) (\w+)", re.M)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def missing(block):
    """The first module that a block imports and that is not installed."""
    return next((name for name in NEEDED.findall(block) if find_spec(name) is None), None)


def ran(page):
    """Runs them, and says so of each."""
    space = {"__name__": "page"}
    exec(PRELUDES.get(page.name, ""), space)
    for number, block in enumerate(blocks(page, "python"), 1):
        ast.parse(block)
        if name := missing(block):
            print(f"block {number} is left out: no {name} here", flush=True)
            continue
        exec(compile(block, f"{page.name}, block {number}", "exec"), space)
        print(f"block {number} ran", flush=True)
