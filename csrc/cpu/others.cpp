// The ops with row passes of their own on the CPU, for one instruction-set level.
#include "../sharded/rows_others.h"
#include "each_row.h"
#include "op_table.h"
#include "rows_self.h"
#include "rows_slkd.h"

namespace kdfuse {

OpOnCpu KDFUSE_JOIN(tf_nkd, KDFUSE_LEVEL)() {
  return {{rows_of<Problem, tf_nkd_score<float>, tf_nkd_score<double>>,
           rows_of<Problem, tf_nkd_row<float>, tf_nkd_row<double>>},
          {split_stats_of<tf_nkd_plan>, rows_of<SplitProblem, split_tf_nkd_row<float>, split_tf_nkd_row<double>>}};
}

OpOnCpu KDFUSE_JOIN(uskd, KDFUSE_LEVEL)() {
  return {
      {rows_of<Problem, uskd_score<float>, uskd_score<double>>, rows_of<Problem, uskd_row<float>, uskd_row<double>>},
      {nullptr, nullptr}};
}

OpOnCpu KDFUSE_JOIN(slkd, KDFUSE_LEVEL)() {
  return {{nullptr, rows_of<Problem, slkd_row<float>, slkd_row<double>>},
          {split_stats_of<slkd_plan>, rows_of<SplitProblem, split_slkd_row<float>, split_slkd_row<double>>}};
}

}  // namespace kdfuse
