// The rows of a student with one teacher, or alone, in registers.
#pragma once
#include "fast_row.h"

namespace kdfuse {

// Which exponentials stay in registers from the sums to the gradient. The others are made again.
enum class Keep { all, at_t, none };

template <Loss loss, DType type, bool labelled, int kChunks, Keep keep, class Team>
class Resident : public FastRows<type, 1, loss != Loss::tf_nkd, labelled, kChunks, Team> {
  using Base = FastRows<type, 1, loss != Loss::tf_nkd, labelled, kChunks, Team>;
  using typename Base::Row;
  using S = Sums<loss, labelled>;
  using Of = Pair<loss, labelled>;
  using Base::p_, Base::stage_, Base::team_, Base::x_;
  static constexpr bool kKeepT = S::kAtT && keep != Keep::none, kKeep1 = labelled && keep == Keep::all;

 public:
  static constexpr bool kScored = loss == Loss::tf_nkd;

  using Base::Base;

  KDFUSE_MEMBER void score(int64_t row, int64_t next) {
    const Row at = this->open(row, next);
    if (at.skipped) return;
    float sums[S::kCount];
    exponentiate(at, sums);
    const Split<float> one = split(Stats<float>{sums[S::student1], of(at).far(at.label.values[0], 0).student1});
    if (team_.rank() == 0) p_.scores[2 * row] = one.label, p_.scores[2 * row + 1] = 0;
  }

  KDFUSE_MEMBER void run(int64_t row, int64_t next) {
    const Row at = this->open(row, next);
    if (at.skipped) return this->leave_out(at);
    float sums[S::kCount];
    exponentiate(at, sums);
    const Far far = of(at).far(at.label.values[0], at.label.values[Base::kInputs - 1]);
    Hit hit = {0, 0};
    if constexpr (labelled) hit = this->hit(at, 0, sums[S::rank]);
    Conclusion<loss> found;
    if constexpr (kScored) {
      const Split<float> one = split(Stats<float>{sums[S::student1], far.student1});
      found = conclude_alone(p_.params, one, far.student1, hit, p_.scores[2 * row], team_.batch().score_mean[0]);
    } else {
      found = conclude<loss, labelled>(p_.params, sums, far, hit);
    }
    write_values(team_, p_, row, 0, found.values);
    if (p_.with_gradient) write_gradient(at, found);
  }

 private:
  KDFUSE_MEMBER Of of(const Row& at) const { return {p_.params, at.peak[0], at.peak[Base::kInputs - 1]}; }

  KDFUSE_MEMBER void exponentiate(const Row& at, float (&sums)[S::kCount]) {
    const Of of = this->of(at);
    typename Threshold<type>::Count ahead;
#pragma unroll
    for (float& sum : sums) sum = 0;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) break;
      if constexpr (labelled) this->threshold(at, 0, u).count(x_[0][u], ahead);
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        const auto e = of.add(unpack(x_[0][u], v), unpack(x_[Base::kInputs - 1][u], v), sums);
        if constexpr (kKeep1) one_[u][v] = e.one;
        if constexpr (kKeepT) z_[u][v] = e.z, t_[u][v] = e.t;
      }
    }
    if constexpr (labelled) sums[S::rank] = ahead.total() + at.ties[0];
    team_.sum(sums);
  }

  // Has the compiler start again from the logits: differences kept from the sums would fill the registers.
  KDFUSE_MEMBER void forget_differences() {
#if defined(__CUDA_ARCH__)
#pragma unroll
    for (int k = 0; k < (kKeepT ? 1 : Base::kInputs); ++k) {
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
#pragma unroll
        for (uint32_t& w : x_[k][u].w) asm volatile("" : "+r"(w));
      }
    }
#endif
  }

  KDFUSE_MEMBER void write_gradient(const Row& at, const Conclusion<loss>& found) {
    const Conclusion<loss> g = weighted(found, row_weight<float>(team_, p_, at.row));
    const Of of = this->of(at);
    void* const to = this->gradient(0, at.row);
    if constexpr (keep != Keep::all) forget_differences();
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) break;
      float out[kChunk];
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        auto e = of.powers(unpack(x_[0][u], v), unpack(x_[Base::kInputs - 1][u], v));
        if constexpr (kKeep1) e.one = one_[u][v];
        if constexpr (kKeepT) e.z = z_[u][v], e.t = t_[u][v];
        out[v] = Of::combine(g, e);
      }
      const int i = stage_.chunk(u);
      if (at.span.whole(i)) store_chunk<type>(to, at.span.first(i), out);
    }
    if (labelled && at.label.mine) store_one<type>(to, at.label.index, g.label);
    this->each_edge(at.span, [&](int j) {
      if (j == at.label.index) return;
      const float z = load_one<type>(this->logits(0, at.row), j);
      const float t = load_one<type>(this->logits(Base::kInputs - 1, at.row), j);
      store_one<type>(to, j, Of::combine(g, of.powers(z, t)));
    });
  }

  float z_[kChunks][kChunk], one_[kChunks][kChunk], t_[kChunks][kChunk];
};

}  // namespace kdfuse
