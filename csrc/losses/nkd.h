// Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation":
//   loss = -V_y log S_y - gamma * square * sum_{j != y} V'_j log S'_j + ce_weight * CE
// with V_y and S_y at T = 1 and the softmaxes V', S' of the rest at temperature T. The second term
// is a cross-entropy: the teacher's entropy stays in.
#pragma once
#include "../core/stats.h"

namespace kdfuse {

template <class N>
struct NkdParams {
  N temperature, square, gamma, ce_weight;

  KDFUSE_MEMBER explicit NkdParams(const N* p) : temperature(p[0]), square(p[1]), gamma(p[2]), ce_weight(p[3]) {}
};

template <class R>
struct NkdRow {
  R target, others;  // -V_y log S_y; square * cross-entropy of the rest
  R weight;  // V_y: joins the coefficient of softmax at T = 1
  R a, b;
};

// weighted: the sum over j != y of e_t,j u_z,j; weight: V_y.
template <class R, class N>
KDFUSE_HD NkdRow<R> nkd(const NkdParams<N>& p, const Stats<R>& z, R log_label, const Stats<R>& t, R weight,
                        R weighted) {
  const R step = R(p.gamma) * R(p.square) / R(p.temperature);
  const R target = gated(weight, -log_label);
  if (t.sum == R(0)) return {target, R(0), weight, R(0), R(0)};
  const R b = R(1) / t.sum;
  if (z.sum == R(0)) return {target, R(INFINITY), weight, R(0), -step * b};
  return {target, R(p.square) * (lse_rest(z) - weighted * b), weight, step / z.sum, -step * b};
}

}  // namespace kdfuse
