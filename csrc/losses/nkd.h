// Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation":
//   loss = -V_y log S_y - gamma * square * sum_{j != y} V'_j log S'_j + ce_weight * CE
// with V_y and S_y at T = 1 and the softmaxes V', S' of the rest at temperature T. The second term
// is a cross-entropy: the teacher's entropy stays in.
#pragma once
#include "../row.h"

namespace kdfuse {

struct NkdParams {
  double temperature, square, gamma, ce_weight;

  explicit NkdParams(const double* p) : temperature(p[0]), square(p[1]), gamma(p[2]), ce_weight(p[3]) {}
};

template <class R>
struct NkdRow {
  R target, others;  // -V_y log S_y; square * cross-entropy of the rest
  R weight;  // V_y: joins the coefficient of softmax at T = 1
  R a, b;
};

// expected: Q', the sum over j != y of V'_j z_j / T.
template <class R>
KDFUSE_HD NkdRow<R> nkd(const NkdParams& p, const Stats<R>& z, const Split<R>& z1, const Stats<R>& t,
                        const Split<R>& t1, R expected) {
  const R weight = t1.label;
  const R step = R(p.gamma * p.square / p.temperature);
  const R target = gated(weight, -z1.log_label);
  if (t.sum == R(0)) return {target, R(0), weight, R(0), R(0)};
  if (z.sum == R(0)) return {target, R(INFINITY), weight, R(0), -step / t.sum};
  return {target, R(p.square) * (lse_rest(z, R(p.temperature)) - expected), weight, step / z.sum, -step / t.sum};
}

}  // namespace kdfuse
