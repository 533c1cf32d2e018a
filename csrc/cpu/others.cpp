// The ops with row passes of their own on the CPU, for one instruction-set level.
#include "../sharded/rows_others.h"
#include "each_row.h"
#include "op_table.h"
#include "rows_self.h"
#include "rows_slkd.h"

namespace kdfuse {

OpOnCpu KDFUSE_JOIN(tf_nkd, KDFUSE_LEVEL)() {
  return {{[](size_t students, size_t teachers, size_t params) { return students == 1 && !teachers && params == 2; },
           [](int) { return 4; }, [](int term) { return term >= 2; }, false, true, true, false},
          {rows_of<Problem, tf_nkd_score<float>, tf_nkd_score<double>>,
           rows_of<Problem, tf_nkd_row<float>, tf_nkd_row<double>>},
          {split_stats_of<tf_nkd_plan>, rows_of<SplitProblem, split_tf_nkd_row<float>, split_tf_nkd_row<double>>}};
}

OpOnCpu KDFUSE_JOIN(uskd, KDFUSE_LEVEL)() {
  return {
      {[](size_t students, size_t teachers, size_t params) { return students == 2 && !teachers && params == 5; },
       [](int) { return 6; }, [](int term) { return term >= 4; }, false, true, true, false},
      {rows_of<Problem, uskd_score<float>, uskd_score<double>>, rows_of<Problem, uskd_row<float>, uskd_row<double>>},
      {nullptr, nullptr}};
}

OpOnCpu KDFUSE_JOIN(slkd, KDFUSE_LEVEL)() {
  return {{[](size_t students, size_t teachers, size_t params) {
             return students >= 2 && teachers == 1 && params == 6 + students;
           },
           [](int students) { return 5 + 4 * (students - 1); },
           [](int term) { return term < 5 ? term >= 3 : (term - 5) % 4 >= 2; }, false, true, false, true},
          {nullptr, rows_of<Problem, slkd_row<float>, slkd_row<double>>},
          {split_stats_of<slkd_plan>, rows_of<SplitProblem, split_slkd_row<float>, split_slkd_row<double>>}};
}

}  // namespace kdfuse
