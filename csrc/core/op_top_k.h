// The top-k teachers of an op as torch hands them over, checked.
#pragma once
#include <sstream>
#include <string>
#include <vector>

#include "op_inputs.h"

namespace kdfuse {

// As the caller knows it: kernels/op.py names it alike.
inline std::string teacher_name(size_t which, size_t count) {
  return count == 1 ? "teacher" : "teacher[" + std::to_string(which) + "]";
}

// One entry for each teacher, or none where all are whole. An op of `teachers` has either no `indices`
// and `masses`, or one of each a teacher: (rows, k) classes and (rows,) masses, or empty tensors.
inline std::vector<TopK> top_k_of(const std::vector<torch::stable::Tensor>& teachers,
                                  const std::vector<torch::stable::Tensor>& indices,
                                  const std::vector<torch::stable::Tensor>& masses, int64_t rows, int64_t classes) {
  using torch::headeronly::ScalarType;
  if (indices.empty() && masses.empty()) return {};
  if (indices.size() != teachers.size() || masses.size() != teachers.size()) {
    refuse("indices and masses must be empty or as many as the " + std::to_string(teachers.size()) + " teachers, got " +
           std::to_string(indices.size()) + " and " + std::to_string(masses.size()));
  }
  std::vector<TopK> out(teachers.size());
  for (size_t i = 0; i < teachers.size(); ++i) {
    const auto &index = indices[i], &mass = masses[i];
    const std::string name = teacher_name(i, teachers.size());
    const bool has_mass = !(mass.dim() == 1 && mass.size(0) == 0);
    if (index.dim() == 1 && index.size(0) == 0) {
      if (has_mass) refuse(name + " has a mass, but no indices");
      continue;
    }
    TopK& top = out[i];
    if (index.dim() != 2 || index.size(0) != rows || index.scalar_type() != ScalarType::Long) {
      refuse(name + ".indices must be int64 of shape (" + std::to_string(rows) + ", k)");
    }
    top.count = index.size(1);
    if (top.count < 1 || top.count >= classes) {
      refuse(name + ".values.shape[1] is " + std::to_string(top.count) + ", but of " + std::to_string(classes) +
             " classes 1 to " + std::to_string(classes - 1) + " can be listed");
    }
    if (top.count > 1 && rows > 0 && index.stride(1) != 1) {
      refuse(name + ".indices must have unit stride along a row; call .contiguous()");
    }
    top.classes = static_cast<const int64_t*>(index.data_ptr());
    top.stride = index.stride(0);
    if (!has_mass) continue;
    const auto type = mass.scalar_type();
    if (mass.dim() != 1 || mass.size(0) != rows || (type != ScalarType::Float && type != ScalarType::Double)) {
      refuse(name + ".mass must be float32 or float64 of shape (" + std::to_string(rows) + ",)");
    }
    top.mass = {mass.data_ptr(), mass.stride(0), type_of(mass)};
  }
  return out;
}

// The logits of all teachers: (rows, classes), or (rows, k) values.
inline std::vector<Matrix> teacher_matrices(const std::vector<torch::stable::Tensor>& teachers,
                                            const std::vector<TopK>& top_k, int64_t rows, int64_t classes) {
  std::vector<Matrix> out;
  for (size_t i = 0; i < teachers.size(); ++i) {
    const int64_t count = top_k.empty() ? 0 : top_k[i].count;
    out.push_back(matrix(teachers[i], rows, count > 0 ? count : classes, "teacher"));
  }
  return out;
}

// Classes and masses in host memory: those of the rows that count.
inline void check_entries(const std::vector<TopK>& top_k, const std::vector<int64_t>& labels, int64_t ignore_index,
                          int64_t rows, int64_t classes) {
  std::vector<int64_t> seen;  // by which row a class was listed last
  for (size_t i = 0; i < top_k.size(); ++i) {
    const TopK& top = top_k[i];
    if (top.count == 0) continue;
    seen.assign(classes, -1);
    const std::string name = teacher_name(i, top_k.size());
    for (int64_t row = 0; row < rows; ++row) {
      if (!labels.empty() && labels[row] == ignore_index) continue;
      for (int64_t j = 0; j < top.count; ++j) {
        const int64_t y = top.classes[row * top.stride + j];
        const bool outside = y < 0 || y >= classes;
        if (outside || seen[y] == row) {
          refuse(name + ".indices[" + std::to_string(row) + ", " + std::to_string(j) + "] is " + std::to_string(y) +
                 (outside ? ", outside the " + std::to_string(classes) + " classes"
                          : ", listed twice in its row; list a class once"));
        }
        seen[y] = row;
      }
      const double mass = top.mass.data ? mass_at(top, row) : 0;
      if (mass < 0 || mass >= 1) {  // NaN reaches the loss, as it does in logits
        std::ostringstream shown;
        shown << mass;
        refuse(name + ".mass[" + std::to_string(row) + "] is " + shown.str() +
               ", outside [0, 1); it is the softmax's mass of the classes left out");
      }
    }
  }
}

}  // namespace kdfuse
