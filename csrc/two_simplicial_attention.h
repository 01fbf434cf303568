// 2-simplicial attention (arXiv 2507.02754): one checked problem, shared by the CPU and CUDA implementations.
#pragma once

#include "op.h"

namespace simplex {

// q [B, Nq, Hq, D]; k1, k2, v1, v2 [B, Nk, Hkv, D]; every tensor obeys aligned(): last dim contiguous, other dims
// strided. Query row n sits at absolute position n + Nk - Nq; query head h reads kv head h / (Hq / Hkv).
struct TwoSimplicialAttention {
  Tensor q, k1, k2, v1, v2;
  int64_t B, Nq, Nk, Hq, Hkv, D;
  int64_t w1, w2;  // >= 1; clamped to Nk, so that i - w cannot overflow
  double scale;
  ScalarType dtype;
  std::optional<Tensor> cu_seqlens;  // packed(), [S + 1] int32: no pair crosses a sequence's start; B is 1, Nq is Nk

  int64_t group() const { return Hq / Hkv; }
};

// out: contiguous [B, Nq, Hq, D] of q's dtype; lse: contiguous [B, Hq, Nq], fp32 (fp64 for fp64 inputs). Both are
// written whole.
void forward_cpu(const TwoSimplicialAttention& p, Tensor& out, Tensor& lse);
void forward_cuda(const TwoSimplicialAttention& p, Tensor& out, Tensor& lse);

struct TwoSimplicialGrads {
  Tensor q, k1, k2, v1, v2;  // contiguous, of the inputs' shapes and dtype; written whole
};

// grad_out [B, Nq, Hq, D] aligned(); out and lse as the forward returned them (contiguous); grad_lse contiguous [B, Hq,
// Nq] or none.
void backward_cpu(const TwoSimplicialAttention& p, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                  const Tensor& out, const Tensor& lse, TwoSimplicialGrads& grads);
void backward_cuda(const TwoSimplicialAttention& p, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                   const Tensor& out, const Tensor& lse, TwoSimplicialGrads& grads);

}  // namespace simplex
