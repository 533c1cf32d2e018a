// SLKD: a student z and K self-learning teachers s_k (SL-Ts), trained together under a teacher t.
//   student = (ce_weight + fused_ce_weight) CE(z) + kd_weight KL(t || z) + fused_kd_weight KL(f || z)
//   SL-T k  = ce_weight CE(s_k) + kd_weight KL(t || s_k)
// with f = sum_k fusion_k s_k and every KL times `square` (T^2, or 1). Where the SL-Ts are not
// detached the student's KL(f || z) reaches them as well:
//   d KL(f || z) / d s_kj = fusion_k / T * p^f_j * ((f_j - z_j) / T - D)
#pragma once
#include "../core/stats.h"

namespace kdfuse {

template <class N>
struct SlkdParams {
  N temperature, square, kd_weight, ce_weight, fused_kd_weight, fused_ce_weight;
  bool detach;
  const N* fusion;  // K fusion weights follow in the op's list

  KDFUSE_MEMBER explicit SlkdParams(const N* p)
      : temperature(p[0]),
        square(p[1]),
        kd_weight(p[2]),
        ce_weight(p[3]),
        fused_kd_weight(p[4]),
        fused_ce_weight(p[5]),
        detach(p[6] != 0),
        fusion(p + 7) {}
};

}  // namespace kdfuse
