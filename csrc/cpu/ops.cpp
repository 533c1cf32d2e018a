// The ops as torch sees them: schemas, checks, allocation, the batch reduction, and the CPU dispatch.
//
// Only torch's stable ABI is used, so that one library serves every torch from 2.11 on, and every Python. All ops share
// one schema; losses/<op>.h says what an op's `params` are, kernels/<op>.py fills them.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../core/op_registration.h"
#include "../core/op_top_k.h"
#include "../core/said.h"
#include "../losses/op_facts.h"
#include "../sharded/registration.h"
#include "op.h"
#include "op_table.h"

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
  const OpFacts facts = facts_of(which);
  check_call(facts, students, teachers, target.has_value(), params);
  if (!facts.takes_top_k) refuse_sparse(indices, masses);
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

  p.num_terms = facts.terms(p.num_students);
  const int width = 1 + p.num_terms;
  std::vector<double> out(rows * width), scores;
  p.out = out.data();
  if (rows > 0) {
    if (facts.scored) {
      scores.resize(2 * rows);
      p.scores = scores.data();
      each_row(op.rows.score, p);
      score_means(p, labels, valid);
    }
    each_row(op.rows.run, p);
  }

  auto [value, terms] = reduced(facts, out, rows, p.num_terms, valid, reduction, scale, real);
  return {value, terms, gradients};
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

namespace {

bool registered(const char* name) {
  Registration schemas(name);
#define KDFUSE_OTHER(name) schemas.def(#name KDFUSE_SCHEMA);
#include "../losses/all.def"
  schemas.def("scale_(Tensor(a!)[] gradients, Tensor factor) -> ()");
  schemas.def("scale_to_half(Tensor[] gradients, Tensor factor) -> Tensor[]");
  define_parts(schemas);
  if (!schemas.ok()) return false;
  Registration cpu(name, "CPU");
#define KDFUSE_OTHER(name) cpu.impl(#name, TORCH_BOX(&loss<Loss::name>));
#include "../losses/all.def"
  implement_parts(cpu);
  return cpu.ok();
}

}  // namespace
}  // namespace kdfuse

// What the library says of itself to kernels/library.py, by ctypes: it has no symbol of Python.
extern "C" {

// Makes the ops those of torch.ops.<name>. 0 where torch refuses, for it has such a namespace.
KDFUSE_SAID int kdfuse_register(const char* name) { return kdfuse::registered(name); }

KDFUSE_SAID const char* kdfuse_compiler() { return __VERSION__; }

// SIMD levels by number, slowest first; null where there is no such level, or this machine does not run it.
KDFUSE_SAID const char* kdfuse_level_name(int level) {
  return level >= 0 && level <= kdfuse::best_level() ? kdfuse::kLevelNames[level] : nullptr;
}

KDFUSE_SAID int kdfuse_level() { return kdfuse::current_level; }

// One that kdfuse_level_name names.
KDFUSE_SAID void kdfuse_set_level(int level) { kdfuse::current_level = static_cast<kdfuse::Level>(level); }
}
