// The inputs of an op as torch hands them over, checked. Only torch's stable ABI is used.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "limits.h"
#include "types.h"

namespace kdfuse {

// A RuntimeError in Python under every torch; 2.11 makes other errors of other exceptions.
[[noreturn]] inline void refuse(const std::string& what) { throw std::runtime_error("kdfuse: " + what); }

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

inline void check_call(const OpFacts& facts, const std::vector<torch::stable::Tensor>& students,
                       const std::vector<torch::stable::Tensor>& teachers, bool has_target,
                       const std::vector<double>& params) {
  if (students.empty() || students[0].dim() != 2 || students[0].size(1) < 1) {
    refuse("student must have shape (N, C), C at least 1");
  }
  if (students.size() + teachers.size() + 4 > kMaxStreams) refuse("too many teachers or SL-Ts");
  if (!facts.fits(students.size(), teachers.size(), params.size())) {
    refuse("this op does not take " + std::to_string(students.size()) + " students, " +
           std::to_string(teachers.size()) + " teachers and " + std::to_string(params.size()) + " params");
  }
  if (facts.needs_target && !has_target) refuse("target is needed");
}

// Top-k teachers, for the ops that do not take them.
inline void refuse_sparse(const std::vector<torch::stable::Tensor>& indices,
                          const std::vector<torch::stable::Tensor>& masses) {
  if (!indices.empty() || !masses.empty()) refuse("this op takes whole teacher logits only");
}

enum Reduction { kNone, kMean, kSum };

}  // namespace kdfuse
