"""What every module and model does alike: how it is made, moved and refuses what it cannot do."""

import copy
import re

import pytest
import torch
from torch import nn

from simplex_ops import models
from simplex_ops.nn import (
    CausalRouter,
    GrassmannMixing,
    MixtureOfDepthsLayer,
    PositionedAttention,
    PriorFFN,
    SubjectiveDepthLayer,
    SubjectiveTimescaleLayer,
    SurpriseGate,
    TwoSimplicialAttention,
    anneal_gates,
)

DIM = 32
SMALL = dict(dim=DIM, heads=2, kv_heads=1, head_dim=16, mlp_dim=32)
TOKENS = torch.arange(12).view(2, 6)


def attention(**options):
    return PositionedAttention(DIM, 2, 1, **options)


MODULES = {
    "2-simplicial": lambda **o: TwoSimplicialAttention(DIM, 2, 1, w1=4, w2=2, **o),
    "grassmann": lambda **o: GrassmannMixing(DIM, 4, (1, 3), **o),
    "positioned": attention,
    "mod": lambda **o: MixtureOfDepthsLayer(attention(**o), DIM, **o),
    "sdt": lambda **o: SubjectiveDepthLayer(attention(**o), attention(**o), DIM, window=5, **o),
    "stt": lambda **o: SubjectiveTimescaleLayer(attention(**o), DIM, window=5, **o),
}


def call(module, x):
    if isinstance(module, PositionedAttention):
        return module(x, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]))
    return module(x)


def lm(*layers, **options):
    return models.DecoderLM(models.DecoderConfig(**SMALL, layers=layers, **options)).eval()


@pytest.mark.parametrize("name", MODULES)
def test_fsdp_can_shard_every_parameter(name):
    """torch.distributed.fsdp.fully_shard refuses those without dimensions."""
    assert all(parameter.dim() > 0 for parameter in MODULES[name]().parameters())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("filled_by", ["to_empty", "assign"])
def test_made_on_the_meta_device(name, filled_by):
    """What no state_dict holds (the angles of rotary positions) must be right nevertheless."""
    module = MODULES[name]().eval()
    late = MODULES[name](device="meta").eval()
    if filled_by == "to_empty":
        late.to_empty(device="cpu")
    late.load_state_dict(module.state_dict(), assign=filled_by == "assign")
    x = torch.randn(2, 9, DIM)
    assert torch.equal(call(late, x), call(module, x))


@pytest.mark.parametrize("name", MODULES)
def test_shapes_on_the_meta_device(name):
    with torch.device("meta"):
        assert call(MODULES[name](), torch.randn(2, 9, DIM)).shape == (2, 9, DIM)


@pytest.mark.parametrize("name", MODULES)
def test_default_dtype_float64(name):
    torch.set_default_dtype(torch.float64)
    try:
        out = call(MODULES[name](), torch.randn(2, 9, DIM))
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == torch.float64


@pytest.mark.parametrize("name", ["mod", "sdt", "stt"])
def test_autocast_of_a_block_that_returns_bfloat16(name):
    module = MODULES[name]()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.randn(2, 9, DIM))
    assert out.dtype == torch.float32
    out.sum().backward()


@pytest.mark.parametrize("layer", ["sdpa", "sdpa_twin"])
def test_far_positions_in_bfloat16(layer):
    """A model that is moved to bfloat16 keeps the angles of its rotary positions: rounded, they grow wrong with the position."""
    model = lm(layer)
    mixer = model.layers[0].mixer
    moved = copy.deepcopy(model).bfloat16()
    assert moved.layers[0].mixer.wq.weight.dtype == torch.bfloat16
    assert torch.equal(moved.layers[0].mixer.frequencies, mixer.frequencies)
    tokens = torch.randint(256, (1, 1024))
    truth, out = model(tokens)[0, -64:], moved(tokens)[0, -64:].float()
    assert (out - truth).norm() < 0.02 * truth.norm()


def generated(count=2, temperature=0.0, top_k=0, lengths=None):
    return lm("sdpa").generate(TOKENS, count, temperature, top_k, None if lengths is None else torch.tensor(lengths))


def with_cache(model, length, position=0):
    return model(torch.zeros(1, length, dtype=torch.int64), model.new_cache(1, 3), position)


def layer_with_cache(position=0, batch=2):
    layer = MODULES["2-simplicial"]()
    return layer(torch.randn(2, 1, DIM), layer.new_cache(batch), position)


BAD = {
    "heads 0": (lambda: PositionedAttention(DIM, 0), "PositionedAttention: expected heads to be at least 1, got 0"),
    "kv_heads 0": (
        lambda: PositionedAttention(DIM, 2, 0),
        "PositionedAttention: expected kv_heads to be at least 1, got 0",
    ),
    "kv_heads 3": (
        lambda: PositionedAttention(DIM, 4, 3),
        "PositionedAttention: expected heads to be a multiple of kv_heads (3), got 4",
    ),
    "dim 33": (
        lambda: PositionedAttention(33, 2),
        "PositionedAttention: expected dim to be a multiple of heads (2) when head_dim is not given, got 33",
    ),
    "head_dim 3": (
        lambda: PositionedAttention(DIM, 2, 2, 3),
        "PositionedAttention: expected head_dim to be even, got 3",
    ),
    "rope_base": (
        lambda: PositionedAttention(DIM, 2, rope_base=-1.0),
        "frequencies: expected base to be above 0, got -1.0",
    ),
    "scale NaN": (
        lambda: TwoSimplicialAttention(DIM, 2, scale=float("nan")),
        "TwoSimplicialAttention: expected scale to be finite, got nan",
    ),
    "w2 0": (
        lambda: TwoSimplicialAttention(DIM, 2, w2=0),
        "TwoSimplicialAttention: expected w2 to be at least 1, got 0",
    ),
    "position": (lambda: layer_with_cache(-1), "TwoSimplicialAttention: expected position to be at least 0, got -1"),
    "batch of the cache": (
        lambda: layer_with_cache(0, 3),
        "TwoSimplicialAttention: expected a cache of 2 sequences, got 3",
    ),
    "past a short ring": (
        lambda: with_cache(lm("two_simplicial"), 4),
        "TwoSimplicialAttention: expected position and length to fit a cache of 3 tokens, got 0 and 4",
    ),
    "past the cache": (
        lambda: with_cache(lm("sdpa"), 2, 2),
        "DotProductAttention: expected position and length to fit a cache of 3 tokens, got 2 and 2",
    ),
    "mod of dim 0": (
        lambda: MixtureOfDepthsLayer(nn.Identity(), 0),
        "MixtureOfDepthsLayer: expected dim to be at least 1, got 0",
    ),
    "capacity": (
        lambda: MixtureOfDepthsLayer(nn.Identity(), 8, float("nan")),
        "MixtureOfDepthsLayer: expected capacity to be above 0 and at most 1, got nan",
    ),
    "router of dim 0": (lambda: CausalRouter(0), "CausalRouter: expected dim to be at least 1, got 0"),
    "window": (lambda: SurpriseGate(0), "SurpriseGate: expected window to be at least 1, got 0"),
    "width": (lambda: PriorFFN(8, float("nan")), "PriorFFN: expected width to be above 0 and finite, got nan"),
    "progress": (
        lambda: anneal_gates(MODULES["stt"](), float("nan")),
        "anneal_gates: expected progress to be a number, got nan",
    ),
    "options": (
        lambda: lm("two_simplicial", options={"two_simplical": {"w1": 8}}),
        "DecoderLM: expected options for layers among [.*], got ['two_simplical']",
    ),
    "positions": (
        lambda: models.GrassmannLM(256, 8, 4, 1, 5)(TOKENS),
        "GrassmannLM: expected position and length to fit 5 positions, got 0 and 6",
    ),
    "count": (lambda: generated(count=-1), "generate: expected count to be at least 0, got -1"),
    "temperature": (lambda: generated(temperature=-1.0), "generate: expected temperature to be at least 0, got -1.0"),
    "temperature NaN": (
        lambda: generated(temperature=float("nan")),
        "generate: expected temperature to be at least 0, got nan",
    ),
    "top_k": (lambda: generated(top_k=-1), "generate: expected top_k to be at least 0, got -1"),
    "a length 0": (lambda: generated(lengths=[0, 6]), "generate: expected lengths to be from 1 to 6, got [0, 6]"),
    "a length past the row": (
        lambda: generated(lengths=[3, 7]),
        "generate: expected lengths to be from 1 to 6, got [3, 7]",
    ),
    "one length for two": (lambda: generated(lengths=[3]), "generate: expected lengths to have shape [2], got [1]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    make, message = BAD[name]
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        make()
