"""Decoding of routed layers: token by token equals one full pass by threshold, in caches that are as small as they claim."""

import pytest
import torch
import torch.nn.functional as F
from problem import assert_same_bits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simplex_ops import topk_route
from simplex_ops.models import DecoderConfig, DecoderLM
from simplex_ops.nn import (
    MixtureOfDepthsLayer,
    PositionedAttention,
    RoutedLayer,
    SubjectiveDepthLayer,
    SubjectiveTimescaleLayer,
    route_map,
)

DIM, WINDOW = 32, 6
CHUNKS = [[1] * 30, [30], [7, 1, 1, 12, 1, 8]]


class Block(nn.Module):
    """A user's block, with a cache."""

    def __init__(self):
        super().__init__()
        self.attention = PositionedAttention(DIM, 4, 2, 8)
        self.wo = nn.Linear(DIM, DIM)
        self.new_cache = self.attention.new_cache

    def forward(self, x, positions, cache=None):
        x = x + self.attention(F.rms_norm(x, (DIM,)), positions, cache)
        return x + self.wo(F.silu(F.rms_norm(x, (DIM,))))


LAYERS = {
    "sdt": lambda: SubjectiveDepthLayer(Block(), Block(), DIM, window=WINDOW),
    "mod": lambda: MixtureOfDepthsLayer(Block(), DIM),
    "stt": lambda: SubjectiveTimescaleLayer(Block(), DIM, window=WINDOW),
}


def make(name, device):
    """A layer whose thresholds are those of a few batches, so that about half of the tokens are routed."""
    layer = LAYERS[name]().to(device)
    for _ in range(4):
        layer(torch.randn(8, 30, DIM, device=device))
    return layer.eval().requires_grad_(False)


def routed(layer):
    return next(m for m in layer.modules() if isinstance(m, RoutedLayer))


def decode(layer, x, positions, chunks, slots=None):
    """Outputs and route masks, chunk by chunk."""
    cache, start, outputs, masks = layer.new_cache(len(x), x.shape[1], slots), 0, [], []
    for count in chunks:
        outputs.append(layer(x[:, start : start + count], positions[:, start : start + count], cache))
        masks.append(routed(layer).report["mask"])
        start += count
    return torch.cat(outputs, 1), torch.cat(masks, 1), cache


def counts(cache):
    return cache[1][-1] if isinstance(cache[1], list) else cache[2]


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_decoding_is_one_full_pass(device, name, chunks):
    layer, x = make(name, device), torch.randn(4, 30, DIM, device=device)
    positions = torch.arange(30, device=device).expand(4, 30)
    whole = layer(x, positions)
    mask = routed(layer).report["mask"]
    assert mask.sum(1).unique().numel() > 1, "every text has as many routed tokens: draw others"
    for trim in (False, True):
        routed(layer).trim = trim
        out, routes, cache = decode(layer, x, positions, chunks, slots=30)
        assert torch.equal(routes, mask)
        torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-5)
        assert torch.equal(counts(cache), mask.sum(1).int())


@pytest.mark.parametrize("name", LAYERS)
def test_no_texts(device, name):
    layer, x, positions = make(name, device), torch.randn(0, 30, DIM, device=device), torch.arange(30, device=device)
    for trim in (False, True):
        routed(layer).trim = trim
        assert layer(x).shape == x.shape
        assert decode(layer, x, positions.expand(0, 30), [29, 1])[0].shape == x.shape


@pytest.mark.parametrize("name", LAYERS)
def test_texts_of_different_lengths_share_a_batch(device, name):
    """Prompts of 5, 20, 1 and 13 tokens, then ten steps each: every text gets what it gets alone."""
    layer, lengths = make(name, device), [5, 20, 1, 13]
    texts = [torch.randn(1, n + 10, DIM, device=device) for n in lengths]
    prompt = torch.full((4, 20, DIM), 1e4, device=device)  # what stands where no token is must not matter
    positions = torch.full((4, 20), -1, device=device)
    for b, n in enumerate(lengths):
        prompt[b, :n], positions[b, :n] = texts[b][0, :n], torch.arange(n, device=device)
    cache = layer.new_cache(4, 30, 30)
    outs = [layer(prompt, positions, cache)]
    for step in range(10):
        token = torch.stack([text[0, n + step] for text, n in zip(texts, lengths, strict=True)])[:, None]
        at = torch.tensor([[n + step] for n in lengths], device=device)
        outs.append(layer(token, at, cache))
    for b, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        got = torch.cat((outs[0][b, :n], *(out[b] for out in outs[1:])))
        torch.testing.assert_close(got, layer(text)[0], rtol=1e-4, atol=1e-5)
        assert counts(cache)[b] == routed(layer).report["mask"].sum()


@pytest.mark.parametrize("name", LAYERS)
def test_no_text_sees_another_in_the_cache(device, name):
    layer, x = make(name, device), torch.randn(3, 30, DIM, device=device)
    positions = torch.arange(30, device=device).expand(3, 30)
    before, routes, _ = decode(layer, x, positions, [9, 1, 1, 19])
    x[[0, 2]] = torch.randn(2, 30, DIM, device=device)
    after, again, _ = decode(layer, x, positions, [9, 1, 1, 19])
    assert_same_bits(after[1], before[1])
    assert torch.equal(again[1], routes[1])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("name", LAYERS)
def test_no_text_sees_another_in_training(device, name):
    layer, x = LAYERS[name]().to(device), torch.randn(3, 30, DIM, device=device)
    before = layer(x)
    x[[0, 2]] = torch.randn(2, 30, DIM, device=device)
    after = layer(x)
    assert_same_bits(after[1], before[1])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cut", [1, 17, 29])
def test_routes_equal_no_token_sees_a_later_one_in_training(device, name, cut):
    """Nothing but the choice of tokens looks ahead."""
    layer, x = LAYERS[name]().to(device), torch.randn(2, 30, DIM, device=device)
    chosen = topk_route(torch.rand(2, 30, device=device), 15)
    routed(layer).top_k = lambda scores, calibrates=False: chosen
    before = layer(x)
    x[:, cut:] = torch.randn(2, 30 - cut, DIM, device=device)
    after = layer(x)
    assert_same_bits(after[:, :cut].contiguous(), before[:, :cut].contiguous())
    assert not torch.equal(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cut", [1, 17, 29])
def test_under_the_threshold_no_token_sees_a_later_one(device, name, cut):
    layer, x = make(name, device), torch.randn(2, 30, DIM, device=device)
    before, routes = layer(x), routed(layer).report["mask"]
    x[:, cut:] = torch.randn(2, 30 - cut, DIM, device=device)
    after = layer(x)
    assert_same_bits(after[:, :cut].contiguous(), before[:, :cut].contiguous())
    assert torch.equal(routed(layer).report["mask"][:, :cut], routes[:, :cut])
    assert not torch.equal(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize("name", LAYERS)
def test_a_full_cache_takes_no_more(device, name):
    layer, x = make(name, device), torch.randn(3, 30, DIM, device=device)
    routed(layer).threshold.fill_(-torch.inf)
    positions = torch.arange(30, device=device).expand(3, 30)
    for chunks in CHUNKS:
        _, routes, cache = decode(layer, x, positions, chunks, slots=11)
        assert torch.equal(routes, (positions < 11))
        assert counts(cache).tolist() == [11, 11, 11]


def test_positions_are_those_of_the_text(device):
    """A text that starts at 1000 instead of 0 gives the same result, because rotary attention sees differences only; a
    cache that rotated by its own rows would not notice that tokens 3 and 4 were skipped."""
    layer, x = (
        make("mod", device).double() if device == "cpu" else make("mod", device),
        torch.randn(2, 30, DIM, device=device),
    )
    x = x.to(layer.router.weight.dtype)
    positions = torch.arange(30, device=device).expand(2, 30)
    near, _, _ = decode(layer, x, positions, [1] * 30, slots=30)
    far, _, _ = decode(layer, x, positions + 1000, [1] * 30, slots=30)
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-4)
    stretched, _, _ = decode(layer, x, positions * 3, [1] * 30, slots=30)
    assert (stretched - near).abs().max() > 1e-3


def test_static_decoding_compiles(device):
    layer, x = make("stt", device), torch.randn(2, 8, DIM, device=device)
    positions = torch.arange(8, device=device).expand(2, 8)
    expected, _, _ = decode(layer, x, positions, [1] * 8, slots=8)
    step, cache = torch.compile(layer, fullgraph=True, backend="aot_eager"), layer.new_cache(2, 8, 8)
    out = [step(x[:, t : t + 1].clone(), positions[:, t : t + 1].contiguous(), cache) for t in range(8)]
    torch.testing.assert_close(torch.cat(out, 1), expected, rtol=1e-4, atol=1e-5)


# In the decoder

SIZES = {"vocab_size": 64, "dim": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_dim": 96}
STACKS = {
    "dense": ("sdpa", "sdpa", "sdpa", "sdpa"),
    "mod": ("sdpa", "mod", "sdpa", "mod"),
    "sdt": ("sdt", "sdt"),
    "stt": ("sdpa", "stt", "sdpa", "stt"),
}


def model_of(name, device="cpu", **options):
    layers = STACKS[name]
    return DecoderLM(DecoderConfig(**SIZES, layers=layers, options={n: options for n in set(layers) - {"sdpa"}})).to(
        device
    )


def make_room(model):
    """For all tokens in the caches, so that none is skipped for want of it."""
    for layer in model.modules():
        if isinstance(layer, RoutedLayer):
            layer.capacity = 1.0


@pytest.mark.parametrize("name", ["mod", "sdt", "stt"])
def test_the_decoder_decodes_what_it_sees_whole(device, name):
    model = model_of(name, device)
    for _ in range(3):
        model(torch.randint(64, (4, 40), device=device))
    model.eval().requires_grad_(False)
    tokens = torch.randint(64, (3, 40), device=device)
    whole = model(tokens)
    names, routes = route_map(model)
    assert len(names) == 2
    assert 0.2 < routes.float().mean() < 0.8
    make_room(model)
    cache, out, seen = model.new_cache(3, 40), [], []
    for t in range(40):
        out.append(model(tokens[:, t : t + 1], cache, t))
        seen.append(route_map(model)[1])
    assert torch.equal(torch.cat(seen, 2), routes)
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-3, atol=1e-4)
    assert model.generate(tokens[:, :7], 5, temperature=0).shape == (3, 12)


@pytest.mark.parametrize("name", STACKS)
def test_texts_of_different_lengths_share_the_decoder(device, name):
    """Prompts of 3, 11 and 1 tokens in one batch: each text is continued as it is alone, from the same logits."""
    model = model_of(name, device)
    for _ in range(3):
        model(torch.randint(64, (4, 40), device=device))
    make_room(model.eval().requires_grad_(False))
    tokens, lengths = torch.randint(64, (3, 11), device=device), torch.tensor([3, 11, 1], device=device)
    at = torch.arange(11, device=device)
    logits = model(tokens, model.new_cache(3, 40), 0, torch.where(at < lengths[:, None], at, -1))
    texts = model.generate(tokens, 9, temperature=0, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = tokens[b : b + 1, :n]
        torch.testing.assert_close(logits[b, :n], model(alone, model.new_cache(1, 40))[0], rtol=1e-3, atol=1e-4)
        assert torch.equal(texts[b, : n + 9], model.generate(alone, 20, temperature=0)[0, : n + 9])
        assert texts[b, n + 9 :].sum() == 0


def test_a_layer_of_one_position_says_so():
    model = DecoderLM(DecoderConfig(**SIZES, layers=("sdpa", "grassmann")))
    with pytest.raises(ValueError, match="Block: expected a mixer that takes positions, got GrassmannMixing"):
        model(torch.zeros(1, 3, dtype=torch.long), None, 0, torch.arange(3)[None])


def storage(tensors):
    """Bytes of the distinct allocations behind nested lists of tensors, without the per-text numbers."""
    found = {}

    def visit(x):
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() if x.dim() >= 4 else 0
        else:
            for item in x:
                visit(item)

    visit(tensors)
    return sum(found.values())


@pytest.mark.parametrize("name", ["mod", "sdt", "stt"])
def test_cache_bytes(name):
    """Keys and values as allocated: half of a dense layer's in a routed one, three quarters of the dense model's."""
    dense, model = model_of("dense").new_cache(3, 1024), model_of(name)
    cache = model.new_cache(3, 1024)
    assert storage(cache) == 0.75 * storage(dense)
    of_routed = cache[0][1] if name == "sdt" else cache[1]
    assert storage(of_routed) == 0.5 * storage(dense[1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mod", "sdt", "stt"])
def test_cache_bytes_of_the_allocator(name):
    def allocated(model):
        before = torch.cuda.memory_allocated()
        cache = model.new_cache(4, 4096)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, cache

    dense, _ = allocated(model_of("dense", "cuda"))
    ours, _ = allocated(model_of(name, "cuda"))
    assert ours == pytest.approx(0.75 * dense, rel=0.02)


ROUTED = {
    name: {f"DecoderLM.layers.{i}.layer{part}" for i in places}
    for name, places, part in (("mod", (1, 3), ""), ("sdt", (0, 1), ".dynamic"), ("stt", (1, 3), ""))
}


def of_attention(q, k, v, *args, out_shape=None, **kwargs):
    """As torch counts its CUDA kernels, which have a formula: two products over all pairs, masked ones included."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def attention_flops(model, tokens):
    """Of the whole model, and by module."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={op: of_attention}) as counter:
        model(tokens)
    flops = {module: counts.get(op, 0) for module, counts in counter.get_flop_counts().items()}
    return flops["Global"], flops


@pytest.mark.parametrize("name", ["mod", "sdt", "stt"])
def test_attention_flops(name):
    """Counted by torch: a routed layer's attention is a quarter of a dense one's, the whole model's 0.625."""
    tokens = torch.randint(64, (2, 128))
    dense, _ = attention_flops(model_of("dense").eval(), tokens)
    model = model_of(name)
    if name == "stt":  # what the student costs: its teacher computes the whole block besides
        model.eval()
        tell_half_of_the_tokens(model)
    total, modules = attention_flops(model, tokens)
    assert dense > 0
    assert total == 0.625 * dense
    of_routed = [count for module, count in modules.items() if module in ROUTED[name]]
    assert of_routed == [0.25 * dense / 4] * 2


def tell_half_of_the_tokens(model):
    """Students that route every other token: the count depends on how many, not on which."""

    def every_other(scores, positions, cache=None):
        mask = positions % 2 == 1
        return positions[mask].view(len(scores), -1).int(), mask

    for layer in model.modules():
        if isinstance(layer, RoutedLayer):
            layer.by_threshold = every_other
