// The rows of a top-k teacher: each warp makes them of their lists, in the places of its threads.
#pragma once
#include "listed.h"
#include "prefetch.h"
#include "team.h"

namespace kdfuse {

// The row that is open, and the next one. which: the teacher's place among the inputs.
template <int which>
class ListedRow {
 public:
  KDFUSE_DEVICE_MEMBER explicit ListedRow(const FastTask& p) : p_(p) {}

  // Sends for the next row's list: an entry for each lane of a warp.
  KDFUSE_DEVICE_MEMBER void send(uint32_t row) {
    if (lane() < p_.listed.count) first_ = entry(row, lane());
  }

  // Makes the next row; returns the logit of `label`, where that is a class.
  template <class Stage>
  KDFUSE_DEVICE_MEMBER float take(const Stage& stage, uint32_t row, const Span& span, int label) {
    float most[2] = {-INFINITY, -1};  // of the logits; the label's place in the list
    each_entry(row, [&](int i, const Entry& of) {
      most[0] = of.logit > most[0] ? of.logit : most[0];
      if (of.index == label) most[1] = static_cast<float>(i);
    });
    Warp::join(joint<Max>(most));
    next_ = {};
    if (p_.listed.mass.data) {
      const float origin = most[0] - most[0] == 0 ? most[0] : 0.f;
      float sum[1] = {0};
      each_entry(row, [&](int, const Entry& of) { sum[0] += power((of.logit - origin) * p_.step); });
      Warp::join(joint<Sum>(sum));
      const float mass = static_cast<float>(number(numbers_of(p_.listed.mass), row));
      next_ = unlisted(origin, sum[0], mass, static_cast<float>(p_.classes - p_.listed.count), p_.temperature);
    }
    stage.fill(which, span, next_.fill);
    Warp::sync();
    each_entry(row, [&](int, const Entry& of) { stage.fill_class(which, span, of.index, of.logit - next_.shift); });
    Warp::sync();
    const int place = static_cast<int>(most[1]);
    return place < 0 ? next_.fill : entry(row, place).logit - next_.shift;
  }

  // The next row is open.
  KDFUSE_DEVICE_MEMBER void turn() { open_ = next_; }

  KDFUSE_DEVICE_MEMBER float logit(uint32_t row, int j) const {
    float logit = open_.fill;
#pragma unroll 1
    for (int i = 0; i < p_.listed.count; ++i) {
      const Entry of = entry(row, i);
      if (of.index == j) logit = of.logit - open_.shift;
    }
    return logit;
  }

 private:
  KDFUSE_DEVICE_MEMBER static int lane() { return threadIdx.x % kLanes; }

  KDFUSE_DEVICE_MEMBER Entry entry(uint32_t row, int i) const {
    const int64_t index = p_.listed.classes[row * p_.listed.stride + i];
    assert(index >= 0 && index < p_.classes && "kdfuse: an index of a top-k teacher is outside the classes");
    const char* const from = static_cast<const char*>(p_.logits[which]) + uint64_t{row} * p_.steps[which];
    const uint32_t bits =
        p_.listed_type == DType::f32 ? load_bits<DType::f32>(from, i) : load_bits<DType::bf16>(from, i);
    return {static_cast<int>(index), unpack_one(p_.listed_type, bits)};
  }

  // Each in one lane of every warp: see(i, entry).
  template <class F>
  KDFUSE_DEVICE_MEMBER void each_entry(uint32_t row, F see) const {
    if (lane() < p_.listed.count) see(lane(), first_);
#pragma unroll 1
    for (int i = lane() + kLanes; i < p_.listed.count; i += kLanes) see(i, entry(row, i));
  }

  const FastTask& p_;
  Entry first_;
  Unlisted<float> next_, open_;
};

}  // namespace kdfuse
