// What every op's host code needs from LibTorch's stable ABI, and nothing more.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace simplex {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "[2, 16, 4, 64]", for error messages.
std::string shape_string(const Tensor& t);
// "cuda:0" or "cpu", for error messages.
std::string device_string(const Tensor& t);

// t itself where a kernel can read it as it is (last dim contiguous, every other stride a multiple of 8 elements and the
// data 16-byte aligned), else a contiguous copy. The cubins are compiled with exactly these promises.
Tensor aligned(const Tensor& t);

// The current CUDA stream of torch. Looked up at run time: libtorch_cuda.so does not exist beside a CPU-only torch.
void* current_cuda_stream(int device);

}  // namespace simplex
