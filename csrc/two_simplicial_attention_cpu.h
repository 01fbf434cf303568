// What the CPU driver of 2-simplicial attention hands to the code that computes one tile; no torch, no instruction set.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace simplex::cpu {

// Sums run in fp32, or in fp64 for fp64 inputs.
template <class In>
using Acc = std::conditional_t<std::is_same_v<In, double>, double, float>;

// A [batch, length, heads, head_dim] tensor whose last dimension is contiguous.
template <class T>
struct Rows {
  T* data;
  int64_t batch_stride, length_stride, head_stride;

  T* operator()(int64_t batch, int64_t n, int64_t head) const {
    return data + batch * batch_stride + n * length_stride + head * head_stride;
  }
};

// The trilinear form is symmetric under (k1, v1, w1) <-> (k2, v2, w2), so the axes are named by what the code does with
// them: the keys of the short window multiply the query elementwise, those of the long window enter the matrix
// products.
template <class In>
struct Problem {
  using T = Acc<In>;
  Rows<const In> q, k_short, v_short, k_long, v_long;
  int64_t Nq, Nk, Hq, D, group;
  int64_t w_short, w_long;
  double scale;
  const int64_t* starts;  // of packed sequences: the first position of each position's own; or null
  int64_t start(int64_t position) const { return starts ? starts[position] : 0; }

  Rows<In> out;             // forward: written
  T* lse;                   // forward: written, [B, Hq, Nq]
  Rows<const In> grad_out;  // backward: read, as the next two
  const T* saved_lse;
  const T* grad_lse;  // or null
  Rows<In> grad_q;    // backward: written
};

// Consecutive queries of the heads that share one kv head: the unit of work of one thread.
struct Tile {
  int64_t batch, kv_head, first_query, queries;
};

// What a tile adds to the gradients of keys and values: rows [short_begin, short_begin + short_count) and likewise
// long.
template <class T>
struct KeyGrads {
  int64_t short_begin, short_count, long_begin, long_count;
  T *k_short, *v_short, *k_long, *v_long;  // rows of padded(D) elements
};

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Row length of every private buffer: a whole number of the longest vectors, fp32.
inline int64_t padded(int64_t D) { return round_up(D, 16); }

// Hands out a thread's buffers one after another; without memory it only counts, which is how the memory is sized.
template <class T>
class Arena {
 public:
  explicit Arena(T* memory = nullptr) : memory_(memory) {}
  T* take(int64_t count) {
    T* const p = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count, 16);
    return p;
  }
  template <class U>
  U* take_as(int64_t count) {
    return reinterpret_cast<U*>(take(round_up(count * sizeof(U), sizeof(T)) / sizeof(T)));
  }
  int64_t used() const { return used_; }

 private:
  T* memory_;
  int64_t used_ = 0;
};

}  // namespace simplex::cpu
