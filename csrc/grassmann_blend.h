// The gate of Grassmann mixing, on packed() tensors of one shape. simplex_ops/grassmann_blend.py has the equation.
#pragma once

#include "op.h"

namespace simplex {

Tensor blended(const Tensor& h, const Tensor& g, const Tensor& logits);

// With respect to h, g and the logits.
using BlendGradients = std::tuple<Tensor, Tensor, Tensor>;
BlendGradients blend_gradients(const Tensor& grad_out, const Tensor& h, const Tensor& g, const Tensor& logits);
// The same, written to `grads`; that of the logits may be rows [n, d] of a wider matrix, 8 * k elements apart.
void blend_gradients(const Tensor& grad_out, const Tensor& h, const Tensor& g, const Tensor& logits,
                     const BlendGradients& grads);

}  // namespace simplex
