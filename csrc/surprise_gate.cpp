// The surprise gate of Subjective Depth Transformers (arXiv 2511.21408). simplex_ops/surprise_gate.py has the
// equations.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "elements.h"
#include "kernel.h"
#include "op.h"

namespace simplex {

namespace {

constexpr double kEpsilon = 1e-10;

// One checked problem. x_*: packed [B, T, D] of one dtype; the others: one number each, of the wide dtype.
struct SurpriseGate {
  Tensor x_in, x_post, x_prior, beta_ce, beta_cu, o_ce, m_cu;
  int64_t B, T, D, window;
  ScalarType wide;

  int64_t rows() const { return B * T; }
};

// The fakes (simplex_ops/surprise_gate.py) check the same in the same words.
SurpriseGate checked(const char* op, const Tensor& x_in, const Tensor& x_post, const Tensor& x_prior,
                     const Tensor& beta_ce, const Tensor& beta_cu, const Tensor& o_ce, const Tensor& m_cu,
                     int64_t window) {
  SIMPLEX_EXPECT(x_in.dim() == 3, op, "x_in to be 3-dimensional [batch, length, dim], got ", x_in.dim(), " dimensions");
  SurpriseGate p{x_in, x_post, x_prior, beta_ce, beta_cu, o_ce, m_cu, x_in.size(0), x_in.size(1), x_in.size(2), window};
  for (const auto& [name, t] : {std::pair{"x_post", &x_post}, {"x_prior", &x_prior}}) {
    expect_sizes(op, name, *t, {p.B, p.T, p.D}, "that of x_in");
    expect_like(op, name, *t, "x_in", x_in);
  }
  expect_floating(op, "x_in", x_in);
  p.wide = wide_dtype(x_in);
  SIMPLEX_EXPECT(p.D >= 1, op, "the last dim of x_in to be at least 1, got ", p.D);
  SIMPLEX_EXPECT(x_in.is_cpu() || p.D % 8 == 0, op, "the last dim of x_in to be a multiple of 8 on cuda, got ", p.D);
  for (const auto& [name, t] :
       {std::pair{"beta_ce", &beta_ce}, {"beta_cu", &beta_cu}, {"o_ce", &o_ce}, {"m_cu", &m_cu}}) {
    expect_sizes(op, name, *t, {}, "one number");
    expect_dtype(op, name, *t, p.wide);
    expect_device(op, name, *t, "x_in", x_in);
  }
  SIMPLEX_EXPECT(window >= 1, op, "window to be at least 1, got ", window);
  SIMPLEX_EXPECT(window < int64_t{1} << 31, op, "window to be below 2^31, got ", window);
  for (Tensor* t : {&p.x_in, &p.x_post, &p.x_prior}) *t = packed(*t);
  return p;
}

Tensor per_token(const SurpriseGate& p) { return empty_like_device(p.x_in, {p.B, p.T}, p.wide); }

// ---- CPU. Everything is computed in fp64: reading the rows takes the time.

struct Parameters {
  double beta_ce, beta_cu, o_ce, m_cu;

  template <class W>
  static Parameters of(const SurpriseGate& p) {
    const auto value = [](const Tensor& t) { return static_cast<double>(*elements<W>(t)); };
    return {value(p.beta_ce), value(p.beta_cu), value(p.o_ce), value(p.m_cu)};
  }
};

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

// mean_d D^2 and mean_d D^ (2 D - D^) of one row.
template <class In>
std::array<double, 2> row_means(const In* in, const In* post, const In* prior, int64_t D) {
  constexpr int64_t kLanes = 8;  // independent sums, which the compiler turns into vectors
  double change[kLanes] = {}, expected[kLanes] = {};
  const auto add = [&](int64_t lane, int64_t d) {
    const double x = in[d], delta = post[d] - x, prior_delta = prior[d] - x;
    change[lane] += delta * delta;
    expected[lane] += prior_delta * (2 * delta - prior_delta);
  };
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(lane, d + lane);
  }
  for (; d < D; ++d) add(0, d);
  std::array<double, 2> sums{};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sums[0] += change[lane];
    sums[1] += expected[lane];
  }
  return {sums[0] / static_cast<double>(D), sums[1] / static_cast<double>(D)};
}

// The mean of the last `window` values up to each one, x[0] standing in for those before the first. Blocks of `window`
// values, summed from both ends, give each window by one addition; a running sum would carry an outlier's rounding
// error (or NaN) along for ever.
template <class W>
std::vector<double> moving_average(const W* x, int64_t T, int64_t window) {
  std::vector<double> average(T);
  for (int64_t begin = 0; begin < T; begin += window) {
    const int64_t end = std::min(begin + window, T);
    double sum = 0;
    for (int64_t t = begin; t < end; ++t) average[t] += sum += x[t];
    // What the next block's windows see of this one.
    sum = 0;
    for (int64_t t = end - 1; t > begin && end < T; --t) {
      sum += x[t];
      if (t + window - 1 < T) average[t + window - 1] = sum;
    }
  }
  const double n = static_cast<double>(window);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t missing = window - std::min(window, t + 1);
    average[t] = average[t] / n + (missing > 0 ? static_cast<double>(missing) / n * x[0] : 0.0);
  }
  return average;
}

template <class In>
void forward_cpu(const SurpriseGate& p, Tensor& g, Tensor& d_st, Tensor& ce, Tensor& cu) {
  using W = Wide<In>;
  const auto [beta_ce, beta_cu, o_ce, m_cu] = Parameters::of<W>(p);
  const In *in = elements<In>(p.x_in), *post = elements<In>(p.x_post), *prior = elements<In>(p.x_prior);
  W *const to_g = mutable_elements<W>(g), *const to_d_st = mutable_elements<W>(d_st);
  W *const to_ce = mutable_elements<W>(ce), *const to_cu = mutable_elements<W>(cu);
  const double log_o = std::log(o_ce + kEpsilon);
  const int64_t D = p.D, T = p.T, window = p.window;
  torch::stable::parallel_for(0, p.rows(), std::max<int64_t>(1, (1 << 15) / D), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto [change, expected] = row_means(in + row * D, post + row * D, prior + row * D, D);
      to_d_st[row] = static_cast<W>(change);
      to_ce[row] = static_cast<W>(expected + log_o);
    }
  });
  torch::stable::parallel_for(0, p.B, 1,
                              [&, beta_ce = beta_ce, beta_cu = beta_cu, m_cu = m_cu](int64_t b, int64_t end) {
                                for (; b < end; ++b) {
                                  const std::vector<double> average = moving_average(to_d_st + b * T, T, window);
                                  for (int64_t t = 0; t < T; ++t) {
                                    const int64_t i = b * T + t;
                                    to_cu[i] = static_cast<W>(to_d_st[i] - m_cu * average[t]);
                                    const double z_ce = beta_ce * to_ce[i], z_cu = beta_cu * to_cu[i];
                                    to_g[i] = static_cast<W>(sigmoid(z_ce) + sigmoid(-z_ce) * sigmoid(z_cu));
                                  }
                                }
                              });
}

struct Gradients {
  Tensor x_in, x_post, x_prior, beta_ce, beta_cu, o_ce, m_cu;
};

template <class In>
void backward_cpu(const SurpriseGate& p, const Tensor& grad_g, const Tensor& d_st, const Tensor& ce, const Tensor& cu,
                  Gradients& grads) {
  using W = Wide<In>;
  const auto [beta_ce, beta_cu, o_ce, m_cu] = Parameters::of<W>(p);
  const W *e = elements<W>(grad_g), *of_ce = elements<W>(ce), *of_cu = elements<W>(cu), *of_d_st = elements<W>(d_st);
  std::vector<double> grad_ce(p.rows()), grad_cu(p.rows());
  std::array<double, 4> sums{};  // one after the other, so that the result does not depend on the number of threads
  for (int64_t b = 0; b < p.B; ++b) {
    const std::vector<double> average = moving_average(of_d_st + b * p.T, p.T, p.window);
    for (int64_t t = 0; t < p.T; ++t) {
      const int64_t i = b * p.T + t;
      const double z_ce = beta_ce * of_ce[i], z_cu = beta_cu * of_cu[i];
      const double k = e[i] * sigmoid(-z_ce) * sigmoid(-z_cu);  // e (1 - g)
      const double k_ce = k * sigmoid(z_ce), k_cu = k * sigmoid(z_cu);
      grad_ce[i] = beta_ce * k_ce;
      grad_cu[i] = beta_cu * k_cu;
      sums[0] += k_ce * of_ce[i];
      sums[1] += k_cu * of_cu[i];
      sums[2] += grad_ce[i];
      sums[3] -= grad_cu[i] * average[t];
    }
  }
  *mutable_elements<W>(grads.beta_ce) = static_cast<W>(sums[0]);
  *mutable_elements<W>(grads.beta_cu) = static_cast<W>(sums[1]);
  *mutable_elements<W>(grads.o_ce) = static_cast<W>(sums[2] / (o_ce + kEpsilon));
  *mutable_elements<W>(grads.m_cu) = static_cast<W>(sums[3]);

  const In *in = elements<In>(p.x_in), *post = elements<In>(p.x_post), *prior = elements<In>(p.x_prior);
  In *const to_in = mutable_elements<In>(grads.x_in), *const to_post = mutable_elements<In>(grads.x_post);
  In* const to_prior = mutable_elements<In>(grads.x_prior);
  const int64_t D = p.D;
  torch::stable::parallel_for(0, p.rows(), std::max<int64_t>(1, (1 << 15) / D), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double of_change = 2 / static_cast<double>(D) * grad_cu[row];
      const double of_expected = 2 / static_cast<double>(D) * grad_ce[row];
      for (int64_t i = row * D; i < (row + 1) * D; ++i) {
        const double x = in[i], delta = post[i] - x, prior_delta = prior[i] - x;
        const double d_post = of_change * delta + of_expected * prior_delta;
        const double d_prior = of_expected * (delta - prior_delta);
        to_post[i] = static_cast<In>(static_cast<W>(d_post));
        to_prior[i] = static_cast<In>(static_cast<W>(d_prior));
        to_in[i] = static_cast<In>(static_cast<W>(-(d_post + d_prior)));
      }
    }
  });
}

// ---- CUDA

const KernelFamily kRows("surprise_gate_rows", {"dtype"});
const KernelFamily kGate("surprise_gate_fwd", {});
const KernelFamily kGateBackward("surprise_gate_bwd", {});
const KernelFamily kSums("surprise_gate_bwd_sum", {});
const KernelFamily kRowsBackward("surprise_gate_bwd_rows", {"dtype"});

// One call's device and stream, and its grids: a program per row, or per block of tokens of one sequence.
struct Launch {
  const SurpriseGate& p;
  int device;
  void* stream;
  int32_t length, dim, window;

  Launch(const char* op, const SurpriseGate& p)
      : p(p),
        device(p.x_in.get_device_index()),
        stream(current_cuda_stream(device)),
        length(static_cast<int32_t>(p.T)),
        dim(static_cast<int32_t>(p.D)),
        window(static_cast<int32_t>(p.window)) {
    SIMPLEX_EXPECT(p.rows() < int64_t{1} << 30, op, "batch * length of x_in to be below 2^30, got ", p.rows());
    SIMPLEX_EXPECT(p.D < int64_t{1} << 30, op, "the last dim of x_in to be below 2^30, got ", p.D);
  }

  std::array<unsigned, 3> per_row() const { return {static_cast<unsigned>(p.rows()), 1, 1}; }
  std::array<unsigned, 3> per_block(const Kernel& kernel) const {
    return {static_cast<unsigned>((p.T + kernel["BLOCK_T"] - 1) / kernel["BLOCK_T"] * p.B), 1, 1};
  }
};

void forward_cuda(const SurpriseGate& p, Tensor& g, Tensor& d_st, Tensor& ce, Tensor& cu) {
  const Launch l("surprise_gate", p);
  launch(kRows.find(l.device, {dtype_constant(p.x_in)}), l.device, l.stream, l.per_row(),
         {{"x_in_ptr", p.x_in.const_data_ptr()},
          {"x_post_ptr", p.x_post.const_data_ptr()},
          {"x_prior_ptr", p.x_prior.const_data_ptr()},
          {"o_ce_ptr", p.o_ce.const_data_ptr()},
          {"d_st_ptr", d_st.const_data_ptr()},
          {"ce_ptr", ce.const_data_ptr()},
          {"dim", l.dim}});
  const Kernel& gate = kGate.find(l.device, {});
  launch(gate, l.device, l.stream, l.per_block(gate),
         {{"d_st_ptr", d_st.const_data_ptr()},
          {"ce_ptr", ce.const_data_ptr()},
          {"beta_ce_ptr", p.beta_ce.const_data_ptr()},
          {"beta_cu_ptr", p.beta_cu.const_data_ptr()},
          {"m_cu_ptr", p.m_cu.const_data_ptr()},
          {"cu_ptr", cu.const_data_ptr()},
          {"g_ptr", g.const_data_ptr()},
          {"length", l.length},
          {"window", l.window}});
}

void backward_cuda(const SurpriseGate& p, const Tensor& grad_g, const Tensor& d_st, const Tensor& ce, const Tensor& cu,
                   Gradients& grads) {
  const Launch l("surprise_gate_backward", p);
  const Kernel& gate = kGateBackward.find(l.device, {});
  const auto blocks = l.per_block(gate);
  const Tensor grad_ce = per_token(p), grad_cu = per_token(p);
  const Tensor parts = empty_like_device(p.x_in, {4, blocks[0]}, ScalarType::Float);
  launch(gate, l.device, l.stream, blocks,
         {{"grad_g_ptr", grad_g.const_data_ptr()},
          {"d_st_ptr", d_st.const_data_ptr()},
          {"ce_ptr", ce.const_data_ptr()},
          {"cu_ptr", cu.const_data_ptr()},
          {"beta_ce_ptr", p.beta_ce.const_data_ptr()},
          {"beta_cu_ptr", p.beta_cu.const_data_ptr()},
          {"grad_ce_ptr", grad_ce.const_data_ptr()},
          {"grad_cu_ptr", grad_cu.const_data_ptr()},
          {"parts_ptr", parts.const_data_ptr()},
          {"length", l.length},
          {"window", l.window}});
  launch(kSums.find(l.device, {}), l.device, l.stream, {1, 1, 1},
         {{"parts_ptr", parts.const_data_ptr()},
          {"o_ce_ptr", p.o_ce.const_data_ptr()},
          {"grad_beta_ce_ptr", grads.beta_ce.const_data_ptr()},
          {"grad_beta_cu_ptr", grads.beta_cu.const_data_ptr()},
          {"grad_o_ce_ptr", grads.o_ce.const_data_ptr()},
          {"grad_m_cu_ptr", grads.m_cu.const_data_ptr()},
          {"num_parts", static_cast<int32_t>(blocks[0])}});
  launch(kRowsBackward.find(l.device, {dtype_constant(p.x_in)}), l.device, l.stream, l.per_row(),
         {{"x_in_ptr", p.x_in.const_data_ptr()},
          {"x_post_ptr", p.x_post.const_data_ptr()},
          {"x_prior_ptr", p.x_prior.const_data_ptr()},
          {"grad_ce_ptr", grad_ce.const_data_ptr()},
          {"grad_cu_ptr", grad_cu.const_data_ptr()},
          {"grad_in_ptr", grads.x_in.const_data_ptr()},
          {"grad_post_ptr", grads.x_post.const_data_ptr()},
          {"grad_prior_ptr", grads.x_prior.const_data_ptr()},
          {"dim", l.dim}});
}

// ---- The op

std::tuple<Tensor, Tensor, Tensor, Tensor> surprise_gate(const Tensor& x_in, const Tensor& x_post,
                                                         const Tensor& x_prior, const Tensor& beta_ce,
                                                         const Tensor& beta_cu, const Tensor& o_ce, const Tensor& m_cu,
                                                         int64_t window) {
  const auto p = checked("surprise_gate", x_in, x_post, x_prior, beta_ce, beta_cu, o_ce, m_cu, window);
  Tensor g = per_token(p), d_st = per_token(p), ce = per_token(p), cu = per_token(p);
  if (p.rows() == 0) return {g, d_st, ce, cu};
  if (x_in.is_cpu()) {
    dispatch_floating(x_in, [&](auto element) { forward_cpu<decltype(element)>(p, g, d_st, ce, cu); });
  } else {
    forward_cuda(p, g, d_st, ce, cu);
  }
  return {g, d_st, ce, cu};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> surprise_gate_backward(
    const Tensor& grad_g, const Tensor& x_in, const Tensor& x_post, const Tensor& x_prior, const Tensor& beta_ce,
    const Tensor& beta_cu, const Tensor& o_ce, const Tensor& m_cu, const Tensor& d_st, const Tensor& ce,
    const Tensor& cu, int64_t window) {
  constexpr const char* op = "surprise_gate_backward";
  const auto p = checked(op, x_in, x_post, x_prior, beta_ce, beta_cu, o_ce, m_cu, window);
  for (const auto& [name, t] : {std::pair{"grad_g", &grad_g}, {"d_st", &d_st}, {"ce", &ce}, {"cu", &cu}}) {
    expect_sizes(op, name, *t, {p.B, p.T}, "batch, length of x_in");
    expect_dtype(op, name, *t, p.wide);
    expect_device(op, name, *t, "x_in", x_in);
  }
  Gradients grads;
  for (Tensor* grad : {&grads.x_in, &grads.x_post, &grads.x_prior}) {
    *grad = empty_like_device(x_in, {p.B, p.T, p.D}, x_in.scalar_type());
  }
  for (Tensor* grad : {&grads.beta_ce, &grads.beta_cu, &grads.o_ce, &grads.m_cu}) {
    *grad = empty_like_device(x_in, {}, p.wide);
    if (p.rows() == 0) torch::stable::zero_(*grad);
  }
  if (p.rows() > 0) {
    const Tensor e = packed(grad_g), of_d_st = packed(d_st), of_ce = packed(ce), of_cu = packed(cu);
    if (x_in.is_cpu()) {
      dispatch_floating(x_in,
                        [&](auto element) { backward_cpu<decltype(element)>(p, e, of_d_st, of_ce, of_cu, grads); });
    } else {
      backward_cuda(p, e, of_d_st, of_ce, of_cu, grads);
    }
  }
  return {grads.x_in, grads.x_post, grads.x_prior, grads.beta_ce, grads.beta_cu, grads.o_ce, grads.m_cu};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simplex, m) {
  m.def(
      "surprise_gate(Tensor x_in, Tensor x_post, Tensor x_prior, Tensor beta_ce, Tensor beta_cu, Tensor o_ce, "
      "Tensor m_cu, SymInt window=100) -> (Tensor g, Tensor d_st, Tensor ce, Tensor cu)");
  m.def(
      "surprise_gate_backward(Tensor grad_g, Tensor x_in, Tensor x_post, Tensor x_prior, Tensor beta_ce, "
      "Tensor beta_cu, Tensor o_ce, Tensor m_cu, Tensor d_st, Tensor ce, Tensor cu, SymInt window=100) -> "
      "(Tensor grad_x_in, Tensor grad_x_post, Tensor grad_x_prior, Tensor grad_beta_ce, Tensor grad_beta_cu, "
      "Tensor grad_o_ce, Tensor grad_m_cu)");
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CPU, m) {
  m.impl("surprise_gate", TORCH_BOX(&surprise_gate));
  m.impl("surprise_gate_backward", TORCH_BOX(&surprise_gate_backward));
}

STABLE_TORCH_LIBRARY_IMPL(simplex, CUDA, m) {
  m.impl("surprise_gate", TORCH_BOX(&surprise_gate));
  m.impl("surprise_gate_backward", TORCH_BOX(&surprise_gate_backward));
}

}  // namespace simplex
