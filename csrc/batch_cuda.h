// What stands before and after the rows: the count of valid rows, batch means, and the totals. Sums
// run in double and in a fixed order, whatever the number of threads that made the rows.
#pragma once
#include "row_cuda.h"

namespace kdfuse {

// Counts the rows that count. Returns how many of this thread's labels are outside the classes.
template <class Team>
KDFUSE_HD int64_t count_rows(const Team& team, const Task& p) {
  int64_t outside = 0;
  double valid[1] = {0};
  for (int64_t row = team.rank(); row < p.rows; row += team.size()) {
    if (p.labels && !ignored(p, row)) {
      const int64_t y = p.labels[row * p.label_stride];
      outside += y < 0 || y >= p.classes;
    }
    valid[0] += !ignored(p, row);
  }
  team.sum(valid);
  if (team.rank() == 0) {
    const double divisor = p.denominator.data ? number(p.denominator, 0) : valid[0] > 1 ? valid[0] : 1.;
    *p.batch = {valid[0], p.mean ? 1 / divisor : 1., {0, 0}};
  }
  return outside;
}

template <class Team>
KDFUSE_HD void average_scores(const Team& team, const Task& p) {
  double sums[2] = {0, 0};
  for (int64_t row = team.rank(); row < p.rows; row += team.size()) {
    if (ignored(p, row)) continue;
    sums[0] += p.scores[2 * row];
    sums[1] += p.scores[2 * row + 1];
  }
  team.sum(sums);
  if (team.rank() != 0) return;
  const double valid = p.batch->valid > 1 ? p.batch->valid : 1;
  for (int k = 0; k < 2; ++k) p.batch->score_mean[k] = sums[k] / valid;
}

KDFUSE_HD void put(void* to, DType type, int64_t i, double value) {
  if (type == DType::f64) {
    static_cast<double*>(to)[i] = value;
  } else {
    static_cast<float*>(to)[i] = static_cast<float>(value);
  }
}

// Column 0 is the loss, the others are the terms.
template <class Team>
KDFUSE_HD void total(const Team& team, const Task& p, const Totals& totals, int column) {
  const int width = 1 + p.num_terms;
  double sums[1] = {0};
  for (int64_t row = team.rank(); row < p.rows; row += team.size()) {
    const double value = p.out[row * width + column];
    sums[0] += value;
    if (column == 0 && totals.each_row) put(totals.loss, totals.type, row, value);
  }
  team.sum(sums);
  if (team.rank() != 0) return;
  const double valid = p.batch->valid;
  if (column == 0) {
    if (!totals.each_row) put(totals.loss, totals.type, 0, sums[0] * p.batch->scale);
    put(totals.terms, totals.type, p.num_terms, valid);
  } else {
    const int k = column - 1;
    const bool count = totals.counts[k / 64] >> (k % 64) & 1;
    put(totals.terms, totals.type, k, count || valid < 1 ? sums[0] : sums[0] / valid);
  }
}

}  // namespace kdfuse
