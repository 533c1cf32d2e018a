// The kernels of a loss of one student under teachers: KDFUSE_OP of losses/all.def with its facts KDFUSE_FACTS.
#include "../core/paste.h"
// clang-format off
#include KDFUSE_TEXT(../losses/KDFUSE_OP.h)
// clang-format on

#include "kernels.h"

namespace kdfuse {
namespace {

using Facts = KDFUSE_FACTS;
using Factors = Facts::Factors<double>;

template <int teachers, Labels labels, bool any = false>
struct Rows {
  template <DType type>
  FastKernels operator()(Type<type>) const {
    return StudentKernels<Facts, Shape<type, 1, teachers, labels, any>>::get();
  }
};

FastKernels fast(const Task& p) {
  const DType type = p.logits[0].type;
  if constexpr (!Facts::kNeedsTarget) {
    if (p.soft.data) return of_trained_type(type, Rows<1, Labels::soft, true>());
  }
  if constexpr (Facts::kManyTeachers) {
    if (p.num_teachers == 2) return of_trained_type(type, Rows<2, Labels::hard>());
  }
  if (p.sparse || !of_one_type(p)) return of_trained_type(type, Rows<1, Labels::hard, true>());
  if constexpr (!Facts::kNeedsTarget) {
    if (!p.labels) return of_type(type, Rows<1, Labels::none>());
  }
  return of_type(type, Rows<1, Labels::hard>());
}

// Which shapes of rows have kernels.
bool has_shape(const Task& p) {
  const bool one_type = !p.sparse && of_one_type(p);
  if (one_type && !p.soft.data && p.num_teachers == 1) return true;
  if (p.logits[0].type == DType::f16) return false;
  if (p.num_teachers == 2) return Facts::kManyTeachers && p.labels && one_type;
  if (p.num_teachers != 1) return false;
  return p.soft.data ? !Facts::kNeedsTarget : p.labels != nullptr;
}

// A weight of 0 leaves out what a row holds, whatever that is: the fast rows multiply.
bool set_fast(const Task& p, FastTask& fast) {
  if (!has_shape(p)) return false;
  if (p.soft.data && p.params[Facts::kCeWeight] == 0) return false;
  constexpr int count = sizeof(Factors) / sizeof(double);
  static_assert((Facts::kManyTeachers ? 2 : 1) * count <= sizeof(fast.params) / sizeof(float) &&
                    sizeof(Facts::Factors<float>) == count * sizeof(float),
                "factors are numbers, few enough for a task");
  for (int k = 0; k < p.num_teachers; ++k) {
    if (!Facts::weighs_all(p.params, k)) return false;
    const Factors factors = Facts::factors<double>(p.params, k);
    double numbers[count];
    std::memcpy(numbers, &factors, sizeof(factors));
    std::copy(numbers, numbers + count, fast.params + k * count);
  }
  fast.ce_weight = static_cast<float>(p.params[Facts::kCeWeight]);
  fast.temperature = static_cast<float>(p.params[0]);
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
