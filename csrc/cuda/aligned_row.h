// A row of the fast path in registers: its way there, its label and its peaks, and what stands beside the
// loops over whole chunks. Every thread has kChunks chunks of a row; while it works on them those of the next two
// rows are on their way (prefetch.h).
//
// A team meets once for a row: the row's sums are joined together with the peaks of the next row, which has come
// by then.
//
// The label and what chunks have outside the row stand at -inf, so that every loop runs over the rest
// alone. What few elements need is done element by element beside the loops: ties of the label's own
// chunk, chunks that the row shares with its neighbours, the label's gradient.
#pragma once
#include "coefficients.h"
#include "joint.h"
#include "listed_row.h"
#include "prefetch.h"
#include "rank.h"

namespace kdfuse {

// Rows lie apart by whole chunks and their classes.
KDFUSE_DEVICE Span fast_span(const FastTask& p, uint32_t row) {
  const int shift = static_cast<int>(p.shift + row * p.classes) & (kChunk - 1);
  return {p.classes, shift, static_cast<int>(static_cast<unsigned>(p.classes + shift + kChunk - 1) / kChunk)};
}

template <class Shape>
struct Label {
  int index = kNowhere;
  int chunk = -1;
  bool mine = false;  // in a chunk of this thread
  uint32_t bits[Shape::kStudents] = {};  // its logits as they come
  float values[Shape::kLogits] = {};
};

template <class Shape>
struct FastRow {
  uint32_t row;
  Span span;
  bool skipped;  // by its label
  Label<Shape> label;
  float ties[Shape::kStudents];  // classes of the label's chunk that come before it by their place alone
  float peak[Shape::kLogits];  // of the rest
};

// What is known of a row that is still in its places.
template <class Shape>
struct Coming {
  uint32_t row;
  int label;  // or -1, of a row that takes no part
  int chunk;  // of the label
  bool mine;
  uint32_t bits[Shape::kLogits] = {};  // the label's logits
  float ties[Shape::kStudents] = {};
  uint32_t peaks[peak_words<Shape::others, Shape::kLogits>];
  uint64_t likeliest[1];  // of class probabilities: the largest, and its class
};

// Orders class probabilities by size, equal ones by the lower class.
KDFUSE_DEVICE uint64_t rank_of(float probability, int j) {
  const uint32_t bits = as_bits(probability), sign = bits >> 31;
  return uint64_t{sign ? ~bits : bits | 0x80000000u} << 32 | ~static_cast<uint32_t>(j);
}

KDFUSE_DEVICE int class_of(uint64_t rank) { return static_cast<int>(~static_cast<uint32_t>(rank)); }

template <class Shape, int kChunks, class Team>
class FastRows {
  static constexpr int kInputs = Shape::kInputs, kStudents = Shape::kStudents;
  static constexpr DType type = Shape::type;
  // Larger words, of the type that all peaks have in common.
  using Join = Larger<Shape::others>;

 public:
  static constexpr int kThreadBytes = Stage<Shape, kChunks, Team>::kBytes;
  using Row = FastRow<Shape>;
  using Index = uint32_t;

  KDFUSE_DEVICE_MEMBER FastRows(const Team& team, const FastTask& p) : team_(team), p_(p), stage_(team, p), list_(p) {
    stage_.clear();
  }

  // Sends for a row, into the places of the one that has been taken.
  KDFUSE_DEVICE_MEMBER void fetch(uint32_t row) {
    next_.row = last_row_;
    next_.label = last_label_ == p_.ignore_index ? -1 : static_cast<int>(last_label_);
    last_row_ = row;
    if (row < rows()) {
      const char* from[kInputs];
#pragma unroll
      for (int k = 0; k < kInputs; ++k) from[k] = logits(k, row);
      const Span span = fast_span(p_, row);
      stage_.fetch(from, span, span.chunks - (row >= p_.guarded));
      if (Shape::labelled) last_label_ = p_.labels[row * p_.label_stride];
    }
    commit_copies();
    stage_.turn();
  }

  // After two rows have been sent for.
  KDFUSE_DEVICE_MEMBER void begin() {
    send_for_label();
    join();
  }

 protected:
  // Class 0 of the k-th input.
  KDFUSE_DEVICE_MEMBER const char* logits(int k, uint32_t row) const {
    return static_cast<const char*>(p_.logits[k]) + uint64_t{row} * p_.steps[k];
  }
  // A number of the k-th input.
  KDFUSE_DEVICE_MEMBER uint32_t bits_of(int k, uint32_t row, int j) const {
    return stage_.type_of(k) == DType::f32 ? load_bits<DType::f32>(logits(k, row), j)
                                           : load_bits<DType::bf16>(logits(k, row), j);
  }
  KDFUSE_DEVICE_MEMBER float number_of(int k, uint32_t bits) const { return unpack_one(stage_.type_of(k), bits); }
  KDFUSE_DEVICE_MEMBER float logit(int k, uint32_t row, int j) const {
    return stage_.is_listed(k) ? list_.logit(row, j) : number_of(k, bits_of(k, row, j));
  }

  // Class v of this thread's u-th chunk of the k-th input.
  KDFUSE_DEVICE_MEMBER float at(int k, int u, int v) const {
    return k < kStudents ? unpack(x_[k < kStudents ? k : 0][u], v)
                         : unpack(others_[k < kStudents ? 0 : k - kStudents][u], v);
  }

  KDFUSE_DEVICE_MEMBER void* gradient(int k, uint32_t row) const {
    return static_cast<char*>(p_.gradients[k]) + kept(int64_t{row} * p_.classes * bytes_of(gradient_type<type>));
  }

  // Takes the row from its places and sends for the one after the next into them.
  KDFUSE_DEVICE_MEMBER Row open(uint32_t row, uint32_t ahead) {
    Row at = {};
    at.row = row;
    at.span = fast_span(p_, row);
    if constexpr (Shape::labelled) open_label(at);
    if constexpr (Shape::soft) open_likeliest(at);
    spread_peaks<Shape::others>(next_.peaks, at.peak);
    list_.turn();
    // Where nothing else is finite the label stands in for the peak, so that the row keeps its distribution.
#pragma unroll
    for (int k = 0; k < Shape::kLogits; ++k) {
      const float label = Shape::labelled ? at.label.values[k] : -INFINITY;
      if (at.peak[k] == -INFINITY) at.peak[k] = label != -INFINITY ? label : 0.f;
    }
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) continue;
#pragma unroll
      for (int k = 0; k < kStudents; ++k) x_[k][u] = stage_.take(k, u);
#pragma unroll
      for (int k = 0; k < Shape::kOthers; ++k) others_[k][u] = stage_.take_other(k, u);
    }
    fetch(ahead);
    send_for_label();
    return at;
  }

  // Finds the next row's peaks among this thread's chunks. see(x) sees a chunk of every student.
  template <class F>
  KDFUSE_DEVICE_MEMBER void prepare(F see) {
    wait_for_copies();
    uint32_t top[kStudents], of_others[Shape::kTeachers > 0 ? Shape::kTeachers : 1];
#pragma unroll
    for (uint32_t& w : top) w = nothing<type>().w[0];
#pragma unroll
    for (uint32_t& w : of_others) w = nothing<Shape::others>().w[0];
    next_.likeliest[0] = 0;
    if (next_.row < rows()) {
      const Span span = fast_span(p_, next_.row);
      if (has_list()) {
        const float label = list_.take(stage_, next_.row, span, next_.label);
        if (Shape::labelled) next_.bits[Shape::kLogits - 1] = as_bits(label);
      }
      if (!p_.whole) {
        stage_.trim(span, next_.row >= p_.guarded, [&](int k, int j) { return bits_of(k, next_.row, j); });
      }
      if constexpr (Shape::labelled) find_label(span);
      if (Shape::labelled && next_.mine) take_label(span);
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
        if (!stage_.has(span, u)) continue;
        Packed<type> x[kStudents];
#pragma unroll
        for (int k = 0; k < kStudents; ++k) {
          x[k] = stage_.take(k, u);
          top[k] = largest_word(x[k], top[k]);
        }
#pragma unroll
        for (int k = 0; k < Shape::kTeachers; ++k) of_others[k] = largest_word(stage_.take_other(k, u), of_others[k]);
        if constexpr (Shape::soft) see_probabilities(span, u);
        see(x);
      }
    }
    uint32_t all[Shape::kLogits];
#pragma unroll
    for (int k = 0; k < Shape::kLogits; ++k) {
      all[k] = k >= kStudents ? of_others[k < kStudents ? 0 : k - kStudents]
               : Shape::any   ? as_bits(largest_number<type>(top[k < kStudents ? k : 0]))
                              : top[k < kStudents ? k : 0];
    }
    gather_peaks<Shape::others>(all, next_.peaks);
  }

  // The meeting of a row, and of what comes next.
  template <class... Joints>
  KDFUSE_DEVICE_MEMBER void join(const Joints&... of) {
    prepare([](const Packed<type>(&)[kStudents]) {});
    if constexpr (Shape::soft) {
      team_.join(of..., joint<Join>(next_.peaks), joint<Max>(next_.likeliest));
    } else {
      team_.join(of..., joint<Join>(next_.peaks));
    }
  }

  // The next row's label and its logits; what its teacher lists.
  KDFUSE_DEVICE_MEMBER void send_for_label() {
    if (next_.row >= rows()) return;
    if (has_list()) list_.send(next_.row);
    if (!Shape::labelled) return;
    const int index = next_.label > 0 ? next_.label : 0;
#pragma unroll
    for (int k = 0; k < Shape::kLogits; ++k) {
      if (!stage_.is_listed(k)) next_.bits[k] = bits_of(k, next_.row, index);
    }
  }

  // Counts what comes before the label in the u-th chunk of the k-th student.
  KDFUSE_DEVICE_MEMBER void count_ahead(const Row& at, const Threshold<type>& threshold, int k, int u,
                                        typename Threshold<type>::Count& count) const {
    threshold.count(x_[k][u], stage_.chunk(u) < at.label.chunk, count);
    if constexpr (Shape::soft) {  // the label stands where it is, ties before it in its own chunk come before it
      if (stage_.chunk(u) != at.label.chunk) return;
      const int first = at.span.first(at.label.chunk);
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        count.single += first + v >= 0 && first + v < at.label.index && unpack(x_[k][u], v) == at.label.values[k];
      }
    }
  }

  // The label's rank from the count of what exceeds the thresholds. Places before the row's first class are
  // at -inf and tie with such a label.
  KDFUSE_DEVICE_MEMBER Hit hit(const Row& at, int k, float count) const {
    const float label = at.label.values[k];
    if (!p_.whole && label == -INFINITY && at.label.chunk > 0) count -= at.span.shift;
    return hit_of(label, count);
  }

  // The classes of chunks that are not whole, shared among the team.
  template <class F>
  KDFUSE_DEVICE_MEMBER void each_edge(const Span& span, F run) const {
    if (p_.whole) return;
    const int head = span.shift ? kChunk - span.shift : 0, tail = (span.classes + span.shift) % kChunk;
    const int count = span.chunks > 1 ? head + tail : span.whole(0) ? 0 : span.classes;
#pragma unroll 1
    for (int i = team_.rank(); i < count; i += team_.size()) {
      run(span.chunks == 1 || i < head ? i : span.classes - tail + i - head);
    }
  }

  // A row that takes no part: no loss, no gradient.
  KDFUSE_DEVICE_MEMBER void leave_out(const Row& at) const {
    write_no_values(team_, p_, at.row);
    if (!p_.with_gradient) return;
    const float zeros[kChunk] = {};
#pragma unroll 1
    for (int k = 0; k < kStudents; ++k) {
      void* const to = gradient(k, at.row);
#pragma unroll 1
      for (int i = team_.rank(); i < at.span.chunks; i += team_.size()) {
        if (at.span.whole(i)) store_chunk<type>(to, at.span.first(i), zeros);
      }
      each_edge(at.span, [&](int j) { store_one<type>(to, j, 0.f); });
    }
  }

  const Team& team_;
  const FastTask& p_;
  Stage<Shape, kChunks, Team> stage_;
  Packed<type> x_[kStudents][kChunks];
  Packed<Shape::others> others_[Shape::kOthers > 0 ? Shape::kOthers : 1][kChunks];
  Coming<Shape> next_;

 private:
  // Whether the next row has a list, and takes part: else it may hold anything.
  KDFUSE_DEVICE_MEMBER bool has_list() const {
    return stage_.is_listed(kStudents) && !(Shape::labelled && next_.label < 0);
  }

  KDFUSE_DEVICE_MEMBER uint32_t rows() const { return static_cast<uint32_t>(p_.rows); }

  KDFUSE_DEVICE_MEMBER void open_label(Row& at) const {
    Label<Shape>& y = at.label;
    at.skipped = next_.label < 0;
    y.index = next_.label, y.chunk = next_.chunk, y.mine = next_.mine;
#pragma unroll
    for (int k = 0; k < Shape::kLogits; ++k) y.values[k] = number_of(k, next_.bits[k]);
#pragma unroll
    for (int k = 0; k < kStudents; ++k) y.bits[k] = next_.bits[k], at.ties[k] = next_.ties[k];
  }

  // The label of class probabilities is the likeliest class, for the student's rank of it alone.
  KDFUSE_DEVICE_MEMBER void open_likeliest(Row& at) const {
    Label<Shape>& y = at.label;
    y.index = class_of(next_.likeliest[0]);
    y.chunk = at.span.chunk_of(y.index);
#pragma unroll
    for (int k = 0; k < kStudents; ++k) {
      y.bits[k] = bits_of(k, at.row, y.index), y.values[k] = number_of(k, y.bits[k]);
    }
  }

  KDFUSE_DEVICE_MEMBER void see_probabilities(const Span& span, int u) {
    const Packed<Shape::others> q = stage_.take_other(Shape::kTeachers, u);
    const int first = span.first(stage_.chunk(u));
#pragma unroll
    for (int v = 0; v < kChunk; ++v) {
      const uint64_t rank = rank_of(unpack(q, v), first + v);
      const bool there = static_cast<unsigned>(first + v) < static_cast<unsigned>(span.classes);
      if (there && rank > next_.likeliest[0]) next_.likeliest[0] = rank;
    }
  }

  KDFUSE_DEVICE_MEMBER void find_label(const Span& span) {
    next_.chunk = span.chunk_of(next_.label);
    next_.mine = false;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) next_.mine |= stage_.chunk(u) == next_.chunk;
#pragma unroll
    for (float& ties : next_.ties) ties = 0;
  }

  // Takes the label of the next row out of its chunk.
  KDFUSE_DEVICE_MEMBER void take_label(const Span& span) {
    const int u = next_.chunk / team_.size(), place = next_.label - span.first(next_.chunk);
#pragma unroll
    for (int k = 0; k < kStudents; ++k) {
      const float value = unpack_one<type>(next_.bits[k]);
#pragma unroll 1
      for (int v = next_.chunk == 0 ? span.shift : 0; v < place; ++v) next_.ties[k] += stage_.peek(k, u, v) == value;
    }
    stage_.drop(u, place);
  }

  ListedRow<kStudents> list_;
  uint32_t last_row_ = 0;  // that has been sent for
  int64_t last_label_ = 0;
};

}  // namespace kdfuse
