"""Plain-torch definitions of the ops, like their equations: the truth in fp64, "plain torch" in any other dtype.

Differentiable by ordinary autograd, on any device. Deliberately not an implementation to learn speed from.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Elements of the largest intermediate of a block of queries. Backward recomputes block by block: memory stays near it.
BLOCK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}


def two_simplicial_attention(q, k1, k2, v1, v2, w1, w2, scale=None, cu_seqlens=None):
    """out_i = sum_jk P_ijk (v1_j * v2_k) and lse_i = ln sum_jk exp(A_ijk), P the joint softmax over the valid (j, k) of
    A_ijk = scale * sum_d q_id k1_jd k2_kd, valid(i) = {i - w1 < j <= i and i - w2 < k <= i}, i the absolute position.

    q [B, Nq, Hq, D]; k1, k2, v1, v2 [B, Nk, Hkv, D]; the queries are the last Nq positions.
    Returns out like q and lse [B, Hq, Nq] in fp32 (fp64 for fp64 inputs). Packed sequences are so many calls.
    """
    if cu_seqlens is not None:
        calls = [
            two_simplicial_attention(*(x[:, s] for x in (q, k1, k2, v1, v2)), w1, w2, scale)
            for s in _sequences(cu_seqlens)
        ]
        return torch.cat([out for out, _ in calls], 1), torch.cat([lse for _, lse in calls], 2)
    batch, n_q, heads, dim = q.shape
    n_k = k1.shape[1]
    w1, w2 = min(w1, n_k), min(w2, n_k)
    scale = dim**-0.5 if scale is None else scale

    cost_of_query = batch * heads * w1 * max(w2, dim)
    block = max(1, BLOCK_ELEMENTS[q.device.type] // max(1, cost_of_query))
    outs, lses = [], []
    for start in range(0, n_q, block):
        stop = min(start + block, n_q)
        positions = torch.arange(start, stop, device=q.device) + (n_k - n_q)
        windows = [
            _rows(x, w, start + n_k - n_q, stop + n_k - n_q)
            for x, w in zip((k1, k2, v1, v2), (w1, w2) * 2, strict=True)
        ]
        out, lse = checkpoint(_attend, q[:, start:stop], *windows, w1, w2, positions, scale, use_reentrant=False)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return q.clone(), q.new_empty(batch, heads, 0, dtype=wide(q.dtype))
    return torch.cat(outs, 1), torch.cat(lses, 1).transpose(1, 2)


def wide(dtype):
    """The dtype that torch.matmul accumulates in."""
    return torch.promote_types(dtype, torch.float32)


def _rows(x, w, start, stop):
    """Rows start-w+1 .. stop-1 of x, zeros before the first, widened: gradients of overlapping windows then add up in
    the wide dtype, as inside a matmul, so that plain bf16 is as good, and the 2x rule as strict, as it can be."""
    first = start - w + 1
    return F.pad(x[:, max(first, 0) : stop].to(wide(x.dtype)), (0, 0, 0, 0, max(-first, 0), 0))


def _attend(q, k1, k2, v1, v2, w1, w2, positions, scale):
    batch, n, heads, dim = q.shape
    kv_heads = k1.shape[2]

    def per_query(x, w):  # -> [B, n, Hkv, 1, w, D], the last w rows that each query sees
        return x.unfold(1, w, 1).movedim(-1, 3).unsqueeze(3).to(q.dtype)

    k1, k2, v1, v2 = per_query(k1, w1), per_query(k2, w2), per_query(v1, w1), per_query(v2, w2)
    q = q.reshape(batch, n, kv_heads, heads // kv_heads, 1, dim)
    logits = ((q * k1) @ k2.transpose(-1, -2)) * scale  # [B, n, Hkv, G, w1, w2]

    j = positions[:, None] - w1 + 1 + torch.arange(w1, device=q.device)
    k = positions[:, None] - w2 + 1 + torch.arange(w2, device=q.device)
    valid = (j >= 0)[:, :, None] & (k >= 0)[:, None, :]  # [n, w1, w2]
    logits = logits.masked_fill(~valid[:, None, None], -torch.inf).flatten(-2)
    lse = logits.to(wide(q.dtype)).logsumexp(-1)
    p = logits.softmax(-1).unflatten(-1, (w1, w2))
    out = ((p @ v2) * v1).sum(-2)
    return out.reshape(batch, n, heads, dim), lse.reshape(batch, n, heads)


def surprise_gate(x_in, x_post, x_prior, beta_ce, beta_cu, o_ce, m_cu, window=100):
    """D = x_post - x_in; D^ = x_prior - x_in; d_st = mean D^2; ce = d_st - (mean (D - D^)^2 - ln o_ce);
    cu = d_st - m_cu * the mean of the last `window` d_st; g = 1 - (1 - sigmoid(beta_ce ce)) (1 - sigmoid(beta_cu cu)).

    Returns g, d_st, ce, cu [B, T], widened."""
    x_in, x_post, x_prior = (x.to(wide(x.dtype)) for x in (x_in, x_post, x_prior))
    d_st = (x_post - x_in).square().mean(-1)
    d_ch = (x_post - x_prior).square().mean(-1)
    ce = d_st - (d_ch - torch.log(o_ce + 1e-10))
    past = d_st.detach()
    window = min(window, 10**6)  # memory; the tests' longer windows are so long that only the first value counts
    if past.numel():
        past = torch.cat((past[:, :1].expand(-1, window - 1), past), 1)
        past = past.unfold(1, window, 1).mean(-1)
    cu = d_st - m_cu * past
    g = 1 - (1 - torch.sigmoid(beta_ce * ce)) * (1 - torch.sigmoid(beta_cu * cu))
    return g, d_st, ce, cu


def topk_route(scores, k):
    """The k largest of each row, ties to the lower index, NaN as -inf: ascending indices and the mask of them."""
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    idx = order[:, :k].sort(dim=1).values.to(torch.int32)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return idx, mask.scatter(1, idx.long(), True)


def topk_route_calibrate(scores, k, threshold, calibrations):
    """Of topk_route idx and mask; then the threshold and the number of calibrations after one more."""
    idx, mask = topk_route(scores, k)
    lowest = torch.where(mask, scores, torch.inf).nan_to_num(-torch.inf, torch.inf, -torch.inf).amin(1).mean()
    moved = threshold + (1 / (calibrations + 1)).clamp(min=0.02) * (lowest - threshold)
    return idx, mask, torch.where(lowest.isfinite(), moved, threshold).to(threshold.dtype), calibrations + 1


def threshold_route(scores, threshold, cap):
    """The first `cap` indices of each row with scores >= threshold, then -1; and how many there are."""
    idx = torch.full((scores.shape[0], cap), -1, dtype=torch.int32, device=scores.device)
    count = torch.zeros(scores.shape[0], dtype=torch.int32, device=scores.device)
    for row, values in enumerate(scores):
        chosen = (values >= threshold).nonzero()[:cap, 0]
        idx[row, : len(chosen)] = chosen.to(torch.int32)
        count[row] = len(chosen)
    return idx, count


def route_gather(x, idx):
    """y[b, s] = x[b, idx[b, s]], zero where idx is negative."""
    y = torch.gather(x, 1, idx.clamp(min=0).long()[..., None].expand(-1, -1, x.shape[2]))
    return y * (idx >= 0)[..., None].to(x.dtype)


def route_scatter_add(base, y, idx, gate=None):
    """out = base; out[b, idx[b, s]] += gate[b, s] y[b, s], where idx is not negative."""
    update = y.to(wide(y.dtype))
    if gate is not None:
        update = update * gate[..., None]
    update = update * (idx >= 0)[..., None].to(update.dtype)
    into = idx.clamp(min=0).long()[..., None].expand_as(update)
    return base.to(update.dtype).scatter_add(1, into, update).to(base.dtype)


def route_replace(base, y, idx, gate=None):
    """With t = idx[b, s] not negative: out = base; out[b, t] += gate[b, t] (y[b, s] - out[b, t])."""
    x = base.to(wide(base.dtype))
    gate = None if gate is None else gate.gather(1, idx.clamp(min=0).long())
    return route_scatter_add(x, y.to(x.dtype) - route_gather(x, idx), idx, gate).to(base.dtype)


def plucker_mean(z, offsets, valid=None, cu_seqlens=None, smallest_sine=1e-6):
    """pbar_t = mean over the offsets with t - offset >= 0 (and both tokens valid) of p / |p|, where p holds the minors
    z_{t,i} z_{t-offset,j} - z_{t,j} z_{t-offset,i}, i < j; 0 for a pair that spans no plane, and where nothing is paired.

    z [B, L, r] -> [B, L, r (r - 1) / 2]. Tokens are normalised first, so that |p| is the sine of their angle.
    Packed sequences are so many calls.
    """
    if cu_seqlens is not None:
        return torch.cat([plucker_mean(z[:, s], offsets, _of(valid, s)) for s in _sequences(cu_seqlens)], 1)
    x = z.to(wide(z.dtype))
    norm = x.norm(dim=-1, keepdim=True)
    u = torch.where(norm == 0, 0, x / torch.where(norm == 0, 1, norm))
    i, j = torch.triu_indices(z.shape[-1], z.shape[-1], 1, device=z.device)
    valid = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if valid is None else valid
    total, count = x.new_zeros(*z.shape[:2], len(i)), x.new_zeros(*z.shape[:2], 1)
    for offset in offsets:
        earlier = _earlier(u, offset)
        counts = (valid & _earlier(valid, offset))[..., None]
        p = u[..., i] * earlier[..., j] - u[..., j] * earlier[..., i]
        square = p.square().sum(-1, keepdim=True)
        spans = counts & (square > smallest_sine**2)
        total = total + torch.where(spans, p / torch.where(spans, square, 1).sqrt(), 0)
        count = count + counts
    return (total / count.clamp(min=1)).to(z.dtype)


def grassmann_mix(z, weight, bias, offsets, valid=None, cu_seqlens=None, bias_everywhere=False):
    """g_t = W pbar_t + b, without b where nothing is paired unless bias_everywhere."""
    if cu_seqlens is not None:
        rest = weight, bias, offsets
        calls = [grassmann_mix(z[:, s], *rest, _of(valid, s), None, bias_everywhere) for s in _sequences(cu_seqlens)]
        return torch.cat(calls, 1)
    g = plucker_mean(z, offsets, valid) @ weight.mT
    if bias is None:
        return g
    if bias_everywhere:
        return g + bias
    with torch.no_grad():
        valid = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if valid is None else valid
        pairs = [valid & _earlier(valid, offset) for offset in offsets]
    return g + bias * torch.stack(pairs).any(0)[..., None]


def grassmann_blend(h, g, logits):
    """alpha h + (1 - alpha) g, alpha = sigmoid(logits), element by element."""
    alpha = torch.sigmoid(logits)
    return alpha * h + (1 - alpha) * g


def grassmann_layer(x, w_reduce, b_reduce, w_expand, b_expand, w_gate_x, w_gate_g, b_gate, offsets, **options):
    """Reduce, mix, expand, and blend by a gate of both."""
    g = grassmann_mix(x @ w_reduce.mT + b_reduce, w_expand, b_expand, offsets, **options)
    return grassmann_blend(x, g, x @ w_gate_x.mT + g @ w_gate_g.mT + b_gate)


def _sequences(cu_seqlens):
    bounds = cu_seqlens.tolist()
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _of(valid, tokens):
    return None if valid is None else valid[:, tokens]


def _earlier(x, offset):
    """Row t - offset of x [B, L, ...] at t, zeros before the first."""
    offset = min(offset, x.shape[1])
    return torch.cat([torch.zeros_like(x[:, :offset]), x[:, : x.shape[1] - offset]], 1)


def causal_route_logits(x, weight, prev=None):
    """logits_t = <weight[:dim], x_t> + <weight[dim:], x_{t-1}>, x_{-1} = prev or 0, widened; a short weight lacks the second."""
    dim = x.shape[2]
    now = x.to(wide(x.dtype))
    first = torch.zeros_like(now[:, :1]) if prev is None else prev.to(now.dtype)[:, None]
    before = torch.cat((first, now), 1)[:, : x.shape[1]]
    return now @ weight[:dim] + (before @ weight[dim:] if len(weight) > dim else 0)


def rotate(x, positions, frequencies):
    """Each pair (x_d, x_{d + D/2}) of x [B, n, H, D] turned by positions [B, n] * frequencies [D/2]."""
    angles = (positions[..., None].to(frequencies.dtype) * frequencies)[:, :, None]
    a, b = x.to(wide(x.dtype)).chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1).to(x.dtype)


def route_kv_append(keys, values, count, k, v, positions, frequencies=None):
    """New keys, values and count: the slots whose position is not negative, in order, until the cache is full."""
    keys, values, count = keys.clone(), values.clone(), count.clone()
    turned = k if frequencies is None else rotate(k, positions, frequencies)
    for b, (start, row) in enumerate(zip(count.tolist(), positions.tolist(), strict=True)):
        taken = [s for s, position in enumerate(row) if position >= 0][: keys.shape[1] - start]
        count[b] = end = start + len(taken)
        keys[b, start:end], values[b, start:end] = turned[b, taken], v[b, taken]
    return keys, values, count
