"""GrassmannMixing and its mixer: numbers against plain torch, decoding, script and export."""

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from simplex_ops.models import DecoderConfig, DecoderLM, GrassmannLM
from simplex_ops.nn import GrassmannMixing

# Torch says on every use that TorchScript is deprecated; C++ programs without Python still need it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

CHUNKS = [[1] * 40, [40], [5, 1, 1, 20, 1, 12], [6, 1, 7, 1, 25]]


def explicit(layer, x):
    z = F.linear(x, layer.reduce.weight, layer.reduce.bias)
    g = reference.grassmann_mix(z, layer.expand.weight, layer.expand.bias, layer.offsets)
    alpha = torch.sigmoid(x @ layer.gate_x.weight.T + g @ layer.gate_g.weight.T + layer.gate_g.bias)
    return alpha * x + (1 - alpha) * g


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


def test_layer_is_its_equation(device):
    layer = GrassmannMixing(48, 9, (1, 3, 3, 30), device=device)
    x = torch.randn(2, 21, 48, device=device, requires_grad=True)
    inputs, grad = (x, *layer.parameters()), torch.randn(2, 21, 48, device=device)
    out, want = layer(x), explicit(layer, x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    for got, ref in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-3, atol=1e-4)


def test_number_of_parameters():
    assert sum(x.numel() for x in GrassmannMixing(256, 32).parameters()) == 256 * (32 + 496 + 2 * 256 + 2) + 32
    assert sum(x.numel() for x in GrassmannLM().parameters()) == 12_607_168
    assert 12_607_168 + 6 * (256 * 256 + 256) == 13_001_920  # the figure with one more projection in each layer


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
    model = small_lm()
    tokens = torch.randint(64, (2, 20))
    torch.testing.assert_close(torch.jit.script(model)(tokens), model(tokens))


def test_lm_refuses():
    with pytest.raises(ValueError, match=r"GrassmannLM: expected an offset for each of 3 layers, got \[1, 2\]"):
        small_lm(offsets=(1, 2), one_offset_per_layer=True)
