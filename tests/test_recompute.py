"""What a CPU recomputes, against the layers as written: values, gradients, and how much is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mae_transfer import build_vit, recompute
from mae_transfer.attention import Attention
from mae_transfer.recompute import gelu_linear, norm_linear
from mae_transfer.vit import Block, VisionTransformer


@pytest.fixture(autouse=True)
def narrow_layers_too(monkeypatch) -> None:
    monkeypatch.setattr(recompute, "MIN_WIDTH", 0)


@pytest.mark.parametrize("bias", [True, False])
def test_functions_against_finite_differences(bias: bool) -> None:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(5, eps=1e-6).double(), nn.Linear(5, 4, bias=bias).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weights = [p for module in (norm, linear) for p in module.parameters()]
    torch.testing.assert_close(norm_linear(x, norm, linear), linear(norm(x)))
    torch.testing.assert_close(gelu_linear(x, linear), linear(nn.functional.gelu(x)))
    assert type(norm_linear(x, norm, linear).grad_fn).__name__ == "NormLinearBackward"
    assert torch.autograd.gradcheck(lambda x, *_: norm_linear(x, norm, linear), (x, *weights))
    assert torch.autograd.gradcheck(lambda x, *_: gelu_linear(x, linear), (x, *linear.parameters()))


def gradients(vit: VisionTransformer, images: Tensor, autocast: bool) -> dict[str, Tensor]:
    vit.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = vit(images).float().square().mean()
    loss.backward()
    found = {name: p.grad.double() for name, p in vit.named_parameters() if p.grad is not None}
    assert all(p.grad.dtype == p.dtype for p in vit.parameters() if p.grad is not None)
    return {"loss": loss.detach().double(), **found}


def test_bf16_gradients_are_no_worse_than_autocasts(monkeypatch) -> None:
    """Against float64, over several weights and images, as single tensors differ by their luck in rounding."""
    worse = []
    for seed in range(3):
        torch.manual_seed(seed)
        vit = build_vit("tiny", image_size=32, patch_size=8, depth=4)
        images = torch.randn(8, 3, 32, 32)
        errors = {}
        ours, plain = gradients(vit, images, True), {}
        with monkeypatch.context() as patch:
            patch.setattr(recompute, "ON_CPU", False)
            plain = gradients(vit, images, True)
            exact = gradients(vit.double(), images.double(), False)
        for name, found in (("ours", ours), ("plain", plain)):
            errors[name] = {key: (found[key] - exact[key]).norm() / exact[key].norm() for key in exact}
        assert ours.keys() == plain.keys() == exact.keys()
        worse += [(errors["ours"][key] / errors["plain"][key]).item() for key in exact if key != "loss"]
        assert errors["ours"]["loss"] < 0.005
        assert max(errors["ours"].values()) < 1.2 * max(errors["plain"].values())
    assert sum(worse) / len(worse) < 1.03


def kept_bytes(run: Callable[[], Tensor], besides: nn.Module) -> int:
    parameters = {p.untyped_storage().data_ptr() for p in besides.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        out = run()
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_block_keeps_little_more_than_half(monkeypatch) -> None:
    block = Block(Attention(64, 4), 64)
    x = torch.randn(32, 50, 64, requires_grad=True)
    copied = 2 * block.attn.proj.weight.numel()  # in bf16
    tokens = 32 * 50 * 64
    # Twice x in float32; q, k, v and what attention gives; the hidden layer.
    expected = tokens * (2 * 4 + 3 * 2 + 2 + 4 * 2)
    ours = kept_bytes(lambda: block(x), block)
    assert ours - copied == pytest.approx(expected, rel=0.03)
    monkeypatch.setattr(recompute, "ON_CPU", False)
    assert kept_bytes(lambda: block(x), block) > 1.6 * ours


def test_narrow_blocks_keep_everything(monkeypatch) -> None:
    monkeypatch.setattr(recompute, "MIN_WIDTH", 384)
    x = torch.randn(1, 3, 384, requires_grad=True)
    narrow, wide = Block(Attention(192, 3), 192), Block(Attention(384, 6), 384)
    names = []
    for block, width in ((narrow, 192), (wide, 384)):
        hidden = norm_linear(x[..., :width], block.norm2, block.mlp.fc1)
        out = gelu_linear(hidden, block.mlp.fc2)
        names.append([type(tensor.grad_fn).__name__ for tensor in (hidden, out)])
    assert names == [["ViewBackward0", "ViewBackward0"], ["NormLinearBackward", "GeluLinearBackward"]]


def test_layers_that_are_not_plain_are_called_as_they_are() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(1, 2, 4, requires_grad=True)
    norm, linear, doubled = nn.LayerNorm(4), nn.Linear(4, 4), Doubled(4, 4)
    torch.testing.assert_close(norm_linear(x, norm, doubled), doubled(norm(x)))
    torch.testing.assert_close(gelu_linear(x, doubled), doubled(nn.functional.gelu(x)))
    torch.testing.assert_close(norm_linear(x, nn.Identity(), linear), linear(x))
    seen: list[str] = []
    norm.register_forward_hook(lambda *_: seen.append("norm"))
    linear.register_full_backward_hook(lambda *_: seen.append("linear"))
    norm_linear(x, norm, linear).sum().backward()
    assert seen == ["norm", "linear"]


def test_frozen_parameters_get_no_gradient_and_the_others_theirs() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    for trained in ("norm1.weight", "attn.qkv.bias", "mlp.fc1.weight", "mlp.fc2.bias"):
        block = Block(Attention(8, 2), 8).requires_grad_(False)
        parameter = block.get_parameter(trained).requires_grad_(True)
        block(x).square().sum().backward()
        assert [name for name, p in block.named_parameters() if p.grad is not None] == [trained]
        found, parameter.grad = parameter.grad, None
        assert found is not None
        recompute.ON_CPU = False
        try:
            block(x).square().sum().backward()
        finally:
            recompute.ON_CPU = True
        torch.testing.assert_close(found, parameter.grad)


def train_on(rank: int, strategy: str, autocast: bool, store: str, results: str) -> None:
    """Three steps of one of two processes, each on its half of the batch; the main one saves the weights."""
    recompute.MIN_WIDTH = 0
    torch.set_num_threads(1)
    if strategy != "alone":
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    vit = build_vit("tiny", image_size=16, patch_size=8, depth=2)
    images = torch.randn(3, 4, 3, 16, 16)[:, slice(None) if strategy == "alone" else slice(2 * rank, 2 * rank + 2)]
    module: nn.Module = vit
    if strategy == "fsdp2":
        for block in vit.blocks:
            fully_shard(block)
        fully_shard(vit)
    elif strategy == "ddp":
        module = DistributedDataParallel(vit)
    optimizer = torch.optim.SGD(vit.parameters(), lr=0.05)
    for step_images in images:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module(step_images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in vit.state_dict().items()}
    if rank == 0:
        torch.save(state, results)
    if strategy != "alone":
        dist.destroy_process_group()


@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_weights_sharded_or_not_train_as_in_one_process(strategy: str, autocast: bool, tmp_path: Path) -> None:
    alone, shared = str(tmp_path / "alone.pt"), str(tmp_path / "shared.pt")
    mp.spawn(train_on, ("alone", autocast, "", alone), 1)
    mp.spawn(train_on, (strategy, autocast, str(tmp_path / "store"), shared), 2)
    expected, found = torch.load(alone), torch.load(shared)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-3 if autocast else 2e-5, msg=name)
