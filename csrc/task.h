// What a CUDA row pass is asked to do. It travels to the kernels by value.
#pragma once
#include "row_limits.h"
#include "rows.h"

namespace kdfuse {

constexpr int kMaxLogits = kMaxStreams - 4;
constexpr int kMaxParams = kMaxStreams + 8;
constexpr int kMaxColumns = 256;  // the loss and its terms

// Numbers of the whole batch, made on the device.
struct Batch {
  double valid;  // rows that count
  double scale;  // of each row's loss in what is returned
  double score_mean[2];  // of the label scores, over the valid rows
};

// float or double numbers on the device, or none.
struct Numbers {
  const void* data;
  DType type;
  int64_t stride;  // 0: one number for all rows
};

struct Task {
  int64_t rows;
  int classes;
  int num_students, num_teachers, num_terms;
  Matrix logits[kMaxLogits];  // of the students, then of the teachers
  Output gradients[kMaxLogits];  // of the students
  bool with_gradient;
  const int64_t* labels;  // or null
  int64_t label_stride;
  int64_t ignore_index;
  Matrix soft;  // class probabilities instead of labels, or no data
  double params[kMaxParams];  // the op's own, see losses/<op>.h
  bool mean;  // over the denominator, or over the valid rows without one
  Numbers denominator, upstream;
  Batch* batch;
  double* out;  // (rows, 1 + num_terms): a row's loss, then its terms
  double* scores;  // (rows, 2), of the ops that need their batch mean
  int held;  // this many of a row's inputs are kept in the team's memory
  int sorted;  // length of the sort that USKD makes in the team's memory
};

// The op's results from the rows': the loss (one number or each row's), the terms and the valid rows.
struct Totals {
  void* loss;
  void* terms;
  DType type;
  bool each_row;
  uint64_t counts[kMaxColumns / 64];  // bit k: term k is a count, not a mean
};

}  // namespace kdfuse
