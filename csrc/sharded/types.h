// Rows whose classes are spread over several processes. Each reads its own classes, the statistics of
// all parts are merged, and each writes the gradient of its own classes. No framework types.
#pragma once
#include "../core/stats.h"
#include "../core/types.h"

namespace kdfuse {

// The statistics of one row over one part of its classes, doubles, in this order:
//   the label's place counted from the part's first class (-1: the row has none), classes of the part
//   for each set of logits (students, teachers, then SLKD's fused teacher):
//     peak of the rest (-inf: there is none), sum of exp((x_j - peak) / T), sum of exp(x_j - peak),
//     the label's logit, -inf where the label is in another part
//   for each pair of teacher t and student z: the sum of exp((t_j - peak_t) / T) times
//     (t_j - peak_t) / T - (z_j - peak_z) / T, or times (z_j - peak_z) / T alone
// T is the set's own: a student's may be 1 under teachers at another.
//   for each student: its five largest logits of the rest, and how many classes of the part come
//     before the label, at most 5
struct SplitLayout {
  int students, sets, pairs;

  static constexpr int head = 2, set = 4, ranks = 6, top = 5;
  int width() const { return head + set * sets + pairs + ranks * students; }
  int of_set(int k) const { return head + set * k; }
  int of_pair(int k) const { return head + set * sets + k; }
  int of_ranks(int k) const { return head + set * sets + pairs + ranks * k; }
};

struct SplitProblem : Problem {
  int64_t first;  // the part holds the classes [first, first + classes); labels count from class 0
  SplitLayout layout;
  double* packed;  // (rows, width) statistics to fill
  const double* merged;  // (rows, width) of all parts
};

// One set of logits of a row as all parts have it.
struct Merged {
  double peak, label;  // as logits; a row without a rest has its label for a peak
  Stats<double> stats;  // relative to the peak, at T and at T = 1
  Split<double> at, at1;
};

KDFUSE_HD Merged merged(const double* set, double temperature) {
  Merged x = {};
  x.label = set[3];
  x.peak = set[0] != -INFINITY ? set[0] : x.label != -INFINITY ? x.label : 0;
  x.stats = {set[1], (x.label - x.peak) / temperature};
  x.at = split(x.stats);
  x.at1 = temperature == 1 ? x.at : split(Stats<double>{set[2], x.label - x.peak});
  return x;
}

}  // namespace kdfuse
