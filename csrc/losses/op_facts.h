// What each op takes and reports, in the library for the CPU and in that for CUDA.
#pragma once
#include "../core/types.h"

namespace kdfuse {

#define KDFUSE_OTHER(name) OpFacts name##_facts();
#include "all.def"

inline OpFacts facts_of(Loss loss) {
  switch (loss) {
#define KDFUSE_OTHER(name) \
  case Loss::name:         \
    return name##_facts();
#include "all.def"
  }
  return {};
}

}  // namespace kdfuse
