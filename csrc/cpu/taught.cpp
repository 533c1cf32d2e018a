// A loss of one student under teachers on the CPU: KDFUSE_OP of losses/all.def with its facts KDFUSE_FACTS, for one
// instruction-set level.
#define KDFUSE_TEXT_(x) #x
#define KDFUSE_TEXT(x) KDFUSE_TEXT_(x)
// clang-format off
#include KDFUSE_TEXT(../losses/KDFUSE_OP.h)
// clang-format on

#include "../sharded/rows_taught.h"
#include "each_row.h"
#include "op_table.h"
#include "rows_taught.h"

namespace kdfuse {
namespace {

using Facts = KDFUSE_FACTS;

bool fits(size_t students, size_t teachers, size_t params) {
  const size_t of_teachers = Facts::kManyTeachers ? teachers : 0;
  return students == 1 && teachers >= 1 && (Facts::kManyTeachers || teachers == 1) &&
         params == Facts::kParams + of_teachers;
}
int terms(int) { return Facts::kTerms + 3; }
bool counts(int term) { return term > Facts::kTerms; }

}  // namespace

OpOnCpu KDFUSE_JOIN(KDFUSE_OP, KDFUSE_LEVEL)() {
  return {{fits, terms, counts, Facts::kTakesTopK, Facts::kNeedsTarget, false, false},
          {nullptr, rows_of<Problem, taught_row<Facts, float>, taught_row<Facts, double>>},
          {split_stats_of<taught_plan<Facts>>,
           rows_of<SplitProblem, split_taught_row<Facts, float>, split_taught_row<Facts, double>>}};
}

}  // namespace kdfuse
