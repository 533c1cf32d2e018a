// Losses under teachers with every pair of facts that says what of a teacher is read: rows of each on the CPU, as
// text. Each loss is the KL of the softmaxes over j != y at T, without the teacher's entropy where the facts have none,
// plus the teacher's probability of the label at T = 1 where the facts have that.
//
// Input: "classes T", then of each row its label, the student's and the teacher's logits. Output: of each loss and
// row "entropy at1 value" and the gradient.
#include <cstdio>
#include <iostream>
#include <vector>

#include "../../csrc/cpu/each_row.h"
#include "../../csrc/cpu/rows_taught.h"

namespace kdfuse {
namespace {

template <bool entropy, bool at1>
struct Any {
  static constexpr int kTerms = 1, kParams = 2, kCeWeight = 1;
  static constexpr bool kManyTeachers = false, kTakesTopK = false, kNeedsTarget = true;
  static constexpr bool kStudentAt1 = false, kTeacherAt1 = at1, kEntropy = entropy, kSoftmaxAtT = false;

  template <class R>
  struct Factors {
    R step;
  };
  static bool reads(const double*, int) { return true; }

  template <class R>
  static Factors<R> factors(const double* p, int) {
    return {R(1) / R(p[0])};
  }

  template <bool, class R>
  static R add(const Factors<R>& f, const Taught<R>& x, Lesson<R, kTerms>& row) {
    const R mixed = x.mixed / x.t_sums.sum;
    row.value = entropy ? mixed + lse_rest(x.z_sums) - lse_rest(x.t_sums) : lse_rest(x.z_sums) - mixed;
    if (at1) row.value += x.t1.label;
    row.a = f.step / x.z_sums.sum;
    return -f.step / x.t_sums.sum;
  }
};

template <class Loss>
void show(int64_t rows, int64_t classes, double temperature, const std::vector<double>& z, const std::vector<double>& t,
          const std::vector<int64_t>& labels) {
  const Matrix student{z.data(), classes, DType::f64}, teacher{t.data(), classes, DType::f64};
  std::vector<double> gradient(rows * classes), out(rows * 5), upstream(rows, 1.);
  const Output into{gradient.data(), DType::f64};
  const double params[] = {temperature, 0};
  Problem p{};
  p.rows = rows, p.classes = classes;
  p.students = &student, p.num_students = 1, p.teachers = &teacher, p.num_teachers = 1;
  p.gradients = &into, p.labels = labels.data(), p.ignore_index = -100;
  p.params = params, p.upstream = upstream.data(), p.num_terms = 4, p.out = out.data(), p.wide = true;
  rows_of<Problem, taught_row<Loss, float>, taught_row<Loss, double>>(p, 0, rows);
  for (int64_t i = 0; i < rows; ++i) {
    std::printf("%d %d %.17g", Loss::kEntropy, Loss::kTeacherAt1, out[i * 5]);
    for (int64_t j = 0; j < classes; ++j) std::printf(" %.17g", gradient[i * classes + j]);
    std::printf("\n");
  }
}

}  // namespace
}  // namespace kdfuse

int main() {
  int64_t classes, label;
  double temperature;
  std::cin >> classes >> temperature;
  std::vector<double> z, t;
  std::vector<int64_t> labels;
  while (std::cin >> label) {
    labels.push_back(label);
    for (auto* to : {&z, &t}) {
      for (int64_t j = 0; j < classes; ++j) {
        double logit;
        std::cin >> logit;
        to->push_back(logit);
      }
    }
  }
  const auto rows = static_cast<int64_t>(labels.size());
  kdfuse::show<kdfuse::Any<false, false>>(rows, classes, temperature, z, t, labels);
  kdfuse::show<kdfuse::Any<false, true>>(rows, classes, temperature, z, t, labels);
  kdfuse::show<kdfuse::Any<true, false>>(rows, classes, temperature, z, t, labels);
  kdfuse::show<kdfuse::Any<true, true>>(rows, classes, temperature, z, t, labels);
}
