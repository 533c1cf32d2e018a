// The statistics of one row and their numerics, for host and device.
//
// A row of logits x is seen as two parts, the label y and the rest. The rest has its own maximum, so
// that it keeps its precision beside a label that holds all the probability, and log(1 - p_y) is a
// difference of log-sum-exps, never 1 - p_y. A row without a label is all rest.
//
// R is the type of the row's scalars: double on the host, float on the device. N, in losses/<op>.h, is
// the type in which an op's params come.
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define KDFUSE_HD static __host__ __device__ __forceinline__
#define KDFUSE_MEMBER __host__ __device__ __forceinline__
#define KDFUSE_DEVICE static __device__ __forceinline__
#define KDFUSE_DEVICE_CALL static __device__ __noinline__
#define KDFUSE_DEVICE_MEMBER __device__ __forceinline__
#else
// static: each instruction-set level compiles its own copy, none may leak into another.
#define KDFUSE_HD static inline
#define KDFUSE_MEMBER inline
#define KDFUSE_DEVICE static inline
#define KDFUSE_DEVICE_CALL static inline
#define KDFUSE_DEVICE_MEMBER inline
#endif

namespace kdfuse {

// What one read of logits x gives at one temperature. Nothing here stands for the logits themselves:
// their exponents u_j = x_j / T - shift are relative to a shift of about the rest's maximum, so that
// logits around 1e4 keep the precision of those around 0. e_j = exp(u_j).
template <class R>
struct Stats {
  R sum;  // of e_j over j != y
  R label;  // u_y; -inf without a label
};

// A row's softmax, split into the label and the rest.
template <class R>
struct Split {
  R lse;  // log sum over all j of e_j
  R label;  // p_y
  R rest;  // 1 - p_y
  R log_label;  // log p_y
  R unit;  // p_j = unit * e_j
};

// One exponential, one logarithm and one division, relative to the larger of the label and the rest's
// maximum: total = 1 + more, where more is never the small difference of large numbers.
template <class R>
KDFUSE_HD Split<R> split(const Stats<R>& x) {
  const bool above = x.label > R(0);
  const R small = std::exp(above ? -x.label : x.label), others = above ? x.sum * small : x.sum;
  const R more = above ? others : (x.sum - R(1)) + small, scale = R(1) / (R(1) + more);
  const R log_total = std::log1p(more);
  // A label at +inf gives NaN.
  return {above ? x.label + log_total : log_total, above ? scale : small * scale, others * scale,
          above ? (x.label - x.label) - log_total : x.label - log_total, above ? small * scale : scale};
}

// log sum over j != y of e_j.
template <class R>
KDFUSE_HD R lse_rest(const Stats<R>& x) {
  return std::log(x.sum);
}

// weight * x, where a weight of 0 gives exactly 0 whatever x is.
template <class R>
KDFUSE_HD R gated(R weight, R x) {
  return weight == R(0) ? R(0) : weight * x;
}

// KL(q || p) of teacher t and student z at one temperature: its value, and the coefficients of
// T * d KL / d z_j = a e_z - b e_t.
template <class R>
struct Kl {
  R value;
  R a, b;
  R label;  // the same derivative at the label
  R drift;  // D, the sum over all j of q_j (u_t,j - u_z,j)
};

// crossed: the sum over j != y of e_t,j (u_t,j - u_z,j).
template <class R>
KDFUSE_HD Kl<R> kl(const Stats<R>& zs, const Split<R>& z, const Stats<R>& ts, const Split<R>& t, R crossed) {
  const R drift = gated(t.unit, crossed) + gated(t.label, ts.label - zs.label);
  return {drift + (z.lse - t.lse), z.unit, t.unit, z.label - t.label, drift};
}

// Its gradient under a weight, of which 0 leaves it out whatever it is; its value as it was.
template <class R>
KDFUSE_HD Kl<R> gated(R weight, const Kl<R>& x) {
  return {x.value, gated(weight, x.a), gated(weight, x.b), gated(weight, x.label), x.drift};
}

// The same over j != y alone (the NCKD of DKD). Without any teacher mass outside the label it is 0.
template <class R>
KDFUSE_HD Kl<R> kl_rest(const Stats<R>& z, const Stats<R>& t, R crossed) {
  if (t.sum == R(0)) return {R(0), R(0), R(0), R(0), R(0)};
  const R b = R(1) / t.sum, drift = crossed * b;
  // No student mass where the teacher has some: infinite, though drift + lse would be inf - inf.
  if (z.sum == R(0)) return {R(INFINITY), R(0), b, R(0), drift};
  return {drift + (lse_rest(z) - lse_rest(t)), R(1) / z.sum, b, R(0), drift};
}

// Cross-entropy at T = 1 against a hard label (mass = 1, dot = u_y) or class probabilities
// (mass = sum_j y_j, dot = sum_j y_j u_j).
template <class R>
KDFUSE_HD R cross_entropy(const Split<R>& z, R mass, R dot) {
  return gated(mass, z.lse) - dot;
}

}  // namespace kdfuse
