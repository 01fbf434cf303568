"""The Triton kernels of 2-simplicial attention and their errors; imported by the process of interpreter.py only."""

import torch
from problem import draw, evaluate
from reference import two_simplicial_attention as reference

from triton_kernels import sequence_bounds, two_simplicial_decode
from triton_kernels import two_simplicial_attention as kernels
from triton_kernels import two_simplicial_partial_sums as partial_sums

TILE = {"BLOCK_M": 16, "BLOCK_N": 16}


def strides(**tensors):
    return {f"stride_{name}{d}": t.stride(i) for name, t in tensors.items() for i, d in enumerate("bnh")}


def run_decode(shared, out, lse, keys, heads, offsets):
    """The forward pass of few queries, each part with `keys` of the long window."""
    batch, n_q, q_heads, dim = out.shape
    parts = -(-shared["w_short"] // offsets) * -(-shared["w_long"] // keys)
    rows = batch * q_heads * n_q
    part_out, part_lse = torch.full((rows, parts, dim), float("nan")), torch.full((rows, parts), float("nan"))
    outputs = dict(part_out_ptr=part_out, part_lse_ptr=part_lse, out_ptr=out, lse_ptr=lse, num_parts=parts)
    tile = dict(HEAD_DIM=16, HEADS=heads, OFFSETS=offsets, BLOCK_N=16)
    two_simplicial_decode.two_simplicial_fwd_decode[(rows // heads * parts,)](share=keys, **outputs, **shared, **tile)
    if parts > 1:
        two_simplicial_decode.two_simplicial_fwd_merge[(rows,)](
            num_queries=n_q, heads=q_heads, head_dim=dim, HEAD_DIM=16, BLOCK_PARTS=2, **outputs
        )


def packing(lengths):
    """The arguments that tell packed sequences apart."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    bounds = torch.full((2, int(ends[-1])), -1, dtype=torch.int32)
    if not lengths:
        return dict(bounds_ptr=bounds, packed=0)
    steps = max(len(lengths) - 1, 0).bit_length()
    sequence_bounds.sequence_bounds[(-(-bounds.shape[1] // 16),)](
        ends, bounds, num_tokens=bounds.shape[1], num_sequences=len(lengths), search_steps=steps, BLOCK=16
    )
    return dict(bounds_ptr=bounds, packed=1)


def run(problem, head_dim, share, chunk_tiles, num_splits, decode, lengths):
    """out, lse and the gradients, by the launches that csrc/two_simplicial_attention_cuda.cpp makes."""
    q, k_long, k_short, v_long, v_short = problem.inputs
    (batch, n_q, heads, dim), (_, n_k, kv_heads, _) = q.shape, k_long.shape
    group, w_long, w_short = heads // kv_heads, min(problem.w1, n_k), min(problem.w2, n_k)
    sizes = dict(num_queries=n_q, num_keys=n_k, kv_heads=kv_heads, group=group, head_dim=dim)
    scale = dim**-0.5 if problem.scale is None else problem.scale
    shared = sizes | dict(q_ptr=q, k_long_ptr=k_long, v_long_ptr=v_long, k_short_ptr=k_short, v_short_ptr=v_short,
                          w_long=w_long, w_short=w_short, scale=scale)  # fmt: skip
    shared |= strides(q=q, kl=k_long, vl=v_long, ks=k_short, vs=v_short)
    constants = dict(HEAD_DIM=head_dim, **TILE, **packing(lengths))
    tiles, blocks, bh = -(-n_q * group // 16), -(-n_k // 16), batch * kv_heads

    def nan(*shape, dtype=torch.float32):
        return torch.full(shape, float("nan"), dtype=dtype)

    out, lse = torch.full_like(q, float("nan")).contiguous(), nan(batch, heads, n_q)
    if decode:
        run_decode(shared, out, lse, **decode)
    else:
        kernels.two_simplicial_fwd[(tiles * bh,)](out_ptr=out, lse_ptr=lse, SHARE=share, **shared, **constants)

    grad_out, grad_lse = problem.grad_out, problem.grad_lse
    chunks, span = -(-tiles // chunk_tiles), -(-chunk_tiles * 16 // group) + w_short
    part_k, part_v, delta = nan(bh * chunks, span, dim), nan(bh * chunks, span, dim), nan(batch, heads, n_q)
    grads = [torch.full(x.shape, float("nan"), dtype=x.dtype) for x in problem.inputs]
    kernels.two_simplicial_bwd_dq[(chunks * bh,)](
        out_ptr=out, lse_ptr=lse, grad_out_ptr=grad_out, grad_lse_ptr=lse if grad_lse is None else grad_lse,
        has_grad_lse=int(grad_lse is not None), grad_q_ptr=grads[0], delta_ptr=delta, part_k_ptr=part_k, part_v_ptr=part_v,
        chunk_tiles=chunk_tiles, chunk_span=span, SHARE=share, **shared, **strides(g=grad_out), **constants,
    )  # fmt: skip
    partial_sums.two_simplicial_bwd_merge[(blocks * bh,)](
        part_k_ptr=part_k, part_v_ptr=part_v, grad_k_ptr=grads[2], grad_v_ptr=grads[4], w_short=w_short, scale=scale,
        chunk_rows=chunk_tiles * 16, chunk_span=span, reach=0, HEAD_DIM=head_dim, BLOCK_N=16, **sizes,
    )  # fmt: skip
    part_k, part_v = nan(bh * blocks * num_splits, 16, dim), nan(bh * blocks * num_splits, 16, dim)
    kernels.two_simplicial_bwd_dkv[(blocks * num_splits * bh,)](
        lse_ptr=lse, grad_out_ptr=grad_out, delta_ptr=delta, grad_k_ptr=grads[1], grad_v_ptr=grads[3],
        part_k_ptr=part_k, part_v_ptr=part_v, num_splits=num_splits, **shared, **strides(g=grad_out), **constants,
    )  # fmt: skip
    if num_splits > 1:
        partial_sums.two_simplicial_bwd_sum[(n_k * bh,)](
            part_k_ptr=part_k, part_v_ptr=part_v, grad_k_ptr=grads[1], grad_v_ptr=grads[3], num_keys=n_k,
            kv_heads=kv_heads, head_dim=dim, scale=scale, num_splits=num_splits, block_keys=16, HEAD_DIM=head_dim,
            BLOCK_SPLITS=2,
        )  # fmt: skip
    return [out, lse, *grads]


def run_case(head_dim=16, share=1, chunk_tiles=1, num_splits=1, decode=None, dtype="float32", lengths=(), **case):
    """{output: relative error}. Sequences of these lengths are packed."""
    problem = draw(dtype=getattr(torch, dtype), **(case | dict(batch=1, n_k=sum(lengths)) if lengths else case))

    def apart(*inputs, **options):
        tensors, windows = inputs[:5], inputs[5:]
        sequences = zip(*(x.split(list(lengths), 1) for x in tensors), strict=True)
        outs, lses = zip(*(reference(*s, *windows, **options) for s in sequences if s[0].numel()), strict=True)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    names = ["out", "lse", *(f"grad_{x}" for x in ("q", "k1", "k2", "v1", "v2"))]
    truth = evaluate(apart if lengths else reference, problem, torch.float64)
    errors = {}
    for name, actual in zip(
        names, run(problem, head_dim, share, chunk_tiles, num_splits, decode, lengths), strict=True
    ):
        errors[name] = ((actual.double() - truth[name]).norm() / (truth[name].norm() + 1e-30)).item()
    return errors
