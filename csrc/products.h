// Matrix products, which are torch's: cuBLAS and oneDNN run them at their full rate.
#pragma once

#include "op.h"

namespace simplex {

// [rows, last size] of a contiguous tensor
Tensor flat(const Tensor& t, int64_t rows);
// Views of a matrix.
Tensor transposed(const Tensor& matrix);
Tensor row_range(const Tensor& matrix, int64_t first, int64_t count);
Tensor column_range(const Tensor& matrix, int64_t first, int64_t count);

// Of matrices; out is written or added to in place. Autocast and autograd see none of them.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out);      // out = a b
void multiply_add(const Tensor& a, const Tensor& b, const Tensor& out);  // out += a b
// x weight^T + bias
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

}  // namespace simplex
