#include "products.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace simplex {

namespace {

// A function of torch like `on_cpu`, looked up at run time: libtorch_cuda.so does not exist beside a CPU-only torch.
template <class Function>
Function* on_cuda(Function*, const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, name) : nullptr;
  STD_TORCH_CHECK(found, "simplex_ops: expected ", name, " in libtorch_cuda.so, got none");
  return reinterpret_cast<Function*>(found);
}

}  // namespace

Tensor flat(const Tensor& t, int64_t rows) {
  const int64_t columns = t.size(-1);
  return reinterpreted(t, {rows, columns}, {columns, 1});
}

Tensor transposed(const Tensor& matrix) {
  return reinterpreted(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

Tensor row_range(const Tensor& matrix, int64_t first, int64_t count) {
  const int64_t stride = matrix.stride(0);
  return reinterpreted(matrix, {count, matrix.size(1)}, {stride, matrix.stride(1)}, first * stride);
}

Tensor column_range(const Tensor& matrix, int64_t first, int64_t count) {
  const int64_t stride = matrix.stride(1);
  return reinterpreted(matrix, {matrix.size(0), count}, {matrix.stride(0), stride}, first * stride);
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  auto* mm_out = &aoti_torch_cpu_mm_out;
  if (!a.is_cpu()) {
    static auto* const found = on_cuda(mm_out, "aoti_torch_cuda_mm_out");
    mm_out = found;
  }
  STABLE_TORCH_ERROR_CODE_CHECK(mm_out(out.get(), a.get(), b.get()));
}

namespace {

// out = base + a b
void add_product(const Tensor& base, const Tensor& a, const Tensor& b, const Tensor& out) {
  auto* addmm_out = &aoti_torch_cpu_addmm_out;
  if (!a.is_cpu()) {
    static auto* const found = on_cuda(addmm_out, "aoti_torch_cuda_addmm_out");
    addmm_out = found;
  }
  STABLE_TORCH_ERROR_CODE_CHECK(addmm_out(out.get(), base.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace

void multiply_add(const Tensor& a, const Tensor& b, const Tensor& out) { add_product(out, a, b, out); }

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor out = empty_like_device(x, {x.size(0), weight.size(0)}, x.scalar_type());
  if (bias) {
    add_product(*bias, x, transposed(weight), out);
  } else {
    multiply(x, transposed(weight), out);
  }
  return out;
}

}  // namespace simplex
