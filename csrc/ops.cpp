// The ops as torch sees them: schemas, checks, allocation, the batch reduction, and the CPU dispatch.
//
// Only torch's stable ABI is used, so that one binary serves every torch from 2.11 on. All ops share
// one schema; losses/<op>.h says what an op's `params` are, kernels/<op>.py fills them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "op_inputs.h"
#include "op_top_k.h"

namespace kdfuse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

RowPasses passes() {
  switch (current_level.load()) {
#if defined(__x86_64__)
    case kAvx512:
      return row_passes_avx512();
    case kAvx2:
      return row_passes_avx2();
#endif
    default:
      return row_passes_base();
  }
}

// An op of the table: its row passes beside its facts.
struct Kd : KdFacts {
  static RowPass pass() { return passes().kd; }
};
struct Dkd : DkdFacts {
  static RowPass pass() { return passes().dkd; }
};
struct Nkd : NkdFacts {
  static RowPass pass() { return passes().nkd; }
};
struct TfNkd : TfNkdFacts {
  static RowPass pass() { return passes().tf_nkd; }
};
struct Uskd : UskdFacts {
  static RowPass pass() { return passes().uskd; }
};
struct Slkd : SlkdFacts {
  static RowPass pass() { return passes().slkd; }
};

std::vector<double> numbers(const Tensor& x, const char* name) {
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
std::vector<int64_t> read_labels(const Tensor& target, int64_t rows, int64_t classes, int64_t ignore_index) {
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

using Result = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

// Means of the label scores over the valid rows, summed in row order.
void score_means(Problem& p, const std::vector<int64_t>& labels, int64_t valid) {
  p.score_mean[0] = p.score_mean[1] = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!labels.empty() && labels[i] == p.ignore_index) continue;
    for (int k = 0; k < 2; ++k) p.score_mean[k] += p.scores[2 * i + k];
  }
  for (double& mean : p.score_mean) mean /= std::max<int64_t>(valid, 1);
}

void each_row(void (*run)(const Problem&, int64_t, int64_t), const Problem& p) {
  // About 32k logits a task: enough to pay for the hand-over, small enough to balance.
  const int64_t grain = std::max<int64_t>(1, 32768 / p.classes);
  torch::stable::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

void put(const Tensor& to, int64_t i, double value) {
  if (to.scalar_type() == ScalarType::Double) {
    static_cast<double*>(to.data_ptr())[i] = value;
  } else {
    static_cast<float*>(to.data_ptr())[i] = static_cast<float>(value);
  }
}

// The system hands out a large tensor's memory as it is first written; in 4 KiB pages that takes
// longer than the loss.
void ask_for_large_pages(const Tensor& x) {
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

template <class Op>
Result loss(std::vector<Tensor> students, std::vector<Tensor> teachers, std::vector<Tensor> indices,
            std::vector<Tensor> masses, std::optional<Tensor> target, std::optional<Tensor> denominator,
            std::optional<Tensor> upstream, std::vector<double> params, int64_t reduction, int64_t ignore_index,
            bool with_gradient) {
  check_call<Op>(students, teachers, target.has_value(), params);
  if (!Op::takes_top_k) refuse_sparse(indices, masses);
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

  double scale = 1;
  if (reduction == kMean) {
    const double divisor = denominator ? numbers(*denominator, "denominator").at(0) : std::max<int64_t>(valid, 1);
    if (!(divisor > 0)) refuse("denominator must be positive, got " + std::to_string(divisor));
    scale = 1 / divisor;
  }
  std::vector<double> weights(rows, scale);
  if (upstream) {
    const auto given = numbers(*upstream, "upstream");
    if (given.size() != 1 && static_cast<int64_t>(given.size()) != rows) refuse("upstream must have 1 or N numbers");
    for (int64_t i = 0; i < rows; ++i) weights[i] *= given[given.size() == 1 ? 0 : i];
  }
  p.upstream = weights.data();

  std::vector<Tensor> gradients;
  std::vector<Output> outputs;
  if (with_gradient) {
    for (const Tensor& x : students) {
      // float16 would lose what lies below 6e-8 before a loss scaler could lift it.
      const auto type = x.scalar_type() == ScalarType::Half ? ScalarType::Float : x.scalar_type();
      gradients.push_back(torch::stable::empty({rows, classes}, type));
      ask_for_large_pages(gradients.back());
      outputs.push_back({gradients.back().data_ptr(), type_of(gradients.back())});
    }
    p.gradients = outputs.data();
  }

  p.num_terms = Op::terms(p.num_students);
  const int width = 1 + p.num_terms;
  std::vector<double> out(rows * width), scores;
  p.out = out.data();
  const RowPass pass = Op::pass();
  if (rows > 0) {
    if (pass.score) {
      scores.resize(2 * rows);
      p.scores = scores.data();
      each_row(pass.score, p);
      score_means(p, labels, valid);
    }
    each_row(pass.run, p);
  }

  // In row order, whatever thread made a row: the same bits for any number of threads.
  std::vector<double> totals(width, 0.);
  for (int64_t i = 0; i < rows; ++i) {
    for (int k = 0; k < width; ++k) totals[k] += out[i * width + k];
  }
  Tensor value = reduction == kNone ? torch::stable::empty({rows}, real) : torch::stable::empty({}, real);
  if (reduction == kNone) {
    for (int64_t i = 0; i < rows; ++i) put(value, i, out[i * width]);
  } else {
    put(value, 0, totals[0] * scale);
  }
  Tensor terms = torch::stable::empty({width}, real);
  for (int k = 0; k < p.num_terms; ++k) {
    put(terms, k, totals[1 + k] / (Op::counts(k) ? 1. : std::max<double>(valid, 1)));
  }
  put(terms, p.num_terms, valid);
  return {value, terms, gradients};
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (int k = best_level(); k >= 0; --k) names.push_back(kLevelNames[k]);
  return names;
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

#define KDFUSE_SCHEMA                                                                          \
  "(Tensor[] students, Tensor[] teachers, Tensor[] indices, Tensor[] masses, Tensor? target, " \
  "Tensor? denominator, Tensor? upstream, float[] params, int reduction, int ignore_index, "   \
  "bool with_gradient) "                                                                       \
  "-> (Tensor loss, Tensor terms, Tensor[] gradients)"

STABLE_TORCH_LIBRARY(kdfuse, m) {
  m.def("kd" KDFUSE_SCHEMA);
  m.def("dkd" KDFUSE_SCHEMA);
  m.def("nkd" KDFUSE_SCHEMA);
  m.def("tf_nkd" KDFUSE_SCHEMA);
  m.def("uskd" KDFUSE_SCHEMA);
  m.def("slkd" KDFUSE_SCHEMA);
  m.def("scale_(Tensor(a!)[] gradients, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdfuse, CPU, m) {
  m.impl("kd", TORCH_BOX(&loss<Kd>));
  m.impl("dkd", TORCH_BOX(&loss<Dkd>));
  m.impl("nkd", TORCH_BOX(&loss<Nkd>));
  m.impl("tf_nkd", TORCH_BOX(&loss<TfNkd>));
  m.impl("uskd", TORCH_BOX(&loss<Uskd>));
  m.impl("slkd", TORCH_BOX(&loss<Slkd>));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts of the compiled part; loading it registers torch.ops.kdfuse.";
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_archs") = cuda_archs();
  m.def("levels", &levels, "SIMD levels that this machine runs, best first.");
  m.def("level", [] { return std::string(kLevelNames[current_level.load()]); }, "The SIMD level in use.");
  m.def("set_level", &set_level, pybind11::arg("name"), "Use another of levels().");
}

}  // namespace kdfuse
