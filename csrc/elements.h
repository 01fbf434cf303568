// Typed access to a tensor's elements, for CPU kernels that need no more than that.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "op.h"

namespace simplex {

template <class T>
const T* elements(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_elements(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// wide_dtype() as a type.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a value of the element type of t, which expect_floating has passed.
template <class F>
void dispatch_floating(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    default:
      return f(float{});
  }
}

}  // namespace simplex
