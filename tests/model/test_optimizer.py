import math
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_map_only

from spo_ray.config.train import GroupConfig
from spo_ray.errors import UserError
from spo_ray.model.optimizer import Group, learning_rates, make_optimizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.LayerNorm(256), nn.Linear(256, 97))  # uneven in shards


def groups_of(model, **options):
    """The first layer is theta, the others phi."""
    named = list(model.named_parameters())
    theta = GroupConfig(lr=1e-2, weight_decay=0.1, warmup_ratio=0.0, schedule="constant", **options)
    phi = GroupConfig(lr=5e-3, weight_decay=0.3, warmup_ratio=0.2, schedule="linear", **options)
    return [Group("theta", dict(named[:2]), theta), Group("phi", dict(named[2:]), phi)]


def train(model, optimizer, groups, steps, total, start=0):
    torch.manual_seed(1)
    x, y = torch.randn(32, 128), torch.randn(32, 97)
    for step in range(start, start + steps):
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        learning_rates(optimizer, groups, step, total)
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def test_a_group_decays_its_matrices_alone():
    model = network()
    optimizer = make_optimizer([*groups_of(model), Group("none", {}, GroupConfig())], "adamw")
    seen = [(g["name"], g["weight_decay"], g["initial_lr"], len(g["params"])) for g in optimizer.param_groups]
    assert seen == [("theta", 0.1, 1e-2, 1), ("theta", 0.0, 1e-2, 1), ("phi", 0.3, 5e-3, 1), ("phi", 0.0, 5e-3, 3)]
    optimized = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(optimized) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_adamws(dtype):
    """Against the formula, with each group's own learning rate and decay."""
    model = network().to(dtype)
    groups = groups_of(model)
    optimizer = make_optimizer(groups, "adamw")
    states = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(3)
    for step in range(3):
        rates = learning_rates(optimizer, groups, step, 10)
        for group in groups:
            for name, p in group.parameters.items():
                p.grad = g = torch.randn_like(p)
                m, v = states[name]
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                decay = rates[group.name] * group.config.weight_decay if p.ndim == 2 else 0.0
                move = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                expected[name] = expected[name] * (1 - decay) - rates[group.name] * move
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, expected[name], atol=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(
    ("schedule", "ratio", "expected"),
    [
        ("linear", 0.4, [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 0.0, [1.0, 1.0, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]),
        ("constant", 0.2, [0.5, *[1.0] * 9]),
        ("cosine", 0.4, [0.25, 0.5, 0.75, 1.0, *[math.cos(math.pi * i / 12) ** 2 for i in range(6)]]),
        ("linear", 1.0, [i / 10 for i in range(1, 11)]),
    ],
)
def test_learning_rates_by_hand(schedule, ratio, expected):
    config = GroupConfig(lr=2e-3, schedule=schedule, warmup_ratio=ratio)
    groups = [Group("theta", {"w": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(torch.zeros(2))}, config)]
    optimizer = make_optimizer(groups, "adamw")
    for step in (7, 0, 9, *range(10)):  # in any order: nothing depends on the steps before
        rates = learning_rates(optimizer, groups, step, 10)
        assert rates == {"theta": pytest.approx(2e-3 * expected[step])}
        assert [g["lr"] for g in optimizer.param_groups] == [rates["theta"]] * 2


def test_groups_have_rates_of_their_own():
    model = network()
    groups = groups_of(model)
    optimizer = make_optimizer(groups, "adamw")
    optimizer.param_groups[2]["lr"] = kept = torch.tensor(0.0)  # as TorchAO keeps it
    assert learning_rates(optimizer, groups, 0, 10) == pytest.approx({"theta": 1e-2, "phi": 2.5e-3})
    assert optimizer.param_groups[2]["lr"] is kept and kept.item() == pytest.approx(2.5e-3)


def sharded(rank, size, kind, folder):
    """A process of its own: the same training in shards."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    model = network()
    fully_shard(model[0])
    fully_shard(model)
    groups = groups_of(model)
    optimizer = make_optimizer(groups, kind)
    train(model, optimizer, groups, 3, 6)
    state = tree_map_only(
        torch.Tensor, lambda value: value.detach().clone(), get_optimizer_state_dict(model, optimizer)
    )
    writing = dcp.async_save(state, checkpoint_id=f"{folder}/state", process_group=dist.new_group(backend="gloo"))
    parameters = [p.detach().clone() for p in model.parameters()]
    first = train(model, optimizer, groups, 3, 6, start=3)
    writing.result()
    model.zero_grad()  # with gradients there, PyTorch takes the new optimizer to be stateless
    optimizer = make_optimizer(groups, kind)  # goes on from the checkpoint, which was written while training went on
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load(state, checkpoint_id=f"{folder}/state")
    set_optimizer_state_dict(model, optimizer, state)
    with torch.no_grad():
        for p, value in zip(model.parameters(), parameters, strict=True):
            p.copy_(value)
    again = train(model, optimizer, groups, 3, 6, start=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if rank == 0:
        torch.save(first, f"{folder}/parameters.pt")
    dist.destroy_process_group()


def in_shards(kind, folder, size):
    folder.mkdir()
    torch.multiprocessing.spawn(sharded, (size, kind, str(folder)), nprocs=size)
    return torch.load(folder / "parameters.pt")


def test_shards_take_the_same_steps_and_go_on_from_a_checkpoint(tmp_path):
    model = network()
    groups = groups_of(model)
    whole = train(model, make_optimizer(groups, "adamw"), groups, 6, 6)
    for a, b in zip(in_shards("adamw", tmp_path / "adamw", 2), whole, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_8_bit_states(tmp_path, monkeypatch):
    """Close to AdamW, alone and in uneven shards, and in a quarter of the memory; compiling takes most of the time."""
    pytest.importorskip("torchao")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    results, start = {}, network()
    for kind in ("adamw", "adamw_8bit"):
        model = network()
        groups = groups_of(model)
        optimizer = make_optimizer(groups, kind)
        results[kind] = train(model, optimizer, groups, 6, 6)
    state = optimizer.state[model[0].weight]["exp_avg"]
    assert state.codes.dtype == torch.uint8 and state.codes.numel() == model[0].weight.numel()
    shards, cached = (in_shards("adamw_8bit", tmp_path / run, 2) for run in ("fresh", "cached"))
    assert all(torch.equal(a, b) for a, b in zip(shards, cached, strict=True))
    for found in (results["adamw_8bit"], shards):
        for parameter, first, reference in zip(found, start.parameters(), results["adamw"], strict=True):
            assert (parameter - reference).norm() < 0.05 * (reference - first).norm()
    assert not torch.equal(results["adamw"][0], results["adamw_8bit"][0])


def test_8_bit_states_without_their_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"needs torchao: pip install 'spo-ray\[low-memory\]'"):
        make_optimizer(groups_of(network()), "adamw_8bit")
