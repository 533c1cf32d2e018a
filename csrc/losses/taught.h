// What a loss of one student under teachers (kd.h, dkd.h, nkd.h, wttm.h) says of itself, so that every row pass can
// run it. A row pass brings the statistics of a row, the loss makes of them its value and the gradient's factors:
//
//   kTerms          how many terms of its own it reports; cross-entropy, top-1 and top-5 follow them
//   kParams         how many params its op has; of kManyTeachers one more for each teacher. The first is T
//   kCeWeight       which of them is the weight of cross-entropy
//   kManyTeachers   takes any number of teachers, others take one
//   kTakesTopK      takes teachers of which only the k largest logits are known
//   kNeedsTarget    has no meaning without a label
//   kStudentAt1     compares the student at T = 1, not at T, with the teacher at T
//   kTeacherAt1     reads the teacher's softmax at T = 1 too
//   kEntropy        Taught::mixed holds the teacher's exponent
//   kSoftmaxAtT     reads the softmaxes at T; else the sums over j != y alone
//   reads           whether a teacher is read; where it is not, its row may hold anything
//   weighs_all      whether the loss may multiply all that a teacher's rows hold, as no weight is 0
//   Factors         what the params come to, for one teacher
//   add             adds what one teacher teaches; returns the factor of its exponentials in the gradient
#pragma once
#include "../core/stats.h"

namespace kdfuse {

// A row's student z and one of its teachers t: sums and softmaxes at their temperatures and at T = 1.
template <class R>
struct Taught {
  Stats<R> z_sums, t_sums;
  Split<R> z, t, z1, t1;
  R mixed;  // the sum over j != y of e_t,j (u_t,j - u_z,j), or of e_t,j u_z,j
};

// A row's value without cross-entropy, its own terms, and the gradient: the factors of the student's exponentials at
// its temperature and at T = 1, and the entry of the label.
template <class R, int terms>
struct Lesson {
  R value = 0, terms_of_row[terms] = {};
  R a = 0, c = 0, label = 0;
};

// weight * x; where it may be 0, that leaves out x, whatever it is.
template <bool may_be_zero, class R>
KDFUSE_HD R times(R weight, R x) {
  return may_be_zero ? gated(weight, x) : weight * x;
}

}  // namespace kdfuse
