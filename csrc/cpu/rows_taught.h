// The rows of one student under teachers on the CPU, for any loss of losses/taught.h.
#pragma once
#include <algorithm>

#include "../losses/taught.h"
#include "row_parts.h"

namespace kdfuse {
namespace {

// The student's temperature beside the teachers'.
template <class Loss>
double own_temperature(const double* params) {
  return Loss::kStudentAt1 ? 1 : params[0];
}

template <class T>
Taught<double> taught_by(const Logits<T>& z, const Logits<T>& t, double mixed) {
  return {z.stats, t.stats, z.at, t.at, z.at1, t.at1, mixed};
}

// A teacher's exponentials and softmaxes; returns Taught::mixed. e1: two rows of scratch.
template <class Loss, class T>
double learn(const Problem& p, Logits<T>& t, const Logits<T>& z, double temperature, T* e1) {
  const double own = own_temperature<Loss>(p.params);
  if (Loss::kEntropy && !Loss::kTeacherAt1) return teach(p, t, temperature, z, own, t.x);
  static_assert(!Loss::kManyTeachers || !Loss::kTeacherAt1, "one place for a teacher's exponentials");
  T* const e = Loss::kEntropy ? e1 + padded(p.classes) : t.x;  // then its logits are read again
  exponentiate(p, t, temperature, Loss::kTeacherAt1, e, e1);
  const Units<T> of_z(own, z.peak);
  if (Loss::kEntropy) return cross(e, t.x, Units<T>(temperature, t.peak), z.x, of_z, padded(p.classes));
  return weighted(e, z.x, of_z, padded(p.classes));
}

// The loss of a row, its terms and ranks.
template <class Loss>
void write_taught(const Problem& p, int64_t row, const Lesson<double, Loss::kTerms>& found, double ce, double top1,
                  double top5) {
  double* const out = p.out + row * (1 + p.num_terms);
  out[0] = found.value + gated(p.params[Loss::kCeWeight], ce);
  std::copy(found.terms_of_row, found.terms_of_row + Loss::kTerms, out + 1);
  const double rest[] = {ce, top1, top5};
  std::copy(rest, rest + 3, out + 1 + Loss::kTerms);
}

template <class Loss, class T>
void taught_row(const Problem& p, int64_t row, Scratch<T>& scratch) {
  const double temperature = p.params[0], own = own_temperature<Loss>(p.params);
  const int64_t length = padded(p.classes);
  // Class probabilities, the student's logits and exponentials at T and at T = 1, two rows to spare, the teachers.
  T* const base = scratch.rows(6 + p.num_teachers, length);
  const auto at = [&](int k) { return base + k * length; };
  const auto target = read_target(p, row, 1, base);
  auto z = read_logits(p, p.students[0], row, target, at(1), 0);
  const Hits hit = rank_student(p, z, target, own);
  const double dot = target_dot(p, z, target, own);
  // Under one teacher the student's exponentials take the place of its logits, which nobody reads again then.
  const bool alone = p.num_teachers == 1;
  if (!alone) exponentiate(p, z, own, target.count > 0, at(2), at(3));

  Gradient<T> g;
  Lesson<double, Loss::kTerms> found;
  for (int k = 0; k < p.num_teachers; ++k) {
    const bool reads = Loss::reads(p.params, k);
    Logits<T> t;
    double mixed = 0;
    if (reads) {
      t = read_any_teacher(p, k, row, target, at(6 + k), at(4), temperature);
      mixed = learn<Loss>(p, t, z, temperature, at(4));
    }
    if (alone) exponentiate(p, z, own, target.count > 0, z.x, at(3));
    if (!reads) continue;
    const double b =
        Loss::template add<true>(Loss::template factors<double>(p.params, k), taught_by(z, t, mixed), found);
    g.add(t.e, b);
  }
  g.a = found.a, g.c = found.c, g.label[0] = found.label;
  const double ce = target.count ? add_cross_entropy(z, target, dot, p.params[Loss::kCeWeight], g) : 0;
  write_taught<Loss>(p, row, found, ce, hit.top1, hit.top5);
  if (p.gradients) write_gradient(p, 0, row, own, z, g, target);
}

}  // namespace
}  // namespace kdfuse
