// 2-simplicial attention on CUDA: one call's kernels. Which there are, and which of them serve the call;
// two_simplicial_attention_cuda.cpp launches them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <string_view>

#include "kernel.h"
#include "two_simplicial_attention.h"

namespace simplex {

inline const KernelFamily kSequenceBounds("sequence_bounds", {});
inline const KernelFamily kForward("two_simplicial_fwd", {"dtype", "HEAD_DIM", "SHARE"});
inline const KernelFamily kForwardScaled("two_simplicial_fwd_scaled", {"dtype", "HEAD_DIM", "BLOCK_N"});
inline const KernelFamily kForwardSkewed("two_simplicial_fwd_skewed", {"dtype", "HEAD_DIM"});
inline const KernelFamily kForwardDecode("two_simplicial_fwd_decode", {"dtype", "HEAD_DIM", "HEADS"});
inline const KernelFamily kForwardMerge("two_simplicial_fwd_merge", {"dtype", "HEAD_DIM"});
inline const KernelFamily kBackwardQScaled("two_simplicial_bwd_dq_scaled", {"dtype", "HEAD_DIM", "BLOCK_N"});
inline const KernelFamily kBackwardQSkewed("two_simplicial_bwd_dq_skewed", {"dtype", "HEAD_DIM"});
inline const KernelFamily kBackwardKVSkewed("two_simplicial_bwd_dkv_skewed", {"dtype", "HEAD_DIM"});
inline const KernelFamily kBackwardKVScaled("two_simplicial_bwd_dkv_scaled", {"dtype", "HEAD_DIM", "BLOCK_N"});
inline const KernelFamily kBackwardQ("two_simplicial_bwd_dq", {"dtype", "HEAD_DIM", "SHARE"});
inline const KernelFamily kBackwardMerge("two_simplicial_bwd_merge", {"dtype", "HEAD_DIM"});
inline const KernelFamily kBackwardSum("two_simplicial_bwd_sum", {"dtype", "HEAD_DIM"});
inline const KernelFamily kBackwardKV("two_simplicial_bwd_dkv", {"dtype", "HEAD_DIM"});

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The axes by what the kernels do with them: the shorter window's is walked by offset, the other's by tiles.
struct Axes {
  const Tensor &k_long, &v_long, &k_short, &v_short;
  int64_t w_long, w_short;

  explicit Axes(const TwoSimplicialAttention& p)
      : Axes(p.w1 >= p.w2 ? Axes{p.k1, p.v1, p.k2, p.v2, p.w1, p.w2} : Axes{p.k2, p.v2, p.k1, p.v1, p.w2, p.w1}) {}

 private:
  Axes(const Tensor& kl, const Tensor& vl, const Tensor& ks, const Tensor& vs, int64_t wl, int64_t ws)
      : k_long(kl), v_long(vl), k_short(ks), v_short(vs), w_long(wl), w_short(ws) {}
};

constexpr int64_t kResident = 128;        // programs that run at a time on Hopper, where a multiprocessor holds one
constexpr int64_t kFreeBytes = 64 << 20;  // of partial sums, at any size of the arguments
constexpr int64_t kMostRowsPerToken = 8;  // of partial sums beyond that, in a chunk of rows: w_short / its tokens

// One call's device, stream and key. No device guard: launch() makes the device's context current, allocations name it.
struct Launch {
  const TwoSimplicialAttention& p;
  Axes axes;
  int device;
  void* stream;
  int64_t dtype, head_dim;
  int64_t rows;                  // of one kv head
  std::optional<Tensor> bounds;  // [2, Nk] of packed sequences: triton_kernels/sequence_bounds.py

  Launch(const char* op, const TwoSimplicialAttention& p)
      : p(p),
        axes(p),
        device(p.q.get_device_index()),
        stream(current_cuda_stream(device)),
        dtype(dtype_constant(p.q)),
        head_dim(32),
        rows(p.Nq * p.group()) {
    while (head_dim < p.D) head_dim *= 2;
    // The kernels count rows and positions in 32 bits (elements in 64).
    SIMPLEX_EXPECT(rows < (int64_t{1} << 31) - 256, op, "length * heads of q / heads of k1 to be below 2^31, got ",
                   rows);
    SIMPLEX_EXPECT(p.Nk < int64_t{1} << 30, op, "the length of k1 to be below 2^30, got ", p.Nk);
    if (p.cu_seqlens) find_bounds();
  }

  // The variant whose runs of rows with one token are longest, of those that the group consists of.
  const Kernel& select(const KernelFamily& family) const {
    for (int64_t share : {64, 8}) {
      const Kernel* kernel = p.group() % share == 0 ? family.find_if(device, {dtype, head_dim, share}) : nullptr;
      if (kernel) return *kernel;
    }
    return family.find(device, {dtype, head_dim, 1});
  }

  // The kernels with scaled tiles (triton_kernels/two_simplicial_scaled*.py), both passes or none: S is rounded
  // elsewhere in the others, and a backward pass that differs from its forward in that takes the difference for a
  // gradient. The backward pass has work to do once per short key, which many rows must share, and leaves partial sums
  // of the short gradients for each block of long keys, at most as large as all arguments and gradients (those of the
  // long ones are not larger, or 268 MB).
  bool scales() const {
    constexpr int64_t kRowsPerShortKey = 128;
    const int64_t block_n = scaled_keys();
    const Kernel* kernel = portable_only() ? nullptr : kBackwardKVScaled.find_if(device, {dtype, head_dim, block_n});
    if (!kernel || axes.w_short * p.group() < kRowsPerShortKey || decode()) return false;
    if (p.group() % 8 || skewed_tiles_win()) return false;  // its copies are of 8 heads
    const bool counts_fit = (p.Nq + axes.w_long) * p.group() < int64_t{1} << 31;
    return counts_fit && short_parts_fit(block_n);
  }
  // The 64 rows of a warpgroup are of `tokens` tokens. Scaled, it walks the short keys that any of them sees; skewed, a
  // row's own, but whole tiles of long keys. Skewed tiles win up to 16/15 of the scaled ones' pairs
  // (docs/kernel_trials.md).
  bool skewed_tiles_win() const {
    const int64_t tokens = ceil_div(64, p.group());
    const int64_t scaled = axes.w_long * (axes.w_short + tokens - 1);
    const int64_t skewed = 64 * ceil_div(axes.w_long + 2 * tokens - 1, 64) * axes.w_short;
    return tokens > 1 && skewed_dq() && 16 * scaled > 15 * skewed;
  }
  // Long keys of a scaled tile: a block of two tokens sees one more than the window holds.
  int64_t scaled_tile() const { return axes.w_long <= 32 ? 32 : 64; }
  // Long keys of a tile of dkv, whose 64 lines are these with 64 / block_n short keys. It meets every row that sees any
  // of its pairs, so a row meets (w_long + block_n) * (w_short + 64 / block_n): the least is fastest (docs/kernels.md).
  int64_t scaled_keys() const {
    const auto met = [&](int64_t n) { return (axes.w_long + n) * (axes.w_short + 64 / n); };
    const int64_t most = met(32) <= met(64) && short_parts_fit(32) ? 32 : 64;
    return met(16) < met(most) && short_parts_fit(16) ? 16 : most;
  }
  bool short_parts_fit(int64_t block_n) const {
    const int64_t partial_rows = ceil_div(p.Nk, block_n) * short_rows(block_n) * p.B * p.Hkv;
    const int64_t bytes_of_all = 2 * (4 * p.q.numel() + 8 * p.k1.numel());
    return int64_t{2 * sizeof(float)} * partial_rows * p.D <= kFreeBytes + bytes_of_all;
  }
  // Short keys that share a row with a block of long keys.
  int64_t short_rows(int64_t block_n) const { return block_n + axes.w_long + axes.w_short - 2; }

  // How two_simplicial_fwd_decode spreads the pairs of a row: over `parts`, each of `share` long keys.
  struct Decode {
    const Kernel& kernel;
    int64_t parts, share;
  };
  // For queries so few, next to their keys, that blocks of rows would leave most of the GPU or of their tiles idle. Its
  // time grows with the rows, that of the others with the waves of their blocks.
  std::optional<Decode> decode() const {
    const int64_t all_rows = rows * p.B * p.Hkv;
    const int64_t waves = ceil_div(ceil_div(rows, 128) * p.B * p.Hkv, kResident);
    const int64_t heads = p.group() % 4 ? 1 : 4;
    if (portable_only() || 4 * p.Nq > p.Nk || all_rows > (heads == 4 ? 40 : 25) * kResident * waves) return {};
    const Kernel* kernel = kForwardDecode.find_if(device, {dtype, std::max<int64_t>(head_dim, 64), heads});
    if (!kernel) return {};
    const int64_t block_n = (*kernel)["BLOCK_N"];
    const int64_t chunks = ceil_div(axes.w_short, (*kernel)["OFFSETS"]);
    const int64_t tiles = ceil_div(axes.w_long, block_n);
    const int64_t splits = std::clamp<int64_t>(2 * kResident * heads / (all_rows * chunks), 1, tiles);
    const int64_t share = ceil_div(tiles, splits) * block_n;
    const int64_t parts = chunks * ceil_div(axes.w_long, share);
    if (parts > 1 && all_rows * parts * p.D * int64_t{sizeof(float)} > kFreeBytes) return {};
    return Decode{*kernel, parts, share};
  }

  // Hopper has kernels for fewer heads, too (two_simplicial_skewed*.py), which round as the portable ones.
  const Kernel& forward() const {
    if (scales()) return kForwardScaled.find(device, {dtype, head_dim, scaled_tile()});
    const Kernel* skewed = skewed_kernel(kForwardSkewed);
    return skewed ? *skewed : select(kForward);
  }
  // Null where its partial rows of the short gradients, w_short and more for each 64 rows, would be too many.
  const Kernel* skewed_dq() const {
    const int64_t partial_bytes = 2 * sizeof(float) * ceil_div(rows, 64) * chunk_span(64) * p.B * p.Hkv * p.D;
    const bool fits = partial_bytes <= kFreeBytes || axes.w_short * p.group() <= kMostRowsPerToken * 64;
    return fits ? skewed_kernel(kBackwardQSkewed) : nullptr;
  }
  // A step of the skewed one is of 64 / BLOCK_M offsets, of which at most a third may lie past the window.
  const Kernel& dkv() const {
    const Kernel* skewed = skewed_kernel(kBackwardKVSkewed);
    const int64_t offsets = skewed ? 64 / (*skewed)["BLOCK_M"] : 1;
    const bool fits = 2 * ceil_div(axes.w_short, offsets) * offsets <= 3 * axes.w_short;
    return skewed && fits ? *skewed : kBackwardKV.find(device, {dtype, head_dim});
  }
  // Short keys that a chunk of rows sees.
  int64_t chunk_span(int64_t chunk_rows) const { return ceil_div(chunk_rows, p.group()) + axes.w_short; }

  std::array<unsigned, 3> grid(int64_t programs_per_head) const {
    const int64_t programs = programs_per_head * p.B * p.Hkv;
    SIMPLEX_EXPECT(programs < int64_t{1} << 31, "two_simplicial_attention",
                   "fewer than 2^31 programs of a CUDA grid, got ", programs);
    return {static_cast<unsigned>(programs), 1, 1};
  }

 private:
  void find_bounds() {
    const Kernel& kernel = kSequenceBounds.find(device, {});
    const auto num_tokens = static_cast<int32_t>(p.Nk), num_sequences = static_cast<int32_t>(p.cu_seqlens->numel() - 1);
    int32_t search_steps = 0;
    while (int64_t{1} << search_steps < num_sequences) ++search_steps;
    bounds = empty_like_device(p.q, {2, p.Nk}, ScalarType::Int);
    simplex::launch(kernel, device, stream, {static_cast<unsigned>(ceil_div(p.Nk, kernel["BLOCK"])), 1, 1},
                    {{"cu_seqlens_ptr", p.cu_seqlens->const_data_ptr()},
                     {"bounds_ptr", bounds->const_data_ptr()},
                     {"num_tokens", num_tokens},
                     {"num_sequences", num_sequences},
                     {"search_steps", search_steps}});
  }
  const Kernel* skewed_kernel(const KernelFamily& family) const {
    return portable_only() ? nullptr : family.find_if(device, {dtype, head_dim});
  }
  // A reader's switch, not a tuning knob: SIMPLEX_KERNELS=portable is what the other kernels are compared with.
  static bool portable_only() {
    static const bool only = [] {
      const char* kernels = std::getenv("SIMPLEX_KERNELS");
      return kernels && std::string_view(kernels) == "portable";
    }();
    return only;
  }
};

}  // namespace simplex
