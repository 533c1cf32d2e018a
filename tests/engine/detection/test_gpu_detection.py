"""Detectors on a GPU: compiled backbones give the losses of eager ones, for images of any size."""

import pytest

pytest.importorskip("pydantic")  # the engine's, which the losses do without

import torch
from on_gpu import MARKS
from test_detection import SMALL, STUDENT, batch_of, coco_root, data  # noqa: F401 - fixtures
from torch import nn

from kdfuse.engine.detection.distiller import DetectionDistiller
from kdfuse.engine.detection.method import NKD
from kdfuse.engine.detection.networks import create
from kdfuse.engine.detection.recipe import Detector
from kdfuse.engine.training.compiled import compiling

pytestmark = MARKS


@pytest.mark.parametrize("amp", [False, True])
def test_compiled_backbones_give_the_losses_of_eager_ones(amp, data):  # noqa: F811
    images, targets = batch_of(data)
    found = {}
    for compile in (False, True):
        with compiling(compile):
            torch.manual_seed(0)
            student, teacher = create(STUDENT, data, 2), create(Detector(**SMALL), data, 2)
            distiller = DetectionDistiller(NKD(), student, teacher, amp=amp).cuda().train()
            for frozen in distiller._teachers:
                frozen.cuda()
            if compile:
                distiller.prepare(("student", "teacher"))
            for wider in (0, 40):
                torch.manual_seed(1)
                given = [nn.functional.pad(image, (0, wider)).cuda() for image in images]
                boxes = [{k: v.cuda() for k, v in target.items()} for target in targets]
                loss, _ = distiller({}, given, boxes)
                loss.backward()
                found[compile, wider] = loss.item()
    for wider in (0, 40):
        # Which RoIs are drawn follows from scores, whose last digits differ.
        assert found[True, wider] == pytest.approx(found[False, wider], rel=0.1)
