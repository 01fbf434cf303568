"""Subjective Timescale layers: teacher and student token by token, losses, and what each may see."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from problem import assert_same_bits
from torch import nn

from simplex_ops import topk_route
from simplex_ops.nn import (
    CausalRouter,
    PositionedAttention,
    SubjectiveTimescaleLayer,
    TransitionNetwork,
    anneal_gates,
    route_map,
    routing_loss,
    routing_reports,
    routing_statistics,
)

DIM = 32


class Block(nn.Module):
    """A user's block: attention at positions, its cache, and the residual connection."""

    def __init__(self):
        super().__init__()
        self.attention = PositionedAttention(DIM, 2)
        self.new_cache = self.attention.new_cache

    def forward(self, x, positions, cache=None):
        return x + self.attention(F.rms_norm(x, (DIM,)), positions, cache)


def make(device, passes=2, capacity=0.5):
    layer = SubjectiveTimescaleLayer(Block(), DIM, capacity, window=7, passes=passes).to(device)
    layer.gate.beta.fill_(1.0)
    return layer


def teacher(layer, x):
    """(gates, mask, prior loss) by the equations."""
    positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    post = layer.block(x, positions)
    before = torch.cat((torch.zeros_like(x[:, :1]), post[:, :-1]), 1)
    network = layer.transition
    gate, up = (F.rms_norm(before, (DIM,), network.norm.weight, 1e-6) @ network.wi.weight.t()).chunk(2, -1)
    forecast = (F.silu(gate) * up) @ network.wo.weight.t()
    beta, o, m = layer.gate.beta, F.softplus(layer.gate.o_ce), F.softplus(layer.gate.m_cu)
    g, *_ = reference.surprise_gate(x, post, x + forecast, beta, beta, o, m, 7)
    _, mask = reference.topk_route(g, max(1, int(layer.capacity * x.shape[1])))
    return post, g, mask, (forecast - (post - x)).square().mean()


@pytest.mark.parametrize("passes", [2, 1])
@pytest.mark.parametrize(("length", "capacity"), [(1, 0.5), (2, 0.5), (25, 0.3), (24, 1.0)])
def test_teacher_is_its_equations(device, passes, length, capacity):
    layer, x = make(device, passes, capacity), torch.randn(3, length, DIM, device=device)
    out = layer(x)
    post, g, mask, prior_loss = teacher(layer, x)
    expected = x.clone()
    for b in range(3):
        at = mask[b].nonzero()[:, 0]
        new = layer.block(x[b : b + 1, at], at[None])[0] if passes == 2 else post[b, at]
        expected[b, at] = x[b, at] + g[b, at, None] * (new - x[b, at])
    torch.testing.assert_close(out, expected)
    report = layer.report
    assert torch.equal(report["mask"], mask)
    torch.testing.assert_close(report["gate"], g)
    torch.testing.assert_close(report["prior_loss"], prior_loss)
    logits = reference.causal_route_logits(x, layer.router.weight) + layer.router.bias
    bce = F.binary_cross_entropy_with_logits(logits, mask.float())
    torch.testing.assert_close(report["router_loss"], bce)
    off = (torch.sigmoid(logits).mean() - capacity).square()
    torch.testing.assert_close(routing_loss(layer, 0.0, 0.0, 2.0), 2 * off)
    accuracy = ((logits >= layer.threshold) == mask).float().mean()
    torch.testing.assert_close(report["router_accuracy"], accuracy)
    expected_loss = 0.05 * prior_loss + 0.01 * bce
    torch.testing.assert_close(routing_loss(layer), expected_loss)


def test_student_is_its_equations(device):
    layer, x = make(device).eval(), torch.randn(3, 25, DIM, device=device)
    layer.threshold.fill_(0.2)
    out = layer(x)
    logits = reference.causal_route_logits(x, layer.router.weight) + layer.router.bias
    mask = logits >= 0.2
    expected = x.clone()
    for b in range(3):
        at = mask[b].nonzero()[:, 0]
        expected[b, at] = layer.block(x[b : b + 1, at], at[None])[0]
    torch.testing.assert_close(out, expected)
    assert torch.equal(layer.report["mask"], mask)
    assert_same_bits(out[~mask], x[~mask])


def test_the_router_is_detached_and_learns(device):
    layer, x = make(device), torch.randn(2, 20, DIM, device=device, requires_grad=True)
    layer(x)
    gradients = torch.autograd.grad(layer.report["router_loss"], [x, *layer.parameters()], allow_unused=True)
    names = ["x", *dict(layer.named_parameters())]
    assert {n for n, g in zip(names, gradients, strict=True) if g is not None} == {"router.weight", "router.bias"}
    out = layer(x)
    (out.square().mean() + routing_loss(layer)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_student_learns_what_it_can_see(device):
    """A teacher that looks at one feature of a token and of the one before: the student's accuracy goes to 1."""
    router = CausalRouter(8).to(device)
    optimizer = torch.optim.Adam(router.parameters(), 0.1)
    for _ in range(100):
        x = torch.randn(8, 32, 8, device=device)
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        wanted = (x[..., 0] - 0.5 * before[..., 3] > 0).float()
        logits = router(x)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, wanted).backward()
        optimizer.step()
    assert ((logits > 0) == (wanted > 0)).float().mean() > 0.95


def test_transition_sees_the_past_only(device):
    network, x = TransitionNetwork(DIM).to(device), torch.randn(2, 9, DIM, device=device)
    before = network(x)
    assert before[:, 0].abs().sum() == 0
    x[:, 5:] = torch.randn(2, 4, DIM, device=device)
    assert_same_bits(network(x)[:, :6].contiguous(), before[:, :6].contiguous())
    assert not torch.equal(network(x)[:, 6], before[:, 6])


@pytest.mark.parametrize("training", [True, False])
def test_no_text_sees_another(device, training):
    layer, x = make(device).train(training), torch.randn(3, 24, DIM, device=device)
    before = layer(x)
    x[[0, 2]] = torch.randn(2, 24, DIM, device=device)
    layer.threshold.zero_()
    after = layer(x)
    assert_same_bits(after[1], before[1])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("cut", [1, 11, 23])
def test_under_the_threshold_no_token_sees_a_later_one(device, cut):
    """Strictly: the routes too are free to change behind the cut."""
    layer, x = make(device).eval(), torch.randn(2, 24, DIM, device=device)
    before, routes = layer(x), layer.report["mask"]
    x[:, cut:] = torch.randn(2, 24 - cut, DIM, device=device)
    after = layer(x)
    assert_same_bits(after[:, :cut].contiguous(), before[:, :cut].contiguous())
    assert torch.equal(layer.report["mask"][:, :cut], routes[:, :cut])
    assert not torch.equal(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize("passes", [2, 1])
@pytest.mark.parametrize("capacity", [0.5, 1.0])
def test_routes_equal_no_token_sees_a_later_one_in_training(device, passes, capacity):
    """Nothing but the choice of tokens looks ahead."""
    layer, x = make(device, passes, capacity), torch.randn(2, 24, DIM, device=device)
    before, chosen = layer(x), topk_route(layer.report["gate"].detach(), int(24 * capacity))
    layer.top_k = lambda scores, calibrates=False: chosen
    x[:, 13:] = torch.randn(2, 11, DIM, device=device)
    after = layer(x)
    assert_same_bits(after[:, :13].contiguous(), before[:, :13].contiguous())
    assert not torch.equal(after[:, 13:], before[:, 13:])


def test_calibration_keeps_the_capacity(device):
    layer = make(device, capacity=0.25)
    x = torch.randn(40, 8, 64, DIM, device=device)
    for batch in x[:30]:
        layer(batch)
    share = []
    layer.eval()
    for batch in x[30:]:
        layer(batch)
        share.append(layer.report["mask"].float().mean())
    assert torch.stack(share).mean().item() == pytest.approx(0.25, abs=0.03)


def test_what_keeps_its_dtype(device):
    layer = make(device).to(torch.bfloat16)
    assert {layer.threshold.dtype, layer.calibrations.dtype, layer.block.attention.frequencies.dtype} == {torch.float32}
    assert layer.router.weight.dtype == torch.bfloat16
    with torch.device("meta"):
        layer = SubjectiveTimescaleLayer(Block(), DIM)
    assert layer.to_empty(device=device).threshold.device.type == device


def test_threshold_trades_speed_for_quality(device):
    layer, x = make(device).eval(), torch.randn(2, 64, DIM, device=device)
    shares = []
    for threshold in (-torch.inf, -0.5, 0.5, torch.inf):
        layer.threshold.fill_(threshold)
        layer(x)
        shares.append(layer.report["mask"].float().mean().item())
    assert shares[0] == 1
    assert shares[3] == 0
    assert shares == sorted(shares, reverse=True)
    assert_same_bits(layer(x), x)


def test_schedule_and_statistics(device):
    model = nn.Sequential(make(device), make(device))
    anneal_gates(model, 0.5)
    assert model[1].gate.beta.item() == pytest.approx(10**0.5)
    anneal_gates(model, 2.0)
    assert model[0].gate.beta.item() == pytest.approx(100)
    anneal_gates(model, 0.0)
    model(torch.randn(2, 10, DIM, device=device))
    statistics = routing_statistics(model)
    assert list(statistics) == ["0", "1"]
    row, report = statistics["1"], routing_reports(model)["1"]
    assert row["capacity"] == 0.5
    assert row["s_ce"] == pytest.approx(torch.sigmoid(0.1 * report["ce"]).mean().item(), abs=1e-6)
    assert row["gate_std"] == pytest.approx(report["gate"].std(correction=0).item(), abs=1e-6)
    names, routes = route_map(model)
    assert names == ["0", "1"]
    assert routes.shape == (2, 2, 10)
    assert routing_loss(nn.Linear(2, 2)) == 0


def test_compile(device):
    """In one graph, which is the question here (the ops' own tests go through Inductor); gradients and statistics included."""
    teacher, student = make(device), make(device).eval()
    x = torch.randn(2, 9, DIM, device=device)
    results = []
    for function in (torch.compile(teacher, fullgraph=True, backend="aot_eager"), teacher):
        loss = function(x).square().mean() + routing_loss(teacher)
        results.append([loss, *torch.autograd.grad(loss, list(teacher.parameters()))])
    torch.testing.assert_close(*results)
    compiled = torch.compile(student, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((2, 9), (3, 16)):
            x = torch.randn(*size, DIM, device=device)
            torch.testing.assert_close(compiled(x), student(x))


@pytest.mark.parametrize("training", [True, False])
def test_export(device, training):
    layer = make(device).train(training)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=4)
    first = (torch.randn(2, 9, DIM, device=device),)
    program = torch.export.export(layer, first, dynamic_shapes={"x": {0: batch, 1: length}}).module()
    for size in ((2, 9), (3, 16)):
        x = torch.randn(*size, DIM, device=device)
        torch.testing.assert_close(program(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(device, dtype):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("fp64 is on the CPU only")
    layer, x = make(device).to(dtype), torch.randn(2, 16, DIM, device=device, dtype=dtype)
    for training in (True, False):
        out = layer.train(training)(x)
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert layer.report["gate"].dtype == reference.wide(dtype)


def test_autocast(device):
    layer, x = make(device), torch.randn(2, 16, DIM, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32
        assert layer.report["gate"].dtype == torch.float32


def test_a_copy_takes_no_graph_along(device):
    layer, x = make(device), torch.randn(2, 9, DIM, device=device)
    layer(x)
    copied = copy.deepcopy(layer)
    assert copied.report == {}
    assert layer.report["router_loss"].requires_grad
    assert_same_bits(copied.eval()(x), layer.eval()(x))


def test_refusals():
    with pytest.raises(ValueError, match="SubjectiveTimescaleLayer: expected passes to be 1 or 2, got 3"):
        make("cpu", passes=3)
    with pytest.raises(
        ValueError, match="SubjectiveTimescaleLayer: expected capacity to be above 0 and at most 1, got 0"
    ):
        make("cpu", capacity=0)
    with pytest.raises(ValueError, match="PositionedAttention: expected heads to be a multiple of kv_heads"):
        PositionedAttention(32, 3, 2, 8)
    with pytest.raises(ValueError, match="PositionedAttention: expected head_dim to be even, got 7"):
        PositionedAttention(32, 2, 2, 7)
