"""Routed layers: their equations token by token, and that no token sees another sequence or, the routes equal, the future."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from problem import assert_same_bits
from torch import nn

from simplex_ops import topk_route
from simplex_ops.nn import DecisionLayer, DynamicLayer, MixtureOfDepthsLayer, PriorFFN, SurpriseGate

DIM = 32


class Attention(nn.Module):
    """A user's block: causal attention with rotary positions, and its residual connection."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.wo = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x, positions):
        q, k, v = self.qkv(F.rms_norm(x, (DIM,))).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        angles = positions[:, None, :, None] * 0.1 ** torch.arange(DIM // 4, device=x.device)
        q, k = (self.rotate(t, angles.to(t.dtype)) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.wo(out.transpose(1, 2).flatten(-2))

    @staticmethod
    def rotate(x, angles):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


LAYERS = {
    "decision": lambda device, block=Attention: DecisionLayer(block(), DIM, window=7).to(device),
    "dynamic": lambda device, block=Attention: DynamicLayer(block(), 0.5).to(device),
    "mod": lambda device, block=Attention: MixtureOfDepthsLayer(block(), DIM, 0.5).to(device),
}


def run(layer, x, gate):
    if isinstance(layer, DecisionLayer):
        return layer(x).x
    return layer(x, gate) if isinstance(layer, DynamicLayer) else layer(x)


@pytest.mark.parametrize(("dim", "hidden"), [(16, 2), (32, 2), (33, 4), (1024, 64), (1, 2)])
def test_prior(dim, hidden):
    prior = PriorFFN(dim)
    assert (prior.wi.weight.shape, prior.wo.weight.shape) == ((2 * hidden, dim), (dim, hidden))
    x = torch.randn(2, 3, dim)
    gate, up = (F.rms_norm(x, (dim,), eps=1e-6) @ prior.wi.weight.t()).split(hidden, -1)
    torch.testing.assert_close(prior(x), (F.silu(gate) * up) @ prior.wo.weight.t())


def test_gate_starts_as_published():
    gate = SurpriseGate()
    values = [F.softplus(p).item() for p in (gate.o_ce, gate.m_cu, gate.beta_ce, gate.beta_cu)]
    assert values == pytest.approx([1.025, 1.1, math.log1p(math.exp(-0.3)), math.log1p(math.exp(-0.6))])


def test_decision_is_its_equations(device):
    layer = LAYERS["decision"](device)
    x = torch.randn(3, 40, DIM, device=device)
    decision = layer(x)
    post = layer.block(x, torch.arange(40, device=device).expand(3, -1))
    forecast = layer.prior(x)
    parameters = [F.softplus(p) for p in (layer.gate.beta_ce, layer.gate.beta_cu, layer.gate.o_ce, layer.gate.m_cu)]
    expected = reference.surprise_gate(x, post, x + forecast, *parameters, 7)
    torch.testing.assert_close(decision.x, post)
    torch.testing.assert_close((decision.gate, *decision[3:]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decision.prior_loss, (forecast - (post - x)).square().mean())
    decision.prior_loss.backward()
    assert all(p.grad is not None for p in layer.prior.parameters())
    assert all(p.grad is None for p in layer.block.parameters())


def by_hand(layer, x, gate):
    """Sequence by sequence, token by token."""
    out = x.clone()
    k = max(1, math.floor(layer.capacity * x.shape[1]))
    for b in range(len(x)):
        chosen = sorted(range(x.shape[1]), key=lambda t: (-gate[b, t].item(), t))[:k]
        positions = torch.tensor(sorted(chosen), device=x.device)
        rows = x[b : b + 1, positions]
        update = layer.block(rows, positions[None]) - rows
        out[b, positions] = rows[0] + gate[b, positions, None] * update[0]
    return out


@pytest.mark.parametrize("capacity", [0.01, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("length", [1, 2, 25])
def test_routed_layers_are_their_equations(device, capacity, length):
    x, gate = torch.randn(3, length, DIM, device=device), torch.rand(3, length, device=device).round(decimals=1)
    dynamic = DynamicLayer(Attention(), capacity).to(device)
    torch.testing.assert_close(dynamic(x, gate), by_hand(dynamic, x, gate))
    mod = MixtureOfDepthsLayer(Attention(), DIM, capacity).to(device)
    torch.testing.assert_close(mod(x), by_hand(mod, x, torch.sigmoid(mod.router(x)[..., 0])))


def test_made_on_a_device(device):
    """What `device=` makes is where its block is: parameters, buffers, and what a pass makes of them."""
    block, x = Attention().to(device), torch.randn(2, 9, DIM, device=device)
    made = DecisionLayer(block, DIM, device=device)(x)
    out = MixtureOfDepthsLayer(block, DIM, device=device)(DynamicLayer(block, device=device)(made.x, made.gate))
    assert out.device == x.device


def test_full_capacity_and_open_gates_are_the_block(device):
    layer = DynamicLayer(Attention(), 1.0).to(device)
    x = torch.randn(2, 12, DIM, device=device)
    torch.testing.assert_close(
        layer(x, torch.ones(2, 12, device=device)), layer.block(x, torch.arange(12, device=device)[None])
    )


def test_skipped_tokens_keep_their_bits(device):
    layer, x, gate = LAYERS["dynamic"](device), torch.randn(2, 30, DIM, device=device), torch.rand(2, 30, device=device)
    _, mask = topk_route(gate, 15)
    out = layer(x, gate)
    assert_same_bits(out[~mask], x[~mask])
    assert (out[mask] != x[mask]).any(-1).all()


def test_the_block_gets_original_positions(device):
    class Record(nn.Module):
        def forward(self, x, positions):
            self.positions = positions
            return x + 1

    layer, gate = (
        DynamicLayer(Record(), 0.5).to(device),
        torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.9, 0.8, 0.2, 0.1]], device=device),
    )
    layer(torch.zeros(2, 4, DIM, device=device), gate)
    assert layer.block.positions.tolist() == [[1, 3], [0, 1]]
    layer(torch.zeros(2, 4, DIM, device=device), gate, torch.tensor([5, 6, 9, 11], device=device))
    assert layer.block.positions.tolist() == [[6, 11], [5, 6]]


@pytest.mark.parametrize("name", LAYERS)
def test_no_sequence_sees_another(device, name):
    layer = LAYERS[name](device)
    x, gate = torch.randn(3, 24, DIM, device=device), torch.rand(3, 24, device=device)
    before = run(layer, x, gate)
    x[[0, 2]], gate[[0, 2]] = torch.randn(2, 24, DIM, device=device), torch.rand(2, 24, device=device)
    after = run(layer, x, gate)
    assert_same_bits(after[1], before[1])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cut", [1, 11, 23])
def test_routes_equal_no_token_sees_a_later_one(device, name, cut):
    layer = LAYERS[name](device)
    x, gate = torch.randn(2, 24, DIM, device=device), torch.rand(2, 24, device=device)
    if name == "mod":  # which looks at one feature only, and that one stays
        layer.router.weight.data.zero_()[0, 0] = 1
    before = run(layer, x, gate)
    x[:, cut:, 1:] = torch.randn(2, 24 - cut, DIM - 1, device=device)
    after = run(layer, x, gate)
    assert_same_bits(after[:, :cut], before[:, :cut])
    assert not torch.equal(after[:, cut:], before[:, cut:])


def test_the_gate_is_causal(device):
    layer, x = LAYERS["decision"](device), torch.randn(2, 24, DIM, device=device)
    before = layer(x)
    x[:, 13:] = torch.randn(2, 11, DIM, device=device)
    after = layer(x)
    for name in ("gate", "d_st", "ce", "cu"):
        assert_same_bits(getattr(after, name)[:, :13], getattr(before, name)[:, :13], name)


def test_gradients_reach_everything(device):
    decision, dynamic, mod = (make(device) for make in LAYERS.values())
    made = decision(torch.randn(2, 20, DIM, device=device))
    loss = mod(dynamic(made.x, made.gate)).square().mean() + 0.05 * made.prior_loss
    loss.backward()
    for layer in (decision, dynamic, mod):
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


class Model(nn.Module):
    def __init__(self, device, block=Attention):
        super().__init__()
        self.decision, self.dynamic, self.mod = (make(device, block) for make in LAYERS.values())

    def forward(self, x):
        made = self.decision(x)
        return self.mod(self.dynamic(made.x, made.gate)), made.prior_loss


def test_compile(device):
    """In one graph, which is the question here: the ops' own tests go through Inductor, those of STT through autograd."""
    model = Model(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((2, 9), (3, 16)):
            x = torch.randn(*size, DIM, device=device)
            torch.testing.assert_close(compiled(x), model(x))


def test_export(device):
    model = Model(device)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=4)
    first = (torch.randn(2, 9, DIM, device=device),)
    program = torch.export.export(model, first, dynamic_shapes={"x": {0: batch, 1: length}}).module()
    for size in ((2, 9), (3, 16), (5, 31)):
        x = torch.randn(*size, DIM, device=device)
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(device, dtype):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("fp64 is on the CPU only")
    model, x = Model(device), torch.randn(2, 16, DIM, device=device)
    out, _ = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_autocast(device):
    model, x = Model(device), torch.randn(2, 16, DIM, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        made = model.decision(x)
        out = model.mod(model.dynamic(made.x, made.gate))
    assert (made.gate.dtype, out.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(made.gate, model.decision(x).gate, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DynamicLayer(Attention(), 0.0),
            "DynamicLayer: expected capacity to be above 0 and at most 1, got 0.0",
        ),
        (
            lambda: DynamicLayer(Attention(), math.nan),
            "DynamicLayer: expected capacity to be above 0 and at most 1, got nan",
        ),
        (
            lambda: MixtureOfDepthsLayer(Attention(), DIM, 1.5),
            "MixtureOfDepthsLayer: expected capacity to be .*, got 1.5",
        ),
        (lambda: PriorFFN(0), "PriorFFN: expected dim to be at least 1, got 0"),
        (lambda: PriorFFN(8, -1), "PriorFFN: expected width to be above 0 and finite, got -1"),
        (lambda: SurpriseGate(0), "SurpriseGate: expected window to be at least 1, got 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
