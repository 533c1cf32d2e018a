// Rows longer than the registers of a team, of a student with one teacher, or alone: one read makes the
// peaks and the sums together, a second one the gradient. A peak that grows rescales what was summed. Where
// the block's memory can hold the row, the first read leaves it there for the second.
#pragma once
#include "aligned_row.h"

namespace kdfuse {

template <class Loss, class Shape, class Team>
class Streamed {
  static_assert(!Shape::any && !Shape::soft && Shape::kInputs <= 2, "rows of one type");
  static constexpr DType type = Shape::type;
  static constexpr bool labelled = Shape::labelled;
  static constexpr int kTeachers = Shape::kTeachers, kInputs = Shape::kInputs, kAhead = type == DType::f32 ? 1 : 2;
  using S = Sums<Loss, Shape::labels, kTeachers>;
  using Of = Pair<Loss, Shape::labels, kTeachers>;
  struct Row {
    uint32_t row;
    Span span;
    int label = kNowhere;
    uint32_t bits = 0;  // of the student's logit at the label
    float values[kInputs] = {}, peak[kInputs];
  };

 public:
  using Index = uint32_t;
  static constexpr bool kScored = !is_taught<Loss>;

  KDFUSE_DEVICE_MEMBER Streamed(const Team& team, const FastTask& p) : team_(team), p_(p) {}

  KDFUSE_DEVICE_MEMBER void fetch(uint32_t) {}
  KDFUSE_DEVICE_MEMBER void begin() {}

  KDFUSE_DEVICE_MEMBER void score(uint32_t row, uint32_t) {
    if (ignored(p_, row)) return;
    Row at = open(row);
    float sums[S::kCount];
    sum_up(at, sums);
    const Split<float> one = split(Stats<float>{sums[S::student1], of(at).far(at.values).student1});
    put_scores(team_, p_, row, one.label, 0);
  }

  KDFUSE_DEVICE_MEMBER void run(uint32_t row, uint32_t) {
    Row at = open(row);
    if (labelled && ignored(p_, row)) return leave_out(at);
    float sums[S::kCount];
    sum_up(at, sums);
    const auto far = of(at).far(at.values);
    Hit hit = {0, 0};
    if constexpr (labelled) hit = hit_of(at.values[0], sums[S::rank]);
    Conclusion<Loss, kTeachers> found;
    if constexpr (kScored) {
      const Split<float> one = split(Stats<float>{sums[S::student1], far.student1});
      found = conclude_alone(p_, one, far.student1, hit, p_.scores[2 * row], team_.batch().score_mean[0]);
    } else {
      found = conclude<Loss, Shape::labels>(p_, sums, far, hit);
    }
    write_values(team_, p_, row, 0, found.values);
    if (p_.with_gradient) write_gradient(at, weighted(found.gradient, row_weight<float>(team_, p_, row)));
  }

 private:
  KDFUSE_DEVICE_MEMBER const char* logits(int k, uint32_t row) const {
    return static_cast<const char*>(p_.logits[k]) + uint64_t{row} * p_.steps[k];
  }
  KDFUSE_DEVICE_MEMBER void* gradient(uint32_t row) const {
    return static_cast<char*>(p_.gradients[0]) + kept(int64_t{row} * p_.classes * bytes_of(gradient_type<type>));
  }
  KDFUSE_DEVICE_MEMBER Of of(const Row& at) const { return {p_, at.peak}; }

  KDFUSE_DEVICE_MEMBER Row open(uint32_t row) const {
    Row at;
    at.row = row;
    at.span = fast_span(p_, row);
    if (labelled && !ignored(p_, row)) {
      at.label = static_cast<int>(p_.labels[row * p_.label_stride]);
      at.bits = load_bits<type>(logits(0, row), at.label);
#pragma unroll
      for (int k = 0; k < kInputs; ++k) at.values[k] = load_one<type>(logits(k, row), at.label);
    }
    return at;
  }

  // A chunk of the k-th input, as it stands in memory; what is outside the row is at -inf.
  KDFUSE_DEVICE_MEMBER Packed<type> load(const Row& at, int k, int i) const {
    Packed<type> x = nothing<type>();
    const int j = at.span.first(i);
    if (at.span.whole(i)) {
#pragma unroll
      for (int h = 0; h < Packed<type>::kUnits; ++h) {
        const Words words = load_words(logits(k, at.row) + j * bytes_of(type) + 16 * h);
#pragma unroll
        for (int w = 0; w < 4; ++w) x.w[4 * h + w] = words.w[w];
      }
      return x;
    }
#pragma unroll
    for (int v = 0; v < kChunk; ++v) {
      if (static_cast<unsigned>(j + v) < static_cast<unsigned>(at.span.classes)) {
        set_one(x, v, load_bits<type>(logits(k, at.row), j + v));
      }
    }
    return x;
  }

  KDFUSE_DEVICE_MEMBER void drop_label(const Row& at, int i, Packed<type>& x) const {
    if (!labelled || i != at.span.chunk_of(at.label)) return;
    const int label = at.label - at.span.first(i);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) {
      if (v == label) set_one(x, v, nothing<type>().w[0] & (type == DType::f32 ? ~0u : 0xffffu));
    }
  }

  KDFUSE_DEVICE_MEMBER Words* held(int k, int i, int h) const {
    const int chunks = max_chunks(p_.classes);
    return static_cast<Words*>(team_.memory()) + (k * Packed<type>::kUnits + h) * chunks + i;
  }

  KDFUSE_DEVICE_MEMBER void hold(const Packed<type>& x, int k, int i) const {
#pragma unroll
    for (int h = 0; h < Packed<type>::kUnits; ++h) {
      store_words(held(k, i, h), {{x.w[4 * h], x.w[4 * h + 1], x.w[4 * h + 2], x.w[4 * h + 3]}});
    }
  }

  KDFUSE_DEVICE_MEMBER Packed<type> again(const Row& at, int k, int i) const {
    if (!p_.hold) {
      Packed<type> x = load(at, k, i);
      drop_label(at, i, x);
      return x;
    }
    Packed<type> x;
#pragma unroll
    for (int h = 0; h < Packed<type>::kUnits; ++h) {
      const Words words = load_held(held(k, i, h));
#pragma unroll
      for (int w = 0; w < 4; ++w) x.w[4 * h + w] = words.w[w];
    }
    return x;
  }

  // Moves sums from the peaks that they were made with to others.
  KDFUSE_DEVICE_MEMBER void move(const float (&from)[kInputs], const float (&to)[kInputs],
                                 float (&sums)[S::kCount]) const {
    float was[kInputs], is[kInputs];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) was[k] = finite(from[k]), is[k] = finite(to[k]);
    const Of old(p_, was), now(p_, is);
    const auto factor = [](float peak, const Exponents& a, const Exponents& b) {
      return peak == -INFINITY ? 0.f : power(a.origin - b.origin);
    };
    if constexpr (S::kAt1) sums[S::student1] *= factor(from[0], old.z1, now.z1);
    if constexpr (S::kTaught) {
      const float by_z = S::kApart ? old.z.origin - now.z.origin : old.z1.origin - now.z1.origin;
      const float by_t = old.t[0].origin - now.t[0].origin, shift = Loss::kEntropy ? by_t - by_z : by_z;
      const float teacher = factor(from[1], old.t[0], now.t[0]);
      sums[S::mixed] = sums[S::teacher] == 0 ? 0.f : teacher * std::fma(sums[S::teacher], shift, sums[S::mixed]);
      if constexpr (S::kApart) sums[S::student] *= factor(from[0], old.z, now.z);
      sums[S::teacher] *= teacher;
      if constexpr (S::kTeacherAt1) sums[S::teacher1] *= factor(from[1], old.t1, now.t1);
    }
  }

  KDFUSE_DEVICE_MEMBER static float finite(float peak) { return peak == -INFINITY ? 0.f : peak; }

  KDFUSE_DEVICE_MEMBER void sum_up(Row& at, float (&sums)[S::kCount]) const {
    float peak[kInputs];
#pragma unroll
    for (float& x : peak) x = -INFINITY;
#pragma unroll
    for (float& sum : sums) sum = 0;
#pragma unroll 1
    for (int first = team_.rank(); first < at.span.chunks; first += kAhead * team_.size()) {
      Packed<type> x[kAhead][kInputs];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int i = first + u * team_.size();
#pragma unroll
        for (int k = 0; k < kInputs; ++k) x[u][k] = i < at.span.chunks ? load(at, k, i) : nothing<type>();
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int i = first + u * team_.size();
        if (i < at.span.chunks) add_chunk(at, i, x[u], peak, sums);
      }
    }
    finish(at, peak, sums);
  }

  KDFUSE_DEVICE_MEMBER void add_chunk(const Row& at, int i, Packed<type> (&x)[kInputs], float (&peak)[kInputs],
                                      float (&sums)[S::kCount]) const {
    if constexpr (labelled) {
      typename Threshold<type>::Count ahead;
      const int label = at.span.chunk_of(at.label);
      if (i == label) {
        // Ties of its own chunk come before it by their place.
        const Span& span = at.span;
        for (int j = span.first(i) > 0 ? span.first(i) : 0; j < at.label; ++j) {
          sums[S::rank] += load_one<type>(logits(0, at.row), j) == at.values[0];
        }
        drop_label(at, i, x[0]);
        drop_label(at, i, x[kInputs - 1]);
      }
      Threshold<type>(at.bits).count(x[0], i < label, ahead);
      float count = ahead.total();
      // Places before the row's first class are at -inf and tie with such a label.
      if (i == 0 && label > 0 && at.values[0] == -INFINITY) count -= at.span.shift;
      sums[S::rank] += count;
    }
    float top[kInputs];
    bool grows = false;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      if (p_.hold) hold(x[k], k, i);
      const float of_chunk = largest_number<type>(largest_word(x[k], x[k].w[0]));
      top[k] = of_chunk > peak[k] ? of_chunk : peak[k];
      grows |= top[k] > peak[k];
    }
    if (grows) {
      move(peak, top, sums);
#pragma unroll
      for (int k = 0; k < kInputs; ++k) peak[k] = top[k];
    }
    float origin[kInputs];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) origin[k] = finite(peak[k]);
    const Of of(p_, origin);
#pragma unroll
    for (int v = 0; v < kChunk; ++v) {
      float of_class[kInputs];
#pragma unroll
      for (int k = 0; k < kInputs; ++k) of_class[k] = unpack(x[k], v);
      of.add(of_class, sums);
    }
  }

  // Brings the threads' sums to the peaks of all.
  KDFUSE_DEVICE_MEMBER void finish(Row& at, const float (&peak)[kInputs], float (&sums)[S::kCount]) const {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) at.peak[k] = peak[k];
    team_.max(at.peak);
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      // Where nothing else is finite the label stands in for the peak: nothing has been summed then.
      const float label = labelled ? at.values[k] : -INFINITY;
      if (at.peak[k] == -INFINITY) at.peak[k] = label != -INFINITY ? label : 0.f;
    }
    move(peak, at.peak, sums);
    team_.sum(sums);
  }

  KDFUSE_DEVICE_MEMBER void write_gradient(const Row& at, const Blend<kTeachers>& g) const {
    const Of of = this->of(at);
    void* const to = gradient(at.row);
    const int label = labelled ? at.span.chunk_of(at.label) : -1;
    const bool bare = Of::is_bare(g);
#pragma unroll 1
    for (int i = team_.rank(); i < at.span.chunks; i += team_.size()) {
      Packed<type> x[kInputs];
#pragma unroll
      for (int k = 0; k < kInputs; ++k) x[k] = again(at, k, i);
      float out[kChunk];
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        float of_class[kInputs];
#pragma unroll
        for (int k = 0; k < kInputs; ++k) of_class[k] = unpack(x[k], v);
        const auto e = of.powers(of_class);
        out[v] = bare ? Of::combine_bare(g, e) : Of::combine(g, e);
      }
      const int j = at.span.first(i);
      if (at.span.whole(i)) {
        store_chunk<type>(to, j, out);
      } else {
#pragma unroll
        for (int v = 0; v < kChunk; ++v) {
          if (static_cast<unsigned>(j + v) < static_cast<unsigned>(at.span.classes)) store_one<type>(to, j + v, out[v]);
        }
      }
      if (i == label) store_one<type>(to, at.label, g.label);
    }
  }

  // A row that takes no part: no loss, no gradient.
  KDFUSE_DEVICE_MEMBER void leave_out(const Row& at) const {
    write_no_values(team_, p_, at.row);
    if (!p_.with_gradient) return;
    const float zeros[kChunk] = {};
    void* const to = gradient(at.row);
#pragma unroll 1
    for (int i = team_.rank(); i < at.span.chunks; i += team_.size()) {
      const int j = at.span.first(i);
      if (at.span.whole(i)) {
        store_chunk<type>(to, j, zeros);
      } else {
        for (int v = 0; v < kChunk; ++v) {
          if (j + v >= 0 && j + v < at.span.classes) store_one<type>(to, j + v, 0.f);
        }
      }
    }
  }

  const Team& team_;
  const FastTask& p_;
};

}  // namespace kdfuse
