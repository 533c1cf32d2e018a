// The row pass on the CPU, compiled once for each instruction-set level (KDFUSE_LEVEL). A row pass
// reads each input row once from memory; what follows stays in the caches.
#include "../sharded/losses.h"
#include "rows_self.h"
#include "rows_slkd.h"
#include "rows_teacher.h"

namespace kdfuse {
namespace {

template <class T, void (*Row)(const Problem&, int64_t, Scratch<T>&)>
void each_row(const Problem& p, int64_t begin, int64_t end) {
  static thread_local Scratch<T> scratch;
  for (int64_t row = begin; row < end; ++row) {
    if (ignored(p, row)) {
      write_nothing(p, row);
    } else {
      Row(p, row, scratch);
    }
  }
}

template <void (*Float)(const Problem&, int64_t, Scratch<float>&),
          void (*Double)(const Problem&, int64_t, Scratch<double>&)>
void rows_of(const Problem& p, int64_t begin, int64_t end) {
  return p.wide ? each_row<double, Double>(p, begin, end) : each_row<float, Float>(p, begin, end);
}

}  // namespace

#define KDFUSE_JOIN_(a, b) a##b
#define KDFUSE_JOIN(a, b) KDFUSE_JOIN_(a, b)

RowPasses KDFUSE_JOIN(row_passes_, KDFUSE_LEVEL)() {
  return {
      {nullptr, rows_of<kd_row<float>, kd_row<double>>},
      {nullptr, rows_of<dkd_row<float>, dkd_row<double>>},
      {nullptr, rows_of<nkd_row<float>, nkd_row<double>>},
      {rows_of<tf_nkd_score<float>, tf_nkd_score<double>>, rows_of<tf_nkd_row<float>, tf_nkd_row<double>>},
      {rows_of<uskd_score<float>, uskd_score<double>>, rows_of<uskd_row<float>, uskd_row<double>>},
      {nullptr, rows_of<slkd_row<float>, slkd_row<double>>},
      {split_stats_of<kd_plan>, split_rows_of<split_kd_row<float>, split_kd_row<double>>},
      {split_stats_of<dkd_plan>, split_rows_of<split_dkd_row<float>, split_dkd_row<double>>},
      {split_stats_of<nkd_plan>, split_rows_of<split_nkd_row<float>, split_nkd_row<double>>},
      {split_stats_of<tf_nkd_plan>, split_rows_of<split_tf_nkd_row<float>, split_tf_nkd_row<double>>},
      {split_stats_of<slkd_plan>, split_rows_of<split_slkd_row<float>, split_slkd_row<double>>},
  };
}

}  // namespace kdfuse
