// Grassmann mixing (arXiv 2512.19428): the checked front end that plucker_mean and grassmann_mix share.
#pragma once

#include <vector>

#include "kernel.h"
#include "op.h"

namespace simplex {

// Below this sine of the angle between two tokens their plane is rounding noise: the pair contributes 0, but counts.
constexpr double kSmallestSine = 1e-6;
constexpr int64_t kMaxRank = 128;
constexpr int64_t kBlockColumns = 64;  // tokens of a block of the matrices that the token kernels share, on CUDA

struct PluckerMean {
  Tensor z;                      // packed() [B, L, r]
  std::optional<Tensor> valid;   // packed() [B, L] bool
  std::optional<Tensor> starts;  // packed() cu_seqlens, [S + 1] int32: no pair crosses a sequence's start; B is 1
  std::vector<int64_t> offsets;  // those below L, in the caller's order: no other pairs anything
  int64_t B, L, r;
  ScalarType dtype;
  int64_t history = 0;  // so many first tokens of each row are only seen; the forward pass has no output for them

  int64_t tokens() const { return B * L; }
  int64_t outputs() const { return B * (L - history); }
  // Those packed into the one row of z, 0 if z is not packed.
  int64_t sequences() const { return starts ? starts->size(0) - 1 : 0; }
  int64_t planes() const { return r * (r - 1) / 2; }
};

PluckerMean checked_plucker_mean(const char* op, const Tensor& z, const std::vector<int64_t>& offsets,
                                 const std::optional<Tensor>& valid, const std::optional<Tensor>& cu_seqlens);

// On CUDA, what both passes begin with; nothing on the CPU, which goes token by token.
struct PluckerFrames {
  Tensor z;                       // [B, L, width], width: r padded with zeros to a multiple of 8
  std::optional<Tensor> offsets;  // int32, if they are too many to be arguments of a kernel
  std::optional<Tensor> frame;    // fp32 [blocks, 2 rows + 2, 64], triton_kernels/plucker_mean.py says of what
  std::optional<Tensor> pairs;    // fp32 [blocks, 3 offsets, 64], for a backward pass
  std::optional<Tensor> seen;     // as in MeanPlucker
};

// A kernel that in its first programs does what the system's own does, and has `count` more, for which `args` are.
struct MorePrograms {
  const Kernel* kernel = nullptr;
  unsigned count = 0;
  std::vector<Arg> args = {};
};

// Such a matrix.
Tensor empty_columns(const PluckerMean& p, int64_t num_rows);

PluckerFrames plucker_frames(const PluckerMean& p, bool for_backward, const MorePrograms& more = {});

// What depends on the planes is a matrix [outputs, P] that lies in memory as the kernels walk it: token after token on
// the CPU; plane after plane on CUDA, where matrix products take either.
Tensor empty_planes(const PluckerMean& p);

struct MeanPlucker {
  Tensor pbar;  // as empty_planes() is
  Tensor seen;  // [outputs, 1] of z's dtype: 1 where N_t > 0, 0 elsewhere
};

MeanPlucker plucker_mean_forward(const PluckerMean& p, const PluckerFrames& frames);
// grad_pbar: as empty_planes() is. grad_z: [tokens, r], a matrix of any row stride, written whole.
void plucker_mean_backward(const PluckerMean& p, const PluckerFrames& frames, const Tensor& grad_pbar,
                           const Tensor& grad_z);
// The second half of it on CUDA, from `turn`, fp32 [blocks, 2 rows, 64] (triton_kernels/plucker_mean.py says what it
// is).
void plucker_mean_backward_token(const PluckerMean& p, const PluckerFrames& frames, const Tensor& turn,
                                 const Tensor& grad_z, const MorePrograms& more = {});

// The same on the CPU (plucker_mean_cpu.cpp).
void plucker_mean_forward_cpu(const PluckerMean& p, Tensor& pbar, Tensor& seen);
void plucker_mean_backward_cpu(const PluckerMean& p, const Tensor& grad_pbar, const Tensor& grad_z);

}  // namespace simplex
