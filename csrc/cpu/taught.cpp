// A loss of one student under teachers on the CPU: KDFUSE_OP of losses/all.def with its facts KDFUSE_FACTS, for one
// instruction-set level.
#include "../core/paste.h"
// clang-format off
#include KDFUSE_TEXT(../losses/KDFUSE_OP.h)
// clang-format on

#include "../sharded/rows_taught.h"
#include "each_row.h"
#include "op_table.h"
#include "rows_taught.h"

namespace kdfuse {

OpOnCpu KDFUSE_JOIN(KDFUSE_OP, KDFUSE_LEVEL)() {
  using Facts = KDFUSE_FACTS;
  return {{nullptr, rows_of<Problem, taught_row<Facts, float>, taught_row<Facts, double>>},
          {split_stats_of<taught_plan<Facts>>,
           rows_of<SplitProblem, split_taught_row<Facts, float>, split_taught_row<Facts, double>>}};
}

}  // namespace kdfuse
