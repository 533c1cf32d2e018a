// The ops for logits whose classes are spread over several processes: <op>_stats reads one part of the
// classes, <op>_grad_from_stats takes the statistics that all parts merged into (kernels/sharded/call.py) and
// gives the loss of the whole rows and the gradient of the part. types.h says what the statistics are.
#include <tuple>

#include "../cpu/op.h"
#include "../losses/op_facts.h"
#include "registration.h"
#include "types.h"

namespace kdfuse {
namespace {

using Result = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

// A part's logits and labels as the row passes take them; holds what the Problem points to.
struct Part {
  SplitProblem p = {};
  std::vector<Matrix> students, teachers;
  std::vector<int64_t> labels;
  int64_t valid;

  static Part of(Loss loss, const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                 const std::optional<Tensor>& target, int64_t first, int64_t classes, const std::vector<double>& params,
                 int64_t ignore_index) {
    const OpFacts facts = facts_of(loss);
    if (!op_on_cpu(loss).parts.run) refuse("this op takes whole rows only");
    check_call(facts, students, teachers, target.has_value(), params);
    Part part;
    SplitProblem& p = part.p;
    p.rows = students[0].size(0);
    p.classes = students[0].size(1);
    p.first = first;
    if (first < 0 || first + p.classes > classes) {
      refuse("a part of " + std::to_string(p.classes) + " classes from class " + std::to_string(first) +
             " on is not within " + std::to_string(classes) + " classes");
    }
    part.students = matrices(students, p.rows, p.classes, "student and SL-Ts");
    part.teachers = matrices(teachers, p.rows, p.classes, "teacher");
    p.num_students = static_cast<int>(students.size());
    p.num_teachers = static_cast<int>(teachers.size());
    for (const auto& list : {part.students, part.teachers}) {
      for (const Matrix& m : list) p.wide |= m.type == DType::f64;
    }
    if (target) {
      if (target->dim() != 1) refuse("target must be class indices where the classes are in parts");
      part.labels = read_labels(*target, p.rows, classes, ignore_index);
    }
    part.valid = p.rows;
    for (int64_t y : part.labels) part.valid -= y == ignore_index;
    p.ignore_index = ignore_index;
    const int pairs = p.num_teachers == 0 ? 0 : facts.fused ? p.num_students + 1 : p.num_teachers;
    p.layout = {p.num_students, p.num_students + p.num_teachers + facts.fused, pairs};
    return part;
  }

  // After the last move of this object.
  SplitProblem& problem(const std::vector<double>& params) {
    p.students = students.data();
    p.teachers = teachers.data();
    if (!labels.empty()) p.labels = labels.data();
    p.params = params.data();
    return p;
  }
};

template <Loss loss>
Tensor stats(std::vector<Tensor> students, std::vector<Tensor> teachers, std::optional<Tensor> target, int64_t first,
             int64_t classes, std::vector<double> params, int64_t ignore_index) {
  Part part = Part::of(loss, students, teachers, target, first, classes, params, ignore_index);
  SplitProblem& p = part.problem(params);
  Tensor packed = empty({p.rows, p.layout.width()}, ScalarType::Double);
  p.packed = static_cast<double*>(packed.data_ptr());
  if (p.rows > 0) each_row(op_on_cpu(loss).parts.stats, p);
  return packed;
}

template <Loss loss>
Result grad_from_stats(std::vector<Tensor> students, std::vector<Tensor> teachers, std::optional<Tensor> target,
                       int64_t first, int64_t classes, Tensor merged_stats, std::optional<Tensor> denominator,
                       std::optional<Tensor> upstream, std::vector<double> params, int64_t reduction,
                       int64_t ignore_index, bool with_gradient) {
  Part part = Part::of(loss, students, teachers, target, first, classes, params, ignore_index);
  const OpFacts facts = facts_of(loss);
  SplitProblem& p = part.problem(params);
  if (merged_stats.scalar_type() != ScalarType::Double || merged_stats.dim() != 2 || merged_stats.size(0) != p.rows ||
      merged_stats.size(1) != p.layout.width() || !merged_stats.is_contiguous()) {
    refuse("stats must be contiguous float64 of shape (" + std::to_string(p.rows) + ", " +
           std::to_string(p.layout.width()) + ")");
  }
  p.merged = static_cast<const double*>(merged_stats.data_ptr());

  std::vector<double> scores(2 * p.rows, 0.);
  if (facts.scored) {
    for (int64_t i = 0; i < p.rows; ++i) {
      if (part.labels[i] == ignore_index) continue;
      scores[2 * i] = std::exp(merged(p.merged + i * p.layout.width() + p.layout.of_set(0), 1).at1.log_label);
    }
    p.scores = scores.data();
    score_means(p, part.labels, part.valid);
  }

  const double scale = scale_of(reduction, denominator, std::nullopt, part.valid);
  const auto weights = row_weights(upstream, p.rows, scale);
  p.upstream = weights.data();
  std::vector<Tensor> gradients;
  std::vector<Output> outputs;
  if (with_gradient) {
    gradients = gradients_of(students);
    outputs = outputs_of(gradients);
    p.gradients = outputs.data();
  }
  p.num_terms = facts.terms(p.num_students);
  std::vector<double> out(p.rows * (1 + p.num_terms));
  p.out = out.data();
  if (p.rows > 0) each_row(op_on_cpu(loss).parts.run, p);
  const auto real = p.wide ? ScalarType::Double : ScalarType::Float;
  auto [value, terms] = reduced(facts, out, p.rows, p.num_terms, part.valid, reduction, scale, real);
  return {value, terms, gradients};
}

}  // namespace

#define KDFUSE_STATS                                                                      \
  "_stats(Tensor[] students, Tensor[] teachers, Tensor? target, int first, int classes, " \
  "float[] params, int ignore_index) -> Tensor"
#define KDFUSE_GRAD                                                                                 \
  "_grad_from_stats(Tensor[] students, Tensor[] teachers, Tensor? target, int first, int classes, " \
  "Tensor stats, Tensor? denominator, Tensor? upstream, float[] params, int reduction, "            \
  "int ignore_index, bool with_gradient) -> (Tensor loss, Tensor terms, Tensor[] gradients)"

void define_parts(Registration& schemas) {
#define KDFUSE_OTHER(name)         \
  schemas.def(#name KDFUSE_STATS); \
  schemas.def(#name KDFUSE_GRAD);
#include "../losses/all.def"
}

void implement_parts(Registration& cpu) {
#define KDFUSE_OTHER(name)                                 \
  cpu.impl(#name "_stats", TORCH_BOX(&stats<Loss::name>)); \
  cpu.impl(#name "_grad_from_stats", TORCH_BOX(&grad_from_stats<Loss::name>));
#include "../losses/all.def"
}

}  // namespace kdfuse
