"""The losses in other people's loops: trained with them and with the usual PyTorch calls, a network
ends with the same weights but for rounding.

The usual calls stand here as those repositories write them, and share nothing with kdfuse.
"""

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kdfuse import dkd_loss, kd_loss

pytestmark = pytest.mark.slow(40)
T, STEPS, N, CLASSES = 4.0, 5, 8, 10


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # accelerate sets it, and leaves it


def hinton(student, teacher, target):
    kl = F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction="batchmean")
    return 0.1 * F.cross_entropy(student, target) + 0.9 * T**2 * kl


def fused(student, teacher, target):
    return kd_loss(student, teacher, target, temperature=T, kd_weight=0.9, ce_weight=0.1)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def batches(rows=slice(None)):
    torch.manual_seed(7)
    made = [(torch.randn(N, 3, 4, 4), torch.randint(CLASSES, (N,))) for _ in range(STEPS)]
    return [(images[rows], target[rows]) for images, target in made]


def given(images):
    with torch.no_grad():
        return 3 * network(1)(images)


def train(loss, wrap=lambda module: module, rows=slice(None), student=None):
    student = network(0) if student is None else student
    wrapped = wrap(student)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    for images, target in batches(rows):
        optimizer.zero_grad()
        loss(wrapped(images), given(images), target).backward()
        optimizer.step()
    return student


def assert_alike(one, other):
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-5)
    moved = (one.state_dict()["1.weight"] - network(0).state_dict()["1.weight"]).abs().max()
    assert moved > 1e-3  # a hundred times what they may differ by


def test_a_plain_loop():
    assert_alike(train(fused), train(hinton))


class Distiller(nn.Module):
    """As mdistiller's: a dict of losses, of which its trainer takes the sum."""

    def __init__(self, student, loss):
        super().__init__()
        self.student, self.loss = student, loss

    def forward_train(self, image, target, epoch):
        logits = self.student(image)
        losses = {
            "loss_ce": F.cross_entropy(logits, target),
            "loss_kd": min(epoch / 2, 1.0) * self.loss(logits, given(image), target),
        }
        return logits, losses


def released_dkd(student, teacher, target):
    """alpha = 1, beta = 8, as Zhao et al. released it."""
    own = F.one_hot(target, CLASSES).bool()
    p, q = F.softmax(student / T, 1), F.softmax(teacher / T, 1)
    both = [torch.stack([(x * own).sum(1), (x * ~own).sum(1)], 1) for x in (p, q)]
    tckd = F.kl_div(both[0].log(), both[1], reduction="sum") * T**2 / len(target)
    z, t = student / T - 1000.0 * own, teacher / T - 1000.0 * own
    nckd = F.kl_div(F.log_softmax(z, 1), F.softmax(t, 1), reduction="sum") * T**2 / len(target)
    return tckd + 8 * nckd


def test_mdistiller():
    def trained(loss):
        distiller = Distiller(network(0), loss)
        optimizer = torch.optim.SGD(distiller.student.parameters(), lr=0.01)
        for epoch, (images, target) in enumerate(batches(), 1):
            _, losses = distiller.forward_train(images, target, epoch)
            optimizer.zero_grad()
            sum(loss.mean() for loss in losses.values()).backward()
            optimizer.step()
        return distiller.student

    own = trained(lambda z, t, y: dkd_loss(z, t, y, alpha=1.0, beta=8.0, temperature=T))
    assert_alike(own, trained(released_dkd))


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
def test_timm_with_mixup():
    """A loop as timm's train.py: Mixup gives class probabilities, its loss takes them."""
    import numpy as np
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy

    def trained(loss):
        np.random.seed(0)
        mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES)
        student = network(0)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
        for images, target in batches():
            images, soft = mix(images, target)
            optimizer.zero_grad()
            loss(student(images), given(images), soft).backward()
            optimizer.step()
        return student

    def usual(z, t, soft):
        kl = F.kl_div(F.log_softmax(z / T, 1), F.softmax(t / T, 1), reduction="batchmean")
        return 0.1 * SoftTargetCrossEntropy()(z, soft) + 0.9 * T**2 * kl

    assert_alike(trained(fused), trained(usual))


def test_torch_compile():
    torch.compiler.reset()
    assert_alike(train(torch.compile(fused, fullgraph=True)), train(hinton))


def test_torch_export():
    class Both(nn.Module):
        def forward(self, student, teacher, target):
            return fused(student, teacher, target)

    torch.manual_seed(0)
    one = torch.randn(N, CLASSES), torch.randn(N, CLASSES), torch.randint(CLASSES, (N,))
    program = torch.export.export(Both(), one)
    other = torch.randn(N, CLASSES), torch.randn(N, CLASSES), torch.randint(CLASSES, (N,))
    assert torch.equal(program.module()(*other), fused(*other))
    torch.testing.assert_close(program.module()(*other), hinton(*other))


@pytest.mark.long
def test_a_package_of_aotinductor_takes_the_reference(tmp_path):
    class Both(nn.Module):
        def forward(self, student, teacher, target):
            return kd_loss(student, teacher, target, ce_weight=0.1, backend="reference")

    one = torch.randn(N, CLASSES), torch.randn(N, CLASSES), torch.randint(CLASSES, (N,))
    program = torch.export.export(Both(), one)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "l.pt2"))
    found = torch._inductor.aoti_load_package(path)(*one)
    torch.testing.assert_close(found, kd_loss(*one, ce_weight=0.1))


def halves():
    """Half of each batch a process, and the weights of a loop over whole ones."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    try:
        rows = slice(dist.get_rank() * N // 2, (dist.get_rank() + 1) * N // 2)
        whole = train(hinton)
        assert_alike(train(fused, DistributedDataParallel, rows), whole)
        sharded = train(fused, fully_shard, rows)
        state = {name: value.full_tensor() for name, value in sharded.state_dict().items()}
        gathered = network(0)
        gathered.load_state_dict(state)
        assert_alike(gathered, whole)
    finally:
        dist.destroy_process_group()


def test_ddp_and_fsdp2():
    together(2, halves)


@pytest.mark.skipif(find_spec("lightning") is None, reason="needs lightning")
def test_lightning():
    import lightning

    class Distilled(lightning.LightningModule):
        def __init__(self, loss):
            super().__init__()
            self.student, self.loss = network(0), loss

        def training_step(self, batch, number):
            images, target = batch
            return self.loss(self.student(images), given(images), target)

        def configure_optimizers(self):
            return torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)

    def trained(loss):
        module = Distilled(loss)
        trainer = lightning.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(batches(), batch_size=None)
        trainer.fit(module, loader)
        return module.student

    assert_alike(trained(fused), trained(hinton))


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_hugging_face_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    def trained(loss):
        class Distilling(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                logits = model(inputs["pixel_values"])
                return loss(logits, given(inputs["pixel_values"]), inputs["labels"])

        arguments = TrainingArguments(
            str(tmp_path), max_steps=STEPS, per_device_train_batch_size=N, learning_rate=1e-2,
            report_to=[], save_strategy="no", remove_unused_columns=False, use_cpu=True, seed=0,
        )  # fmt: skip
        items = [
            {"pixel_values": image, "labels": label}
            for images, target in batches()
            for image, label in zip(images, target, strict=True)
        ]
        student = network(0)
        Distilling(student, arguments, train_dataset=items).train()
        return student

    assert_alike(trained(fused), trained(hinton))
