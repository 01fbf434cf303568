// A whole layer of Grassmann mixing. simplex_ops/grassmann_layer.py has the equation.
//
// One op, so that what the parts of the layer owe x and g is added inside the matrix products, not in passes of its
// own.
#include "grassmann_blend.h"
#include "grassmann_mix.h"
#include "kernel.h"
#include "products.h"

namespace simplex {
namespace {

struct Weights {
  const Tensor &reduce, &expand, &gate_x, &gate_g;
};

// The fakes (simplex_ops/grassmann_layer.py) check the same in the same words; checked_grassmann_mix does the rest.
void check(const char* op, const Tensor& x, const Weights& w) {
  SIMPLEX_EXPECT(x.dim() == 3, op, "x to be 3-dimensional [batch, length, dim], got ", x.dim(), " dimensions");
  expect_floating(op, "x", x);
  SIMPLEX_EXPECT(w.reduce.dim() == 2, op, "reduce_weight to be 2-dimensional [r, dim], got ", w.reduce.dim(),
                 " dimensions");
  const int64_t dim = x.size(2), r = w.reduce.size(0);
  expect_sizes(op, "reduce_weight", w.reduce, {r, dim}, "its own r, dim of x");
  expect_sizes(op, "expand_weight", w.expand, {dim, r * (r - 1) / 2}, "dim of x, r * (r - 1) / 2");
  expect_sizes(op, "gate_x_weight", w.gate_x, {dim, dim}, "dim of x twice");
  expect_sizes(op, "gate_g_weight", w.gate_g, {dim, dim}, "dim of x twice");
  for (const auto& [name, t] : {std::pair{"reduce_weight", &w.reduce},
                                {"expand_weight", &w.expand},
                                {"gate_x_weight", &w.gate_x},
                                {"gate_g_weight", &w.gate_g}}) {
    expect_like(op, name, *t, "x", x);
  }
}

void check_vector(const char* op, const char* name, const Tensor& t, int64_t size, const char* origin,
                  const Tensor& x) {
  expect_sizes(op, name, t, {size}, origin);
  expect_like(op, name, t, "x", x);
}

// A matrix of all tokens as [batch, length, columns], as x is.
Tensor by_rows(const Tensor& matrix, const Tensor& x) {
  const int64_t length = x.size(1), columns = matrix.size(1);
  return reinterpreted(matrix, {x.size(0), length, columns}, {length * columns, columns, 1});
}

const KernelFamily kGate("grassmann_layer_gate", {"dtype"});

// The blend of x and g and its logits.
std::pair<Tensor, Tensor> gated(const Tensor& x, const Tensor& g, const Weights& w, const Tensor& bias) {
  const int64_t dim = x.size(2), tokens = x.size(0) * x.size(1);
  const int device = x.is_cpu() ? 0 : x.get_device_index();
  const Kernel* kernel = x.is_cpu() || tokens == 0 ? nullptr : kGate.find_if(device, {dtype_constant(x)});
  if (!kernel || dim % (*kernel)["BLOCK_N"] != 0) {
    const Tensor sums = linear(flat(g, tokens), w.gate_g, bias);
    multiply_add(flat(x, tokens), transposed(w.gate_x), sums);
    const Tensor logits = by_rows(sums, x);
    return {blended(x, g, logits), logits};
  }
  const Tensor w_x = packed(w.gate_x), w_g = packed(w.gate_g), b = packed(bias);
  const Tensor logits = packed_like(x), out = packed_like(x);
  const int64_t rows = (*kernel)["BLOCK_M"], columns = (*kernel)["BLOCK_N"];
  const auto blocks = static_cast<unsigned>((tokens + rows - 1) / rows * (dim / columns));
  launch(*kernel, device, current_cuda_stream(device), {blocks, 1, 1},
         {{"x_ptr", x.const_data_ptr()},
          {"g_ptr", g.const_data_ptr()},
          {"w_x_ptr", w_x.const_data_ptr()},
          {"w_g_ptr", w_g.const_data_ptr()},
          {"bias_ptr", b.const_data_ptr()},
          {"out_ptr", out.const_data_ptr()},
          {"logits_ptr", logits.const_data_ptr()},
          {"num_tokens", static_cast<int32_t>(tokens)},
          {"dim", static_cast<int32_t>(dim)}});
  return {out, logits};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs grassmann_layer(const Tensor& x, const Tensor& reduce_weight, const Tensor& reduce_bias,
                        const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& gate_x_weight,
                        const Tensor& gate_g_weight, const Tensor& gate_bias, const std::vector<int64_t>& offsets,
                        const std::optional<Tensor>& valid, const std::optional<Tensor>& cu_seqlens) {
  constexpr const char* op = "grassmann_layer";
  const Weights weights{reduce_weight, expand_weight, gate_x_weight, gate_g_weight};
  check(op, x, weights);
  const int64_t dim = x.size(2);
  check_vector(op, "reduce_bias", reduce_bias, reduce_weight.size(0), "r of reduce_weight", x);
  check_vector(op, "expand_bias", expand_bias, dim, "dim of x", x);
  check_vector(op, "gate_bias", gate_bias, dim, "dim of x", x);
  const Tensor rows = packed(x);
  const Tensor z = by_rows(linear(flat(rows, x.size(0) * x.size(1)), reduce_weight, reduce_bias), x);
  const auto [p, d] = checked_grassmann_mix(op, z, expand_weight, expand_bias, offsets, valid, cu_seqlens);
  const Tensor g = mixed(p, expand_weight, expand_bias, false);
  const auto [out, logits] = gated(rows, g, weights, gate_bias);
  return {out, z, g, logits};
}

// The rows of a above those of b.
Tensor stacked(const Tensor& a, const Tensor& b) {
  const Tensor both = empty_like_device(a, {a.size(0) + b.size(0), a.size(1)}, a.scalar_type());
  Tensor upper = row_range(both, 0, a.size(0)), lower = row_range(both, a.size(0), b.size(0));
  torch::stable::copy_(upper, a);
  torch::stable::copy_(lower, b);
  return both;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients grassmann_layer_backward(const Tensor& grad_out, const Tensor& x, const Tensor& reduce_weight,
                                   const Tensor& expand_weight, const Tensor& gate_x_weight,
                                   const Tensor& gate_g_weight, const Tensor& z, const Tensor& g, const Tensor& logits,
                                   const std::vector<int64_t>& offsets, const std::optional<Tensor>& valid,
                                   const std::optional<Tensor>& cu_seqlens) {
  constexpr const char* op = "grassmann_layer_backward";
  check(op, x, {reduce_weight, expand_weight, gate_x_weight, gate_g_weight});
  const auto [p, d] = checked_grassmann_mix(op, z, expand_weight, std::nullopt, offsets, valid, cu_seqlens);
  expect_sizes(op, "z", z, {x.size(0), x.size(1), reduce_weight.size(0)}, "batch and length of x, r of reduce_weight");
  expect_like(op, "z", z, "x", x);
  for (const auto& [name, t] : {std::pair{"grad_out", &grad_out}, {"g", &g}, {"logits", &logits}}) {
    expect_shape_of(op, name, *t, "x", x);
    expect_like(op, name, *t, "x", x);
  }
  const int64_t tokens = p.tokens(), both = d + p.r;
  const auto empty = [&](std::initializer_list<int64_t> shape) { return empty_like_device(x, shape, p.dtype); };
  const Tensor rows = packed(x), g_rows = packed(g), x_matrix = flat(rows, tokens);
  // The gradients of the logits and of z side by side: x owes its gradient to both, and they owe their weights to x.
  const Tensor wide = empty({tokens, (both + 7) / 8 * 8});
  const Tensor of_both = column_range(wide, 0, both), of_logits = column_range(wide, 0, d);
  const Tensor grad_x = empty({p.B, p.L, d}), grad_g = empty({p.B, p.L, d});
  blend_gradients(packed(grad_out), rows, g_rows, packed(logits), {grad_x, grad_g, of_logits});
  const Tensor grad_gate_g = empty({d, d});
  multiply(transposed(of_logits), flat(g_rows, tokens), grad_gate_g);
  multiply_add(of_logits, gate_g_weight, flat(grad_g, tokens));

  const auto [grad_expand, grad_expand_bias] =
      mix_gradients(p, grad_g, expand_weight, false, column_range(wide, d, p.r));
  multiply_add(of_both, stacked(gate_x_weight, reduce_weight), flat(grad_x, tokens));
  const Tensor grad_weights = empty({both, d}), grad_biases = empty({both, 1});
  multiply(transposed(of_both), x_matrix, grad_weights);
  Tensor ones = empty({tokens, 1});
  torch::stable::fill_(ones, 1.0);
  multiply(transposed(of_both), ones, grad_biases);  // faster than torch's sum
  const auto part = [&](const Tensor& of, int64_t first, std::initializer_list<int64_t> shape) {
    const Tensor copy = empty(shape);
    const int64_t rows = *shape.begin(), columns = of.size(1);
    Tensor to = reinterpreted(copy, {rows, columns}, {columns, 1});
    torch::stable::copy_(to, row_range(of, first, rows));
    return copy;
  };
  return {grad_x,
          part(grad_weights, d, {p.r, d}),
          part(grad_biases, d, {p.r}),
          grad_expand,
          grad_expand_bias,
          part(grad_weights, 0, {d, d}),
          grad_gate_g,
          part(grad_biases, 0, {d})};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def(
      "grassmann_layer(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, "
      "Tensor gate_x_weight, Tensor gate_g_weight, Tensor gate_bias, int[] offsets, Tensor? valid=None, "
      "Tensor? cu_seqlens=None) -> (Tensor out, Tensor z, Tensor g, Tensor logits)");
  m.def(
      "grassmann_layer_backward(Tensor grad_out, Tensor x, Tensor reduce_weight, Tensor expand_weight, "
      "Tensor gate_x_weight, Tensor gate_g_weight, Tensor z, Tensor g, Tensor logits, int[] offsets, "
      "Tensor? valid=None, Tensor? cu_seqlens=None) -> (Tensor grad_x, Tensor grad_reduce_weight, "
      "Tensor grad_reduce_bias, Tensor grad_expand_weight, Tensor grad_expand_bias, Tensor grad_gate_x_weight, "
      "Tensor grad_gate_g_weight, Tensor grad_gate_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) {
  m.impl("grassmann_layer", TORCH_BOX(&grassmann_layer));
  m.impl("grassmann_layer_backward", TORCH_BOX(&grassmann_layer_backward));
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) {
  m.impl("grassmann_layer", TORCH_BOX(&grassmann_layer));
  m.impl("grassmann_layer_backward", TORCH_BOX(&grassmann_layer_backward));
}

}  // namespace simplex
