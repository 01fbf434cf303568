"""The determinant form: its scores one by one, and what a determinant obeys."""

from functools import partial

import pytest
import torch
from problem import DTYPES, FLOOR, PRECISE, assert_close_to_truth, draw, evaluate, leaves, small

import simplex_ops
from simplex_ops.models import DecoderConfig, DecoderLM
from simplex_ops.nn import TwoSimplicialAttention

op = partial(simplex_ops.two_simplicial_attention, determinant=True, return_lse=True)


def explicit(q, k1, k2, v1, v2, w1, w2, scale=None):
    """Every score by torch.linalg.det of its chunks, softmax over the pairs seen; in at least fp32."""
    dim, dtype = q.shape[-1], q.dtype
    repeats = q.shape[2] // k1.shape[2]
    wide = torch.promote_types(dtype, torch.float32)
    q, k1, k2, v1, v2 = (x.to(wide) for x in (q, k1, k2, v1, v2))
    k1, k2, v1, v2 = (x.repeat_interleave(repeats, 2) for x in (k1, k2, v1, v2))
    whole = dim // 3 * 3
    batch, n_q, heads, _ = q.shape
    n_k = k1.shape[1]

    def chunks(x, *places):
        x = x[..., :whole].unflatten(-1, (whole // 3, 3)).transpose(1, 2)  # [B, H, N, C, 3]
        return x.reshape(*x.shape[:2], *places, *x.shape[3:]).expand(batch, heads, n_q, n_k, n_k, -1, -1)

    rows = torch.stack((chunks(q, n_q, 1, 1), chunks(k1, 1, n_k, 1), chunks(k2, 1, 1, n_k)), -2)
    scores = torch.linalg.det(rows).sum(-1)
    scores = scores + torch.einsum("bihd,bjhd,bkhd->bhijk", q[..., whole:], k1[..., whole:], k2[..., whole:])
    scores = scores * (dim**-0.5 if scale is None else scale)
    back = torch.arange(n_k - n_q, n_k, device=q.device)[:, None] - torch.arange(n_k, device=q.device)
    seen1, seen2 = (back >= 0) & (back < w1), (back >= 0) & (back < w2)
    scores = scores.masked_fill(~(seen1[:, :, None] & seen2[:, None, :]), -torch.inf).flatten(-2)
    weights = scores.softmax(-1).unflatten(-1, (n_k, n_k))
    return torch.einsum("bhijk,bjhd,bkhd->bihd", weights, v1, v2).to(dtype), scores.logsumexp(-1)


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 16, 64, 100, 128])
def test_accuracy(device, dim):
    for dtype in DTYPES[device]:
        problem = draw(n_q=7, n_k=9, ratio=2, dim=dim, w1=5, w2=3, dtype=dtype, device=device)
        actual = evaluate(op, problem)
        truth = evaluate(explicit, problem, torch.float64)
        plain = truth if dtype == torch.float64 else evaluate(explicit, problem)
        for name, x in actual.items():
            # A product of the plain form is rounded before it is added: a chunk's six, where `explicit` rounds none.
            atol = 6 * FLOOR[dtype] * truth[name].abs().max().item()
            assert_close_to_truth(x, plain[name], truth[name], dtype, name, atol)


def test_gradcheck():
    problem = small("cpu", n_q=4, n_k=5, dim=7, grad_lse=False)
    assert torch.autograd.gradcheck(lambda *x: op(*x, 4, 2), leaves(problem), atol=1e-7)


def test_rotating_every_chunk_changes_nothing(device):
    dtype = PRECISE[device]
    problem = draw(n_k=20, dim=48, w1=9, w2=5, dtype=dtype, device=device)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    rotation = (rotation * torch.linalg.det(rotation).sign()).to(dtype).to(device)
    out, lse = op(*problem.inputs, 9, 5)
    turned = [(x.unflatten(-1, (-1, 3)) @ rotation).flatten(-2) for x in problem.inputs[:3]]
    got, got_lse = op(*turned, *problem.inputs[3:], 9, 5)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(got, out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got_lse, lse, atol=tolerance, rtol=tolerance)
    plain, _ = simplex_ops.two_simplicial_attention(*turned, *problem.inputs[3:], 9, 5, return_lse=True)
    before, _ = simplex_ops.two_simplicial_attention(*problem.inputs, 9, 5, return_lse=True)
    assert (plain - before).abs().max() > 0.1  # the plain form does not have this


def test_exchanging_the_axes_flips_the_sign(device):
    dtype = PRECISE[device]
    q, k1, k2, v1, v2 = draw(n_k=20, dim=48, dtype=dtype, device=device).inputs
    out, lse = op(q, k1, k2, v1, v2, 9, 5, scale=0.3)
    other, other_lse = op(q, k2, k1, v2, v1, 5, 9, scale=-0.3)
    torch.testing.assert_close(other, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other_lse, lse, atol=1e-5, rtol=1e-5)


def test_packed_sequences(device):
    problem = draw(lengths=[5, 0, 9], dim=24, dtype=PRECISE[device], device=device)
    out, _ = op(*problem.inputs, 4, 3, cu_seqlens=problem.cu_seqlens)
    alone, _ = op(*(x[:, 5:] for x in problem.inputs), 4, 3)
    torch.testing.assert_close(out[:, 5:], alone, atol=1e-5, rtol=1e-5)


def test_compile(device):
    torch._dynamo.reset()
    problem = small(device, dim=30)
    compiled = evaluate(torch.compile(op, fullgraph=True), problem)
    for name, x in evaluate(op, problem).items():
        torch.testing.assert_close(compiled[name], x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dim": 129}, r"the head_dim of q to be from 1 to 128 in the determinant form, got 129"),
        ({"dim": 0}, r"the head_dim of q to be from 1 to 128 in the determinant form, got 0"),
    ],
)
def test_bad_input(changes, error):
    with pytest.raises(RuntimeError, match=f"two_simplicial_attention: expected {error}"):
        op(*small("cpu", **changes).inputs, 3, 3)


def test_unlike_head_dims():
    q, k1, k2, v1, v2 = small("cpu").inputs
    with pytest.raises(RuntimeError, match=r"expected the head_dim of v1 to be that of q \(16\), got 15"):
        op(q, k1, k2, v1[..., :15], v2, 3, 3)
    with pytest.raises(RuntimeError, match=r"expected k2 to be 4-dimensional .*, got 3 dimensions"):
        op(q, k1, k2[0], v1, v2, 3, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_layer(device):
    layer = TwoSimplicialAttention(48, 4, 2, 20, w1=9, w2=4, determinant=True, device=device)
    x = torch.randn(2, 15, 48, device=device)
    inputs = [p(x).unflatten(-1, (-1, 20)) for p in (layer.wq, layer.wk1, layer.wk2, layer.wv1, layer.wv2)]
    want = layer.wo(explicit(*inputs, 9, 4)[0].flatten(-2))
    for called in (layer, torch.jit.script(layer)):
        torch.testing.assert_close(called(x), want, rtol=1e-4, atol=1e-5)
    cache = layer.new_cache(2)
    with torch.no_grad():
        steps = [layer(x[:, i : i + 1], cache, i) for i in range(15)]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected head_dim to be from 1 to 128 in the determinant form, got 136"):
        TwoSimplicialAttention(48, 4, 2, 136, determinant=True)


def test_model():
    """The option reaches the mixer, and the model decodes what it sees whole."""
    sizes = {"dim": 32, "heads": 2, "kv_heads": 1, "head_dim": 12, "mlp_dim": 48, "layers": ("sdpa", "two_simplicial")}
    options = {"two_simplicial": {"w1": 7, "w2": 3, "determinant": True}}
    model = DecoderLM(DecoderConfig(**sizes, options=options))
    assert model.layers[1].mixer.determinant
    tokens = torch.randint(256, (2, 9))
    cache = model.new_cache(2, 9)
    with torch.no_grad():
        steps = [model(tokens[:, i : i + 1], cache, i) for i in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=1e-4, atol=1e-5)
