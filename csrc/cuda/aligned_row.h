// A row of the fast path in registers: its way there, its label and its peaks, and what stands beside the
// loops over whole chunks. Every thread has kChunks chunks of a row; while it works on them the next row's
// are on their way (prefetch.h).
//
// The label and what chunks have outside the row stand at -inf, so that every loop runs over the rest
// alone. What few elements need is done element by element beside the loops: ties of the label's own
// chunk, chunks that the row shares with its neighbours, the label's gradient.
#pragma once
#include "coefficients.h"
#include "prefetch.h"
#include "rank.h"

namespace kdfuse {

KDFUSE_DEVICE Span fast_span(int classes, DType type, const void* row) {
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(row) >> log_bytes(type)) & (kChunk - 1);
  return {classes, shift, static_cast<int>(static_cast<unsigned>(classes + shift + kChunk - 1) / kChunk)};
}

template <int kInputs>
struct Label {
  int index = kNowhere;
  int chunk = -1, u = 0, v = 0;
  bool mine = false;  // in a chunk of this thread
  uint32_t bits[kInputs] = {};  // its logits as they come
  float values[kInputs] = {};
};

template <int kInputs>
struct FastRow {
  int64_t row;
  const char* logits[kInputs];  // class 0 of each
  Span span;
  bool skipped;  // by its label
  Label<kInputs> label;
  float ties[kInputs];  // classes of the label's chunk that come before it by their place alone
  float peak[kInputs];  // of the rest
};

template <DType type, int kStudents, int kTeachers, bool labelled, int kChunks, class Team>
class FastRows {
 public:
  static constexpr int kInputs = kStudents + kTeachers;
  static constexpr int kThreadBytes = Stage<type, kInputs, kChunks, Team>::kBytes;
  using Row = FastRow<kInputs>;

  KDFUSE_DEVICE_MEMBER FastRows(const Team& team, const FastTask& p) : team_(team), p_(p), stage_(team) {
    stage_.clear();
  }

  KDFUSE_DEVICE_MEMBER void fetch(int64_t row) {
    if (row >= p_.rows) return;
    const char* rows[kInputs];
    find(row, rows);
    const Span span = span_at(rows[0]);
    stage_.fetch(rows, span, span.chunks - (row >= p_.guarded));
    if (labelled) next_label_ = p_.labels[row * p_.label_stride];
  }

 protected:
  KDFUSE_DEVICE_MEMBER void* gradient(int k, int64_t row) const {
    return static_cast<char*>(p_.gradients[k]) + row * p_.classes * bytes_of(gradient_type<type>);
  }

  // Takes the row from its places, makes its peaks and sends for the next row. last(k, x) may see each
  // input's chunks on the way.
  KDFUSE_DEVICE_MEMBER Row open(int64_t row, int64_t next) {
    Row at = {};
    at.row = row;
    find(row, at.logits);
    at.span = span_at(at.logits[0]);
    if constexpr (labelled) open_label(at);
    wait_for_copies();
    if (!p_.whole) stage_.trim(at.logits, at.span, row >= p_.guarded);
    if (labelled && at.label.mine) take_label(at);
    uint32_t top[kInputs];
#pragma unroll
    for (uint32_t& w : top) w = nothing<type>().w[0];
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!stage_.has(at.span, u)) continue;
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
        x_[k][u] = stage_.take(k, u);
        top[k] = largest_word(x_[k][u], top[k]);
      }
    }
    uint32_t words[peak_words<type, kInputs>];
    gather_peaks<type>(top, words);
    team_.template join<Larger<type>>(words);
    spread_peaks<type>(words, at.peak);
    fetch(next);
    // Where nothing else is finite the label stands in for the peak, so that the row keeps its distribution.
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      const float label = labelled ? at.label.values[k] : -INFINITY;
      if (at.peak[k] == -INFINITY) at.peak[k] = label != -INFINITY ? label : 0.f;
    }
    return at;
  }

  // Counts what comes before the label in the u-th chunk of the k-th student.
  KDFUSE_DEVICE_MEMBER void count_ahead(const Row& at, const Threshold<type>& threshold, int k, int u,
                                        typename Threshold<type>::Count& count) const {
    threshold.count(x_[k][u], stage_.chunk(u) < at.label.chunk, count);
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
  Stage<type, kInputs, kChunks, Team> stage_;
  Packed<type> x_[kInputs][kChunks];

 private:
  // Class 0 of each input.
  KDFUSE_DEVICE_MEMBER void find(int64_t row, const char* (&rows)[kInputs]) const {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) rows[k] = static_cast<const char*>(p_.logits[k]) + product(row, p_.steps[k]);
  }

  KDFUSE_DEVICE_MEMBER void open_label(Row& at) const {
    Label<kInputs>& y = at.label;
    at.skipped = next_label_ == p_.ignore_index;
    y.index = at.skipped ? 0 : static_cast<int>(next_label_);
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      y.bits[k] = load_bits<type>(at.logits[k], y.index);
      y.values[k] = unpack_one<type>(y.bits[k]);
    }
    y.chunk = static_cast<int>(static_cast<unsigned>(y.index + at.span.shift) / kChunk);
    const unsigned chunk = y.chunk, size = team_.size();
    y.mine = static_cast<int>(chunk % size) == team_.rank();
    y.u = static_cast<int>(chunk / size);
    y.v = y.index - at.span.first(y.chunk);
  }

  KDFUSE_DEVICE_MEMBER void take_label(Row& at) const {
    const Label<kInputs>& y = at.label;
#pragma unroll
    for (int k = 0; k < kStudents; ++k) {
#pragma unroll 1
      for (int v = y.chunk == 0 ? at.span.shift : 0; v < y.v; ++v) at.ties[k] += stage_.peek(k, y.u, v) == y.values[k];
    }
    stage_.drop(y.u, y.v);
  }

  KDFUSE_DEVICE_MEMBER Span span_at(const void* row) const { return fast_span(p_.classes, type, row); }

  int64_t next_label_ = 0;  // of the row that is on its way
};

}  // namespace kdfuse
