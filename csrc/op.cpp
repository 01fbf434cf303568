#include "op.h"

#include <dlfcn.h>

#include <algorithm>
#include <vector>

#include "elements.h"
#include "kernel.h"

namespace simplex {

namespace {

template <class Shape>
std::string bracketed(const Shape& shape) {
  std::string text;
  for (int64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

bool data_is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// The C shim rather than torch::stable::empty, which looks the op up by name at every call (1 us).
Tensor empty(const Tensor& on_device_of, const int64_t* sizes, size_t dims, int32_t dtype) {
  std::vector<int64_t> strides(dims);
  int64_t step = 1;
  for (size_t d = dims; d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on_device_of.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes, strides.data(), dtype,
                                                         device_type, on_device_of.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor copy_packed(const Tensor& t) {
  // Not contiguous() or clone(): the one returns a misaligned view as it is, the other keeps the order of the strides.
  Tensor copy = packed_like(t);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace

std::string shape_string(const Tensor& t) { return bracketed(t.sizes()); }
std::string shape_string(std::initializer_list<int64_t> shape) { return bracketed(shape); }

std::string device_string(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device:") + std::to_string(t.get_device_index());
}

std::string dtype_string(const Tensor& t) { return torch::headeronly::toString(t.scalar_type()); }

bool same_dtype(const Tensor& a, const Tensor& b) {
  int32_t of_a, of_b;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(a.get(), &of_a));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(b.get(), &of_b));
  return of_a == of_b;
}

bool same_device(const Tensor& a, const Tensor& b) {
  int32_t of_a, of_b;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &of_a));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &of_b));
  return of_a == of_b && a.get_device_index() == b.get_device_index();
}

void expect_sizes(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                  const char* origin) {
  SIMPLEX_EXPECT(has_shape(t, shape), op, name, " to have shape ", shape_string(shape), " (", origin, "), got ",
                 shape_string(t));
}

void expect_shape_of(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  const auto sizes = t.sizes(), expected = other.sizes();
  SIMPLEX_EXPECT(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), op, name, " to have shape ",
                 shape_string(other), " (that of ", other_name, "), got ", shape_string(t));
}

void expect_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  SIMPLEX_EXPECT(t.scalar_type() == dtype, op, name, " to have dtype ", torch::headeronly::toString(dtype), ", got ",
                 dtype_string(t));
}

void expect_device(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  SIMPLEX_EXPECT(same_device(t, other), op, name, " to have the device of ", other_name, " (", device_string(other),
                 "), got ", device_string(t));
}

void expect_like(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  SIMPLEX_EXPECT(same_dtype(t, other), op, name, " to have the dtype of ", other_name, " (", dtype_string(other),
                 "), got ", dtype_string(t));
  expect_device(op, name, t, other_name, other);
}

void expect_floating(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  SIMPLEX_EXPECT(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
                     (dtype == ScalarType::Double && t.is_cpu()),
                 op, name,
                 t.is_cpu() ? " to be float32, float64, float16 or bfloat16 on cpu, got "
                            : " to be float32, float16 or bfloat16 on cuda, got ",
                 dtype_string(t));
}

// Only the CPU looks at the values: on CUDA that would wait for the GPU.
Tensor checked_cu_seqlens(const char* op, const Tensor& cu_seqlens, const char* name, const Tensor& t) {
  SIMPLEX_EXPECT(cu_seqlens.dim() == 1, op, "cu_seqlens to be 1-dimensional [sequences + 1], got ", cu_seqlens.dim(),
                 " dimensions");
  const int64_t count = cu_seqlens.size(0), length = t.size(1);
  SIMPLEX_EXPECT(count >= 2, op, "cu_seqlens to hold at least 2 values, got ", count);
  expect_dtype(op, "cu_seqlens", cu_seqlens, ScalarType::Int);
  expect_device(op, "cu_seqlens", cu_seqlens, name, t);
  SIMPLEX_EXPECT(t.size(0) == 1, op, "the batch of ", name, " to be 1 with cu_seqlens, got ", t.size(0));
  const Tensor values = packed(cu_seqlens);
  if (cu_seqlens.is_cpu()) {
    const int32_t* const at = elements<int32_t>(values);
    for (int64_t i = 0; i < count; ++i) {
      SIMPLEX_EXPECT(at[i] >= (i == 0 ? 0 : at[i - 1]), op, "cu_seqlens to ascend from 0, got ", at[i], " at ", i);
    }
    SIMPLEX_EXPECT(at[0] == 0, op, "cu_seqlens to ascend from 0, got ", at[0], " at 0");
    SIMPLEX_EXPECT(at[count - 1] == length, op, "cu_seqlens to end with the length of ", name, " (", length, "), got ",
                   at[count - 1]);
  }
  return values;
}

ScalarType wide_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int64_t dtype_constant(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return static_cast<int64_t>(dtype == ScalarType::Half       ? DType::fp16
                              : dtype == ScalarType::BFloat16 ? DType::bf16
                                                              : DType::fp32);
}

Tensor aligned(const Tensor& t) {
  if (t.numel() == 0) return t;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t last = t.dim() - 1;
  bool ok = data_is_aligned(t) && (strides[last] == 1 || sizes[last] == 1);
  for (int64_t d = 0; d < last; ++d) ok = ok && (sizes[d] == 1 || strides[d] % 8 == 0);
  return ok ? t : copy_packed(t);
}

Tensor packed(const Tensor& t) {
  return t.numel() == 0 || (t.is_contiguous() && data_is_aligned(t)) ? t : copy_packed(t);
}

std::array<int64_t, 3> leading_strides(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  std::array<int64_t, 3> leading;
  for (size_t d = 0; d < leading.size(); ++d) leading[d] = sizes[d] == 1 ? 0 : strides[d];
  return leading;
}

Tensor empty_like_device(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return empty(t, shape.begin(), shape.size(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)));
}

Tensor packed_like(const Tensor& t) {
  const auto sizes = t.sizes();
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return empty(t, sizes.data(), sizes.size(), dtype);
}

Tensor reinterpreted(const Tensor& t, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                     int64_t first) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                               sizes.begin(), strides.begin(), first, &handle));
  return Tensor(handle);
}

void* current_cuda_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(getter, "simplex_ops: expected a torch with CUDA for a CUDA tensor: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

}  // namespace simplex
