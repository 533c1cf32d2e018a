// The kernels of a loss of one student under teachers: KDFUSE_OP of losses/all.def with its facts KDFUSE_FACTS.
#define KDFUSE_TEXT_(x) #x
#define KDFUSE_TEXT(x) KDFUSE_TEXT_(x)
// clang-format off
#include KDFUSE_TEXT(../losses/KDFUSE_OP.h)
// clang-format on

#include "kernels.h"

#define KDFUSE_JOIN_(a, b) a##_##b
#define KDFUSE_JOIN(a, b) KDFUSE_JOIN_(a, b)

namespace kdfuse {
namespace {

using Facts = KDFUSE_FACTS;
using Factors = Facts::Factors<double>;

#define KDFUSE_LABELLED(type) PairKernels<Facts, type, true>::get()
#define KDFUSE_BARE(type) PairKernels<Facts, type, false>::get()
FastKernels fast(const Task& p) {
  const DType type = p.logits[0].type;
  if constexpr (!Facts::kNeedsTarget) {
    if (!p.labels) return KDFUSE_FOR_TYPE(type, KDFUSE_BARE);
  }
  return KDFUSE_FOR_TYPE(type, KDFUSE_LABELLED);
}

// A weight of 0 leaves out what a row holds, whatever that is: the fast rows multiply.
bool set_fast(const Task& p, FastTask& fast) {
  if (p.num_teachers != 1 || p.sparse || !Facts::weighs_all(p.params)) return false;
  const Factors factors = Facts::factors<double>(p.params, 0);
  constexpr int count = sizeof(Factors) / sizeof(double);
  static_assert(count <= sizeof(fast.params) / sizeof(float) && sizeof(Facts::Factors<float>) == count * sizeof(float),
                "factors are numbers, few enough for a task");
  double numbers[count];
  std::memcpy(numbers, &factors, sizeof(factors));
  std::copy(numbers, numbers + count, fast.params);
  fast.ce_weight = static_cast<float>(p.params[Facts::kCeWeight]);
  fast.step = static_cast<float>(kLog2OfE / p.params[0]);
  fast.squarings = p.params[0] == 1 ? 0 : p.params[0] == 2 ? 1 : p.params[0] == 4 ? 2 : -1;
  fast.own_step = Facts::kStudentAt1 ? static_cast<float>(kLog2OfE) : fast.step;
  return true;
}

GeneralKernels general() {
  return general_kernels<taught_row<Facts, float, Warp>, taught_row<Facts, float, Block>,
                         taught_row<Facts, double, Block>>();
}

}  // namespace

LossKernels KDFUSE_JOIN(KDFUSE_OP, kernels)() { return {set_fast, fast, general, false, false, false}; }

}  // namespace kdfuse
