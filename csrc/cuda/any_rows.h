// Any rows of an op (any_taught.h, any_others.h, any_uskd.h), for run_batch().
#pragma once
#include "any_others.h"
#include "any_taught.h"
#include "any_uskd.h"

namespace kdfuse {

template <class T, class Team>
using RowFunction = void (*)(const Team&, const Task&, int64_t, const Span&);

// score: of the ops that need their batch mean, or null.
template <class T, class Team, RowFunction<T, Team> of_row, RowFunction<T, Team> of_score>
class General {
 public:
  using Index = int64_t;
  static constexpr bool kScored = of_score != nullptr;

  KDFUSE_DEVICE_MEMBER General(const Team& team, const Task& p) : team_(team), p_(p) {}

  KDFUSE_DEVICE_MEMBER void fetch(int64_t) {}
  KDFUSE_DEVICE_MEMBER void begin() {}

  KDFUSE_DEVICE_MEMBER void score(int64_t row, int64_t) {
    if (ignored(p_, row)) return;
    of_score(team_, p_, row, span_of(p_, row, sizeof(T) == sizeof(float)));
    team_.sync();  // before the next row takes the team's memory
  }

  KDFUSE_DEVICE_MEMBER void run(int64_t row, int64_t) {
    const Span span = span_of(p_, row, sizeof(T) == sizeof(float));
    if (ignored(p_, row)) return write_nothing<T>(team_, p_, row, span);
    of_row(team_, p_, row, span);
    team_.sync();
  }

 private:
  const Team& team_;
  const Task& p_;
};

}  // namespace kdfuse
