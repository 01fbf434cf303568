// Routing tokens to a layer (arXiv 2511.21408): there and back. Which ones: topk_route.cpp. simplex_ops/routing.py has
// the equations.
#include <algorithm>
#include <array>

#include "elements.h"
#include "kernel.h"
#include "op.h"

namespace simplex {

namespace {

constexpr int64_t kMost = int64_t{1} << 31;

// rows [B, T, D] and what they are routed by.
struct Route {
  Tensor idx;  // packed [B, k]
  int64_t B, T, D, k;

  int64_t slots() const { return B * k; }
};

Route checked(const char* op, const char* name, const Tensor& rows, const Tensor& idx) {
  SIMPLEX_EXPECT(rows.dim() == 3, op, name, " to be 3-dimensional [batch, length, dim], got ", rows.dim(),
                 " dimensions");
  expect_floating(op, name, rows);
  SIMPLEX_EXPECT(rows.is_cpu() || rows.size(2) % 8 == 0, op, "the last dim of ", name,
                 " to be a multiple of 8 on cuda, got ", rows.size(2));
  SIMPLEX_EXPECT(idx.dim() == 2, op, "idx to be 2-dimensional [batch, slots], got ", idx.dim(), " dimensions");
  expect_sizes(op, "idx", idx, {rows.size(0), idx.size(1)}, "batch, slots");
  expect_dtype(op, "idx", idx, ScalarType::Int);
  expect_device(op, "idx", idx, name, rows);
  Route r{packed(idx), rows.size(0), rows.size(1), rows.size(2), idx.size(1)};
  if (rows.is_cpu()) {
    const int32_t* const values = elements<int32_t>(r.idx);
    for (int64_t i = 0; i < r.slots(); ++i) {
      SIMPLEX_EXPECT(values[i] >= -1 && values[i] < r.T, op, "idx to be -1 or an index below the length of ", name,
                     " (", r.T, "), got ", values[i]);
    }
  } else {
    SIMPLEX_EXPECT(r.slots() < kMost / 2, op, "batch * slots of idx to be below 2^30, got ", r.slots());
    SIMPLEX_EXPECT(r.B * r.T < kMost / 2, op, "batch * length of ", name, " to be below 2^30, got ",
                   shape_string(rows));
    SIMPLEX_EXPECT(r.T < kMost && r.D < kMost / 2, op, "the length and last dim of ", name, " to be below 2^30, got ",
                   shape_string(rows));
  }
  return r;
}

// Calls work(slot, row) for every slot that is not empty, then empty(slot) for those that are.
template <class Work, class Empty>
void for_slots(const Route& r, Work work, Empty empty) {
  const int32_t* const idx = elements<int32_t>(r.idx);
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(r.D, 1));
  torch::stable::parallel_for(0, r.slots(), grain, [&](int64_t slot, int64_t end) {
    for (; slot < end; ++slot) idx[slot] >= 0 ? work(slot, slot / r.k * r.T + idx[slot]) : empty(slot);
  });
}

struct Launch {
  int device;
  void* stream;
  int32_t length, slots, total, dim;

  explicit Launch(const Route& r)
      : device(r.idx.get_device_index()),
        stream(current_cuda_stream(device)),
        length(static_cast<int32_t>(r.T)),
        slots(static_cast<int32_t>(r.k)),
        total(static_cast<int32_t>(r.slots())),
        dim(static_cast<int32_t>(r.D)) {}

  static std::array<unsigned, 3> programs(int64_t items, int64_t of_each) {
    return {static_cast<unsigned>((items + of_each - 1) / of_each), 1, 1};
  }
};

const KernelFamily kGather("route_gather_rows", {"dtype"});
const KernelFamily kSlots("route_slots", {});
const KernelFamily kScatterAdd("route_scatter_add_rows", {"dtype"});
const KernelFamily kScatterAddBackward("route_scatter_add_bwd", {"dtype"});

// Moves rows whatever is in them: one kernel for every dtype of that width.
void gather_cuda(const Route& r, const Tensor& from, const Tensor& to) {
  const Launch l(r);
  const DType width = from.scalar_type() == ScalarType::Float ? DType::fp32 : DType::fp16;
  const Kernel& kernel = kGather.find(l.device, {static_cast<int64_t>(width)});
  launch(kernel, l.device, l.stream, Launch::programs(l.total, kernel["ROWS"]),
         {{"from_ptr", from.const_data_ptr()},
          {"idx_ptr", r.idx.const_data_ptr()},
          {"to_ptr", to.const_data_ptr()},
          {"length", l.length},
          {"slots", l.slots},
          {"total", l.total},
          {"dim", l.dim}});
}

// out = base, or 0 without one, with gate * y added at the routed rows, or with y in their place.
void scatter_cuda(const Route& r, bool replaces, const Tensor* base, const Tensor& y, const Tensor* gate,
                  const Tensor& out) {
  const Launch l(r);
  const int64_t rows = r.B * r.T;
  Tensor slot_of = empty_like_device(out, {rows}, ScalarType::Int);
  launch(kSlots.find(l.device, {}), l.device, l.stream, Launch::programs(r.B, 1),
         {{"idx_ptr", r.idx.const_data_ptr()},
          {"slot_of_ptr", slot_of.const_data_ptr()},
          {"length", l.length},
          {"slots", l.slots}});
  const Kernel& kernel = kScatterAdd.find(l.device, {dtype_constant(out)});
  launch(kernel, l.device, l.stream, Launch::programs(rows, kernel["ROWS"]),
         {{"base_ptr", base ? base->const_data_ptr() : nullptr},
          {"y_ptr", y.const_data_ptr()},
          {"slot_of_ptr", slot_of.const_data_ptr()},
          {"gate_ptr", gate ? gate->const_data_ptr() : nullptr},
          {"out_ptr", out.const_data_ptr()},
          {"rows", static_cast<int32_t>(rows)},
          {"dim", l.dim},
          {"has_base", static_cast<int32_t>(base != nullptr)},
          {"has_gate", static_cast<int32_t>(gate != nullptr)},
          {"replaces", static_cast<int32_t>(replaces)}});
}

Tensor route_gather(const Tensor& x, const Tensor& idx) {
  const Route r = checked("route_gather", "x", x, idx);
  Tensor y = empty_like_device(x, {r.B, r.k, r.D}, x.scalar_type());
  if (y.numel() == 0) return y;
  const Tensor from = packed(x);
  if (!x.is_cpu()) {
    gather_cuda(r, from, y);
    return y;
  }
  dispatch_floating(x, [&](auto element) {
    using In = decltype(element);
    const In* const rows = elements<In>(from);
    In* const to = mutable_elements<In>(y);
    for_slots(
        r, [&](int64_t slot, int64_t row) { std::copy_n(rows + row * r.D, r.D, to + slot * r.D); },
        [&](int64_t slot) { std::fill_n(to + slot * r.D, r.D, In(0.0f)); });
  });
  return y;
}

Tensor route_gather_backward(const Tensor& grad_y, const Tensor& x, const Tensor& idx) {
  constexpr const char* op = "route_gather_backward";
  const Route r = checked(op, "x", x, idx);
  expect_sizes(op, "grad_y", grad_y, {r.B, r.k, r.D}, "batch, slots of idx, last dim of x");
  expect_like(op, "grad_y", grad_y, "x", x);
  Tensor grad_x = empty_like_device(x, {r.B, r.T, r.D}, x.scalar_type());
  const Tensor from = packed(grad_y);
  if (!x.is_cpu() && grad_x.numel() > 0 && grad_y.numel() > 0) {
    scatter_cuda(r, /*replaces=*/true, nullptr, from, nullptr, grad_x);
    return grad_x;
  }
  torch::stable::zero_(grad_x);
  if (grad_x.numel() == 0 || grad_y.numel() == 0) return grad_x;
  dispatch_floating(x, [&](auto element) {
    using In = decltype(element);
    const In* const rows = elements<In>(from);
    In* const to = mutable_elements<In>(grad_x);
    for_slots(
        r, [&](int64_t slot, int64_t row) { std::copy_n(rows + slot * r.D, r.D, to + row * r.D); }, [](int64_t) {});
  });
  return grad_x;
}

// Adding takes a gate for each slot, replacing one for each token.
void check_update(const char* op, const Route& r, bool replaces, const char* name, const Tensor& rows, const Tensor& y,
                  const std::optional<Tensor>& gate) {
  expect_sizes(op, "y", y, {r.B, r.k, r.D}, "batch, slots of idx, dim");
  expect_like(op, "y", y, name, rows);
  if (!gate) return;
  if (replaces) {
    expect_sizes(op, "gate", *gate, {r.B, r.T}, "batch, length");
  } else {
    expect_sizes(op, "gate", *gate, {r.B, r.k}, "that of idx");
  }
  expect_dtype(op, "gate", *gate, wide_dtype(rows));
  expect_device(op, "gate", *gate, name, rows);
}

// The two ways to put rows back: base + gate * y, and base + gate * (y - base), which is y without a gate.
Tensor put_back(const char* op, bool replaces, const Tensor& base, const Tensor& y, const Tensor& idx,
                const std::optional<Tensor>& gate) {
  const Route r = checked(op, "base", base, idx);
  check_update(op, r, replaces, "base", base, y, gate);
  Tensor out = empty_like_device(base, {r.B, r.T, r.D}, base.scalar_type());
  const Tensor update = packed(y), scale = gate ? packed(*gate) : Tensor();
  if (!base.is_cpu() && out.numel() > 0 && r.slots() > 0) {
    const Tensor from = packed(base);
    scatter_cuda(r, replaces, &from, update, gate ? &scale : nullptr, out);
    return out;
  }
  torch::stable::copy_(out, base);
  if (out.numel() == 0 || r.slots() == 0) return out;
  dispatch_floating(base, [&](auto element) {
    using In = decltype(element);
    using W = Wide<In>;
    const In* const from = elements<In>(update);
    const W* const gates = gate ? elements<W>(scale) : nullptr;
    In* const to = mutable_elements<In>(out);
    for_slots(
        r,
        [&](int64_t slot, int64_t row) {
          const W g = gates ? gates[replaces ? row : slot] : W(1);
          for (int64_t d = 0; d < r.D; ++d) {
            const W before = to[row * r.D + d], x = from[slot * r.D + d];
            to[row * r.D + d] = static_cast<In>(replaces && !gates ? x : before + g * (replaces ? x - before : x));
          }
        },
        [](int64_t) {});
  });
  return out;
}

// base: what was replaced, null where y was added.
std::tuple<Tensor, Tensor, Tensor> put_back_backward(const char* op, const Tensor& grad_out, const Tensor* base,
                                                     const Tensor& y, const Tensor& idx,
                                                     const std::optional<Tensor>& gate) {
  const Route r = checked(op, "grad_out", grad_out, idx);
  if (base) {
    expect_sizes(op, "base", *base, {r.B, r.T, r.D}, "that of grad_out");
    expect_like(op, "base", *base, "grad_out", grad_out);
  }
  check_update(op, r, base != nullptr, "grad_out", grad_out, y, gate);
  Tensor grad_base = empty_like_device(grad_out, {r.B, r.T, r.D}, grad_out.scalar_type());
  torch::stable::copy_(grad_base, grad_out);
  Tensor grad_y = empty_like_device(grad_out, {r.B, r.k, r.D}, grad_out.scalar_type());
  // Without a gate nobody asks for its gradient.
  Tensor grad_gate = empty_like_device(grad_out, {gate ? r.B : 0, !gate ? 0 : base ? r.T : r.k}, wide_dtype(grad_out));
  if (gate && (base || r.D == 0)) torch::stable::zero_(grad_gate);
  if (grad_y.numel() == 0) return {grad_base, grad_y, grad_gate};
  const Tensor rows = packed(grad_out), update = packed(y), scale = gate ? packed(*gate) : Tensor();
  const Tensor before = base ? packed(*base) : Tensor();
  if (!grad_out.is_cpu()) {
    const Launch l(r);
    launch(kScatterAddBackward.find(l.device, {dtype_constant(grad_out)}), l.device, l.stream,
           Launch::programs(l.total, 1),
           {{"grad_out_ptr", rows.const_data_ptr()},
            {"base_ptr", base ? before.const_data_ptr() : nullptr},
            {"y_ptr", update.const_data_ptr()},
            {"idx_ptr", r.idx.const_data_ptr()},
            {"gate_ptr", gate ? scale.const_data_ptr() : nullptr},
            {"grad_base_ptr", grad_base.const_data_ptr()},
            {"grad_y_ptr", grad_y.const_data_ptr()},
            {"grad_gate_ptr", gate ? grad_gate.const_data_ptr() : nullptr},
            {"length", l.length},
            {"slots", l.slots},
            {"dim", l.dim},
            {"has_gate", static_cast<int32_t>(gate.has_value())},
            {"replaces", static_cast<int32_t>(base != nullptr)}});
    return {grad_base, grad_y, grad_gate};
  }
  dispatch_floating(grad_out, [&](auto element) {
    using In = decltype(element);
    using W = Wide<In>;
    const In *const from = elements<In>(rows), *const of_y = elements<In>(update);
    const In* const of_base = base ? elements<In>(before) : nullptr;
    const W* const gates = gate ? elements<W>(scale) : nullptr;
    In *const to = mutable_elements<In>(grad_y), *const to_base = mutable_elements<In>(grad_base);
    W* const to_gate = gate ? mutable_elements<W>(grad_gate) : nullptr;
    for_slots(
        r,
        [&](int64_t slot, int64_t row) {
          const int64_t of_gate = of_base ? row : slot;
          const W g = gates ? gates[of_gate] : W(1);
          double dot = 0;
          for (int64_t d = 0; d < r.D; ++d) {
            const W e = from[row * r.D + d];
            to[slot * r.D + d] = static_cast<In>(g * e);
            if (of_base) to_base[row * r.D + d] = static_cast<In>(gates ? (1 - g) * e : W(0));
            const double less = of_base ? static_cast<double>(of_base[row * r.D + d]) : 0.0;
            dot += static_cast<double>(e) * (static_cast<double>(of_y[slot * r.D + d]) - less);
          }
          if (to_gate) to_gate[of_gate] = static_cast<W>(dot);
        },
        [&](int64_t slot) {
          std::fill_n(to + slot * r.D, r.D, In(0.0f));
          if (to_gate && !of_base) to_gate[slot] = 0;
        });
  });
  return {grad_base, grad_y, grad_gate};
}

Tensor route_scatter_add(const Tensor& base, const Tensor& y, const Tensor& idx, const std::optional<Tensor>& gate) {
  return put_back("route_scatter_add", /*replaces=*/false, base, y, idx, gate);
}

std::tuple<Tensor, Tensor, Tensor> route_scatter_add_backward(const Tensor& grad_out, const Tensor& y,
                                                              const Tensor& idx, const std::optional<Tensor>& gate) {
  return put_back_backward("route_scatter_add_backward", grad_out, nullptr, y, idx, gate);
}

Tensor route_replace(const Tensor& base, const Tensor& y, const Tensor& idx, const std::optional<Tensor>& gate) {
  return put_back("route_replace", /*replaces=*/true, base, y, idx, gate);
}

std::tuple<Tensor, Tensor, Tensor> route_replace_backward(const Tensor& grad_out, const Tensor& base, const Tensor& y,
                                                          const Tensor& idx, const std::optional<Tensor>& gate) {
  return put_back_backward("route_replace_backward", grad_out, &base, y, idx, gate);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def("route_gather(Tensor x, Tensor idx) -> (Tensor y)");
  m.def("route_gather_backward(Tensor grad_y, Tensor x, Tensor idx) -> (Tensor grad_x)");
  m.def("route_scatter_add(Tensor base, Tensor y, Tensor idx, Tensor? gate=None) -> (Tensor out)");
  m.def(
      "route_scatter_add_backward(Tensor grad_out, Tensor y, Tensor idx, Tensor? gate=None) -> (Tensor grad_base, "
      "Tensor grad_y, Tensor grad_gate)");
  m.def("route_replace(Tensor base, Tensor y, Tensor idx, Tensor? gate=None) -> (Tensor out)");
  m.def(
      "route_replace_backward(Tensor grad_out, Tensor base, Tensor y, Tensor idx, Tensor? gate=None) -> (Tensor "
      "grad_base, Tensor grad_y, Tensor grad_gate)");
}

template <class Library>
void implement(Library& m) {
  m.impl("route_gather", TORCH_BOX(&route_gather));
  m.impl("route_gather_backward", TORCH_BOX(&route_gather_backward));
  m.impl("route_scatter_add", TORCH_BOX(&route_scatter_add));
  m.impl("route_scatter_add_backward", TORCH_BOX(&route_scatter_add_backward));
  m.impl("route_replace", TORCH_BOX(&route_replace));
  m.impl("route_replace_backward", TORCH_BOX(&route_replace_backward));
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) { implement(m); }

}  // namespace simplex
