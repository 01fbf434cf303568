// plucker_mean on the CPU: a token after the other, gradients gathered by the token they belong to, so that the result
// does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "elements.h"
#include "plucker_mean.h"

namespace simplex {
namespace {

// Rows are padded with zeros to whole blocks of kLanes. A sum keeps kLanes partial sums: the compiler may not reorder
// additions, so only then can it use vectors.
constexpr int64_t kLanes = 16;

template <class T>
T dot(const T* a, const T* b, int64_t begin, int64_t end) {
  T lanes[kLanes] = {};
  for (int64_t j = begin; j < end; j += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += a[j + l] * b[j + l];
  T total = 0;
  for (T lane : lanes) total += lane;
  return total;
}

// y += factor * x
template <class T>
void add_scaled(T factor, const T* x, T* __restrict y, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) y[j] += factor * x[j];
}

template <class T>
struct Angle {
  T cosine, sine;
  bool spans;  // whether the two tokens span a plane
};

// direction: the unit vector normal to u in the plane of the unit vectors u and v, or 0.
template <class T>
Angle<T> angle(const T* u, const T* v, int64_t width, T* __restrict direction) {
  const T cosine = dot(u, v, 0, width);
  for (int64_t j = 0; j < width; ++j) direction[j] = v[j] - cosine * u[j];
  // Once more: where the angle is small the first subtraction leaves rounding errors along u.
  add_scaled(-dot(u, direction, 0, width), u, direction, 0, width);
  const T sine = std::sqrt(dot(direction, direction, 0, width));
  const bool spans = !(sine <= T(kSmallestSine));  // true for NaN, which must not vanish
  for (int64_t j = 0; j < width; ++j) direction[j] = spans ? direction[j] / sine : T(0);
  return {cosine, sine, spans};
}

// The tokens from begin to end - 1, of which no other ones see any.
struct Sequence {
  int64_t begin, end;
};

// One call, every token normalised.
template <class In>
struct Problem {
  using T = Wide<In>;
  const PluckerMean& p;
  const bool* valid;
  int64_t r, width;      // width: of a padded row
  std::vector<T> units;  // z / |z|, padded
  std::vector<T> sizes;  // per token two factors of |z|, neither of which overflows; 0, 0 for a token of 0

  explicit Problem(const PluckerMean& p)
      : p(p),
        valid(p.valid ? elements<bool>(*p.valid) : nullptr),
        r(p.r),
        width((p.r + kLanes - 1) / kLanes * kLanes),
        units(p.tokens() * width),
        sizes(p.tokens() * 2) {
    const In* const z = elements<In>(p.z);
    for_each_token(
        [&](int64_t token, Sequence) { normalize(z + token * r, &units[token * width], &sizes[token * 2]); });
  }

  const T* unit(int64_t token) const { return &units[token * width]; }

  // work(token, its sequence), in parallel.
  template <class Work>
  void for_each_token(Work work) const {
    torch::stable::parallel_for(0, p.tokens(), 32, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) work(token, sequence(token));
    });
  }

  Sequence sequence(int64_t token) const {
    if (!p.starts) return {token - token % p.L, token - token % p.L + p.L};
    const int32_t* const starts = elements<int32_t>(*p.starts);
    const int32_t* const after = std::upper_bound(starts, starts + p.sequences(), token);
    return {after[-1], *after};
  }

  bool pairs(int64_t token, int64_t other) const { return !valid || (valid[token] && valid[other]); }

  // work(earlier token) for every pair of this one; returns their number N_t.
  template <class Work>
  int64_t for_each_pair(int64_t token, Sequence sequence, Work work) const {
    int64_t count = 0;
    for (int64_t offset : p.offsets) {
      if (token - offset < sequence.begin || !pairs(token, token - offset)) continue;
      ++count;
      work(token - offset);
    }
    return count;
  }

  // mean: Y_t. Returns N_t.
  int64_t mean_direction(int64_t token, Sequence sequence, T* __restrict mean) const {
    T direction[kMaxRank];
    std::fill(mean, mean + width, T(0));
    const int64_t count = for_each_pair(token, sequence, [&](int64_t other) {
      angle(unit(token), unit(other), width, direction);
      add_scaled(T(1), direction, mean, 0, width);
    });
    for (int64_t j = 0; count > 0 && j < width; ++j) mean[j] /= T(count);
    return count;
  }

 private:
  void normalize(const In* z, T* unit, T* size) const {
    T largest = 0;
    for (int64_t j = 0; j < r; ++j) {
      unit[j] = T(z[j]);
      if (!(std::abs(unit[j]) <= largest)) largest = std::abs(unit[j]);
    }
    if (largest < std::numeric_limits<T>::min()) return void(std::fill(unit, unit + r, T(0)));
    for (int64_t j = 0; j < r; ++j) unit[j] /= largest;
    const T norm = std::sqrt(dot(unit, unit, 0, width));
    for (int64_t j = 0; j < r; ++j) unit[j] /= norm;
    size[0] = largest;
    size[1] = norm;
  }
};

template <class In>
void forward(const PluckerMean& p, Tensor& pbar, Tensor& seen) {
  using T = Wide<In>;
  const Problem<In> problem(p);
  In* const out = mutable_elements<In>(pbar);
  In* const seen_out = mutable_elements<In>(seen);
  problem.for_each_token([&](int64_t token, Sequence sequence) {
    if (token % p.L < p.history) return;
    const int64_t output = token - (token / p.L + 1) * p.history;
    T mean[kMaxRank];
    const int64_t count = problem.mean_direction(token, sequence, mean);
    seen_out[output] = In(count > 0 ? 1.0f : 0.0f);
    const T* const u = problem.unit(token);
    In* __restrict row = out + output * p.planes();
    for (int64_t i = 0; i < p.r; ++i) {
      const T u_i = u[i], mean_i = mean[i];
      for (int64_t j = i + 1; j < p.r; ++j) *row++ = In(u_i * mean[j] - mean_i * u[j]);
    }
  });
}

// h = Om u and k = Om mean, Om the antisymmetric matrix whose upper triangle is grad, row after row.
template <class In, class T>
void contract(const In* grad, int64_t r, int64_t width, const T* u, const T* mean, T* h, T* k) {
  T row[kMaxRank] = {};
  for (int64_t i = 0; i < r; ++i) {
    row[i] = 0;
    for (int64_t j = i + 1; j < r; ++j) row[j] = T(*grad++);
    const int64_t begin = i / kLanes * kLanes;
    h[i] += dot(row, u, begin, width);
    k[i] += dot(row, mean, begin, width);
    add_scaled(-u[i], row, h, begin, width);
    add_scaled(-mean[i], row, k, begin, width);
  }
}

template <class In>
void backward(const PluckerMean& p, const Tensor& grad_pbar, const Tensor& grad_z) {
  using T = Wide<In>;
  const Problem<In> problem(p);
  const int64_t width = problem.width;
  const In* const grad = elements<In>(grad_pbar);
  In* const out = mutable_elements<In>(grad_z);
  const int64_t out_stride = grad_z.stride(0);

  // What a token's own mean tells it (times |z_t|), and h_t / N_t, which the earlier tokens of its pairs need.
  std::vector<T> own(p.tokens() * width), shares(p.tokens() * width);
  problem.for_each_token([&](int64_t token, Sequence sequence) {
    T mean[kMaxRank], direction[kMaxRank], turn[kMaxRank] = {};
    const int64_t count = problem.mean_direction(token, sequence, mean);
    if (count == 0) return;
    const T* const u = problem.unit(token);
    T *const share = &shares[token * width], *const sum = &own[token * width];
    contract(grad + token * p.planes(), p.r, width, u, mean, share, sum);
    for (int64_t j = 0; j < width; ++j) share[j] /= T(count);
    problem.for_each_pair(token, sequence, [&](int64_t other) {
      const Angle<T> between = angle(u, problem.unit(other), width, direction);
      if (!between.spans) return;
      const T beta = dot(direction, share, 0, width), cotangent = between.cosine / between.sine;
      for (int64_t j = 0; j < width; ++j) turn[j] += beta * u[j] + cotangent * (share[j] - beta * direction[j]);
    });
    add_scaled(T(1), turn, sum, 0, width);
  });

  problem.for_each_token([&](int64_t token, Sequence sequence) {
    T direction[kMaxRank];
    T* const sum = &own[token * width];
    for (int64_t offset : p.offsets) {
      const int64_t later = token + offset;
      if (later >= sequence.end || !problem.pairs(token, later)) continue;
      const Angle<T> between = angle(problem.unit(later), problem.unit(token), width, direction);
      if (!between.spans) continue;
      const T* const share = &shares[later * width];
      const T beta = dot(direction, share, 0, width);
      for (int64_t j = 0; j < width; ++j) sum[j] -= (share[j] - beta * direction[j]) / between.sine;
    }
    const T largest = problem.sizes[token * 2], norm = problem.sizes[token * 2 + 1];
    for (int64_t j = 0; j < p.r; ++j) out[token * out_stride + j] = In(norm == 0 ? T(0) : sum[j] / norm / largest);
  });
}

}  // namespace

void plucker_mean_forward_cpu(const PluckerMean& p, Tensor& pbar, Tensor& seen) {
  dispatch_floating(p.z, [&](auto element) { forward<decltype(element)>(p, pbar, seen); });
}

void plucker_mean_backward_cpu(const PluckerMean& p, const Tensor& grad_pbar, const Tensor& grad_z) {
  dispatch_floating(p.z, [&](auto element) { backward<decltype(element)>(p, grad_pbar, grad_z); });
}

}  // namespace simplex
