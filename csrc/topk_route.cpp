// Which tokens to route to a layer (arXiv 2511.21408). simplex_ops/routing.py has the equations.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "elements.h"
#include "kernel.h"
#include "op.h"

namespace simplex {

namespace {

constexpr int64_t kMost = int64_t{1} << 31;

// The fakes (simplex_ops/routing.py) check the same in the same words.
void check_scores(const char* op, const Tensor& scores) {
  SIMPLEX_EXPECT(scores.dim() == 2, op, "scores to be 2-dimensional [batch, length], got ", scores.dim(),
                 " dimensions");
  const ScalarType dtype = scores.scalar_type();
  SIMPLEX_EXPECT(
      dtype == ScalarType::Float || (dtype == ScalarType::Double && scores.is_cpu()), op,
      scores.is_cpu() ? "scores to be float32 or float64 on cpu, got " : "scores to be float32 on cuda, got ",
      dtype_string(scores));
  SIMPLEX_EXPECT(scores.size(1) < kMost, op, "the length of scores to be below 2^31, got ", scores.size(1));
}

// A number that sorts as a score does, NaN with -inf and -0 with 0.
template <class W>
auto image(W score) {
  using Bits = std::conditional_t<sizeof(W) == 8, int64_t, int32_t>;
  if (score == 0) score = 0;
  if (std::isnan(score)) score = -std::numeric_limits<W>::infinity();
  Bits bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits < 0 ? static_cast<Bits>(bits ^ std::numeric_limits<Bits>::max()) : bits;
}

template <class W>
void topk_cpu(const Tensor& scores, int64_t k, Tensor& idx, Tensor& mask, Tensor* lowest) {
  const int64_t B = scores.size(0), T = scores.size(1);
  const W* from = elements<W>(scores);
  int32_t* const to_idx = mutable_elements<int32_t>(idx);
  bool* const to_mask = mutable_elements<bool>(mask);
  W* const to_lowest = lowest ? mutable_elements<W>(*lowest) : nullptr;
  torch::stable::parallel_for(0, B, 1, [&](int64_t b, int64_t end) {
    std::vector<decltype(image(W{}))> images(T), order(T);
    for (; b < end; ++b) {
      std::transform(from + b * T, from + (b + 1) * T, images.begin(), image<W>);
      order = images;
      std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<>());
      const auto least = order[k - 1];
      int64_t ties = k - std::count_if(images.begin(), images.end(), [&](auto x) { return x > least; });
      int32_t* next = to_idx + b * k;
      for (int64_t t = 0; t < T; ++t) {
        const bool chosen = images[t] > least || (images[t] == least && ties-- > 0);
        to_mask[b * T + t] = chosen;
        if (chosen) *next++ = static_cast<int32_t>(t);
        if (to_lowest && images[t] == least) to_lowest[b] = std::isnan(from[b * T + t]) ? -HUGE_VAL : from[b * T + t];
      }
    }
  });
}

template <class W>
void threshold_cpu(const Tensor& scores, double threshold, Tensor& idx, Tensor& count) {
  const int64_t T = scores.size(1), cap = idx.size(1);
  const W* from = elements<W>(scores);
  for (int64_t b = 0; b < scores.size(0); ++b) {
    int32_t* const row = mutable_elements<int32_t>(idx) + b * cap;
    int64_t found = 0;
    for (int64_t t = 0; t < T && found < cap; ++t) {
      if (from[b * T + t] >= static_cast<W>(threshold)) row[found++] = static_cast<int32_t>(t);
    }
    std::fill(row + found, row + cap, -1);
    mutable_elements<int32_t>(count)[b] = static_cast<int32_t>(found);
  }
}

const KernelFamily kTopK("route_topk", {});
const KernelFamily kThreshold("route_threshold", {});

const KernelFamily kCalibrate("route_calibrate", {});

// lowest: null, or [B], for the k-th score of each sequence.
std::tuple<Tensor, Tensor> choose(const char* op, const Tensor& scores, int64_t k, Tensor* lowest) {
  const int64_t B = scores.size(0), T = scores.size(1);
  SIMPLEX_EXPECT(k >= 1 && k <= T, op, "k to be from 1 to the length of scores (", T, "), got ", k);
  Tensor idx = empty_like_device(scores, {B, k}, ScalarType::Int);
  Tensor mask = empty_like_device(scores, {B, T}, ScalarType::Bool);
  if (B == 0) return {idx, mask};
  const Tensor s = packed(scores);
  if (scores.is_cpu()) {
    s.scalar_type() == ScalarType::Double ? topk_cpu<double>(s, k, idx, mask, lowest)
                                          : topk_cpu<float>(s, k, idx, mask, lowest);
  } else {
    const int device = s.get_device_index();
    launch(kTopK.find(device, {}), device, current_cuda_stream(device), {static_cast<unsigned>(B), 1, 1},
           {{"scores_ptr", s.const_data_ptr()},
            {"idx_ptr", idx.const_data_ptr()},
            {"mask_ptr", mask.const_data_ptr()},
            {"lowest_ptr", lowest ? lowest->const_data_ptr() : nullptr},
            {"length", static_cast<int32_t>(T)},
            {"k", static_cast<int32_t>(k)},
            {"has_lowest", static_cast<int32_t>(lowest != nullptr)}});
  }
  return {idx, mask};
}

std::tuple<Tensor, Tensor> topk_route(const Tensor& scores, int64_t k) {
  constexpr const char* op = "topk_route";
  check_scores(op, scores);
  return choose(op, scores, k, nullptr);
}

template <class W>
double mean(const Tensor& lowest) {
  const W* const values = elements<W>(lowest);
  return std::accumulate(values, values + lowest.numel(), 0.0) / static_cast<double>(lowest.numel());
}

std::tuple<Tensor, Tensor> topk_route_calibrate_(const Tensor& scores, int64_t k, const Tensor& threshold,
                                                 const Tensor& calibrations) {
  constexpr const char* op = "topk_route_calibrate_";
  check_scores(op, scores);
  for (const auto& [name, x] : {std::pair{"threshold", threshold}, std::pair{"calibrations", calibrations}}) {
    expect_sizes(op, name, x, {}, "one number");
    expect_dtype(op, name, x, ScalarType::Float);
    expect_device(op, name, x, "scores", scores);
  }
  const int64_t B = scores.size(0);
  Tensor lowest = empty_like_device(scores, {B}, scores.scalar_type());
  const auto chosen = choose(op, scores, k, &lowest);
  if (B == 0) return chosen;
  if (scores.is_cpu()) {
    const double to = scores.scalar_type() == ScalarType::Double ? mean<double>(lowest) : mean<float>(lowest);
    float& count = *mutable_elements<float>(calibrations);
    float& value = *mutable_elements<float>(threshold);
    count += 1;
    if (std::isfinite(to)) value += static_cast<float>(std::max(1.0 / count, 0.02) * (to - value));
    return chosen;
  }
  SIMPLEX_EXPECT(B < kMost / 2, op, "the batch of scores to be below 2^30, got ", B);
  const int device = scores.get_device_index();
  launch(kCalibrate.find(device, {}), device, current_cuda_stream(device), {1, 1, 1},
         {{"threshold_ptr", threshold.const_data_ptr()},
          {"calibrations_ptr", calibrations.const_data_ptr()},
          {"lowest_ptr", lowest.const_data_ptr()},
          {"batch", static_cast<int32_t>(B)}});
  return chosen;
}

std::tuple<Tensor, Tensor> threshold_route(const Tensor& scores, double threshold, int64_t cap) {
  constexpr const char* op = "threshold_route";
  check_scores(op, scores);
  SIMPLEX_EXPECT(!std::isnan(threshold), op, "threshold to be a number, got nan");
  SIMPLEX_EXPECT(cap >= 1, op, "cap to be at least 1, got ", cap);
  SIMPLEX_EXPECT(cap < kMost, op, "cap to be below 2^31, got ", cap);
  const int64_t B = scores.size(0);
  Tensor idx = empty_like_device(scores, {B, cap}, ScalarType::Int);
  Tensor count = empty_like_device(scores, {B}, ScalarType::Int);
  if (B == 0) return {idx, count};
  const Tensor s = packed(scores);
  if (scores.is_cpu()) {
    s.scalar_type() == ScalarType::Double ? threshold_cpu<double>(s, threshold, idx, count)
                                          : threshold_cpu<float>(s, threshold, idx, count);
  } else {
    const int device = s.get_device_index();
    launch(kThreshold.find(device, {}), device, current_cuda_stream(device), {static_cast<unsigned>(B), 1, 1},
           {{"scores_ptr", s.const_data_ptr()},
            {"idx_ptr", idx.const_data_ptr()},
            {"count_ptr", count.const_data_ptr()},
            {"length", static_cast<int32_t>(scores.size(1))},
            {"cap", static_cast<int32_t>(cap)},
            {"threshold", static_cast<float>(threshold)}});
  }
  return {idx, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def("topk_route(Tensor scores, SymInt k) -> (Tensor idx, Tensor mask)");
  m.def("threshold_route(Tensor scores, float threshold, SymInt cap) -> (Tensor idx, Tensor count)");
  m.def(
      "topk_route_calibrate_(Tensor scores, SymInt k, Tensor(a!) threshold, Tensor(b!) calibrations) -> (Tensor idx, "
      "Tensor mask)");
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) {
  m.impl("topk_route", TORCH_BOX(&topk_route));
  m.impl("threshold_route", TORCH_BOX(&threshold_route));
  m.impl("topk_route_calibrate_", TORCH_BOX(&topk_route_calibrate_));
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) {
  m.impl("topk_route", TORCH_BOX(&topk_route));
  m.impl("threshold_route", TORCH_BOX(&threshold_route));
  m.impl("topk_route_calibrate_", TORCH_BOX(&topk_route_calibrate_));
}

}  // namespace simplex
