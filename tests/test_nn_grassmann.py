"""GrassmannMixing and its mixer: numbers against plain torch, decoding, script and export."""

import itertools

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

import simplex_ops
from simplex_ops.models import DecoderConfig, DecoderLM, GrassmannHead, GrassmannLM
from simplex_ops.nn import GrassmannMixing, interpret

# Torch says on every use that TorchScript is deprecated; C++ programs without Python still need it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

CHUNKS = [[1] * 40, [40], [5, 1, 1, 20, 1, 12], [6, 1, 7, 1, 25]]


def explicit(layer, x, **options):
    gates = layer.gate_x.weight, layer.gate_g.weight, layer.gate_g.bias
    weights = layer.reduce.weight, layer.reduce.bias, layer.expand.weight, layer.expand.bias, *gates
    y = reference.grassmann_layer(x, *weights, layer.offsets, **options)
    return y @ layer.out.weight.T + layer.out.bias if isinstance(layer.out, nn.Linear) else y


def decode(module, x, chunks):
    cache, position, outputs = module.new_cache(x.size(0), x.size(1)), 0, []
    for count in chunks:
        outputs.append(module(x[:, position : position + count], cache, position))
        position += count
    return torch.cat(outputs, dim=1)


def small_model():
    sizes = {"dim": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_dim": 96}
    options = {"grassmann": {"rank": 12, "offsets": (1, 2, 5)}}
    return DecoderLM(DecoderConfig(**sizes, layers=("grassmann", "sdpa", "grassmann"), options=options))


@pytest.mark.parametrize("case", ["plain", "projected", "masked", "packed"])
def test_layer_is_its_equation(device, case):
    layer = GrassmannMixing(48, 9, (1, 3, 3, 30), output_projection=case == "projected", device=device)
    batch, options = 2, {}
    if case == "masked":
        options["valid"] = torch.rand(2, 21, device=device) < 0.7
    if case == "packed":
        batch, options["cu_seqlens"] = 1, torch.tensor([0, 2, 2, 13, 21], dtype=torch.int32, device=device)
    x = torch.randn(batch, 21, 48, device=device, requires_grad=True)
    inputs, grad = (x, *layer.parameters()), torch.randn(batch, 21, 48, device=device)
    out, want = layer(x, **options), explicit(layer, x, **options)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    for got, ref in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-3, atol=1e-4)


def test_number_of_parameters():
    """The paper's two counts, and the switch between them."""
    assert sum(x.numel() for x in GrassmannMixing(256, 32).parameters()) == 256 * (32 + 496 + 2 * 256 + 2) + 32
    projected = GrassmannMixing(256, 32, output_projection=True)
    assert sum(x.numel() for x in projected.parameters()) == 256 * (32 + 496 + 3 * 256 + 3) + 32
    assert GrassmannLM().num_parameters() == 12_607_168
    assert GrassmannLM(output_projection=True).num_parameters() == 13_001_920


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_layer_takes_nothing(batch, length):
    assert GrassmannMixing(32)(torch.randn(batch, length, 32)).shape == (batch, length, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "expected dim to be at least 1, got 0"),
        ({"rank": 1}, "expected rank to be from 2 to 128, got 1"),
        ({"rank": 129}, "expected rank to be from 2 to 128, got 129"),
        ({"offsets": ()}, r"expected offsets of at least 1, at least one, got \[\]"),
        ({"offsets": (1, 0)}, r"expected offsets of at least 1, at least one, got \[1, 0\]"),
    ],
)
def test_layer_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"GrassmannMixing: {message}"):
        GrassmannMixing(**{"dim": 64, **arguments})


@torch.no_grad()
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("offsets", [(1,), (1, 2, 4, 8, 12, 16), (7, 7, 3), (50, 2)], ids=str)
def test_layer_decodes_what_it_sees_whole(device, chunks, offsets):
    layer = GrassmannMixing(32, 8, offsets, device=device)
    x = torch.randn(3, 40, 32, device=device)
    torch.testing.assert_close(decode(layer, x, chunks), layer(x), rtol=1e-4, atol=1e-5)
    assert layer.new_cache(3, 10**6)[0].shape == (3, max(offsets), 8)


@torch.no_grad()
def test_layer_decodes_under_autocast(device):
    """Tokens are bfloat16 there, weights and the ring float32."""
    layer = GrassmannMixing(32, 8, (1, 5), device=device)
    x = torch.randn(2, 40, 32, device=device)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(decode(layer, x, CHUNKS[2]), layer(x), rtol=0.03, atol=0.03)


def test_layer_refuses_a_mask_with_a_cache(device):
    layer = GrassmannMixing(32, 8, device=device)
    with pytest.raises(ValueError, match="GrassmannMixing: expected valid and cu_seqlens to be None with a cache"):
        layer(torch.randn(1, 3, 32, device=device), layer.new_cache(1), 0, torch.ones(1, 3, dtype=torch.bool))


@torch.no_grad()
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_model_decodes_what_it_sees_whole(device, chunks):
    model = small_model().to(device)
    tokens = torch.randint(256, (2, 40), device=device)
    torch.testing.assert_close(decode(model, tokens, chunks), model(tokens), rtol=1e-3, atol=1e-4)


def test_model_learns(device):
    """A repeating text is predicted after a few steps, so gradients reach what they must."""
    model = small_model().to(device)
    tokens = torch.arange(32, device=device).repeat(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    assert model.generate(tokens[:1, :5], 20, temperature=0.0).tolist() == tokens[:1, :25].tolist()


def test_script(tmp_path):
    model = small_model()
    torch.jit.script(model).save(str(tmp_path / "model.ts"))
    loaded = torch.jit.load(str(tmp_path / "model.ts"))
    tokens = torch.randint(256, (3, 33))
    torch.testing.assert_close(loaded(tokens), model(tokens))
    assert torch.equal(loaded.generate(tokens[:, :4], 15, 0.0), model.generate(tokens[:, :4], 15, 0.0))


@torch.no_grad()
def test_export_with_dynamic_sizes():
    model: nn.Module = small_model()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (torch.randint(256, (2, 20)),), dynamic_shapes=((dynamic, dynamic),))
    for batch, length in ((2, 20), (1, 7), (5, 41)):
        tokens = torch.randint(256, (batch, length))
        torch.testing.assert_close(program.module()(tokens), model(tokens))


# GrassmannLM


def small_lm(**changes):
    return GrassmannLM(**{"vocab_size": 64, "dim": 48, "rank": 9, "depth": 3, "max_length": 40, **changes})


def test_lm_is_its_equation(device):
    model = small_lm(offsets=(1, 3, 9), one_offset_per_layer=True).to(device)
    tokens = torch.randint(64, (2, 30), device=device)
    x = model.embedding.weight[tokens] + model.positions.weight[:30]
    for layer, offset in zip(model.layers, (1, 3, 9), strict=True):
        assert layer.mixing.offsets == [offset]
        h = F.layer_norm(explicit(layer.mixing, x), (48,))
        x = F.layer_norm(h + layer.mlp[2](F.gelu(layer.mlp[0](h))), (48,))
    want = F.layer_norm(x, (48,)) @ model.embedding.weight.T
    torch.testing.assert_close(model(tokens), want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_lm_decodes_what_it_sees_whole(device, chunks):
    model = small_lm().to(device)
    tokens = torch.randint(64, (2, 40), device=device)
    cache, position, outputs = model.new_cache(2), 0, []
    for count in chunks:
        outputs.append(model(tokens[:, position : position + count], cache, position))
        position += count
    torch.testing.assert_close(torch.cat(outputs, 1), model(tokens), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_lm_of_packed_texts(device):
    """So many calls; together they may be longer than the positions reach."""
    model = small_lm().to(device)
    tokens = torch.randint(64, (1, 90), device=device)
    bounds = [0, 40, 40, 41, 77, 90]
    whole = model(tokens, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device))
    parts = [model(tokens[:, begin:end]) for begin, end in itertools.pairwise(bounds)]
    torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


def test_lm_learns(device):
    model = small_lm().to(device)
    tokens = torch.arange(8, device=device).repeat(4, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    assert loss.item() < 0.5


def test_lm_scripts():
    model, tokens = small_lm(), torch.randint(64, (1, 20))
    scripted = torch.jit.script(model)
    for starts in (None, torch.tensor([0, 7, 20], dtype=torch.int32)):
        torch.testing.assert_close(scripted(tokens, cu_seqlens=starts), model(tokens, cu_seqlens=starts))


def test_lm_refuses():
    with pytest.raises(ValueError, match=r"GrassmannLM: expected an offset for each of 3 layers, got \[1, 2\]"):
        small_lm(offsets=(1, 2), one_offset_per_layer=True)


# GrassmannHead


def test_head_is_its_equation(device):
    head = GrassmannHead(20, 3, dim=16, rank=5, offsets=(1, 3)).to(device)
    features = torch.randn(3, 12, 20, device=device)
    x = head.project(features)
    for layer in head.layers:
        h = F.layer_norm(explicit(layer.mixing, x), (16,))
        x = F.layer_norm(h + layer.mlp[2](F.gelu(layer.mlp[0](h))), (16,))
    torch.testing.assert_close(head(features), head.classify(x.mean(1)), rtol=1e-4, atol=1e-5)


def test_head_ignores_padding(device):
    """A padded batch gives what each sequence gives alone, whatever stands in the padding; nothing is NaN without a token."""
    head = GrassmannHead(20, 3, dim=16, rank=5, offsets=(1, 3)).to(device)
    features = torch.randn(4, 12, 20, device=device)
    lengths = torch.tensor([12, 7, 1, 0], device=device)
    valid = torch.arange(12, device=device) < lengths[:, None]
    features[~valid] = torch.nan
    logits = head(features, valid)
    for i, length in enumerate(lengths.tolist()):
        alone = head(features[i : i + 1, :length]) if length else head.classify.bias[None]
        torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    assert torch.jit.script(head)(features, valid).isfinite().all()


def test_head_learns_order(device):
    """Whether 'a' comes right before 'b' or right after: nothing that a mean of features tells."""
    head = GrassmannHead(8, 2, dim=32, rank=8, depth=1, offsets=(1, 2)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(60):
        features, labels = 0.1 * torch.randn(32, 10, 8), torch.randint(2, (32,))
        at = torch.randint(9, (32,))
        features[torch.arange(32), at + labels, 0] = features[torch.arange(32), at + 1 - labels, 1] = 3
        loss = F.cross_entropy(head(features.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# interpret


def test_interpret_is_the_geometry_of_the_pairs(device):
    """Coordinates and angle against minors and arccos in fp64, and their mean is what the layer maps."""
    layer = GrassmannMixing(24, 6, (1, 4), device=device)
    x = torch.randn(2, 15, 24, device=device)
    valid = torch.rand(2, 15, device=device) < 0.8
    z = layer.reduce(x).double()
    i, j = torch.triu_indices(6, 6, 1)
    for mask in (None, valid):
        geometry = interpret(layer, x, valid=mask)
        assert geometry.offsets == (1, 4)
        for k, offset in enumerate(layer.offsets):
            for b, t in ((b, t) for b in range(2) for t in range(15)):
                if t < offset or (mask is not None and not (mask[b, t] and mask[b, t - offset])):
                    assert geometry.angle[b, t, k].isnan()
                    assert not geometry.coordinates[b, t, k].any()
                    continue
                now, then = z[b, t], z[b, t - offset]
                minors = now[i] * then[j] - now[j] * then[i]
                cosine = now @ then / (now.norm() * then.norm())
                torch.testing.assert_close(geometry.angle[b, t, k].double(), cosine.arccos(), rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(
                    geometry.coordinates[b, t, k].double(), minors / minors.norm(), rtol=1e-4, atol=1e-5
                )
        mean = geometry.coordinates.sum(2) / geometry.angle.isfinite().sum(2, keepdim=True).clamp(min=1)
        want = simplex_ops.plucker_mean(layer.reduce(x), layer.offsets, valid=mask)
        torch.testing.assert_close(mean, want, rtol=1e-4, atol=1e-5)


def test_interpret_special_pairs(device):
    """Equal, opposite and nearly equal tokens; tokens of 0; packed sequences."""
    layer = GrassmannMixing(3, 3, (1,), device=device)
    nn.init.eye_(layer.reduce.weight)
    nn.init.zeros_(layer.reduce.bias)
    z = torch.tensor(
        [[1.0, 2, 2], [2, 4, 4], [-1, -2, -2], [0, 0, 0], [0, 0, 1], [0, 1e-3, 1], [0, 3, 0]], device=device
    )
    starts = torch.tensor([0, 6, 7], dtype=torch.int32, device=device)
    angle = interpret(layer, z[None], cu_seqlens=starts).angle[0, :, 0]
    expected = [torch.nan, 0, torch.pi, torch.nan, torch.nan, 1e-3, torch.nan]
    torch.testing.assert_close(angle, torch.tensor(expected, device=device), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_interpret_plots(tmp_path):
    pytest.importorskip("matplotlib")
    geometry = interpret(GrassmannMixing(16, 5, (1, 2)), torch.randn(2, 9, 16))
    path = geometry.plot(tmp_path / "geometry.png", sequence=1, tokens=list("abcdefghi"))
    assert path.read_bytes().startswith(b"\x89PNG")
