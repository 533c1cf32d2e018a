"""Annotations that were damaged or mean harm: one error that names the file."""

import json

import pytest
from damaged import survives

from kdfuse.engine.detection.coco import read_coco

HELD = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "height": 20, "width": 30} for i in range(3)],
    "annotations": [
        {"id": 9 + i, "image_id": i % 3, "category_id": 1 + i % 2, "bbox": [1.0, 2, 5.5, 6]}
        for i in range(5)
    ],
    "categories": [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}],
}


@pytest.fixture
def annotations(tmp_path):
    (tmp_path / "train2017").mkdir()
    for image in HELD["images"]:
        (tmp_path / "train2017" / image["file_name"]).touch()
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(HELD))
    return path


def test_damaged_annotations(annotations, tmp_path):
    def read():
        read_coco(tmp_path, "train")

    read()
    allowed = (ValueError, FileNotFoundError)
    told = "images are missing"  # of names that became others
    assert survives(read, annotations, 600, *allowed, told=told) > 300


@pytest.mark.parametrize(
    ("part", "name", "value", "why"),
    [
        ("images", "id", 10**400, "image id 1.* is beyond 64 bits"),
        ("images", "height", -1, "image id 0 has height -1, wants 1 to"),
        ("images", "width", 10**30, "image id 0 has width 1000"),
        ("annotations", "bbox", [0, 0, 10**400, 1], "bbox .* wants .left, top, width, height"),
        ("annotations", "bbox", [0, 0, float("nan"), 1], "bbox .* wants .left, top"),
        ("annotations", "category_id", 10**400, "there is no category 1000"),
        ("categories", "name", None, "has name None, wants str"),
    ],
)
def test_numbers_that_cannot_be(part, name, value, why, annotations, tmp_path):
    held = json.loads(json.dumps(HELD))
    held[part][0][name] = value
    annotations.write_text(json.dumps(held))
    with pytest.raises(ValueError, match=f"instances_train2017.json: .*{why}"):
        read_coco(tmp_path, "train")
