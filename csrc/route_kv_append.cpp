// Keys and values of routed tokens into a compact cache (arXiv 2511.21408). simplex_ops/route_kv_append.py has the
// equations.
#include <algorithm>
#include <cmath>

#include "elements.h"
#include "kernel.h"
#include "op.h"

namespace simplex {

namespace {

// One checked problem: keys, values [B, S, H, D] are written in place, k, v [B, n, H, D] packed.
struct Append {
  Tensor k, v, positions, frequencies;
  bool rotates;
  int64_t B, n, H, D, S;

  int64_t half() const { return D / 2; }
};

// The fakes (simplex_ops/route_kv_append.py) check the same in the same words.
Append checked(const char* op, const Tensor& keys, const Tensor& values, const Tensor& count, const Tensor& k,
               const Tensor& v, const Tensor& positions, const std::optional<Tensor>& frequencies) {
  SIMPLEX_EXPECT(k.dim() == 4, op, "k to be 4-dimensional [batch, slots, heads, head_dim], got ", k.dim(),
                 " dimensions");
  SIMPLEX_EXPECT(keys.dim() == 4, op, "keys to be 4-dimensional [batch, capacity, heads, head_dim], got ", keys.dim(),
                 " dimensions");
  expect_floating(op, "k", k);
  Append p{k,         v,         positions, Tensor(),  frequencies.has_value(),
           k.size(0), k.size(1), k.size(2), k.size(3), keys.size(1)};
  SIMPLEX_EXPECT(p.D % 2 == 0, op, "the head_dim of k to be even, got ", p.D);
  SIMPLEX_EXPECT(k.is_cpu() || p.H * p.D % 8 == 0, op, "heads * head_dim of k to be a multiple of 8 on cuda, got ",
                 p.H * p.D);
  expect_sizes(op, "v", v, {p.B, p.n, p.H, p.D}, "that of k");
  expect_like(op, "v", v, "k", k);
  for (const auto& [name, t] : {std::pair{"keys", &keys}, {"values", &values}}) {
    expect_sizes(op, name, *t, {p.B, p.S, p.H, p.D}, "batch of k, the capacity of keys, heads and head_dim of k");
    expect_like(op, name, *t, "k", k);
    SIMPLEX_EXPECT(t->is_contiguous(), op, name, " to be contiguous, got strides that are not");
  }
  expect_sizes(op, "count", count, {p.B}, "batch of k");
  expect_dtype(op, "count", count, ScalarType::Int);
  expect_device(op, "count", count, "k", k);
  SIMPLEX_EXPECT(count.is_contiguous(), op, "count to be contiguous, got strides that are not");
  expect_sizes(op, "positions", positions, {p.B, p.n}, "batch, slots of k");
  expect_dtype(op, "positions", positions, ScalarType::Int);
  expect_device(op, "positions", positions, "k", k);
  if (frequencies) {
    expect_sizes(op, "frequencies", *frequencies, {p.half()}, "half the head_dim of k");
    expect_dtype(op, "frequencies", *frequencies, wide_dtype(k));
    expect_device(op, "frequencies", *frequencies, "k", k);
    p.frequencies = packed(*frequencies);
  }
  p.k = packed(k);
  p.v = packed(v);
  p.positions = packed(positions);
  if (k.is_cpu()) {
    const int32_t* const at = elements<int32_t>(p.positions);
    const int32_t* const filled = elements<int32_t>(count);
    for (int64_t b = 0; b < p.B; ++b) {
      SIMPLEX_EXPECT(filled[b] >= 0 && filled[b] <= p.S, op, "count to be from 0 to the capacity of keys (", p.S,
                     "), got ", filled[b]);
      for (int64_t s = 1; s < p.n; ++s) {
        const int32_t before = at[b * p.n + s - 1], now = at[b * p.n + s];
        SIMPLEX_EXPECT(now < 0 || before >= 0, op, "the empty slots of positions to be the last ones, got ", before,
                       " before ", now);
      }
    }
  } else {
    constexpr int64_t kMost = int64_t{1} << 30;
    SIMPLEX_EXPECT(p.B * p.n < kMost && p.S < kMost && p.H * p.D < kMost, op,
                   "batch * slots, capacity and heads * head_dim to be below 2^30, got k of ", shape_string(k),
                   " and keys of ", shape_string(keys));
  }
  return p;
}

template <class In>
void append_cpu(const Append& p, const Tensor& keys, const Tensor& values, const Tensor& count) {
  using W = Wide<In>;
  const In *const k = elements<In>(p.k), *const v = elements<In>(p.v);
  const W* const frequencies = p.rotates ? elements<W>(p.frequencies) : nullptr;
  const int32_t* const at = elements<int32_t>(p.positions);
  int32_t* const filled = mutable_elements<int32_t>(count);
  In *const to_k = mutable_elements<In>(keys), *const to_v = mutable_elements<In>(values);
  const int64_t row = p.H * p.D, half = p.half();
  torch::stable::parallel_for(0, p.B, 1, [&](int64_t b, int64_t end) {
    for (; b < end; ++b) {
      for (int64_t s = 0; s < p.n && at[b * p.n + s] >= 0 && filled[b] < p.S; ++s, ++filled[b]) {
        const In *const key = k + (b * p.n + s) * row, *const value = v + (b * p.n + s) * row;
        In *const key_to = to_k + (b * p.S + filled[b]) * row, *const value_to = to_v + (b * p.S + filled[b]) * row;
        std::copy_n(value, row, value_to);
        if (!p.rotates) std::copy_n(key, row, key_to);
        for (int64_t d = 0; d < half && p.rotates; ++d) {
          const W angle = static_cast<W>(at[b * p.n + s]) * frequencies[d];
          const W cosine = std::cos(angle), sine = std::sin(angle);
          for (int64_t i = d; i < row; i += p.D) {
            const W x = key[i], y = key[i + half];
            key_to[i] = static_cast<In>(x * cosine - y * sine);
            key_to[i + half] = static_cast<In>(x * sine + y * cosine);
          }
        }
      }
    }
  });
}

const KernelFamily kRows("route_kv_append_rows", {"dtype"});
const KernelFamily kCount("route_kv_append_count", {});

void route_kv_append_(const Tensor& keys, const Tensor& values, const Tensor& count, const Tensor& k, const Tensor& v,
                      const Tensor& positions, const std::optional<Tensor>& frequencies) {
  const Append p = checked("route_kv_append_", keys, values, count, k, v, positions, frequencies);
  if (p.B == 0 || p.n == 0) return;
  if (k.is_cpu()) {
    dispatch_floating(k, [&](auto element) { append_cpu<decltype(element)>(p, keys, values, count); });
    return;
  }
  const int device = k.get_device_index();
  void* const stream = current_cuda_stream(device);
  const int32_t slots = static_cast<int32_t>(p.n), capacity = static_cast<int32_t>(p.S);
  if (p.H * p.D > 0) {
    launch(kRows.find(device, {dtype_constant(k)}), device, stream, {static_cast<unsigned>(p.B * p.n), 1, 1},
           {{"k_ptr", p.k.const_data_ptr()},
            {"v_ptr", p.v.const_data_ptr()},
            {"positions_ptr", p.positions.const_data_ptr()},
            {"count_ptr", count.const_data_ptr()},
            {"frequencies_ptr", p.rotates ? p.frequencies.const_data_ptr() : nullptr},
            {"keys_ptr", keys.const_data_ptr()},
            {"values_ptr", values.const_data_ptr()},
            {"slots", slots},
            {"capacity", capacity},
            {"row", static_cast<int32_t>(p.H * p.D)},
            {"half", static_cast<int32_t>(p.half())},
            {"rotates", static_cast<int32_t>(p.rotates)}});
  }
  // Afterwards, because every row of the sequence reads the old count.
  launch(kCount.find(device, {}), device, stream, {static_cast<unsigned>(p.B), 1, 1},
         {{"positions_ptr", p.positions.const_data_ptr()},
          {"count_ptr", count.const_data_ptr()},
          {"slots", slots},
          {"capacity", capacity}});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def(
      "route_kv_append_(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) count, Tensor k, Tensor v, Tensor positions, "
      "Tensor? frequencies=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) { m.impl("route_kv_append_", TORCH_BOX(&route_kv_append_)); }
STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) { m.impl("route_kv_append_", TORCH_BOX(&route_kv_append_)); }

}  // namespace simplex
