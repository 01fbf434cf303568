// Grassmann mixing: the mean of the Pluecker vectors (plucker_mean.h), then one matrix product.
//
// The backward pass computes the mean anew, which is cheap beside the products, so that nothing but z is saved for it.
#include "grassmann_mix.h"

#include <algorithm>

#include "products.h"

namespace simplex {

namespace {

// t *= factor
void scale(const Tensor& t, const Tensor& factor) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(t), from(factor)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owns the reference that the call returns
}

}  // namespace

// The fake kernels (simplex_ops/grassmann_mix.py) check the same in the same words.
GrassmannMix checked_grassmann_mix(const char* op, const Tensor& z, const Tensor& weight,
                                   const std::optional<Tensor>& bias, const std::vector<int64_t>& offsets,
                                   const std::optional<Tensor>& valid, const std::optional<Tensor>& cu_seqlens) {
  const PluckerMean front = checked_plucker_mean(op, z, offsets, valid, cu_seqlens);
  SIMPLEX_EXPECT(weight.dim() == 2, op, "weight to be 2-dimensional [d, r * (r - 1) / 2], got ", weight.dim(),
                 " dimensions");
  const int64_t d = weight.size(0);
  expect_sizes(op, "weight", weight, {d, front.planes()}, "its own d, r * (r - 1) / 2 for the r of z");
  expect_like(op, "weight", weight, "z", z);
  if (bias) {
    expect_sizes(op, "bias", *bias, {d}, "d of weight");
    expect_like(op, "bias", *bias, "z", z);
  }
  return {front, d};
}

Tensor mixed(const PluckerMean& p, const Tensor& weight, const std::optional<Tensor>& bias, int64_t empty,
             bool bias_everywhere) {
  const int64_t length = p.L - p.history, d = weight.size(0);
  if (p.outputs() * d == 0) return empty_like_device(p.z, {p.B, length, d}, p.dtype);
  if (const auto g = mixed_in_registers(p, weight, bias, bias_everywhere)) {
    return reinterpreted(*g, {p.B, length, d}, {length * d, d, 1});
  }
  const auto [pbar, seen] = plucker_mean_forward(p, plucker_frames(p, false));
  const Tensor rows = linear(pbar, weight, bias);
  const Tensor g = reinterpreted(rows, {p.B, length, d}, {length * d, d, 1});
  if (!bias || bias_everywhere) return g;
  if (empty < 0) {
    scale(rows, seen);
  } else if (empty > 0) {
    Tensor without = reinterpreted(rows, {p.B, empty, d}, {length * d, d, 1});
    torch::stable::zero_(without);
  }
  return g;
}

Tensor mixed(const PluckerMean& p, const Tensor& weight, const std::optional<Tensor>& bias, bool bias_everywhere) {
  // Offsets of L or more pair nothing and are not in p.
  const auto smallest = std::min_element(p.offsets.begin(), p.offsets.end());
  const int64_t empty = smallest == p.offsets.end() ? p.L : *smallest;
  return mixed(p, weight, bias, p.valid || p.starts ? -1 : empty, bias_everywhere);
}

std::pair<Tensor, Tensor> mix_gradients(const PluckerMean& p, const Tensor& grad_g, const Tensor& weight,
                                        bool bias_everywhere, const Tensor& grad_z) {
  const int64_t d = weight.size(0);
  const Tensor grad = flat(grad_g, p.tokens());
  if (auto gradients = gradients_in_registers(p, grad, weight, bias_everywhere, grad_z)) return *gradients;
  Tensor grad_weight = empty_like_device(p.z, {d, p.planes()}, p.dtype);
  Tensor grad_bias = empty_like_device(p.z, {d}, p.dtype);
  const PluckerFrames frames = plucker_frames(p, true);
  auto [pbar, seen] = plucker_mean_forward(p, frames);
  if (bias_everywhere) torch::stable::fill_(seen, 1.0);
  multiply(transposed(grad), pbar, grad_weight);
  multiply(transposed(grad), seen, reinterpreted(grad_bias, {d, 1}, {1, 1}));
  multiply(grad, weight, pbar);  // no longer needed: its buffer takes its gradient
  plucker_mean_backward(p, frames, pbar, grad_z);
  return {grad_weight, grad_bias};
}

namespace {

Tensor grassmann_mix(const Tensor& z, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::vector<int64_t>& offsets, const std::optional<Tensor>& valid,
                     const std::optional<Tensor>& cu_seqlens, bool bias_everywhere) {
  const auto [p, d] = checked_grassmann_mix("grassmann_mix", z, weight, bias, offsets, valid, cu_seqlens);
  return mixed(p, weight, bias, bias_everywhere);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients grassmann_mix_backward(const Tensor& grad_g, const Tensor& z, const Tensor& weight,
                                 const std::vector<int64_t>& offsets, const std::optional<Tensor>& valid,
                                 const std::optional<Tensor>& cu_seqlens, bool bias_everywhere) {
  constexpr const char* op = "grassmann_mix_backward";
  const auto [p, d] = checked_grassmann_mix(op, z, weight, std::nullopt, offsets, valid, cu_seqlens);
  expect_sizes(op, "grad_g", grad_g, {p.B, p.L, d}, "batch and length of z, d of weight");
  expect_like(op, "grad_g", grad_g, "z", z);
  const Tensor grad_z = empty_like_device(z, {p.B, p.L, p.r}, p.dtype);
  const auto [grad_weight, grad_bias] =
      mix_gradients(p, packed(grad_g), weight, bias_everywhere, flat(grad_z, p.tokens()));
  return {grad_z, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def(
      "grassmann_mix(Tensor z, Tensor weight, Tensor? bias, int[] offsets, Tensor? valid=None, "
      "Tensor? cu_seqlens=None, bool bias_everywhere=False) -> (Tensor g)");
  m.def(
      "grassmann_mix_backward(Tensor grad_g, Tensor z, Tensor weight, int[] offsets, Tensor? valid=None, "
      "Tensor? cu_seqlens=None, bool bias_everywhere=False) -> (Tensor grad_z, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) {
  m.impl("grassmann_mix", TORCH_BOX(&grassmann_mix));
  m.impl("grassmann_mix_backward", TORCH_BOX(&grassmann_mix_backward));
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) {
  m.impl("grassmann_mix", TORCH_BOX(&grassmann_mix));
  m.impl("grassmann_mix_backward", TORCH_BOX(&grassmann_mix_backward));
}

}  // namespace simplex
