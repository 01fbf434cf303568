// 2-simplicial attention on the CPU: splits a problem into tiles, runs them on torch's threads with the widest vectors
// the machine has, and adds up what tiles share. two_simplicial_attention_tile.h computes one tile.
#include "two_simplicial_attention_cpu.h"

#include <torch/headeronly/util/BFloat16.h>

#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "elements.h"
#include "two_simplicial_attention.h"

#define SIMPLEX_ISA baseline
#define SIMPLEX_VECTOR_BYTES 16
#include "two_simplicial_attention_tile.h"

// The wheel is built for the oldest x86-64; the machine it runs on is rarely that old.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SIMPLEX_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define SIMPLEX_ISA x86_64_v3
#define SIMPLEX_VECTOR_BYTES 32
#include "two_simplicial_attention_tile.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define SIMPLEX_ISA x86_64_v4
#define SIMPLEX_VECTOR_BYTES 64
#include "two_simplicial_attention_tile.h"
#pragma GCC pop_options
#endif

namespace simplex {
namespace {

using cpu::Acc;
using cpu::Arena;
using cpu::KeyGrads;
using cpu::Problem;
using cpu::Tile;
using torch::headeronly::BFloat16;

template <class In>
struct TileFunctions {
  void (*forward)(const Problem<In>&, const Tile&, Arena<Acc<In>>&);
  KeyGrads<Acc<In>> (*backward)(const Problem<In>&, const Tile&, Arena<Acc<In>>&);
};

template <class In>
TileFunctions<In> tile_functions() {
#ifdef SIMPLEX_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return {x86_64_v4::forward_tile<In>, x86_64_v4::backward_tile<In>};
  if (__builtin_cpu_supports("x86-64-v3")) return {x86_64_v3::forward_tile<In>, x86_64_v3::backward_tile<In>};
#endif
  return {baseline::forward_tile<In>, baseline::backward_tile<In>};
}

template <class T>
cpu::Rows<const T> rows(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
cpu::Rows<T> mutable_rows(const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// The first position of each position's sequence; empty if there is one sequence only.
std::vector<int64_t> starts_of(const TwoSimplicialAttention& p) {
  std::vector<int64_t> starts(p.cu_seqlens ? p.Nk : 0);
  for (int64_t i = 0; !starts.empty() && i + 1 < p.cu_seqlens->numel(); ++i) {
    const int32_t* const at = elements<int32_t>(*p.cu_seqlens) + i;
    std::fill(starts.begin() + at[0], starts.begin() + at[1], at[0]);
  }
  return starts;
}

template <class In>
Problem<In> make_problem(const TwoSimplicialAttention& p, const std::vector<int64_t>& starts) {
  Problem<In> problem{};
  const bool swap = p.w1 > p.w2;
  problem.q = rows<In>(p.q);
  problem.k_short = rows<In>(swap ? p.k2 : p.k1);
  problem.v_short = rows<In>(swap ? p.v2 : p.v1);
  problem.k_long = rows<In>(swap ? p.k1 : p.k2);
  problem.v_long = rows<In>(swap ? p.v1 : p.v2);
  problem.Nq = p.Nq;
  problem.Nk = p.Nk;
  problem.Hq = p.Hq;
  problem.D = p.D;
  problem.group = p.group();
  problem.w_short = std::min(p.w1, p.w2);
  problem.w_long = std::max(p.w1, p.w2);
  problem.scale = p.scale;
  problem.starts = starts.empty() ? nullptr : starts.data();
  return problem;
}

// The tiles of a problem, in an order in which the tiles of one (batch, kv head) ascend. Their shape must not depend on
// the number of threads, because the order of additions, and so the last bits of the result, depends on it.
struct Tiling {
  int64_t heads, kv_heads, tiles, queries, Nq;

  explicit Tiling(const TwoSimplicialAttention& p)
      : heads(p.B * p.Hkv), kv_heads(p.Hkv), queries(std::clamp<int64_t>(256 / p.group(), 1, 64)), Nq(p.Nq) {
    tiles = (p.Nq + queries - 1) / queries;
  }
  int64_t tasks() const { return heads * tiles; }
  Tile operator[](int64_t task) const {
    const int64_t head = task % heads, first = task / heads * queries;
    return {head / kv_heads, head % kv_heads, first, std::min(queries, Nq - first)};
  }
};

// Calls compute(problem, tile, arena) with a null arena, which tells how much memory the largest tile needs.
template <class In, class Compute>
int64_t arena_size(const Problem<In>& problem, const Tiling& tiling, Compute compute) {
  int64_t largest = 0;
  for (int64_t task = 0; task < tiling.tasks(); task += tiling.heads) {
    Arena<Acc<In>> arena;
    compute(problem, tiling[task], arena);
    largest = std::max(largest, arena.used());
  }
  return largest;
}

// Runs every tile once; work(task, arena) gets memory of its thread. Threads take tasks in ascending order.
template <class In, class Work>
void run_tiles(int64_t tasks, int64_t arena_size, Work work) {
  if (tasks == 0) return;
  struct alignas(64) CacheLine {
    char bytes[64];
  };
  using T = Acc<In>;
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t lines = (arena_size * sizeof(T) + sizeof(CacheLine) - 1) / sizeof(CacheLine);
  std::vector<CacheLine> memory(workers * lines);  // here, because a thread of the pool must not throw
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t task; (task = next++) < tasks;) {
      Arena<T> arena(reinterpret_cast<T*>(memory.data() + worker * lines));
      work(task, arena);
    }
  });
}

template <class In>
void forward(const TwoSimplicialAttention& p, Tensor& out, Tensor& lse) {
  const std::vector<int64_t> starts = starts_of(p);
  Problem<In> problem = make_problem<In>(p, starts);
  problem.out = mutable_rows<In>(out);
  problem.lse = static_cast<Acc<In>*>(lse.mutable_data_ptr());
  const Tiling tiling(p);
  const auto tile = tile_functions<In>().forward;
  run_tiles<In>(tiling.tasks(), arena_size(problem, tiling, tile),
                [&](int64_t task, Arena<Acc<In>>& arena) { tile(problem, tiling[task], arena); });
}

// Adds rows of one head, padded, to a [Nk, Hkv, D] gradient.
template <class T>
void add_rows(int64_t begin, int64_t count, const T* from, int64_t D, int64_t length_stride, T* to) {
  for (int64_t j = 0; j < count; ++j) {
    const T* __restrict x = from + j * cpu::padded(D);
    T* __restrict sum = to + (begin + j) * length_stride;
    for (int64_t d = 0; d < D; ++d) sum[d] += x[d];
  }
}

// Neighbouring tiles add to the same keys. Each keeps its share to itself and adds it when its predecessor has done so:
// the result is the same for any number of threads, and memory does not grow with the number of tiles. A thread never
// waits for a task that nobody has begun, since tasks are taken in ascending order.
template <class In>
void backward(const TwoSimplicialAttention& p, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
              const Tensor& lse, TwoSimplicialGrads& grads) {
  using T = Acc<In>;
  const std::vector<int64_t> starts = starts_of(p);
  Problem<In> problem = make_problem<In>(p, starts);
  problem.grad_out = rows<In>(grad_out);
  problem.saved_lse = static_cast<const T*>(lse.const_data_ptr());
  problem.grad_lse = grad_lse ? static_cast<const T*>(grad_lse->const_data_ptr()) : nullptr;
  problem.grad_q = mutable_rows<In>(grads.q);

  const bool swap = p.w1 > p.w2;
  const std::array<Tensor*, 4> targets = {swap ? &grads.k2 : &grads.k1, swap ? &grads.v2 : &grads.v1,
                                          swap ? &grads.k1 : &grads.k2, swap ? &grads.v1 : &grads.v2};
  const int64_t numel = p.B * p.Nk * p.Hkv * p.D, length_stride = p.Hkv * p.D, batch_stride = p.Nk * length_stride;
  // bf16 gradients are summed in fp32 and rounded once.
  constexpr bool kSumInPlace = std::is_same_v<In, T>;
  std::vector<T> sums(kSumInPlace ? 0 : 4 * numel);
  std::array<T*, 4> sum;
  for (int i = 0; i < 4; ++i) {
    sum[i] = kSumInPlace ? static_cast<T*>(targets[i]->mutable_data_ptr()) : sums.data() + i * numel;
    std::fill(sum[i], sum[i] + numel, T(0));
  }

  const Tiling tiling(p);
  const auto tile = tile_functions<In>().backward;
  std::vector<std::atomic<int64_t>> added(tiling.heads);
  for (auto& count : added) count = 0;
  run_tiles<In>(tiling.tasks(), arena_size(problem, tiling, tile), [&](int64_t task, Arena<T>& arena) {
    const Tile t = tiling[task];
    const KeyGrads<T> share = tile(problem, t, arena);
    std::atomic<int64_t>& turn = added[task % tiling.heads];
    while (turn.load(std::memory_order_acquire) != task / tiling.heads) std::this_thread::yield();
    const int64_t offset = t.batch * batch_stride + t.kv_head * p.D;
    add_rows(share.short_begin, share.short_count, share.k_short, p.D, length_stride, sum[0] + offset);
    add_rows(share.short_begin, share.short_count, share.v_short, p.D, length_stride, sum[1] + offset);
    add_rows(share.long_begin, share.long_count, share.k_long, p.D, length_stride, sum[2] + offset);
    add_rows(share.long_begin, share.long_count, share.v_long, p.D, length_stride, sum[3] + offset);
    turn.store(task / tiling.heads + 1, std::memory_order_release);
  });

  if constexpr (!kSumInPlace)
    for (int i = 0; i < 4; ++i) {
      In* const to = static_cast<In*>(targets[i]->mutable_data_ptr());
      torch::stable::parallel_for(0, numel, 1 << 15, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) to[j] = In(sum[i][j]);
      });
    }
}

// Calls f with a value of the element type of t.
template <class F>
void dispatch(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "two_simplicial_attention: expected q to be float32, float64 or bfloat16 on cpu, got ",
                      t.scalar_type());
  }
}

}  // namespace

void forward_cpu(const TwoSimplicialAttention& p, Tensor& out, Tensor& lse) {
  dispatch(p.q, [&](auto element) { forward<decltype(element)>(p, out, lse); });
}

void backward_cpu(const TwoSimplicialAttention& p, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                  const Tensor& /*out*/, const Tensor& lse, TwoSimplicialGrads& grads) {
  dispatch(p.q, [&](auto element) { backward<decltype(element)>(p, grad_out, grad_lse, lse, grads); });
}

}  // namespace simplex
