// The ops as torch sees them: schemas, checks, allocation, the batch reduction, and the CPU dispatch.
//
// Only torch's stable ABI is used, so that one binary serves every torch from 2.11 on. All ops share
// one schema; losses/<op>.h says what an op's `params` are, kernels/<op>.py fills them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "../core/op_top_k.h"
#include "op.h"
#include "op_table.h"
#if defined(KDFUSE_CUDA_ARCHS)
#include "../cuda/launch.h"
#endif

namespace kdfuse {
namespace {

enum Level { kBase, kAvx2, kAvx512 };
const char* const kLevelNames[] = {"base", "avx2", "avx512"};

Level best_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return kAvx2;
  }
#endif
  return kBase;
}

std::atomic<Level> current_level{best_level()};

#if defined(__x86_64__)
#define KDFUSE_AT_LEVEL(name) \
  (current_level == kAvx512 ? name##_avx512() : current_level == kAvx2 ? name##_avx2() : name##_base())
#else
#define KDFUSE_AT_LEVEL(name) name##_base()
#endif

using Result = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

template <Loss which>
Result loss(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
            const std::vector<Tensor>& indices, const std::vector<Tensor>& masses, const std::optional<Tensor>& target,
            const std::optional<Tensor>& denominator, std::optional<double> divisor,
            const std::optional<Tensor>& upstream, const std::vector<double>& params, int64_t reduction,
            int64_t ignore_index, bool with_gradient) {
  const OpOnCpu op = op_on_cpu(which);
  check_call(op.facts, students, teachers, target.has_value(), params);
  if (!op.facts.takes_top_k) refuse_sparse(indices, masses);
  const Tensor& student = students[0];
  const int64_t rows = student.size(0), classes = student.size(1);

  Problem p = {};
  p.rows = rows;
  p.classes = classes;
  const auto student_rows = matrices(students, rows, classes, "student and SL-Ts");
  const auto top_k = top_k_of(teachers, indices, masses, rows, classes);
  const auto teacher_rows = teacher_matrices(teachers, top_k, rows, classes);
  p.students = student_rows.data();
  p.num_students = static_cast<int>(students.size());
  p.teachers = teacher_rows.data();
  p.num_teachers = static_cast<int>(teachers.size());
  if (!top_k.empty()) p.top_k = top_k.data();
  p.ignore_index = ignore_index;
  p.params = params.data();

  std::vector<int64_t> labels;
  if (target) labels = read_labels(*target, rows, classes, ignore_index);
  if (!labels.empty()) p.labels = labels.data();
  check_entries(top_k, labels, ignore_index, rows, classes);
  int64_t valid = rows;
  for (int64_t y : labels) valid -= y == ignore_index;

  for (const auto& list : {student_rows, teacher_rows}) {
    for (const Matrix& m : list) p.wide |= m.type == DType::f64;
  }
  if (target && target->dim() == 2) {
    p.soft = matrix(*target, rows, classes, "target");
    if (p.soft.type == DType::f64 && !p.wide) refuse("target in float64 needs logits in float64");
  }
  const auto real = p.wide ? ScalarType::Double : ScalarType::Float;

  const double scale = scale_of(reduction, denominator, divisor, valid);
  const auto weights = row_weights(upstream, rows, scale);
  p.upstream = weights.data();

  std::vector<Tensor> gradients;
  std::vector<Output> outputs;
  if (with_gradient) {
    gradients = gradients_of(students);
    outputs = outputs_of(gradients);
    p.gradients = outputs.data();
  }

  p.num_terms = op.facts.terms(p.num_students);
  const int width = 1 + p.num_terms;
  std::vector<double> out(rows * width), scores;
  p.out = out.data();
  if (rows > 0) {
    if (op.facts.scored) {
      scores.resize(2 * rows);
      p.scores = scores.data();
      each_row(op.rows.score, p);
      score_means(p, labels, valid);
    }
    each_row(op.rows.run, p);
  }

  auto [value, terms] = reduced(op.facts, out, rows, p.num_terms, valid, reduction, scale, real);
  return {value, terms, gradients};
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (int k = best_level(); k >= 0; --k) names.push_back(kLevelNames[k]);
  return names;
}

// The CUDA that the kernels were built with, as 13000; 0 where they were not.
int cuda_runtime() {
#if defined(KDFUSE_CUDA_ARCHS)
  return KDFUSE_CUDA_RUNTIME;
#else
  return 0;
#endif
}

// The newest CUDA that the driver supports, as 13000; 0 without one.
int cuda_driver() {
#if defined(KDFUSE_CUDA_ARCHS)
  return driver_version();
#else
  return 0;
#endif
}

// Of the CUDA kernels, as in "sm_90"; none where the CUDA part was not built.
std::vector<std::string> cuda_archs() {
  std::vector<std::string> names;
#if defined(KDFUSE_CUDA_ARCHS)
  std::istringstream all(KDFUSE_CUDA_ARCHS);
  for (std::string name; all >> name;) names.push_back(name);
#endif
  return names;
}

void set_level(const std::string& name) {
  for (int k = best_level(); k >= 0; --k) {
    if (name == kLevelNames[k]) {
      current_level = static_cast<Level>(k);
      return;
    }
  }
  refuse("SIMD level '" + name + "' is not one that this machine runs");
}

}  // namespace

OpOnCpu op_on_cpu(Loss loss) {
  switch (loss) {
#define KDFUSE_OTHER(name) \
  case Loss::name:         \
    return KDFUSE_AT_LEVEL(name);
#include "../losses/all.def"
  }
  return {};
}

#define KDFUSE_SCHEMA                                                                          \
  "(Tensor[] students, Tensor[] teachers, Tensor[] indices, Tensor[] masses, Tensor? target, " \
  "Tensor? denominator, float? divisor, Tensor? upstream, float[] params, int reduction, "     \
  "int ignore_index, bool with_gradient) "                                                     \
  "-> (Tensor loss, Tensor terms, Tensor[] gradients)"

STABLE_TORCH_LIBRARY(kdfuse, m) {
#define KDFUSE_OTHER(name) m.def(#name KDFUSE_SCHEMA);
#include "../losses/all.def"
  m.def("scale_(Tensor(a!)[] gradients, Tensor factor) -> ()");
  m.def("scale_to_half(Tensor[] gradients, Tensor factor) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(kdfuse, CPU, m) {
#define KDFUSE_OTHER(name) m.impl(#name, TORCH_BOX(&loss<Loss::name>));
#include "../losses/all.def"
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts of the compiled part; loading it registers torch.ops.kdfuse.";
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_archs") = cuda_archs();
  m.attr("cuda_runtime") = cuda_runtime();
  m.attr("cuda_driver") = cuda_driver();  // a constant: torch.compile cannot trace a call
  m.def("levels", &levels, "SIMD levels that this machine runs, best first.");
  m.def("level", [] { return std::string(kLevelNames[current_level.load()]); }, "The SIMD level in use.");
  m.def("set_level", &set_level, pybind11::arg("name"), "Use another of levels().");
}

}  // namespace kdfuse
