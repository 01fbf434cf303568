// The gate of Grassmann mixing. simplex_ops/grassmann_blend.py has the equation.
#include "grassmann_blend.h"

#include <cmath>
#include <limits>

#include "elements.h"
#include "kernel.h"

namespace simplex {
namespace {

// The fakes (simplex_ops/grassmann_blend.py) check the same in the same words.
void check(const char* op, const Tensor& h, const Tensor& g, const Tensor& logits) {
  expect_floating(op, "h", h);
  for (const auto& [name, t] : {std::pair{"g", &g}, {"logits", &logits}}) {
    expect_shape_of(op, name, *t, "h", h);
    expect_like(op, name, *t, "h", h);
  }
}

// ---- CPU

// Not torch's own, which is faster, but rounds the last few elements of every thread's share differently.
template <class W>
W sigmoid(W x) {
  return 1 / (1 + std::exp(-x));
}

// work(i) for every element, in parallel.
template <class Work>
void for_each_element(int64_t numel, Work work) {
  torch::stable::parallel_for(0, numel, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

template <class In>
void forward_cpu(const Tensor& h, const Tensor& g, const Tensor& logits, Tensor& out) {
  using W = Wide<In>;
  const In* __restrict const from_h = elements<In>(h), * __restrict const from_g = elements<In>(g);
  const In* __restrict const logit = elements<In>(logits);
  In* __restrict const to = mutable_elements<In>(out);
  for_each_element(out.numel(), [=](int64_t i) {
    const W alpha = sigmoid(W(logit[i]));
    to[i] = In(alpha * W(from_h[i]) + (1 - alpha) * W(from_g[i]));
  });
}

// Elements of a row of a matrix and from one row to the next; what is contiguous is one row, of whatever dimensions.
std::pair<int64_t, int64_t> rows_of(const Tensor& t) {
  if (t.is_contiguous()) return {t.numel(), t.numel()};
  return {t.size(1), t.stride(0)};
}

template <class In>
void backward_cpu(const Tensor& grad_out, const Tensor& h, const Tensor& g, const Tensor& logits,
                  const BlendGradients& grads) {
  using W = Wide<In>;
  const In* __restrict const from_h = elements<In>(h), * __restrict const from_g = elements<In>(g);
  const In* __restrict const logit = elements<In>(logits);
  const In* __restrict const grad = elements<In>(grad_out);
  const auto& [grad_h, grad_g, grad_logits] = grads;
  In* __restrict const to_h = mutable_elements<In>(grad_h), * __restrict const to_g = mutable_elements<In>(grad_g);
  In* __restrict const to_logits = mutable_elements<In>(grad_logits);
  const auto [row, stride] = rows_of(grad_logits);
  for_each_element(h.numel(), [=, row = row, stride = stride](int64_t i) {
    const W alpha = sigmoid(W(logit[i]));
    const W of_h = alpha * W(grad[i]), of_g = (1 - alpha) * W(grad[i]);
    to_h[i] = In(of_h);
    to_g[i] = In(of_g);
    to_logits[i / row * stride + i % row] = In(of_h * (1 - alpha) * (W(from_h[i]) - W(from_g[i])));
  });
}

// ---- CUDA

const KernelFamily kForward("grassmann_blend_fwd", {"dtype"});
const KernelFamily kBackward("grassmann_blend_bwd", {"dtype"});

void run_cuda(const KernelFamily& family, const Tensor& h, std::initializer_list<Arg> pointers) {
  const int device = h.get_device_index();
  const Kernel& kernel = family.find(device, {dtype_constant(h)});
  std::vector<Arg> args = pointers;
  args.push_back({"numel", h.numel()});
  const auto blocks = static_cast<unsigned>((h.numel() + kernel["BLOCK"] - 1) / kernel["BLOCK"]);
  launch(kernel, device, current_cuda_stream(device), {blocks, 1, 1}, Span<Arg>(args.data(), args.size()));
}

}  // namespace

Tensor blended(const Tensor& h, const Tensor& g, const Tensor& logits) {
  Tensor out = packed_like(h);
  if (out.numel() == 0) return out;
  if (h.is_cpu()) {
    dispatch_floating(h, [&](auto element) { forward_cpu<decltype(element)>(h, g, logits, out); });
  } else {
    run_cuda(kForward, h,
             {{"h_ptr", h.const_data_ptr()},
              {"g_ptr", g.const_data_ptr()},
              {"logits_ptr", logits.const_data_ptr()},
              {"out_ptr", out.const_data_ptr()}});
  }
  return out;
}

BlendGradients blend_gradients(const Tensor& grad_out, const Tensor& h, const Tensor& g, const Tensor& logits) {
  BlendGradients grads{packed_like(h), packed_like(h), packed_like(h)};
  blend_gradients(grad_out, h, g, logits, grads);
  return grads;
}

void blend_gradients(const Tensor& grad_out, const Tensor& h, const Tensor& g, const Tensor& logits,
                     const BlendGradients& grads) {
  const auto& [grad_h, grad_g, grad_logits] = grads;
  if (h.numel() == 0) return;
  if (h.is_cpu()) {
    dispatch_floating(h, [&](auto element) { backward_cpu<decltype(element)>(grad_out, h, g, logits, grads); });
    return;
  }
  const auto [row, stride] = rows_of(grad_logits);
  if (stride != row && row % 8 != 0) {  // the kernel writes eight elements at a time
    Tensor rows = grad_logits;
    const Tensor whole = packed_like(grad_logits);
    blend_gradients(grad_out, h, g, logits, {grad_h, grad_g, whole});
    torch::stable::copy_(rows, whole);
    return;
  }
  const bool whole = stride == row;
  run_cuda(kBackward, h,
           {{"grad_out_ptr", grad_out.const_data_ptr()},
            {"h_ptr", h.const_data_ptr()},
            {"g_ptr", g.const_data_ptr()},
            {"logits_ptr", logits.const_data_ptr()},
            {"grad_h_ptr", grad_h.const_data_ptr()},
            {"grad_g_ptr", grad_g.const_data_ptr()},
            {"grad_logits_ptr", grad_logits.const_data_ptr()},
            {"row_chunks", whole ? std::numeric_limits<int32_t>::max() : static_cast<int32_t>(row / 8)},
            {"stride", whole ? int64_t{0} : stride}});
}

// ---- The op

namespace {

Tensor grassmann_blend(const Tensor& h, const Tensor& g, const Tensor& logits) {
  check("grassmann_blend", h, g, logits);
  return blended(packed(h), packed(g), packed(logits));
}

BlendGradients grassmann_blend_backward(const Tensor& grad_out, const Tensor& h, const Tensor& g,
                                        const Tensor& logits) {
  constexpr const char* op = "grassmann_blend_backward";
  check(op, h, g, logits);
  expect_shape_of(op, "grad_out", grad_out, "h", h);
  expect_like(op, "grad_out", grad_out, "h", h);
  return blend_gradients(packed(grad_out), packed(h), packed(g), packed(logits));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def("grassmann_blend(Tensor h, Tensor g, Tensor logits) -> (Tensor out)");
  m.def(
      "grassmann_blend_backward(Tensor grad_out, Tensor h, Tensor g, Tensor logits) -> (Tensor grad_h, Tensor grad_g, "
      "Tensor grad_logits)");
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) {
  m.impl("grassmann_blend", TORCH_BOX(&grassmann_blend));
  m.impl("grassmann_blend_backward", TORCH_BOX(&grassmann_blend_backward));
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) {
  m.impl("grassmann_blend", TORCH_BOX(&grassmann_blend));
  m.impl("grassmann_blend_backward", TORCH_BOX(&grassmann_blend_backward));
}

}  // namespace simplex
