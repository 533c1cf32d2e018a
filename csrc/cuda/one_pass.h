// The rows of a student with one teacher, or alone, in registers.
#pragma once
#include "aligned_row.h"

namespace kdfuse {

template <class Loss, DType type, bool labelled, int kChunks, class Team>
class Resident : public FastRows<type, 1, is_taught<Loss>, labelled, kChunks, Team> {
  using Base = FastRows<type, 1, is_taught<Loss>, labelled, kChunks, Team>;
  using typename Base::Row;
  using S = Sums<Loss, labelled>;
  using Of = Pair<Loss, labelled>;
  using Base::p_, Base::stage_, Base::team_, Base::x_;

 public:
  static constexpr bool kScored = !is_taught<Loss>;

  using Base::Base;

  KDFUSE_DEVICE_MEMBER void score(uint32_t row, uint32_t ahead) {
    const Row at = this->open(row, ahead);
    if (at.skipped) return this->join();
    float sums[S::kCount];
    exponentiate(at, sums);
    const Split<float> one = split(Stats<float>{sums[S::student1], of(at).far(at.label.values[0], 0).student1});
    put_scores(team_, p_, row, one.label, 0);
  }

  KDFUSE_DEVICE_MEMBER void run(uint32_t row, uint32_t ahead) {
    const Row at = this->open(row, ahead);
    if (at.skipped) {
      this->join();
      return this->leave_out(at);
    }
    float sums[S::kCount];
    exponentiate(at, sums);
    const Far far = of(at).far(at.label.values[0], at.label.values[Base::kInputs - 1]);
    Hit hit = {0, 0};
    if constexpr (labelled) hit = this->hit(at, 0, sums[S::rank]);
    Conclusion<Loss> found;
    if constexpr (kScored) {
      const Split<float> one = split(Stats<float>{sums[S::student1], far.student1});
      found = conclude_alone(p_, one, far.student1, hit, p_.scores[2 * row], team_.batch().score_mean[0]);
    } else {
      found = conclude<Loss, labelled>(p_, sums, far, hit);
    }
    write_values(team_, p_, row, 0, found.values);
    if (p_.with_gradient) write_gradient(at, found);
  }

 private:
  KDFUSE_DEVICE_MEMBER Of of(const Row& at) const { return {p_, at.peak[0], at.peak[Base::kInputs - 1]}; }

  KDFUSE_DEVICE_MEMBER void exponentiate(const Row& at, float (&sums)[S::kCount]) {
    const Of of = this->of(at);
    const Threshold<type> threshold(at.label.bits[0]);
    typename Threshold<type>::Count ahead;
#pragma unroll
    for (float& sum : sums) sum = 0;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) continue;
      if constexpr (labelled) this->count_ahead(at, threshold, 0, u, ahead);
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        e_[u][v] = of.add(unpack(x_[0][u], v), unpack(x_[Base::kInputs - 1][u], v), sums);
      }
    }
    if constexpr (labelled) sums[S::rank] = ahead.total() + at.ties[0];
    this->join(joint<Sum>(sums));
  }

  KDFUSE_DEVICE_MEMBER void write_gradient(const Row& at, const Conclusion<Loss>& found) {
    const Conclusion<Loss> g = weighted(found, row_weight<float>(team_, p_, at.row));
    if (labelled && Of::is_bare(g)) {
      write_bare(at, g);
    } else {
      write_chunks(at, [&](int u, int v) { return Of::combine(g, e_[u][v]); });
    }
    void* const to = this->gradient(0, at.row);
    if (labelled && at.label.mine) store_one<type>(to, at.label.index, g.label);
    this->each_edge(at.span, [&](int j) {
      if (j == at.label.index) return;
      const float z = this->logit(0, at.row, j), t = this->logit(Base::kInputs - 1, at.row, j);
      const auto e = of(at).powers(z, t);
      store_one<type>(to, j, Of::is_bare(g) ? Of::combine_bare(g, e) : Of::combine(g, e));
    });
  }

  // Without cross-entropy.
  KDFUSE_DEVICE_MEMBER void write_bare(const Row& at, const Conclusion<Loss>& g) {
    write_chunks(at, [&](int u, int v) { return Of::combine_bare(g, e_[u][v]); });
  }

  template <class F>
  KDFUSE_DEVICE_MEMBER void write_chunks(const Row& at, F element) {
    void* const to = this->gradient(0, at.row);
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) continue;
      float out[kChunk];
#pragma unroll
      for (int v = 0; v < kChunk; ++v) out[v] = element(u, v);
      const int i = stage_.chunk(u);
      if (at.span.whole(i)) store_chunk<type>(to, at.span.first(i), out);
    }
  }

  typename Of::Powers e_[kChunks][kChunk];
};

}  // namespace kdfuse
