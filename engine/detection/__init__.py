"""Object detection: Faster R-CNN on COCO's layout, its classification logits distilled."""
