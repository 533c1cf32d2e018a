// What the ops with row passes of their own take and report; the fields in the order of OpFacts.
#include "op_facts.h"

namespace kdfuse {

OpFacts tf_nkd_facts() {
  return {[](size_t students, size_t teachers, size_t params) { return students == 1 && !teachers && params == 2; },
          [](int) { return 4; },
          [](int term) { return term >= 2; },
          false,
          true,
          true,
          false};
}

OpFacts uskd_facts() {
  return {[](size_t students, size_t teachers, size_t params) { return students == 2 && !teachers && params == 5; },
          [](int) { return 6; },
          [](int term) { return term >= 4; },
          false,
          true,
          true,
          false};
}

OpFacts slkd_facts() {
  return {[](size_t students, size_t teachers, size_t params) {
            return students >= 2 && teachers == 1 && params == 6 + students;
          },
          [](int students) { return 5 + 4 * (students - 1); },
          [](int term) { return term < 5 ? term >= 3 : (term - 5) % 4 >= 2; },
          false,
          true,
          false,
          true};
}

}  // namespace kdfuse
