#include "two_simplicial_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace simplex {

namespace {

constexpr int64_t kMaxHeadDim = 256;

// The fake kernels (simplex_ops/two_simplicial_attention.py) check the same in the same words.
TwoSimplicialAttention checked(const char* op, const Tensor& q, const Tensor& k1, const Tensor& k2, const Tensor& v1,
                               const Tensor& v2, int64_t w1, int64_t w2, std::optional<double> scale,
                               const std::optional<Tensor>& cu_seqlens) {
  const std::array<std::pair<const char*, const Tensor*>, 5> tensors{
      {{"q", &q}, {"k1", &k1}, {"k2", &k2}, {"v1", &v1}, {"v2", &v2}}};
  for (size_t i : {0, 1}) {
    const auto& [name, t] = tensors[i];
    SIMPLEX_EXPECT(t->dim() == 4, op, name, " to be 4-dimensional [batch, length, heads, head_dim], got ", t->dim(),
                   " dimensions");
  }
  TwoSimplicialAttention p{q,         k1,         k2,        v1, v2, q.size(0), q.size(1),      k1.size(1),
                           q.size(2), k1.size(2), q.size(3), w1, w2, 0.0,       q.scalar_type()};
  for (size_t i = 1; i < tensors.size(); ++i) {
    const auto& [name, t] = tensors[i];
    expect_sizes(op, name, *t, {p.B, p.Nk, p.Hkv, p.D}, "batch of q, its own length, kv heads, head_dim of q");
    expect_like(op, name, *t, "q", q);
  }
  const ScalarType third = q.is_cpu() ? ScalarType::Double : ScalarType::Half;
  SIMPLEX_EXPECT(p.dtype == ScalarType::Float || p.dtype == ScalarType::BFloat16 || p.dtype == third, op,
                 q.is_cpu() ? "q to be float32, float64 or bfloat16 on cpu, got "
                            : "q to be float32, float16 or bfloat16 on cuda, got ",
                 dtype_string(q));
  SIMPLEX_EXPECT(p.D >= 8 && p.D <= kMaxHeadDim && p.D % 8 == 0, op,
                 "the head_dim of q to be a multiple of 8 up to 256, got ", p.D);
  SIMPLEX_EXPECT(p.Hkv >= 1 && p.Hq % p.Hkv == 0, op, "the heads of q to be a multiple of the heads of k1 (", p.Hkv,
                 "), got ", p.Hq);
  SIMPLEX_EXPECT(p.Nq <= p.Nk, op, "the length of q to be at most that of k1 (", p.Nk, "), got ", p.Nq);
  if (cu_seqlens) {
    SIMPLEX_EXPECT(p.Nq == p.Nk, op, "the length of q to be that of k1 (", p.Nk, ") with cu_seqlens, got ", p.Nq);
    p.cu_seqlens = checked_cu_seqlens(op, *cu_seqlens, "q", q);
  }
  SIMPLEX_EXPECT(w1 >= 1, op, "w1 to be at least 1, got ", w1);
  SIMPLEX_EXPECT(w2 >= 1, op, "w2 to be at least 1, got ", w2);
  p.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(p.D)));
  SIMPLEX_EXPECT(std::isfinite(p.scale), op, "scale to be finite, got ", p.scale);
  SIMPLEX_EXPECT(p.dtype == ScalarType::Double || std::abs(p.scale) <= std::numeric_limits<float>::max(), op,
                 "scale to be within the range of float32, got ", p.scale);

  for (Tensor* t : {&p.q, &p.k1, &p.k2, &p.v1, &p.v2}) *t = aligned(*t);
  p.w1 = std::min(w1, std::max<int64_t>(p.Nk, 1));
  p.w2 = std::min(w2, std::max<int64_t>(p.Nk, 1));
  return p;
}

// ---- The op

using Outputs = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs two_simplicial_attention(const Tensor& q, const Tensor& k1, const Tensor& k2, const Tensor& v1,
                                 const Tensor& v2, int64_t w1, int64_t w2, std::optional<double> scale,
                                 const std::optional<Tensor>& cu_seqlens) {
  const auto p = checked("two_simplicial_attention", q, k1, k2, v1, v2, w1, w2, scale, cu_seqlens);
  Tensor out = empty_like_device(q, {p.B, p.Nq, p.Hq, p.D}, p.dtype);
  Tensor lse = empty_like_device(q, {p.B, p.Hq, p.Nq}, wide_dtype(q));
  if (out.numel() == 0) return {out, lse};
  q.is_cpu() ? forward_cpu(p, out, lse) : forward_cuda(p, out, lse);
  return {out, lse};
}

Gradients two_simplicial_attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                            const Tensor& q, const Tensor& k1, const Tensor& k2, const Tensor& v1,
                                            const Tensor& v2, const Tensor& out, const Tensor& lse, int64_t w1,
                                            int64_t w2, std::optional<double> scale,
                                            const std::optional<Tensor>& cu_seqlens) {
  constexpr const char* op = "two_simplicial_attention_backward";
  const auto p = checked(op, q, k1, k2, v1, v2, w1, w2, scale, cu_seqlens);
  for (const auto& [name, t] : {std::pair{"grad_out", &grad_out}, {"out", &out}}) {
    expect_sizes(op, name, *t, {p.B, p.Nq, p.Hq, p.D}, "that of q");
    expect_like(op, name, *t, "q", q);
  }
  for (const auto& [name, t] : {std::pair{"grad_lse", grad_lse ? &*grad_lse : nullptr}, {"lse", &lse}}) {
    if (!t) continue;
    expect_sizes(op, name, *t, {p.B, p.Hq, p.Nq}, "batch, heads, length of q");
    expect_dtype(op, name, *t, wide_dtype(q));
    expect_device(op, name, *t, "q", q);
  }

  TwoSimplicialGrads grads;
  grads.q = empty_like_device(q, {p.B, p.Nq, p.Hq, p.D}, p.dtype);
  for (Tensor* grad : {&grads.k1, &grads.k2, &grads.v1, &grads.v2}) {
    *grad = empty_like_device(q, {p.B, p.Nk, p.Hkv, p.D}, p.dtype);
    if (p.q.numel() == 0) torch::stable::zero_(*grad);
  }
  if (p.q.numel() > 0) {
    const Tensor g = aligned(grad_out), o = packed(out), l = packed(lse);
    const std::optional<Tensor> gl = grad_lse ? std::optional(packed(*grad_lse)) : std::nullopt;
    (q.is_cpu() ? backward_cpu : backward_cuda)(p, g, gl, o, l, grads);
  }
  return {grads.q, grads.k1, grads.k2, grads.v1, grads.v2};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def(
      "two_simplicial_attention(Tensor q, Tensor k1, Tensor k2, Tensor v1, Tensor v2, SymInt w1, SymInt w2, "
      "float? scale=None, Tensor? cu_seqlens=None) -> (Tensor out, Tensor lse)");
  m.def(
      "two_simplicial_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k1, Tensor k2, "
      "Tensor v1, Tensor v2, Tensor out, Tensor lse, SymInt w1, SymInt w2, float? scale=None, "
      "Tensor? cu_seqlens=None) -> (Tensor grad_q, Tensor grad_k1, Tensor grad_k2, Tensor grad_v1, Tensor grad_v2)");
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) {
  m.impl("two_simplicial_attention", TORCH_BOX(&two_simplicial_attention));
  m.impl("two_simplicial_attention_backward", TORCH_BOX(&two_simplicial_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) {
  m.impl("two_simplicial_attention", TORCH_BOX(&two_simplicial_attention));
  m.impl("two_simplicial_attention_backward", TORCH_BOX(&two_simplicial_attention_backward));
}

}  // namespace simplex
