// The rows of a student with teachers, or alone, in registers.
#pragma once
#include "aligned_row.h"

namespace kdfuse {

template <class Loss, class Shape, int kChunks, class Team>
class Resident : public FastRows<Shape, kChunks, Team> {
  using Base = FastRows<Shape, kChunks, Team>;
  using typename Base::Row;
  static constexpr DType type = Shape::type;
  static constexpr int kTeachers = Shape::kTeachers, kLogits = Shape::kLogits;
  using S = Sums<Loss, Shape::labels, kTeachers>;
  template <int squarings>
  using Of = Pair<Loss, Shape::labels, kTeachers, squarings>;
  using Any = Of<-1>;
  using E = Powers<kTeachers>;
  using G = Blend<kTeachers>;
  // Whether the exponentials stay in registers; else they are made again for the gradient: of 16-bit rows two blocks
  // share a multiprocessor, and more than two inputs leave no room.
  static constexpr bool kKept = Shape::kInputs <= 2 && (type == DType::f32 || Team::kTeams > 1);
  using Base::p_, Base::stage_, Base::team_;

 public:
  static constexpr bool kScored = !is_taught<Loss>;

  using Base::Base;

  KDFUSE_DEVICE_MEMBER void score(uint32_t row, uint32_t ahead) {
    const Row at = this->open(row, ahead);
    if (at.skipped) return this->join();
    float sums[S::kCount];
    exponentiate(at, sums);
    this->join(joint<Sum>(sums));
    const Split<float> one = split(Stats<float>{sums[S::student1], of(at).far(at.label.values).student1});
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
    const G g = conclude_row(at, sums);
    if (p_.with_gradient) write_gradient(at, g);
  }

 private:
  template <int squarings = -1>
  KDFUSE_DEVICE_MEMBER Of<squarings> of(const Row& at) const {
    return {p_, at.peak};
  }

  // Class v of this thread's u-th chunk in the student's and the teachers' rows.
  struct Class {
    float x[kLogits];
  };
  KDFUSE_DEVICE_MEMBER Class class_at(int u, int v) const {
    Class c;
#pragma unroll
    for (int k = 0; k < kLogits; ++k) c.x[k] = this->at(k, u, v);
    return c;
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
        if constexpr (Shape::labels != Labels::none) this->count_ahead(at, threshold, 0, u, ahead);
#pragma unroll
        for (int v = 0; v < kChunk; ++v) {
          const Class c = class_at(u, v);
          const E e = of.add(c.x, sums);
          if constexpr (kKept) e_[u][v] = e;
          if constexpr (Shape::soft) of.add_probability(c.x[0], this->at(kLogits, u, v), sums);
        }
      }
    });
    if constexpr (Shape::labels != Labels::none) sums[S::rank] = ahead.total() + at.ties[0];
  }

  // What the row comes to.
  KDFUSE_DEVICE_MEMBER G conclude_row(const Row& at, const float (&sums)[S::kCount]) const {
    const auto far = of(at).far(at.label.values);
    Hit hit = {0, 0};
    if constexpr (Shape::labels != Labels::none) hit = this->hit(at, 0, sums[S::rank]);
    Conclusion<Loss, kTeachers> found;
    if constexpr (kScored) {
      const Split<float> one = split(Stats<float>{sums[S::student1], far.student1});
      found = conclude_alone(p_, one, far.student1, hit, p_.scores[2 * at.row], team_.batch().score_mean[0]);
    } else {
      found = conclude<Loss, Shape::labels>(p_, sums, far, hit);
    }
    write_values(team_, p_, at.row, 0, found.values);
    return weighted(found.gradient, row_weight<float>(team_, p_, at.row));
  }

  KDFUSE_DEVICE_MEMBER void write_gradient(const Row& at, const G& g) {
    if (Shape::labelled && Any::is_bare(g)) {
      write_bare(at, g);
    } else {
      at_temperature([&](auto squarings) {
        this->template write_chunks<decltype(squarings)::value>(at, g, [&](const E& e) { return Any::combine(g, e); });
      });
    }
    void* const to = this->gradient(0, at.row);
    if (Shape::labelled && at.label.mine) store_one<type>(to, at.label.index, g.label);
    this->each_edge(at.span, [&](int j) {
      if (Shape::labelled && j == at.label.index) return;
      Class c;
#pragma unroll
      for (int k = 0; k < kLogits; ++k) c.x[k] = this->logit(k, at.row, j);
      const E e = of(at).powers(c.x);
      float out = Any::is_bare(g) ? Any::combine_bare(g, e) : Any::combine(g, e);
      if constexpr (Shape::soft) out = std::fma(g.q, this->logit(kLogits, at.row, j), out);
      store_one<type>(to, j, out);
    });
  }

  // Without cross-entropy.
  KDFUSE_DEVICE_MEMBER void write_bare(const Row& at, const G& g) {
    write_chunks<-1>(at, g, [&](const E& e) { return Any::combine_bare(g, e); });
  }

  template <int squarings, class F>
  KDFUSE_DEVICE_MEMBER void write_chunks(const Row& at, const G& g, F element) {
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
          out[v] = element(of.powers(class_at(u, v).x));
        }
        if constexpr (Shape::soft) out[v] = std::fma(g.q, this->at(kLogits, u, v), out[v]);
      }
      const int i = stage_.chunk(u);
      if (at.span.whole(i)) store_chunk<type>(to, at.span.first(i), out);
    }
  }

  E e_[kKept ? kChunks : 1][kChunk];
};

}  // namespace kdfuse
