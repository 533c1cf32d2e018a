// The inputs of an op as torch hands them over, checked; and what each op takes and reports. Only
// torch's stable ABI is used.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "limits.h"
#include "types.h"

namespace kdfuse {

// What each op takes, whether it needs the batch mean of its label scores, and the terms that it reports:
// how many, and which count rows rather than average over them.
struct KdFacts {
  static bool fits(size_t students, size_t teachers, size_t params) {
    return students == 1 && teachers >= 1 && params == 4 + teachers;
  }
  static constexpr bool scored = false;
  static constexpr bool takes_top_k = true;
  static constexpr bool needs_target = false;
  static int terms(int) { return 4; }
  static bool counts(int k) { return k >= 2; }
};
struct DkdFacts {
  static bool fits(size_t students, size_t teachers, size_t params) {
    return students == 1 && teachers == 1 && params == 5;
  }
  static constexpr bool scored = false;
  static constexpr bool takes_top_k = false;
  static constexpr bool needs_target = true;
  static int terms(int) { return 5; }
  static bool counts(int k) { return k >= 3; }
};
struct NkdFacts {
  static bool fits(size_t students, size_t teachers, size_t params) {
    return students == 1 && teachers == 1 && params == 4;
  }
  static constexpr bool scored = false;
  static constexpr bool takes_top_k = true;
  static constexpr bool needs_target = true;
  static int terms(int) { return 5; }
  static bool counts(int k) { return k >= 3; }
};
struct TfNkdFacts {
  static bool fits(size_t students, size_t teachers, size_t params) {
    return students == 1 && teachers == 0 && params == 2;
  }
  static constexpr bool scored = true;
  static constexpr bool takes_top_k = false;
  static constexpr bool needs_target = true;
  static int terms(int) { return 4; }
  static bool counts(int k) { return k >= 2; }
};
struct UskdFacts {
  static bool fits(size_t students, size_t teachers, size_t params) {
    return students == 2 && teachers == 0 && params == 5;
  }
  static constexpr bool scored = true;
  static constexpr bool takes_top_k = false;
  static constexpr bool needs_target = true;
  static int terms(int) { return 6; }
  static bool counts(int k) { return k >= 4; }
};
struct SlkdFacts {
  static bool fits(size_t students, size_t teachers, size_t params) {
    return students >= 2 && teachers == 1 && params == 6 + students;
  }
  static constexpr bool scored = false;
  static constexpr bool takes_top_k = false;
  static constexpr bool needs_target = true;
  static int terms(int students) { return 5 + 4 * (students - 1); }
  static bool counts(int k) { return k < 5 ? k >= 3 : (k - 5) % 4 >= 2; }
};

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument("kdfuse: " + what); }

inline DType type_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      refuse("logits must have a floating type (float16, bfloat16, float32 or float64)");
  }
}

inline Matrix matrix(const torch::stable::Tensor& x, int64_t rows, int64_t classes, const char* name) {
  if (x.dim() != 2 || x.size(0) != rows || x.size(1) != classes) {
    refuse(std::string(name) + " must have shape (" + std::to_string(rows) + ", " + std::to_string(classes) + ")");
  }
  if (classes > 1 && rows > 0 && x.stride(1) != 1) {
    refuse(std::string(name) + " must have unit stride along the classes; call .contiguous()");
  }
  return {x.data_ptr(), x.stride(0), type_of(x)};
}

inline std::vector<Matrix> matrices(const std::vector<torch::stable::Tensor>& xs, int64_t rows, int64_t classes,
                                    const char* name) {
  std::vector<Matrix> out;
  for (const auto& x : xs) out.push_back(matrix(x, rows, classes, name));
  return out;
}

template <class Facts>
void check_call(const std::vector<torch::stable::Tensor>& students, const std::vector<torch::stable::Tensor>& teachers,
                bool has_target, const std::vector<double>& params) {
  if (students.empty() || students[0].dim() != 2 || students[0].size(1) < 1) {
    refuse("student must have shape (N, C), C at least 1");
  }
  if (students.size() + teachers.size() + 4 > kMaxStreams) refuse("too many teachers or SL-Ts");
  if (!Facts::fits(students.size(), teachers.size(), params.size())) {
    refuse("this op does not take " + std::to_string(students.size()) + " students, " +
           std::to_string(teachers.size()) + " teachers and " + std::to_string(params.size()) + " params");
  }
  if (Facts::needs_target && !has_target) refuse("target is needed");
}

// Top-k teachers, for the ops that do not take them.
inline void refuse_sparse(const std::vector<torch::stable::Tensor>& indices,
                          const std::vector<torch::stable::Tensor>& masses) {
  if (!indices.empty() || !masses.empty()) refuse("this op takes whole teacher logits only");
}

enum Reduction { kNone, kMean, kSum };

}  // namespace kdfuse
