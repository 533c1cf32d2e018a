// What a loss of one student under teachers takes and reports: KDFUSE_OP of all.def with its facts KDFUSE_FACTS.
#include "../core/paste.h"
// clang-format off
#include KDFUSE_TEXT(KDFUSE_OP.h)
// clang-format on

#include "op_facts.h"

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

OpFacts KDFUSE_JOIN(KDFUSE_OP, facts)() {
  return {fits, terms, counts, Facts::kTakesTopK, Facts::kNeedsTarget, false, false};
}

}  // namespace kdfuse
