// Grassmann mixing (arXiv 2512.19428): what grassmann_mix, grassmann_layer around it and
// grassmann_step, its decoding form, share.
#pragma once

#include "plucker_mean.h"

namespace simplex {

struct GrassmannMix {
  PluckerMean front;
  int64_t d;
};

GrassmannMix checked_grassmann_mix(const char* op, const Tensor& z, const Tensor& weight,
                                   const std::optional<Tensor>& bias, const std::vector<int64_t>& offsets,
                                   const std::optional<Tensor>& valid, const std::optional<Tensor>& cu_seqlens);

// g = W pbar + b [B, L - history, d], without b where nothing is paired unless bias_everywhere. empty: so many first
// outputs of each row are known to have no pair; negative if p.valid or p.starts leave that to be found out.
Tensor mixed(const PluckerMean& p, const Tensor& weight, const std::optional<Tensor>& bias, int64_t empty,
             bool bias_everywhere);

// The same of whole sequences.
Tensor mixed(const PluckerMean& p, const Tensor& weight, const std::optional<Tensor>& bias, bool bias_everywhere);

// With respect to weight and bias, and to z, which is written to grad_z [B * L, r], a matrix of any row stride.
// grad_g: packed() [B, L, d].
std::pair<Tensor, Tensor> mix_gradients(const PluckerMean& p, const Tensor& grad_g, const Tensor& weight,
                                        bool bias_everywhere, const Tensor& grad_z);

// The same two where kernels make pbar in registers (on Hopper, for some r, d and dtypes); nothing elsewhere. g and
// grad_g are matrices [tokens, d].
std::optional<Tensor> mixed_in_registers(const PluckerMean& p, const Tensor& weight, const std::optional<Tensor>& bias,
                                         bool bias_everywhere);
std::optional<std::pair<Tensor, Tensor>> gradients_in_registers(const PluckerMean& p, const Tensor& grad_g,
                                                                const Tensor& weight, bool bias_everywhere,
                                                                const Tensor& grad_z);

}  // namespace simplex
