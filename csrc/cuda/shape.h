// What the rows of a fast call are.
#pragma once
#include "partition.h"

namespace kdfuse {

enum class Labels { none, hard, soft };  // soft: class probabilities

// The students' rows are of one type. any: the teachers' and the probabilities' have types of their own, as the call
// tells, and are float32 in registers.
template <DType type_, int students, int teachers, Labels labels_ = Labels::hard, bool any_ = false>
struct Shape {
  static constexpr DType type = type_, others = any_ ? DType::f32 : type_;
  static constexpr int kStudents = students, kTeachers = teachers, kLogits = students + teachers;
  static constexpr Labels labels = labels_;
  static constexpr bool labelled = labels == Labels::hard, soft = labels == Labels::soft, any = any_;
  static constexpr int kInputs = kLogits + soft, kOthers = kInputs - students;
};

}  // namespace kdfuse
