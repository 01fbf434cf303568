"""simplex_ops.nn and simplex_ops.models: numbers against plain torch, decoding, equal twins, script and export."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from simplex_ops.models import DecoderConfig, DecoderLM, dot_product_twin, interleave, layer_names
from simplex_ops.models.mixers.sdpa import DotProductAttention
from simplex_ops.nn import TwoSimplicialAttention

# Torch says on every use that TorchScript is deprecated; C++ programs without Python still need it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

CHUNKS = [[1] * 40, [40], [5, 1, 1, 20, 1, 12], [6, 1, 7, 1, 25]]


def explicit(layer: TwoSimplicialAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer's equation over all pairs, with its own weights and repeated heads."""
    length = x.size(1)
    q, k1, k2, v1, v2 = (
        F.linear(x, w.weight, w.bias).view(*x.shape[:2], -1, layer.head_dim)
        for w in (layer.wq, layer.wk1, layer.wk2, layer.wv1, layer.wv2)
    )
    k1, k2, v1, v2 = (t.repeat_interleave(layer.heads // layer.kv_heads, dim=2) for t in (k1, k2, v1, v2))
    scores = layer.scale * torch.einsum("bihd,bjhd,bkhd->bhijk", q, k1, k2)
    back = torch.arange(length, device=x.device)[:, None] - torch.arange(length, device=x.device)
    seen1, seen2 = (back >= 0) & (back < layer.w1), (back >= 0) & (back < layer.w2)
    scores = scores.masked_fill(~(seen1[:, :, None] & seen2[:, None, :]), -math.inf)
    weights = scores.flatten(-2).softmax(-1).view_as(scores)
    out = torch.einsum("bhijk,bjhd,bkhd->bihd", weights, v1, v2)
    return F.linear(out.flatten(-2), layer.wo.weight, layer.wo.bias)


def small_model(**changes) -> DecoderLM:
    sizes = {"dim": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_dim": 96, "layers": interleave(4)}
    options = {"two_simplicial": {"w1": 7, "w2": 3}}
    return DecoderLM(DecoderConfig(**{**sizes, "options": options, **changes}))


def decode(module, x: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    cache, position, outputs = module.new_cache(x.size(0), x.size(1)), 0, []
    for count in chunks:
        outputs.append(module(x[:, position : position + count], cache, position))
        position += count
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("w1", "w2"), [(9, 4), (3, 11), (64, 64), (1, 1)])
def test_layer_is_its_equation(device, heads, kv_heads, w1, w2):
    layer = TwoSimplicialAttention(48, heads, kv_heads, 16, w1=w1, w2=w2, bias=True, device=device)
    x = torch.randn(2, 21, 48, device=device, requires_grad=True)
    inputs = (x, *layer.parameters())
    grad = torch.randn(2, 21, 48, device=device)
    out, want = layer(x), explicit(layer, x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    for got, ref in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-3, atol=1e-4)


def test_scale_is_used():
    layer = TwoSimplicialAttention(32, 2, w1=5, w2=5, scale=3.0)
    x = torch.randn(1, 9, 32)
    torch.testing.assert_close(layer(x), explicit(layer, x), rtol=1e-4, atol=1e-5)
    layer.scale = None
    assert (layer(x) - explicit(TwoSimplicialAttention(32, 2, w1=5, w2=5), x)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layer_dtypes(dtype):
    layer = TwoSimplicialAttention(32, 4, 2, w1=8, w2=3, dtype=dtype)
    x = torch.randn(2, 15, 32, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(out.double(), explicit(layer.double(), x.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_layer_takes_nothing(batch, length):
    layer = TwoSimplicialAttention(32, 4)
    assert layer(torch.randn(batch, length, 32)).shape == (batch, length, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "expected dim to be at least 1, got 0"),
        ({"heads": 5, "kv_heads": 2}, r"expected heads to be a multiple of kv_heads \(2\), got 5"),
        ({"heads": 5}, r"expected dim to be a multiple of heads \(5\) when head_dim is not given, got 64"),
        ({"head_dim": 12}, "expected head_dim to be a multiple of 8 up to 256, got 12"),
        ({"head_dim": 264}, "expected head_dim to be a multiple of 8 up to 256, got 264"),
        ({"w1": 0}, "expected w1 to be at least 1, got 0"),
        ({"w2": -3}, "expected w2 to be at least 1, got -3"),
    ],
)
def test_layer_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"TwoSimplicialAttention: {message}"):
        TwoSimplicialAttention(**{"dim": 64, "heads": 4, **arguments})


def test_layer_of_packed_sequences(device):
    layer = TwoSimplicialAttention(48, 4, 2, 16, w1=9, w2=4, bias=True, device=device)
    bounds = [0, 5, 5, 6, 21]
    starts = torch.tensor(bounds, dtype=torch.int32, device=device)
    x = torch.randn(1, 21, 48, device=device)
    apart = torch.cat([layer(x[:, first:end]) for first, end in itertools.pairwise(bounds)], 1)
    for called in (layer, torch.jit.script(layer)):
        torch.testing.assert_close(called(x, cu_seqlens=starts), apart, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="TwoSimplicialAttention: expected cu_seqlens to be None with a cache"):
        layer(x, layer.new_cache(1), 0, starts)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize(("w1", "w2"), [(7, 3), (2, 6), (1, 1), (50, 4)])
def test_layer_decodes_what_it_sees_whole(device, chunks, w1, w2):
    layer = TwoSimplicialAttention(32, 4, 2, w1=w1, w2=w2, device=device).requires_grad_(False)
    x = torch.randn(3, 40, 32, device=device)
    torch.testing.assert_close(decode(layer, x, chunks), layer(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("of_cache", [torch.float32, torch.bfloat16])
def test_layer_decodes_with_a_cache_of_another_dtype(device, of_cache):
    """Prompts and single tokens alike."""
    layer = TwoSimplicialAttention(32, 4, 2, w1=7, w2=3, device=device)
    layer.to(torch.bfloat16 if of_cache == torch.float32 else torch.float32)
    x = torch.randn(2, 12, 32, device=device).to(layer.wq.weight.dtype)
    cache = [layer.new_cache(2)[0].to(of_cache)]
    steps = [layer(x[:, begin:end], cache, begin) for begin, end in ((0, 5), (5, 6), (6, 7), (7, 12))]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x), rtol=1e-2, atol=1e-2)


def test_layer_cache_does_not_grow():
    layer = TwoSimplicialAttention(32, 4, 2, w1=7, w2=3)
    (ring,) = layer.new_cache(3)
    assert ring.shape == (4, 3, 2, 7, 2, 8)
    assert layer.new_cache(3, max_length=5)[0].shape == (4, 3, 2, 5, 2, 8)


def test_dot_product_mixer_is_its_equation():
    """Rotary positions: the logit of two tokens is that of their vectors turned by the distance between them."""
    mixer = DotProductAttention(dim=32, heads=2, kv_heads=1, head_dim=16).double()
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    q = torch.view_as_complex(mixer.wq(x).view(12, 2, 2, 8).transpose(-1, -2).contiguous())
    k = torch.view_as_complex(mixer.wk(x).view(12, 1, 2, 8).transpose(-1, -2).contiguous())
    distance = torch.arange(12)[:, None] - torch.arange(12)
    turn = torch.polar(torch.ones((), dtype=torch.float64), distance[..., None] * mixer.frequencies.double())
    scores = torch.einsum("ihd,jd,ijd->hij", q, k[:, 0].conj(), turn).real / 4
    weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
    want = mixer.wo(torch.einsum("hij,jd->ihd", weights, mixer.wv(x)[0]).flatten(-2))
    torch.testing.assert_close(mixer(x)[0], want)


@pytest.mark.parametrize("tied", [True, False])
def test_twin_has_equal_parameters(tied):
    model = small_model(tied=tied, layers=interleave(8))
    twin = DecoderLM(dot_product_twin(model.config))
    assert model.config.layers.count("two_simplicial") == 2
    assert "two_simplicial" not in twin.config.layers
    assert twin.num_parameters() == model.num_parameters()
    per_layer = 2 * 64 + 3 * 64 * 96 + 2 * 64 * 64
    kv = 64 * 32
    assert model.num_parameters() == 8 * per_layer + (6 * 2 + 2 * 4) * kv + 64 + 256 * 64 * (1 if tied else 2)


def test_unknown_layer_is_named():
    assert {"sdpa", "sdpa_twin", "two_simplicial"} <= set(layer_names())
    with pytest.raises(ValueError, match=r"expected layers to be among .*'two_simplicial'.*, got 'convolution'"):
        small_model(layers=("convolution",))


def test_model_starts_near_uniform_and_is_causal(device):
    model = small_model().to(device)
    tokens = torch.randint(256, (2, 30), device=device)
    logits = model(tokens)
    assert abs(F.cross_entropy(logits.flatten(0, 1), tokens.roll(1).flatten()).item() - math.log(256)) < 1.0
    changed = tokens.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 256
    difference = (model(changed) - logits).abs().amax(dim=(0, 2))
    assert difference[:17].max() == 0
    assert difference[17] > 0


def test_model_learns(device):
    """A repeating text is predicted after a few steps, so gradients reach what they must."""
    model = small_model(layers=("two_simplicial", "sdpa")).to(device)
    tokens = torch.arange(32, device=device).repeat(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    prompt = tokens[:1, :5]
    assert model.generate(prompt, 20, temperature=0.0).tolist() == tokens[:1, :25].tolist()


@torch.no_grad()
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_model_decodes_what_it_sees_whole(device, chunks):
    model = small_model().to(device)
    tokens = torch.randint(256, (2, 40), device=device)
    torch.testing.assert_close(decode(model, tokens, chunks), model(tokens), rtol=1e-3, atol=1e-4)


def test_generate_samples():
    model = small_model()
    prompt = torch.randint(256, (2, 3))
    greedy = model.generate(prompt, 12, temperature=0.0)
    assert torch.equal(greedy[:, :3], prompt)
    assert greedy.shape == (2, 15)
    for position in range(3, 15):
        assert torch.equal(greedy[:, position], model(greedy[:, :position])[:, -1].argmax(-1))
    assert torch.equal(model.generate(prompt, 12, temperature=2.0, top_k=1), greedy)
    assert not torch.equal(model.generate(prompt, 12, temperature=2.0), greedy)
    with pytest.raises(ValueError, match="expected tokens to hold at least 1 token, got 0"):
        model.generate(prompt[:, :0], 3)


def test_any_temperature_samples():
    """Tiny ones take the most likely token, infinite ones any of the top k alike."""
    model = small_model(tied=True)
    prompt = torch.randint(256, (2, 3))
    greedy = model.generate(prompt, 5, temperature=0.0)
    for temperature in (5e-324, 1e-40, 1e-37, 1e-30):
        assert torch.equal(model.generate(prompt, 5, temperature), greedy)
    two = model(prompt)[:, -1].topk(2).indices
    drawn = torch.stack([model.generate(prompt, 1, math.inf, top_k=2)[:, -1] for _ in range(40)], 1)
    for text in range(2):
        assert set(drawn[text].tolist()) == set(two[text].tolist())


def test_script(tmp_path):
    model = small_model()
    torch.jit.script(model).save(str(tmp_path / "model.ts"))
    loaded = torch.jit.load(str(tmp_path / "model.ts"))
    tokens = torch.randint(256, (3, 33))
    torch.testing.assert_close(loaded(tokens), model(tokens))
    assert torch.equal(loaded.generate(tokens[:, :4], 15, 0.0), model.generate(tokens[:, :4], 15, 0.0))
    weight = "layers.3.mixer.wk2.weight"
    model(tokens).square().mean().backward()
    loaded(tokens).square().mean().backward()
    torch.testing.assert_close(dict(loaded.named_parameters())[weight].grad, model.get_parameter(weight).grad)


@torch.no_grad()
def test_export_with_dynamic_sizes():
    model = small_model()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (torch.randint(256, (2, 20)),), dynamic_shapes=((dynamic, dynamic),))
    for batch, length in ((2, 20), (1, 7), (5, 41)):
        tokens = torch.randint(256, (batch, length))
        torch.testing.assert_close(program.module()(tokens), model(tokens))


@torch.no_grad()
def test_aot_inductor(tmp_path):
    layer = TwoSimplicialAttention(32, 4, 2, w1=7, w2=3)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(layer, (torch.randn(2, 20, 32),), dynamic_shapes=((dynamic, dynamic, None),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for batch, length in ((2, 20), (1, 7), (5, 41)):
        x = torch.randn(batch, length, 32)
        torch.testing.assert_close(loaded(x), layer(x), rtol=1e-4, atol=1e-5)


def test_state_dict_round_trip(tmp_path):
    model = small_model(tied=True)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = small_model(tied=True)
    tokens = torch.randint(256, (2, 20))
    assert not torch.equal(other(tokens), model(tokens))
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(other(tokens), model(tokens))


@torch.no_grad()
def test_tied_weights_stay_tied_when_a_model_takes_its_weights_over():
    model = small_model(tied=True)
    tokens = torch.randint(256, (2, 20))
    for assign in (False, True):
        with torch.device("meta"):
            other = small_model(tied=True)
        if not assign:
            other.to_empty(device="cpu")
        other.load_state_dict(model.state_dict(), assign=assign)
        assert other.num_parameters() == model.num_parameters()
        assert torch.equal(other(tokens), model(tokens))
    torch.testing.assert_close(torch.jit.script(model)(tokens), model(tokens))
