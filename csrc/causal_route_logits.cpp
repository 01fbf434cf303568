// The causal router's logits (arXiv 2511.21408). simplex_ops/causal_route_logits.py has the equations.
#include <algorithm>
#include <array>
#include <vector>

#include "elements.h"
#include "kernel.h"
#include "op.h"

namespace simplex {

namespace {

// One checked problem: x packed [B, T, D]; weight packed [2 D] of the wide dtype, or [D] where no token looks back;
// prev packed [B, D], or empty.
struct Logits {
  Tensor x, weight, prev;
  bool has_prev, looks_back;
  int64_t B, T, D;
  ScalarType wide;

  int32_t dim_before() const { return looks_back ? static_cast<int32_t>(D) : 0; }
};

// The fakes (simplex_ops/causal_route_logits.py) check the same in the same words.
Logits checked(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& prev) {
  SIMPLEX_EXPECT(x.dim() == 3, op, "x to be 3-dimensional [batch, length, dim], got ", x.dim(), " dimensions");
  expect_floating(op, "x", x);
  const int64_t D = x.size(2), columns = weight.dim() == 1 ? weight.size(0) : 0;
  Logits p{x, weight, Tensor(), prev.has_value(), columns != D || D == 0, x.size(0), x.size(1), D, wide_dtype(x)};
  SIMPLEX_EXPECT(x.is_cpu() || p.D % 8 == 0, op, "the last dim of x to be a multiple of 8 on cuda, got ", p.D);
  if (p.looks_back) expect_sizes(op, "weight", weight, {2 * D}, "twice the last dim of x, or once");
  expect_dtype(op, "weight", weight, p.wide);
  expect_device(op, "weight", weight, "x", x);
  if (prev) {
    SIMPLEX_EXPECT(p.looks_back, op, "no prev with a weight of ", D, " elements, which looks at no token before");
    expect_sizes(op, "prev", *prev, {p.B, p.D}, "batch, last dim of x");
    expect_like(op, "prev", *prev, "x", x);
    p.prev = packed(*prev);
  }
  if (!x.is_cpu()) {
    constexpr int64_t kMost = int64_t{1} << 30;
    SIMPLEX_EXPECT(p.B * p.T < kMost && p.D < kMost, op, "batch * length and the last dim of x to be below 2^30, got ",
                   shape_string(x));
  }
  p.x = packed(x);
  p.weight = packed(weight);
  return p;
}

// <w, row>, in an order that no other row or length changes: a token decoded alone gets the bits that it had in its
// sequence.
template <class In, class W>
W dot(const W* w, const In* row, int64_t D) {
  constexpr int64_t kLanes = 8;  // independent sums, which the compiler turns into vectors
  W sums[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += w[d + lane] * static_cast<W>(row[d + lane]);
  }
  for (; d < D; ++d) sums[0] += w[d] * static_cast<W>(row[d]);
  for (int64_t lane = 1; lane < kLanes; ++lane) sums[0] += sums[lane];
  return sums[0];
}

template <class In>
void forward_cpu(const Logits& p, Tensor& logits) {
  using W = Wide<In>;
  const In* const x = elements<In>(p.x);
  const In* const prev = p.has_prev ? elements<In>(p.prev) : nullptr;
  const W* const w = elements<W>(p.weight);
  W* const out = mutable_elements<W>(logits);
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(p.D, 1));
  torch::stable::parallel_for(0, p.B * p.T, grain, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const bool first = row % p.T == 0;
      const In* const before = !first ? x + (row - 1) * p.D : prev ? prev + row / p.T * p.D : nullptr;
      out[row] = dot(w, x + row * p.D, p.D) + (before && p.looks_back ? dot(w + p.D, before, p.D) : W(0));
    }
  });
}

const KernelFamily kForward("causal_route_logits_fwd", {"dtype"});
const KernelFamily kBackward("causal_route_logits_bwd", {"dtype"});

Tensor causal_route_logits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& prev) {
  const Logits p = checked("causal_route_logits", x, weight, prev);
  Tensor logits = empty_like_device(x, {p.B, p.T}, p.wide);
  if (logits.numel() == 0) return logits;
  if (x.is_cpu()) {
    dispatch_floating(x, [&](auto element) { forward_cpu<decltype(element)>(p, logits); });
    return logits;
  }
  const int device = x.get_device_index();
  const Kernel& kernel = kForward.find(device, {dtype_constant(x)});
  const int64_t rows = p.B * p.T;
  launch(kernel, device, current_cuda_stream(device),
         {static_cast<unsigned>((rows + kernel["ROWS"] - 1) / kernel["ROWS"]), 1, 1},
         {{"x_ptr", p.x.const_data_ptr()},
          {"weight_ptr", p.weight.const_data_ptr()},
          {"prev_ptr", p.has_prev ? p.prev.const_data_ptr() : nullptr},
          {"logits_ptr", logits.const_data_ptr()},
          {"rows", static_cast<int32_t>(rows)},
          {"length", static_cast<int32_t>(p.T)},
          {"dim", static_cast<int32_t>(p.D)},
          {"dim_before", p.dim_before()},
          {"has_prev", static_cast<int32_t>(p.has_prev)}});
  return logits;
}

template <class In>
void backward_cpu(const Logits& p, const Tensor& grad_logits, Tensor& grad_x, Tensor& grad_weight, Tensor& grad_prev) {
  using W = Wide<In>;
  const In* const x = elements<In>(p.x);
  const In* const prev = p.has_prev ? elements<In>(p.prev) : nullptr;
  const W *const w = elements<W>(p.weight), *const g = elements<W>(grad_logits);
  In* const to_x = mutable_elements<In>(grad_x);
  In* const to_prev = p.has_prev ? mutable_elements<In>(grad_prev) : nullptr;
  const int64_t D = p.D, T = p.T, grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(D, 1));
  torch::stable::parallel_for(0, p.B * T, grain, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const W own = g[row], next = (row + 1) % T == 0 || !p.looks_back ? W(0) : g[row + 1];
      const W* const before = p.looks_back ? w + D : w;
      for (int64_t d = 0; d < D; ++d) to_x[row * D + d] = static_cast<In>(own * w[d] + next * before[d]);
    }
  });
  std::vector<double> sums(2 * D);  // one row after the other, so that the result does not depend on the threads
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t t = prev ? -1 : 0; t < T; ++t) {
      const In* const row = t < 0 ? prev + b * D : x + (b * T + t) * D;
      const double own = t < 0 ? 0 : g[b * T + t], next = t + 1 < T ? g[b * T + t + 1] : 0;
      for (int64_t d = 0; d < D; ++d) {
        const double value = static_cast<W>(row[d]);
        sums[d] += own * value;
        sums[D + d] += next * value;
      }
      if (t < 0) {
        for (int64_t d = 0; d < D; ++d) to_prev[b * D + d] = static_cast<In>(g[b * T] * w[D + d]);
      }
    }
  }
  std::transform(sums.begin(), sums.begin() + grad_weight.numel(), mutable_elements<W>(grad_weight),
                 [](double v) { return static_cast<W>(v); });
}

std::tuple<Tensor, Tensor, Tensor> causal_route_logits_backward(const Tensor& grad_logits, const Tensor& x,
                                                                const Tensor& weight,
                                                                const std::optional<Tensor>& prev) {
  constexpr const char* op = "causal_route_logits_backward";
  const Logits p = checked(op, x, weight, prev);
  expect_sizes(op, "grad_logits", grad_logits, {p.B, p.T}, "batch, length of x");
  expect_dtype(op, "grad_logits", grad_logits, p.wide);
  expect_device(op, "grad_logits", grad_logits, "x", x);
  Tensor grad_x = empty_like_device(x, {p.B, p.T, p.D}, x.scalar_type());
  Tensor grad_weight = empty_like_device(x, {weight.size(0)}, p.wide);
  // Without a previous token nobody asks for its gradient.
  Tensor grad_prev = empty_like_device(x, {p.has_prev ? p.B : 0, p.has_prev ? p.D : 0}, x.scalar_type());
  if (grad_x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_prev);
    return {grad_x, grad_weight, grad_prev};
  }
  const Tensor g = packed(grad_logits);
  if (x.is_cpu()) {
    dispatch_floating(x, [&](auto element) { backward_cpu<decltype(element)>(p, g, grad_x, grad_weight, grad_prev); });
    return {grad_x, grad_weight, grad_prev};
  }
  const int device = x.get_device_index();
  const Kernel& kernel = kBackward.find(device, {dtype_constant(x)});
  const int64_t blocks = (p.T + kernel["BLOCK_T"] - 1) / kernel["BLOCK_T"];
  // A share of the weight's gradient per block of tokens, added up in order: no atomics, two runs give the same bits.
  Tensor parts = empty_like_device(x, {p.B * blocks, weight.size(0)}, p.wide);
  launch(kernel, device, current_cuda_stream(device), {static_cast<unsigned>(p.B * blocks), 1, 1},
         {{"grad_logits_ptr", g.const_data_ptr()},
          {"x_ptr", p.x.const_data_ptr()},
          {"weight_ptr", p.weight.const_data_ptr()},
          {"prev_ptr", p.has_prev ? p.prev.const_data_ptr() : nullptr},
          {"grad_x_ptr", grad_x.const_data_ptr()},
          {"grad_prev_ptr", p.has_prev ? grad_prev.const_data_ptr() : nullptr},
          {"parts_ptr", parts.const_data_ptr()},
          {"length", static_cast<int32_t>(p.T)},
          {"dim", static_cast<int32_t>(p.D)},
          {"dim_before", p.dim_before()},
          {"has_prev", static_cast<int32_t>(p.has_prev)}});
  const int64_t over_blocks[] = {0};
  torch::stable::sum_out(grad_weight, parts, torch::headeronly::IntHeaderOnlyArrayRef(over_blocks, 1));
  return {grad_x, grad_weight, grad_prev};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def("causal_route_logits(Tensor x, Tensor weight, Tensor? prev=None) -> (Tensor logits)");
  m.def(
      "causal_route_logits_backward(Tensor grad_logits, Tensor x, Tensor weight, Tensor? prev=None) -> (Tensor grad_x, "
      "Tensor grad_weight, Tensor grad_prev)");
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) {
  m.impl("causal_route_logits", TORCH_BOX(&causal_route_logits));
  m.impl("causal_route_logits_backward", TORCH_BOX(&causal_route_logits_backward));
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) {
  m.impl("causal_route_logits", TORCH_BOX(&causal_route_logits));
  m.impl("causal_route_logits_backward", TORCH_BOX(&causal_route_logits_backward));
}

}  // namespace simplex
