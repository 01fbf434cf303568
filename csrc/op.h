// What every op's host code needs from LibTorch's stable ABI, and nothing more.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

namespace simplex {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws "OP: expected WHAT", where WHAT is the rest, put together only on failure: the words of the fakes, without
// the function, file and line that STD_TORCH_CHECK puts in front.
#define SIMPLEX_EXPECT(condition, op, ...) \
  (condition) ? void() : throw std::runtime_error(simplex::joined(op, ": expected ", __VA_ARGS__))

// "[2, 16, 4, 64]", "cuda:0", "BFloat16": for error messages.
std::string shape_string(const Tensor& t);
std::string shape_string(std::initializer_list<int64_t> shape);
std::string device_string(const Tensor& t);
std::string dtype_string(const Tensor& t);

// Compared as torch's own numbers: Tensor::scalar_type() and device() translate them, which costs more than the
// kernel's launch once there are ten tensors.
bool same_dtype(const Tensor& a, const Tensor& b);
bool same_device(const Tensor& a, const Tensor& b);

// The checks that most ops share, in the words of simplex_ops/_checks.py: shape (with where it comes from), dtype,
// dtype and device of another argument, a floating dtype that the kernels of t's device read.
void expect_sizes(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                  const char* origin);
void expect_shape_of(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other);
void expect_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype);
void expect_device(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other);
void expect_like(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other);
void expect_floating(const char* op, const char* name, const Tensor& t);

// packed() cu_seqlens of sequences that lie one after the other in `t` [1, length, ...]: int32, ascending from 0 to
// length.
Tensor checked_cu_seqlens(const char* op, const Tensor& cu_seqlens, const char* name, const Tensor& t);

// What sums over t are taken and returned in.
ScalarType wide_dtype(const Tensor& t);

// The value of the kernel constant "dtype" (csrc/kernel.h) for t.
int64_t dtype_constant(const Tensor& t);

// t itself where a kernel can read it as it is (last dim contiguous, every other stride a multiple of 8 elements and
// the data 16-byte aligned), else a contiguous copy. The cubins are compiled with exactly these promises.
Tensor aligned(const Tensor& t);
// The same for kernels that take no strides: contiguous, data 16-byte aligned.
Tensor packed(const Tensor& t);

// The strides of the first three dims, 0 where a dim has one element: its stride may be anything then, and no kernel
// uses it.
std::array<int64_t, 3> leading_strides(const Tensor& t);

// An uninitialised contiguous tensor on t's device.
Tensor empty_like_device(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype);

// The same of t's sizes and dtype.
Tensor packed_like(const Tensor& t);

// What t holds from element `first` on as a tensor of other sizes and strides: rows, columns, a transposed matrix. By
// the C shim, too.
Tensor reinterpreted(const Tensor& t, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                     int64_t first = 0);

// The current CUDA stream of torch. Looked up at run time: libtorch_cuda.so does not exist beside a CPU-only torch.
void* current_cuda_stream(int device);

}  // namespace simplex
