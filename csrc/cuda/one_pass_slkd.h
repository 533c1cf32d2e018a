// The rows of SLKD in registers: a student z, K self-learning teachers (SL-Ts) and a teacher t. All of
// them are read once; the student comes first, then each SL-T.
#pragma once
#include "../losses/slkd.h"
#include "aligned_row.h"

namespace kdfuse {

template <DType type, int K, int kChunks, class Team>
class ResidentSlkd : public FastRows<Shape<type, 1 + K, 1>, kChunks, Team> {
  using Base = FastRows<Shape<type, 1 + K, 1>, kChunks, Team>;
  using Base::p_, Base::stage_, Base::team_;
  using typename Base::Row;
  static constexpr int kTeacher = 1 + K;

 public:
  static constexpr bool kScored = false;

  KDFUSE_DEVICE_MEMBER ResidentSlkd(const Team& team, const FastTask& p) : Base(team, p), q_(p.params) {}

  KDFUSE_DEVICE_MEMBER void score(uint32_t, uint32_t) {}

  KDFUSE_DEVICE_MEMBER void begin() {
    this->send_for_label();
    join();
  }

  KDFUSE_DEVICE_MEMBER void run(uint32_t row, uint32_t ahead) {
    const Row at = this->open(row, ahead);
    if (at.skipped) {
      join();
      return this->leave_out(at);
    }
    const float label = fused([&](int k) { return at.label.values[k]; });
    // The label stands in where nothing else is finite.
    const float peak = peak_[0] != -INFINITY ? peak_[0] : label != -INFINITY ? label : 0.f;
    const Exponents of_t = at_t(at.peak[kTeacher]), of_f = at_t(peak), of_z = at_t(at.peak[0]);

    float sums[kSums] = {};
    exponentiate(at, of_t, of_f, of_z, sums);
    const Exponents of_z1 = exponents(kLog2e, at.peak[0]);
    const Stats<float> stats[4] = {{sums[kStudent], of_z.natural(at.label.values[0])},
                                   {sums[kOfTeacher], of_t.natural(at.label.values[kTeacher])},
                                   {sums[kFused], of_f.natural(label)},
                                   {sums[kStudent1], of_z1.natural(at.label.values[0])}};
    Split<float> of[4];
    split_all<4>(stats, of);
    const auto pair = kl(stats[0], of[0], stats[1], of[1], kLn2 * sums[kMixed]);
    const auto fused = kl(stats[0], of[0], stats[2], of[2], kLn2 * sums[kMixedFused]);
    const float step = p_.square_by_t, ce_weight = q_.ce_weight + q_.fused_ce_weight;
    const float ce = cross_entropy(of[3], 1.f, stats[3].label);
    const Hit hit = this->hit(at, 0, sums[kRank]);
    const float kd = q_.square * pair.value, fused_kd = q_.square * fused.value;
    float loss = gated(ce_weight, ce) + gated(q_.kd_weight, kd) + gated(q_.fused_kd_weight, fused_kd);
    write_values(team_, p_, row, 1, {kd, fused_kd, ce, hit.top1, hit.top5});

    const float weight = row_weight<float>(team_, p_, row);
    if (p_.with_gradient) {
      const float a = step * (q_.kd_weight * pair.a + q_.fused_kd_weight * fused.a);
      const float at_label =
          step * (q_.kd_weight * pair.label + q_.fused_kd_weight * fused.label) - ce_weight * of[3].rest;
      write_student(at, {weight * a, weight * ce_weight * of[3].unit, weight * -step * q_.kd_weight * pair.b,
                         weight * -step * q_.fused_kd_weight * fused.b, weight * at_label, peak});
      if (!q_.detach) pull_slts(at, of_f, of_z, fused.drift);
    }
    const float pull_label = p_.pull * gated(of[2].label, stats[2].label - stats[0].label - fused.drift);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      loss += slt(at, k, of_t, stats[1], of[1], weight,
                  {weight * q_.fusion[k] * p_.pull * fused.b, weight * q_.fusion[k] * pull_label, fused.drift, peak});
    }
    write_values(team_, p_, row, 0, {loss});
  }

 private:
  enum { kStudent, kStudent1, kOfTeacher, kMixed, kFused, kMixedFused, kRank, kSums };
  struct OfStudent {
    float a, c, t, f, label, peak;  // peak: of the fused SL-Ts
  };
  struct Pull {
    float scale, label, drift, peak;
  };

  KDFUSE_DEVICE_MEMBER Exponents at_t(float peak) const { return exponents(p_.step, peak); }

  // logit(k): of the k-th input.
  template <class F>
  KDFUSE_DEVICE_MEMBER float fused(F logit) const {
    float f = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) f += q_.fusion[k] * logit(1 + k);
    return f;
  }
  KDFUSE_DEVICE_MEMBER float fused_at(int u, int v) const {
    return fused([&](int k) { return this->at(k, u, v); });
  }
  KDFUSE_DEVICE_MEMBER float fused_logit(const Row& at, int j) const {
    return fused([&](int k) { return this->logit(k, at.row, j); });
  }

  // With the peak of the next row's fused SL-Ts.
  template <class... Joints>
  KDFUSE_DEVICE_MEMBER void join(const Joints&... of) {
    peak_[0] = -INFINITY;
    this->prepare([&](const Packed<type>(&x)[1 + K]) {
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        const float f = fused([&](int k) { return unpack(x[k], v); });
        peak_[0] = f > peak_[0] ? f : peak_[0];
      }
    });
    team_.join(of..., joint<Larger<type>>(this->next_.peaks), joint<Max>(peak_));
  }

  KDFUSE_DEVICE_MEMBER static float cross(float e, float gap, float sum) { return e > 0 ? std::fma(e, gap, sum) : sum; }

  KDFUSE_DEVICE_MEMBER void exponentiate(const Row& at, const Exponents& of_t, const Exponents& of_f,
                                         const Exponents& of_z, float (&sums)[kSums]) {
    const Exponents of_z1 = exponents(kLog2e, at.peak[0]);
    const Threshold<type> threshold(at.label.bits[0]);
    typename Threshold<type>::Count ahead;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) break;
      this->count_ahead(at, threshold, 0, u, ahead);
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        const float z = this->at(0, u, v), uz = of_z.of(z), ut = of_t.of(this->at(kTeacher, u, v));
        const float uf = of_f.of(fused_at(u, v));
        sums[kStudent] += z_[u][v] = power(uz);
        sums[kStudent1] += one_[u][v] = power(of_z1.of(z));
        sums[kOfTeacher] += t_[u][v] = power(ut);
        sums[kFused] += f_[u][v] = power(uf);
        sums[kMixed] = cross(t_[u][v], ut - uz, sums[kMixed]);
        sums[kMixedFused] = cross(f_[u][v], uf - uz, sums[kMixedFused]);
      }
    }
    sums[kRank] = ahead.total() + at.ties[0];
    team_.sum(sums);
  }

  KDFUSE_DEVICE_MEMBER void write_student(const Row& at, const OfStudent& g) const {
    void* const to = this->gradient(0, at.row);
    const auto combine = [&](float z, float one, float t, float f) {
      return std::fma(g.c, one, (g.a * z + g.t * t) + g.f * f);
    };
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) break;
      float out[kChunk];
#pragma unroll
      for (int v = 0; v < kChunk; ++v) out[v] = combine(z_[u][v], one_[u][v], t_[u][v], f_[u][v]);
      const int i = stage_.chunk(u);
      if (at.span.whole(i)) store_chunk<type>(to, at.span.first(i), out);
    }
    if (at.label.mine) store_one<type>(to, at.label.index, g.label);
    this->each_edge(at.span, [&](int j) {
      if (j == at.label.index) return;
      const float z = this->logit(0, at.row, j);
      const float t = power(at_t(at.peak[kTeacher]).of(this->logit(kTeacher, at.row, j)));
      const float f = power(at_t(g.peak).of(fused_logit(at, j)));
      store_one<type>(to, j, combine(power(at_t(at.peak[0]).of(z)), power(exponents(kLog2e, at.peak[0]).of(z)), t, f));
    });
  }

  KDFUSE_DEVICE_MEMBER static float pull(float e, float uf, float uz, float drift) {
    return e > 0 ? e * (kLn2 * (uf - uz) - drift) : 0.f;
  }

  // What the student asks of the SL-Ts takes the place of the fused exponentials.
  KDFUSE_DEVICE_MEMBER void pull_slts(const Row& at, const Exponents& of_f, const Exponents& of_z, float drift) {
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) break;
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        f_[u][v] = pull(f_[u][v], of_f.of(fused_at(u, v)), of_z.of(this->at(0, u, v)), drift);
      }
    }
  }

  // The k-th SL-T: its terms and its gradient; returns its loss.
  KDFUSE_DEVICE_MEMBER float slt(const Row& at, int k, const Exponents& of_t, const Stats<float>& ts,
                                 const Split<float>& t, float weight, const Pull& pulled) {
    enum { kOwn, kOwn1, kOwnMixed, kOwnRank, kOwnSums };
    const Exponents of_s = at_t(at.peak[1 + k]), of_s1 = exponents(kLog2e, at.peak[1 + k]);
    const float label = at.label.values[1 + k];
    float sums[kOwnSums] = {};
    const Threshold<type> threshold(at.label.bits[1 + k]);
    typename Threshold<type>::Count ahead;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) break;
      this->count_ahead(at, threshold, 1 + k, u, ahead);
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        const float s = this->at(1 + k, u, v), us = of_s.of(s), ut = of_t.of(this->at(kTeacher, u, v));
        sums[kOwn] += z_[u][v] = power(us);
        sums[kOwn1] += one_[u][v] = power(of_s1.of(s));
        sums[kOwnMixed] = cross(t_[u][v], ut - us, sums[kOwnMixed]);
      }
    }
    sums[kOwnRank] = ahead.total() + at.ties[1 + k];
    if (k + 1 < K) {
      team_.sum(sums);
    } else {
      join(joint<Sum>(sums));
    }
    const Stats<float> stats[2] = {{sums[kOwn], of_s.natural(label)}, {sums[kOwn1], of_s1.natural(label)}};
    Split<float> of[2];
    split_all<2>(stats, of);
    const auto own = kl(stats[0], of[0], ts, t, kLn2 * sums[kOwnMixed]);
    const float ce = cross_entropy(of[1], 1.f, stats[1].label), kd = q_.square * own.value;
    const Hit hit = this->hit(at, 1 + k, sums[kOwnRank]);
    write_values(team_, p_, at.row, 6 + 4 * k, {kd, ce, hit.top1, hit.top5});
    if (p_.with_gradient) {
      const float step = weight * p_.square_by_t * q_.kd_weight;
      const float at_label = step * own.label - weight * q_.ce_weight * of[1].rest + pulled.label;
      write_slt(at, k, {step * own.a, weight * q_.ce_weight * of[1].unit, -step * own.b, pulled.scale, at_label, 0},
                pulled);
    }
    return gated(q_.kd_weight, kd) + gated(q_.ce_weight, ce);
  }

  KDFUSE_DEVICE_MEMBER void write_slt(const Row& at, int k, const OfStudent& g, const Pull& pulled) const {
    void* const to = this->gradient(1 + k, at.row);
    const auto combine = [&](float s, float one, float t, float pull) {
      const float own = std::fma(g.c, one, g.a * s + g.t * t);
      return q_.detach ? own : std::fma(g.f, pull, own);
    };
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) break;
      float out[kChunk];
#pragma unroll
      for (int v = 0; v < kChunk; ++v) out[v] = combine(z_[u][v], one_[u][v], t_[u][v], f_[u][v]);
      const int i = stage_.chunk(u);
      if (at.span.whole(i)) store_chunk<type>(to, at.span.first(i), out);
    }
    if (at.label.mine) store_one<type>(to, at.label.index, g.label);
    this->each_edge(at.span, [&](int j) {
      if (j == at.label.index) return;
      const float s = this->logit(1 + k, at.row, j), z = this->logit(0, at.row, j);
      const float t = power(at_t(at.peak[kTeacher]).of(this->logit(kTeacher, at.row, j)));
      const float uf = at_t(pulled.peak).of(fused_logit(at, j)), uz = at_t(at.peak[0]).of(z);
      const float e = power(at_t(at.peak[1 + k]).of(s)), e1 = power(exponents(kLog2e, at.peak[1 + k]).of(s));
      store_one<type>(to, j, combine(e, e1, t, pull(power(uf), uf, uz, pulled.drift)));
    });
  }

  const SlkdParams<float> q_;
  float peak_[1];  // of the fused SL-Ts, of the next row from its join on
  float z_[kChunks][kChunk], one_[kChunks][kChunk], t_[kChunks][kChunk], f_[kChunks][kChunk];
};

}  // namespace kdfuse
