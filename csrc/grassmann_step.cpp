// Decoding with Grassmann mixing: new tokens after those that a ring holds. simplex_ops/grassmann_step.py has the
// rules.
#include <algorithm>

#include "grassmann_mix.h"

namespace simplex {
namespace {

// The fake (simplex_ops/grassmann_step.py) checks the same in the same words.
void check_ring(const char* op, const Tensor& ring, const PluckerMean& p, const std::vector<int64_t>& offsets,
                int64_t position) {
  SIMPLEX_EXPECT(ring.dim() == 3, op, "ring to be 3-dimensional [batch, slots, r], got ", ring.dim(), " dimensions");
  expect_floating(op, "ring", ring);
  expect_device(op, "ring", ring, "z", p.z);
  expect_sizes(op, "ring", ring, {p.B, ring.size(1), p.r}, "batch of z, its own slots, r of z");
  const int64_t largest = *std::max_element(offsets.begin(), offsets.end());
  SIMPLEX_EXPECT(ring.size(1) >= largest, op, "ring to have a slot for each token up to the largest offset (", largest,
                 "), got ", ring.size(1));
  SIMPLEX_EXPECT(position >= 0, op, "position to be at least 0, got ", position);
}

Tensor rows_of(Tensor t, int64_t first, int64_t count) { return torch::stable::narrow(t, 1, first, count); }

// copy(rows of the ring, rows of a tensor that holds the same tokens in order): one piece, or two around the end.
template <class Copy>
void for_each_piece(const Tensor& ring, const Tensor& rows, int64_t position, Copy copy) {
  const int64_t slots = ring.size(1), count = rows.size(1);
  for (int64_t done = 0; done < count;) {
    const int64_t slot = (position + done) % slots, length = std::min(slots - slot, count - done);
    Tensor of_ring = rows_of(ring, slot, length), of_rows = rows_of(rows, done, length);
    copy(of_ring, of_rows);
    done += length;
  }
}

// Nothing differentiates this op, so nothing keeps autograd from recording those that it is made of.
class NoGrad {
 public:
  NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(enabled_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  const bool enabled_ = aoti_torch_grad_mode_is_enabled();
};

Tensor grassmann_step(const Tensor& z, const Tensor& ring, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::vector<int64_t>& offsets, int64_t position, bool bias_everywhere) {
  constexpr const char* op = "grassmann_step";
  const NoGrad no_grad;
  auto [p, d] = checked_grassmann_mix(op, z, weight, bias, offsets, std::nullopt, std::nullopt);
  check_ring(op, ring, p, offsets, position);
  const int64_t count = p.L, slots = ring.size(1), known = std::min(position, slots);
  if (count == 0) return empty_like_device(z, {p.B, 0, d}, p.dtype);
  if (known > 0) {  // the past in front, so that the offsets hold
    const Tensor rows = empty_like_device(z, {p.B, known + count, p.r}, p.dtype);
    for_each_piece(ring, rows_of(rows, 0, known), position - known,
                   [](const Tensor& from, Tensor& to) { torch::stable::copy_(to, from); });
    Tensor now = rows_of(rows, known, count);
    torch::stable::copy_(now, z);
    p = checked_plucker_mean(op, rows, offsets, std::nullopt, std::nullopt);
    p.history = known;
  }
  const int64_t smallest = *std::min_element(offsets.begin(), offsets.end());
  Tensor g = mixed(p, weight, bias, std::clamp<int64_t>(smallest - position, 0, count), bias_everywhere);
  const int64_t kept = std::min(count, slots);
  for_each_piece(ring, rows_of(z, count - kept, kept), position + count - kept,
                 [](Tensor& to, const Tensor& from) { torch::stable::copy_(to, from); });
  return g;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def(
      "grassmann_step(Tensor z, Tensor(a!) ring, Tensor weight, Tensor? bias, int[] offsets, SymInt position, "
      "bool bias_everywhere=False) -> (Tensor g)");
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) { m.impl("grassmann_step", TORCH_BOX(&grassmann_step)); }

STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) { m.impl("grassmann_step", TORCH_BOX(&grassmann_step)); }

}  // namespace simplex
