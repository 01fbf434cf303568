"""The Triton kernels of routing and the surprise gate, and what they must compute, which each case asserts itself.

Imported by the process of interpreter.py only.
"""

import itertools

import reference
import torch

from triton_kernels import causal_route_logits, route_kv_append, routing, surprise_gate

NAN = float("nan")


def check_gate(batch, length, dim, window, dtype=torch.float32):
    x_in = torch.randn(batch, length, dim)
    rows = [x.to(dtype) for x in (x_in, x_in + torch.randn_like(x_in), x_in + 0.7 * torch.randn_like(x_in))]
    beta_ce, beta_cu, o_ce, m_cu = numbers = [torch.tensor(p) for p in (0.55, 0.44, 1.025, 1.1)]
    e = torch.randn(batch, length)
    leaves = [x.double().requires_grad_() for x in (*rows, *numbers)]
    truth = reference.surprise_gate(*leaves, window)
    truth = [*truth, *torch.autograd.grad(truth[0], leaves, e.double())]

    g, d_st, ce, cu, grad_ce, grad_cu = torch.full((6, batch, length), NAN)
    pointers = {f"{name}_ptr": x for name, x in zip(("x_in", "x_post", "x_prior"), rows, strict=True)}
    surprise_gate.surprise_gate_rows[(batch * length,)](
        **pointers, o_ce_ptr=o_ce, d_st_ptr=d_st, ce_ptr=ce, dim=dim, BLOCK_D=16
    )
    blocks = -(-length // 8) * batch
    surprise_gate.surprise_gate_fwd[(blocks,)](
        d_st_ptr=d_st, ce_ptr=ce, beta_ce_ptr=beta_ce, beta_cu_ptr=beta_cu, m_cu_ptr=m_cu, cu_ptr=cu, g_ptr=g,
        length=length, window=window, BLOCK_T=8,
    )  # fmt: skip
    parts, grads = torch.full((4, blocks), NAN), [torch.full((1,), NAN) for _ in range(4)]
    surprise_gate.surprise_gate_bwd[(blocks,)](
        grad_g_ptr=e, d_st_ptr=d_st, ce_ptr=ce, cu_ptr=cu, beta_ce_ptr=beta_ce, beta_cu_ptr=beta_cu, grad_ce_ptr=grad_ce,
        grad_cu_ptr=grad_cu, parts_ptr=parts, length=length, window=window, BLOCK_T=8,
    )  # fmt: skip
    surprise_gate.surprise_gate_bwd_sum[(1,)](
        parts_ptr=parts, o_ce_ptr=o_ce, grad_beta_ce_ptr=grads[0], grad_beta_cu_ptr=grads[1], grad_o_ce_ptr=grads[2],
        grad_m_cu_ptr=grads[3], num_parts=blocks, BLOCK=4,
    )  # fmt: skip
    grad_rows = [torch.full((batch, length, dim), NAN, dtype=dtype) for _ in range(3)]
    surprise_gate.surprise_gate_bwd_rows[(batch * length,)](
        **pointers, grad_ce_ptr=grad_ce, grad_cu_ptr=grad_cu, grad_in_ptr=grad_rows[0], grad_post_ptr=grad_rows[1],
        grad_prior_ptr=grad_rows[2], dim=dim, BLOCK_D=16,
    )  # fmt: skip
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    for actual, expected in zip((g, d_st, ce, cu, *grad_rows, *(x[0] for x in grads)), truth, strict=True):
        torch.testing.assert_close(actual.double(), expected.detach(), rtol=tolerance, atol=tolerance)


def check_choice(scores, k, cap, threshold):
    batch, length = scores.shape
    idx, mask = torch.full((batch, k), -9, dtype=torch.int32), torch.full((batch, length), 9, dtype=torch.int8)
    lowest = torch.full((batch,), NAN)
    routing.route_topk[(batch,)](
        scores_ptr=scores,
        idx_ptr=idx,
        mask_ptr=mask,
        lowest_ptr=lowest,
        length=length,
        k=k,
        has_lowest=1,
        BLOCK=16,
        THREADS=4,
    )
    expected_idx, expected_mask = reference.topk_route(scores, k)
    assert torch.equal(idx, expected_idx), (scores, idx, expected_idx)
    assert torch.equal(mask, expected_mask.to(torch.int8))
    numbers = torch.tensor([0.5]), torch.tensor([2.0])
    truth = reference.topk_route_calibrate(scores, k, *numbers)[2:]
    routing.route_calibrate[(1,)](
        threshold_ptr=numbers[0], calibrations_ptr=numbers[1], lowest_ptr=lowest, batch=batch, BLOCK=1
    )
    torch.testing.assert_close(numbers, truth)
    idx, count = torch.full((batch, cap), -9, dtype=torch.int32), torch.full((batch,), -9, dtype=torch.int32)
    routing.route_threshold[(batch,)](
        scores_ptr=scores, idx_ptr=idx, count_ptr=count, length=length, cap=cap, threshold=threshold, BLOCK=16
    )
    expected_idx, expected_count = reference.threshold_route(scores, threshold, cap)
    assert torch.equal(idx, expected_idx)
    assert torch.equal(count, expected_count)


def check_moves(dtype, gated, replaces):
    batch, length, slots, dim = 2, 9, 6, 24
    x, y = torch.randn(batch, length, dim).to(dtype), torch.randn(batch, slots, dim).to(dtype)
    gate = torch.rand(batch, length if replaces else slots)
    idx = torch.stack([torch.randperm(length)[:slots].sort().values for _ in range(batch)]).to(torch.int32)
    idx[0, 5], idx[1, 5] = -1, length  # the second is an error that must not touch memory
    legal = torch.where(idx < length, idx, -1)
    total, tile = batch * slots, {"dim": dim, "BLOCK_D": 16}

    gathered = torch.full((batch, slots, dim), NAN, dtype=dtype)
    routing.route_gather_rows[(3,)](
        from_ptr=x, idx_ptr=idx, to_ptr=gathered, length=length, slots=slots, total=total, ROWS=8, **tile
    )
    assert torch.equal(gathered, reference.route_gather(x, legal))

    slot_of = torch.full((batch * length,), -9, dtype=torch.int32)
    routing.route_slots[(batch,)](idx_ptr=idx, slot_of_ptr=slot_of, length=length, slots=slots, BLOCK=4)
    pointers = {"y_ptr": y, "gate_ptr": gate, "slot_of_ptr": slot_of, "rows": batch * length, "ROWS": 4, **tile}
    scattered = torch.full_like(x, NAN)
    routing.route_scatter_add_rows[(5,)](base_ptr=x, out_ptr=scattered, has_base=0, has_gate=0, replaces=1, **pointers)
    assert torch.equal(scattered, reference.route_scatter_add(torch.zeros_like(x), y, legal))

    leaves = [t.double().requires_grad_() for t in (x, y, gate)]
    put_back = reference.route_replace if replaces else reference.route_scatter_add
    truth = put_back(*leaves[:2], legal, leaves[2] if gated else None)
    grad = torch.randn(truth.shape).to(dtype)
    truth_grads = torch.autograd.grad(truth, leaves[: 3 if gated else 2], grad.double())
    out, grad_y = torch.full_like(x, NAN), torch.full_like(y, NAN)
    grad_gate = torch.full_like(gate, 0.0 if replaces and gated else NAN)
    grad_x, how = grad.clone(), {"has_gate": int(gated), "replaces": int(replaces)}
    routing.route_scatter_add_rows[(5,)](base_ptr=x, out_ptr=out, has_base=1, **how, **pointers)
    routing.route_scatter_add_bwd[(total,)](
        grad_out_ptr=grad, base_ptr=x, y_ptr=y, idx_ptr=idx, gate_ptr=gate, grad_base_ptr=grad_x, grad_y_ptr=grad_y,
        grad_gate_ptr=grad_gate, length=length, slots=slots, **how, **tile,
    )  # fmt: skip
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    for actual, expected in zip((out, grad_x, grad_y, grad_gate), (truth.detach(), *truth_grads), strict=False):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    assert gated or grad_gate.isnan().all()


def check_logits(dtype, looks_back, with_prev):
    batch, length, dim = 2, 11, 24
    x, prev = torch.randn(batch, length, dim).to(dtype), torch.randn(batch, dim).to(dtype)
    weight, grad = torch.randn(2 * dim if looks_back else dim), torch.randn(batch, length)
    leaves = [t.double().requires_grad_() for t in ((x, weight, prev) if with_prev else (x, weight))]
    truth = reference.causal_route_logits(*leaves)
    truth = [truth, *torch.autograd.grad(truth, leaves, grad.double())]

    shared = {
        "x_ptr": x,
        "weight_ptr": weight,
        "prev_ptr": prev,
        "length": length,
        "dim": dim,
        "dim_before": dim if looks_back else 0,
        "has_prev": int(with_prev),
    }
    logits, parts = torch.full((batch, length), NAN), torch.full((batch * 3, len(weight)), NAN)
    causal_route_logits.causal_route_logits_fwd[(6,)](
        **shared, logits_ptr=logits, rows=batch * length, ROWS=4, BLOCK_D=16
    )
    grad_x, grad_prev = torch.full_like(x, NAN), torch.full_like(prev, NAN)
    causal_route_logits.causal_route_logits_bwd[(batch * 3,)](
        **shared,
        grad_logits_ptr=grad,
        grad_x_ptr=grad_x,
        grad_prev_ptr=grad_prev,
        parts_ptr=parts,
        BLOCK_T=4,
        BLOCK_D=16,
    )
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    for actual, expected in zip((logits, grad_x, parts.sum(0), grad_prev), truth, strict=False):
        torch.testing.assert_close(actual.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert with_prev or grad_prev.isnan().all()


def check_append(dtype, rotates):
    batch, capacity, slots, heads, head_dim = 3, 6, 5, 2, 12
    keys, values = (torch.randn(batch, capacity, heads, head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, slots, heads, head_dim).to(dtype) for _ in range(2))
    count, frequencies = torch.tensor([0, 3, 6], dtype=torch.int32), torch.rand(head_dim // 2)
    positions = torch.tensor([[1, 4, 9, -1, -1], [0, 1, 2, 3, 4], [7, -1, -1, -1, -1]], dtype=torch.int32)
    expected = reference.route_kv_append(keys, values, count, k, v, positions, frequencies if rotates else None)
    sizes = {"positions_ptr": positions, "count_ptr": count, "slots": slots, "capacity": capacity}
    route_kv_append.route_kv_append_rows[(batch * slots,)](
        **sizes, k_ptr=k, v_ptr=v, frequencies_ptr=frequencies, keys_ptr=keys, values_ptr=values, row=heads * head_dim,
        half=head_dim // 2, rotates=int(rotates), BLOCK_H=4, BLOCK=16,
    )  # fmt: skip
    route_kv_append.route_kv_append_count[(batch,)](**sizes, BLOCK=2)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close((keys, values), expected[:2], rtol=tolerance, atol=tolerance)
    assert torch.equal(count, expected[2])


CASES = {
    "gate": lambda: check_gate(2, 21, 24, 5),
    "gate, long window": lambda: check_gate(1, 17, 40, 100),
    "gate, window 1": lambda: check_gate(3, 1, 8, 1),
    "gate, fp16": lambda: check_gate(2, 9, 40, 9, torch.float16),
    "choice": lambda: [check_choice(torch.randn(2, 37), k, 10, 0.3) for k in (1, 18, 37)],
    "choice, ties": lambda: [check_choice(torch.randn(2, 37).round(), k, 40, 0.0) for k in (1, 18, 37)],
    "choice, in one block": lambda: [
        check_choice(torch.randn(2, n) * 10.0**e, k, 5, 0.3) for n in (1, 9, 16) for e in (-30, 0, 30) for k in (1, n)
    ],
    "choice, constant": lambda: [check_choice(torch.full((1, 33), 0.757), k, 5, 0.757) for k in (1, 16, 33)],
    "choice, special": lambda: [
        check_choice(torch.tensor([[-0.0, NAN, 0.0, 1e-45, -torch.inf, torch.inf, -1e-45, NAN, 3e38]] * 2), k, 4, 0.0)
        for k in range(1, 10)
    ],
    "choice, nothing valid": lambda: [
        check_choice(torch.full((1, 5), x), 3, 2, 0.0) for x in (NAN, -torch.inf, torch.inf)
    ],
    "logits": lambda: [
        check_logits(d, *how)
        for d in (torch.float32, torch.float16)
        for how in ((False,) * 2, (True, False), (True,) * 2)
    ],
    "append": lambda: [check_append(d, rotates) for d in (torch.float32, torch.float16) for rotates in (False, True)],
    "moves": lambda: [check_moves(torch.float32, *how) for how in itertools.product((False, True), repeat=2)],
    "moves, fp16": lambda: [check_moves(torch.float16, *how) for how in itertools.product((False, True), repeat=2)],
}


def run_case(name):
    CASES[name]()
