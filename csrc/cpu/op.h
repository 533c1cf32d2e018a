// What the CPU ops have around their row passes: numbers and labels in, gradients and batch sums out.
// Only torch's stable ABI is used.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../core/op_inputs.h"

namespace kdfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch::stable::empty looks its op up by name and boxes what it gets, for longer than a small loss takes.
inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  const int64_t strides[] = {shape.size() == 2 ? shape.end()[-1] : 1, 1};
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  if (aoti_torch_empty_strided(shape.size(), shape.begin(), strides, code, aoti_torch_device_type_cpu(), 0, &made)) {
    throw std::runtime_error("torch has no memory for a tensor of this loss");
  }
  return Tensor(made);
}

inline std::vector<double> numbers(const Tensor& x, const char* name) {
  if (x.dim() > 1 || (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::Double)) {
    refuse(std::string(name) + " must be a float32 or float64 tensor of at most one dimension");
  }
  const int64_t n = x.numel(), stride = x.dim() == 1 ? x.stride(0) : 1;
  std::vector<double> out(n);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = x.scalar_type() == ScalarType::Float ? static_cast<const float*>(x.data_ptr())[i * stride]
                                                  : static_cast<const double*>(x.data_ptr())[i * stride];
  }
  return out;
}

// Class indices, checked, or an empty vector where the target is class probabilities.
inline std::vector<int64_t> read_labels(const Tensor& target, int64_t rows, int64_t classes, int64_t ignore_index) {
  if (target.dim() == 2) return {};
  if (target.scalar_type() != ScalarType::Long || target.dim() != 1 || target.size(0) != rows) {
    refuse("target must be int64 class indices of shape (" + std::to_string(rows) + ",) or class probabilities");
  }
  std::vector<int64_t> labels(rows);
  const auto* data = static_cast<const int64_t*>(target.data_ptr());
  const int64_t stride = target.stride(0);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = labels[i] = data[i * stride];
    if (y != ignore_index && (y < 0 || y >= classes)) {
      refuse("target[" + std::to_string(i) + "] is " + std::to_string(y) + ", outside the " + std::to_string(classes) +
             " classes; mark rows to skip with ignore_index (" + std::to_string(ignore_index) + ")");
    }
  }
  return labels;
}

// What the sum over the rows is multiplied by.
inline double scale_of(int64_t reduction, const std::optional<Tensor>& denominator, std::optional<double> number,
                       int64_t valid) {
  if (reduction != kMean) return 1;
  const double divisor = denominator ? numbers(*denominator, "denominator").at(0)
                         : number    ? *number
                                     : std::max<int64_t>(valid, 1);
  if (!(divisor > 0)) refuse("denominator must be positive, got " + std::to_string(divisor));
  return 1 / divisor;
}

// The weight of each row's loss in what is differentiated.
inline std::vector<double> row_weights(const std::optional<Tensor>& upstream, int64_t rows, double scale) {
  std::vector<double> weights(rows, scale);
  if (!upstream) return weights;
  const auto given = numbers(*upstream, "upstream");
  if (given.size() != 1 && static_cast<int64_t>(given.size()) != rows) refuse("upstream must have 1 or N numbers");
  for (int64_t i = 0; i < rows; ++i) weights[i] *= given[given.size() == 1 ? 0 : i];
  return weights;
}

inline void put(const Tensor& to, int64_t i, double value) {
  if (to.scalar_type() == ScalarType::Double) {
    static_cast<double*>(to.data_ptr())[i] = value;
  } else {
    static_cast<float*>(to.data_ptr())[i] = static_cast<float>(value);
  }
}

// The system hands out a large tensor's memory as it is first written; in 4 KiB pages that takes
// longer than the loss.
inline void ask_for_large_pages(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21, least = 4 * page;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t end = begin + x.numel() * x.element_size();
  if (end - begin < least) return;
  const uintptr_t first = (begin + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), end / page * page - first, MADV_HUGEPAGE);
#else
  (void)x;
#endif
}

inline std::vector<Tensor> gradients_of(const std::vector<Tensor>& students) {
  std::vector<Tensor> gradients;
  for (const Tensor& x : students) {
    // float16 would lose what lies below 6e-8 before a loss scaler could lift it.
    const auto type = x.scalar_type() == ScalarType::Half ? ScalarType::Float : x.scalar_type();
    gradients.push_back(empty({x.size(0), x.size(1)}, type));
    ask_for_large_pages(gradients.back());
  }
  return gradients;
}

inline std::vector<Output> outputs_of(const std::vector<Tensor>& gradients) {
  std::vector<Output> outputs;
  for (const Tensor& x : gradients) outputs.push_back({x.data_ptr(), type_of(x)});
  return outputs;
}

// Means of the label scores over the valid rows, summed in row order.
inline void score_means(Problem& p, const std::vector<int64_t>& labels, int64_t valid) {
  p.score_mean[0] = p.score_mean[1] = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!labels.empty() && labels[i] == p.ignore_index) continue;
    for (int k = 0; k < 2; ++k) p.score_mean[k] += p.scores[2 * i + k];
  }
  for (double& mean : p.score_mean) mean /= std::max<int64_t>(valid, 1);
}

template <class P>
void each_row(void (*run)(const P&, int64_t, int64_t), const P& p) {
  // About 32k logits a task: enough to pay for the hand-over, small enough to balance.
  const int64_t grain = std::max<int64_t>(1, 32768 / p.classes);
  torch::stable::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

// The loss and the terms from out, the rows' (1 + num_terms) numbers each. In row order, whatever thread
// made a row: the same bits for any number of threads.
inline std::pair<Tensor, Tensor> reduced(const OpFacts& facts, const std::vector<double>& out, int64_t rows,
                                         int num_terms, int64_t valid, int64_t reduction, double scale,
                                         ScalarType real) {
  const int width = 1 + num_terms;
  std::vector<double> totals(width, 0.);
  for (int64_t i = 0; i < rows; ++i) {
    for (int k = 0; k < width; ++k) totals[k] += out[i * width + k];
  }
  Tensor value = reduction == kNone ? empty({rows}, real) : empty({}, real);
  if (reduction == kNone) {
    for (int64_t i = 0; i < rows; ++i) put(value, i, out[i * width]);
  } else {
    put(value, 0, totals[0] * scale);
  }
  Tensor terms = empty({width}, real);
  for (int k = 0; k < num_terms; ++k) {
    put(terms, k, totals[1 + k] / (facts.counts(k) ? 1. : std::max<double>(valid, 1)));
  }
  put(terms, num_terms, valid);
  return {value, terms};
}

}  // namespace kdfuse
