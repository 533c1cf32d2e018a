// The rows of a student with one teacher, or alone, in registers.
#pragma once
#include "aligned_row.h"

namespace kdfuse {

template <class Loss, DType type, bool labelled, int kChunks, class Team>
class Resident : public FastRows<type, 1, is_taught<Loss>, labelled, kChunks, Team> {
  using Base = FastRows<type, 1, is_taught<Loss>, labelled, kChunks, Team>;
  using typename Base::Row;
  using S = Sums<Loss, labelled>;
  template <int squarings>
  using Of = Pair<Loss, labelled, squarings>;
  using Any = Of<-1>;
  // Whether the exponentials stay in registers; else they are made again for the gradient, and two blocks fit.
  static constexpr bool kKept = type == DType::f32 || Team::kTeams > 1;
  using Base::p_, Base::stage_, Base::team_, Base::x_;

 public:
  static constexpr bool kScored = !is_taught<Loss>;

  using Base::Base;

  KDFUSE_DEVICE_MEMBER void score(uint32_t row, uint32_t ahead) {
    const Row at = this->open(row, ahead);
    if (at.skipped) return this->join();
    float sums[S::kCount];
    exponentiate(at, sums);
    this->join(joint<Sum>(sums));
    const Split<float> one = split(Stats<float>{sums[S::student1], far(at).student1});
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
    this->join(joint<Sum>(sums));
    const Blend g = conclude_row(at, sums);
    if (p_.with_gradient) write_gradient(at, g);
  }

 private:
  template <int squarings = -1>
  KDFUSE_DEVICE_MEMBER Of<squarings> of(const Row& at) const {
    return {p_, at.peak[0], at.peak[Base::kInputs - 1]};
  }

  KDFUSE_DEVICE_MEMBER Far far(const Row& at) const {
    return of(at).far(at.label.values[0], at.label.values[Base::kInputs - 1]);
  }

  // run(squarings) with the T of the call, where exponentials are to be saved.
  template <class F>
  KDFUSE_DEVICE_MEMBER void at_temperature(F run) const {
    if constexpr (!kKept && S::kAt1 && (S::kApart || S::kTeacherAt1)) {
      if (p_.squarings == 0) return run(std::integral_constant<int, 0>());
      if (p_.squarings == 1) return run(std::integral_constant<int, 1>());
      if (p_.squarings == 2) return run(std::integral_constant<int, 2>());
    }
    run(std::integral_constant<int, -1>());
  }

  KDFUSE_DEVICE_MEMBER void exponentiate(const Row& at, float (&sums)[S::kCount]) {
#pragma unroll
    for (float& sum : sums) sum = 0;
    const Threshold<type> threshold(at.label.bits[0]);
    typename Threshold<type>::Count ahead;
    at_temperature([&](auto squarings) {
      const auto of = this->template of<decltype(squarings)::value>(at);
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
        if (!stage_.has(at.span, u)) continue;
        if constexpr (labelled) this->count_ahead(at, threshold, 0, u, ahead);
#pragma unroll
        for (int v = 0; v < kChunk; ++v) {
          const Powers e = of.add(unpack(x_[0][u], v), unpack(x_[Base::kInputs - 1][u], v), sums);
          if constexpr (kKept) e_[u][v] = e;
        }
      }
    });
    if constexpr (labelled) sums[S::rank] = ahead.total() + at.ties[0];
  }

  // What the row comes to.
  KDFUSE_DEVICE_MEMBER Blend conclude_row(const Row& at, const float (&sums)[S::kCount]) const {
    const Far far = this->far(at);
    Hit hit = {0, 0};
    if constexpr (labelled) hit = this->hit(at, 0, sums[S::rank]);
    Conclusion<Loss> found;
    if constexpr (kScored) {
      const Split<float> one = split(Stats<float>{sums[S::student1], far.student1});
      found = conclude_alone(p_, one, far.student1, hit, p_.scores[2 * at.row], team_.batch().score_mean[0]);
    } else {
      found = conclude<Loss, labelled>(p_, sums, far, hit);
    }
    write_values(team_, p_, at.row, 0, found.values);
    return weighted(found.gradient, row_weight<float>(team_, p_, at.row));
  }

  KDFUSE_DEVICE_MEMBER void write_gradient(const Row& at, const Blend& g) {
    if (labelled && Any::is_bare(g)) {
      write_bare(at, g);
    } else {
      at_temperature([&](auto squarings) {
        this->template write_chunks<decltype(squarings)::value>(at,
                                                                [&](const Powers& e) { return Any::combine(g, e); });
      });
    }
    void* const to = this->gradient(0, at.row);
    if (labelled && at.label.mine) store_one<type>(to, at.label.index, g.label);
    this->each_edge(at.span, [&](int j) {
      if (j == at.label.index) return;
      const auto e = of(at).powers(this->logit(0, at.row, j), this->logit(Base::kInputs - 1, at.row, j));
      store_one<type>(to, j, Any::is_bare(g) ? Any::combine_bare(g, e) : Any::combine(g, e));
    });
  }

  // Without cross-entropy.
  KDFUSE_DEVICE_MEMBER void write_bare(const Row& at, const Blend& g) {
    write_chunks<-1>(at, [&](const Powers& e) { return Any::combine_bare(g, e); });
  }

  template <int squarings, class F>
  KDFUSE_DEVICE_MEMBER void write_chunks(const Row& at, F element) {
    void* const to = this->gradient(0, at.row);
    const auto of = this->template of<squarings>(at);
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) continue;
      float out[kChunk];
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        if constexpr (kKept) {
          out[v] = element(e_[u][v]);
        } else {
          out[v] = element(of.powers(unpack(x_[0][u], v), unpack(x_[Base::kInputs - 1][u], v)));
        }
      }
      const int i = stage_.chunk(u);
      if (at.span.whole(i)) store_chunk<type>(to, at.span.first(i), out);
    }
  }

  Powers e_[kKept ? kChunks : 1][kChunk];
};

}  // namespace kdfuse
