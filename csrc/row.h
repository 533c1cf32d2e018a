// The statistics of one row and their numerics, for host and device.
//
// A row of logits x is seen as two parts, the label y and the rest. The rest has its own maximum, so
// that it keeps its precision beside a label that holds all the probability, and log(1 - p_y) is a
// difference of log-sum-exps, never 1 - p_y. A row without a label is all rest.
//
// R is the type of the row's scalars: double on the host, float on the device.
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define KDFUSE_HD static __host__ __device__ __forceinline__
#else
// static: each instruction-set level compiles its own copy, none may leak into another.
#define KDFUSE_HD static inline
#endif

namespace kdfuse {

template <class R>
struct Stats {
  R peak;  // max of x_j over j != y; where all of them are -inf the label, or 0
  R sum;  // sum over j != y of exp((x_j - peak) / T)
  R sum1;  // the same at T = 1, where a loss asks for it
  R label;  // x_y; -inf without a label
};

// A row's softmax at temperature T, split into the label and the rest.
template <class R>
struct Split {
  R lse;  // log sum over all j of exp(x_j / T)
  R label;  // p_y
  R rest;  // 1 - p_y
  R log_label;  // log p_y
  R unit;  // p_j = unit * exp((x_j - peak) / T)
};

// One exponential and one logarithm, relative to the larger of the label and the rest's peak.
template <class R>
KDFUSE_HD Split<R> split_at(R peak, R sum, R label) {
  const R gap = label - peak;
  if (gap > R(0)) {
    const R unit = std::exp(-gap), others = sum * unit, total = R(1) + others, log_total = std::log1p(others);
    return {label + log_total, R(1) / total, others / total, -log_total, unit / total};
  }
  const R w = std::exp(gap), total = sum + w, log_total = std::log(total);
  return {peak + log_total, w / total, sum / total, gap - log_total, R(1) / total};
}

template <class R>
KDFUSE_HD Split<R> split(const Stats<R>& x, R temperature) {
  return split_at(x.peak / temperature, x.sum, x.label / temperature);
}

template <class R>
KDFUSE_HD Split<R> split1(const Stats<R>& x) {
  return split_at(x.peak, x.sum1, x.label);
}

// log sum over j != y of exp(x_j / T).
template <class R>
KDFUSE_HD R lse_rest(const Stats<R>& x, R temperature) {
  return x.peak / temperature + std::log(x.sum);
}

// weight * x, where a weight of 0 gives exactly 0 whatever x is.
template <class R>
KDFUSE_HD R gated(R weight, R x) {
  return weight == R(0) ? R(0) : weight * x;
}

// KL(q || p) of teacher t and student z at one temperature: its value, and the coefficients of
// T * d KL / d z_j = a e_z - b e_t, with e the exponentials relative to the peak of the rest.
template <class R>
struct Kl {
  R value;
  R a, b;
  R label;  // the same derivative at the label
  R drift;  // D, the sum over all j of q_j (t_j - z_j) / T
};

// rest: D', the sum over j != y of q'_j (t_j - z_j) / T with q' the teacher's softmax of the rest.
template <class R>
KDFUSE_HD Kl<R> kl(const Split<R>& z, const Split<R>& t, R z_label, R t_label, R rest, R temperature) {
  const R drift = gated(t.rest, rest) + gated(t.label, (t_label - z_label) / temperature);
  return {drift + (z.lse - t.lse), z.unit, t.unit, z.label - t.label, drift};
}

// The same over j != y alone (the NCKD of DKD). Without any teacher mass outside the label it is 0.
template <class R>
KDFUSE_HD Kl<R> kl_rest(const Stats<R>& z, const Stats<R>& t, R rest, R temperature) {
  if (t.sum == R(0)) return {R(0), R(0), R(0), R(0), R(0)};
  // No student mass where the teacher has some: infinite, though rest + lse would be inf - inf.
  if (z.sum == R(0)) return {R(INFINITY), R(0), R(1) / t.sum, R(0), rest};
  return {rest + (lse_rest(z, temperature) - lse_rest(t, temperature)), R(1) / z.sum, R(1) / t.sum, R(0), rest};
}

// Cross-entropy at T = 1 against a hard label (mass = 1, dot = z_y) or class probabilities
// (mass = sum_j y_j, dot = sum_j y_j z_j).
template <class R>
KDFUSE_HD R cross_entropy(const Split<R>& z, R mass, R dot) {
  return gated(mass, z.lse) - dot;
}

}  // namespace kdfuse
