"""The shipped recipes against the published tables, which stand here once more."""

import contextlib
import importlib.util
from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn

from kdfuse.engine import models
from kdfuse.engine.recipe.load import Recipe, recipes
from kdfuse.engine.report.tables import published

# A line of columns, then lines of a row's name and its numbers; - where none is published or where
# no recipe is meant to reach it.
TABLES = {
    "slkd/1": """
            R32x4->R8x4 R56->R8 WRN40-2->WRN40-1 WRN40-2->WRN16-2 VGG13->VGG11 VGG13->VGG8
        Teacher     79.42 72.34 75.61 75.61 74.64 74.64
        Student     72.50 59.98 71.98 73.26 71.32 70.36
        AT          73.44 58.41 72.77 74.08 73.63 71.43
        SP          72.94 58.49 72.65 73.89 74.88 73.36
        RKD         71.90 58.06 72.22 73.35 73.29 71.48
        OFD         74.95 57.42 74.33 75.24 75.14 73.95
        CRD         75.51 60.94 74.14 75.48 74.02 73.94
        ReviewKD    75.63 60.27 75.09 76.12 75.32 74.84
        DKD         76.32 61.62 74.81 76.24 74.92 74.68
        KD          73.33 60.17 73.54 74.92 74.54 72.98
        SLKD        76.85 62.05 74.91 76.31 75.46 75.01
    """,
    "slkd/families": """
            R32x4->ShuV2 R32x4->ShuV1 R50->MV2 VGG13->MV2 WRN40-2->ShuV1
        Teacher     79.42 79.42 79.34 74.64 75.61
        Student     71.82 70.50 64.60 64.60 70.50
        KD          74.45 74.07 67.35 67.37 74.83
        AT          72.73 71.73 58.58 59.40 73.32
        SP          75.75 75.51 68.61 66.74 75.94
        RKD         73.21 72.28 64.43 64.52 72.21
        OFD         76.82 75.98 69.04 69.48 75.85
        CRD         75.65 75.11 69.11 69.73 76.05
        ReviewKD    77.78 77.45 69.89 70.37 77.14
        SLKD        77.26 76.17 70.43 69.94 76.72
    """,
    "slkd/5": """
                R56   R110  R50   R32x4
        KD      71.04 70.71 70.55 69.21
        SLKD    71.13 71.20 70.98 70.38
    """,
    "slkd/6": """
                R110  VGG13 WRN40-2 R32x4
        KD      74.94 74.69 75.31 74.37
        SLKD    75.29 75.42 76.31 75.08
    """,
    "slkd/7": """
                    R32x4->R8x4 VGG13->MV2
        T           73.33 67.37
        SL-T        75.71 68.76
        T and SL-T  76.13 69.25
    """,
    "slkd/8": """
            R32x4->R8x4 R56->R8 WRN40-2->WRN40-1 WRN40-2->WRN16-2 VGG13->VGG11 VGG13->VGG8
        SLKD*   75.61 61.99 74.60 75.78 74.96 74.41
    """,
    "slkd/9": """
            R32x4->ShuV2 R32x4->ShuV1 R50->MV2 VGG13->MV2 WRN40-2->ShuV1
        SLKD*   76.12 75.34 68.29 69.36 76.29
    """,
    "repdistiller/1": """
            R56->R20 R110->R20 R110->R32 R32x4->R8x4 WRN40-2->WRN16-2 WRN40-2->WRN40-1 VGG13->VGG8
        Teacher 72.34 74.31 74.31 79.42 75.61 75.61 74.64
        Student 69.06 69.06 71.14 72.50 73.26 71.98 70.36
        KD      70.66 70.67 73.08 73.33 74.92 73.54 72.98
        FitNet  69.21 68.99 71.06 73.50 73.58 72.24 71.02
        AT      70.55 70.22 72.31 73.44 74.08 72.77 71.43
        SP      69.67 70.04 72.69 72.94 73.83 72.43 72.68
        VID     70.38 70.16 72.61 73.09 74.11 73.30 71.23
        RKD     69.61 69.25 71.82 71.90 73.35 72.22 71.48
        PKT     70.34 70.25 72.61 73.64 74.54 73.45 72.88
        NST     69.60 69.53 71.96 73.30 73.68 72.24 71.53
        CRD     71.16 71.46 73.48 75.51 75.48 74.14 73.94
    """,
    "repdistiller/families": """
            R32x4->ShuV2 R32x4->ShuV1 R50->MV2 VGG13->MV2 WRN40-2->ShuV1
        SP  74.56 73.48 68.08 66.30 74.52
    """,
    "mdistiller/cifar100": """
            R56->R20 R110->R32 R32x4->R8x4 WRN40-2->WRN16-2 WRN40-2->WRN40-1 VGG13->VGG8 \
            R32x4->ShuV2 R32x4->ShuV1 R50->MV2 VGG13->MV2 WRN40-2->ShuV1
        DKD 71.97 74.11 76.32 76.23 74.81 74.68 77.07 76.45 70.35 69.71 76.70
    """,
    "mdistiller/imagenet": """
                R34->R18 R50->MV1
        KD      71.03 70.50
        DKD     71.70 72.05
    """,
    "logit-std/cifar100": """
            R56->R20 R110->R20 R110->R32 R32x4->R8x4 WRN40-2->WRN16-2 WRN40-2->WRN40-1 VGG13->VGG8 \
            R32x4->ShuV2 R50->MV2 VGG13->MV2
        DKD     - 71.06 - - - - - - - -
        KD+LS   71.43 71.48 74.17 76.62 76.11 74.37 74.36 75.56 69.02 68.61
        DKD+LS  72.32 71.85 74.29 77.01 76.39 74.89 74.81 77.37 70.45 69.98
    """,
    "logit-std/logs": """
            R32x4->R8x4 WRN40-2->WRN16-2 WRN40-2->WRN40-1 VGG13->VGG8 R56->R20 R110->R32 R110->R20 \
            R32x4->ShuV2 R50->MV2 VGG13->MV2 WRN40-2->R8x4
        KD+LS   76.66 76.08 74.56 74.69 71.53 74.24 71.46 75.79 69.21 69.45 77.03
        DKD+LS  77.14 76.27 74.93 74.69 72.24 74.27 71.86 77.45 70.91 70.12 76.94
    """,
    "logit-std/imagenet": """
                R34->R18
        KD+LS   71.45
    """,
    "ctkd/cifar100": """
            R56->R20 R110->R20 R110->R32 R32x4->R8x4 WRN40-2->WRN16-2 WRN40-2->WRN40-1 VGG13->VGG8
        CTKD    71.19 70.99 73.52 73.39 75.45 73.93 73.52
    """,
    "ctkd/imagenet": """
                    R34->R18
        CTKD        71.32
        CTKD+DKD    71.51
    """,
    "dist/cifar100": """
            R56->R20 R32x4->R8x4 WRN40-2->WRN40-1 R32x4->ShuV2 R32x4->ShuV1 R50->MV2
        DIST    71.75+-.30 76.31+-.19 74.43+-.24 77.35+-.25 76.34+-.18 68.66+-.23
    """,
    "dist/imagenet": """
            R34->R18 R50->R18 R101->R18 R152->R18 R50->R34 R101->R34 R152->R34 R50->MV1
        KD (T = 4)  71.21 71.35 71.09 71.12 74.73 74.89 74.87 -
        DIST        72.07 72.12 72.08 72.24 75.06 75.36 75.42 73.24
    """,
    "simkd/cifar100": """
                        R32x4->R8x4 R32x4->VGG8 R32x4->ShuV2x1.5
        Teacher         79.42 79.42 79.42
        Student         73.09 70.46 74.15
        KD              74.42 72.73 76.82
        FitNet          74.32 72.91 77.12
        AT              75.07 71.90 77.51
        SP              74.29 73.12 77.18
        VID             74.55 73.19 77.11
        CRD             75.59 73.54 77.66
        SimKD, f = 8    76.73 74.74 78.96
        SimKD, f = 4    77.88 75.62 79.48
        SimKD, f = 2    78.08 75.76 79.54
    """,
    "simkd/study": """
                                        L2         KL
        SimKD                           75.43      -
        two projectors, with bias       75.52+-.18 66.88+-3.78
        right labels alone              75.41+-.48 66.87+-3.78
        a projector after each stage    53.23+-.38 72.6+-.41
    """,
    "simkd/imagenet": """
                R50->R18
        SimKD   71.66
    """,
    "jointrd/cifar100": """
                            CIFAR-100
        JointRD             78.16+-.20
        KD(logits)+Dirac    70.93+-3.36
        KD(MSE_ALL)+Dirac   63.82+-9.97
        ResNet50            78.39+-.40
    """,
    "takd/cifar100": """
                            R110  R20   R8
        alone               72.38 67.03 61.37
        from R110           -     68.11 61.41
        from R110 by R20    -     -     61.82
    """,
    "reviewkd/imagenet": """
                    R34->R18 R50->MV1
        ReviewKD    71.61 72.56
    """,
    "torchdistill/imagenet": """
                R34->R18
        KD      71.37
        AT      70.90
        CRD     70.93
    """,
    "nkd/imagenet": """
                R34->R18 R50->MV1 DeiT-III-S->DeiT-T DeiT-III-L->DeiT-B
        NKD     71.96 72.58 76.68 84.96
    """,
    "nkd/temperature": """
                1     2     3     4
        NKD     80.55 80.76 80.72 80.54
    """,
    "nkd/terms": """
                ResNet18
        T1      71.96
        T2      70.91
        T1+T2   71.70
    """,
    "wttm/cifar100": """
            WRN40-2->WRN16-2 WRN40-2->WRN40-1 R56->R20 R110->R20 R110->R32 R32x4->R8x4 VGG13->VGG8 \
            VGG13->MV2 R50->MV2 R50->VGG8 R32x4->ShuV1 R32x4->ShuV2 WRN40-2->ShuV1
        TTM     76.23+-.15 74.32+-.31 71.83+-.16 71.46+-.16 73.97+-.23 76.17+-.28 74.33+-.07 \
            68.98+-.85 69.24+-.31 74.87+-.31 74.18+-.26 76.57+-.26 75.39+-.33
        WTTM    76.37+-.10 74.58+-.26 71.92+-.40 71.67+-.28 74.13+-.37 76.06+-.27 74.44+-.19 \
            69.16+-.20 69.59+-.58 74.82+-.28 74.37+-.39 76.55+-.08 75.42+-.34
    """,
    "wttm/imagenet": """
                R34->R18 R50->MV1
        WTTM    72.19 73.09
    """,
    "tf-nkd/imagenet": """
            MobileNetV1 MobileNetV2 ShuffleNetV2 ResNet18 ResNet50 Swin-T
        tf-NKD      70.04 72.08 69.93 70.76 76.93 81.48
    """,
    "uskd/imagenet": """
        ResNet18 MobileNetV1 MobileNetV2 ShuffleNetV2 ResNet50 ResNet101 RegNetX-1.6 Swin-T DeiT-T
        baseline    69.90 69.21 - - - - - - -
        USKD        70.79 70.38 72.41 70.30 77.07 78.54 77.30 81.49 74.97
    """,
    "uskd/terms": """
                    ResNet18
        T1 (S1)     70.79
        T2 (S1)     69.50
        T1+T2 (S1)  70.22
        T1 (S2)     70.36
    """,
    "uskd/mu": """
                0.002 0.003 0.005 0.007 0.01  0.02
        USKD    70.61 70.69 70.79 70.77 70.63 70.18
    """,
    "uskd/square": """
                MobileNetV1 RegNetX-1.6
        S       70.04 76.79
        S^2     70.18 76.87
    """,
}
# Whose published number is known to be that of the best epoch; of all others it is not known.
BEST = {
    "mdistiller/cifar100", "mdistiller/imagenet", "simkd/cifar100", "simkd/imagenet",
    "takd/cifar100", "logit-std/logs", "logit-std/imagenet",
}  # fmt: skip
CLASSES = {"cifar100": 100, "digits": 10, "glyphs": 100, "imagenet": 1000, "photos": 5}
Cells = dict[tuple[str, str], tuple[float, float | None]]


def read(text: str) -> Cells:
    """Number and spread by row and column."""
    header, *lines = [line for line in text.strip().splitlines() if line.strip()]
    columns = header.split()
    found: Cells = {}
    for line in lines:
        row, *values = line.rsplit(maxsplit=len(columns))
        for column, value in zip(columns, values, strict=True):
            if value != "-":
                number, _, spread = value.partition("+-")
                found[row.strip(), column] = float(number), float(spread) if spread else None
    return found


@cache
def shipped() -> dict[str, Recipe]:
    """Every recipe for classification."""
    names = [name for name in recipes() if name.split("/")[0] in CLASSES]
    return {name: Recipe.load(name) for name in names}


@cache
def network(name: str, classes: int) -> nn.Module:
    """Without memory for its weights, but for the one family that computes its widths in torch."""
    if name.startswith("timm:") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with contextlib.nullcontext() if "regnet" in name else torch.device("meta"):
        return models.create(name, classes)


def test_every_cell_of_every_table_has_its_recipe_and_number() -> None:
    tables = published(shipped().values())
    assert set(tables) == set(TABLES)
    for name, text in TABLES.items():
        cells = {place: entry.cell for place, entry in tables[name].entries.items()}
        assert {p: (c.top1, c.spread) for p, c in cells.items()} == read(text), name
        assert {c.which for c in cells.values()} == {"best" if name in BEST else "unknown"}, name


@pytest.mark.parametrize("name", shipped())
def test_its_networks_have_what_its_method_reads(name: str) -> None:
    recipe, classes = shipped()[name], CLASSES[name.split("/")[0]]
    points = {"student": models.points(network(recipe.student.name, classes))}
    if recipe.teacher is not None:
        points["teacher"] = models.points(network(recipe.teacher.name, classes))
    beside = recipe.slt or recipe.teacher
    if recipe.method.slt_count and beside is not None:
        points["slts"] = models.points(network(beside.name, classes))
    recipe.method.reads(points)  # type: ignore[arg-type]
    for assistant in recipe.assistants:
        network(assistant.name, classes)


def test_the_same_settings_are_not_written_twice() -> None:
    told = {"name", "description", "expect"}
    seen: dict[str, list[str]] = {}
    for name, recipe in shipped().items():
        seen.setdefault(recipe.model_dump_json(exclude=told), []).append(name)
    assert [names for names in seen.values() if len(names) > 1] == []


def test_all_but_imagenets_recipes_need_nothing_but_the_data_set() -> None:
    trained: Counter[str] = Counter()
    for name, recipe in shipped().items():
        for guide in (recipe.teacher, *recipe.assistants):
            if guide is None:
                continue
            assert (guide.trained_by is None) == name.startswith("imagenet/"), name
            if guide.trained_by is not None:
                first = Recipe.load(guide.trained_by, guide.trained_with)
                assert first.student.name == guide.name, name
                assert (first.data, first.optim.lr > 0) == (recipe.data, True), name
                assert any(word.startswith("run.seed=") for word in guide.trained_with), name
                trained[guide.trained_by] += 1
    assert trained["cifar100/ce:resnet32x4"] > 20
