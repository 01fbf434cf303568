// Grassmann mixing (arXiv 2512.19428): what grassmann_mix and grassmann_step, its decoding form, share.
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

}  // namespace simplex
