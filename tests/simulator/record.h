// A call of an op as the tests hand it over, and what is kept of it.
#pragma once
#include <cstddef>
#include <cstdint>

// A matrix; type: a DType's number.
struct Given {
  void* data;
  int64_t stride;
  int64_t type;
};

// What a top-k teacher has beside its values; count 0: its logits are whole.
struct Listed {
  const int64_t* classes;
  int64_t count;
  Given mass;
};

struct Asked {
  int64_t op, rows, classes, students, teachers, wide, reduction, ignore_index, num_params, num_terms;
  const Given *logits, *gradients;  // gradients: null without
  const Listed* listed;  // null without
  const int64_t* labels;
  int64_t label_stride;
  const Given* soft;
  const double* params;
  const Given *denominator, *upstream;
  double divisor;
  const uint64_t* counts;
  double* scratch;
  void *loss, *terms;
  void* stream;
  int64_t device;
};

extern "C" const char* run(const Asked& a);  // "" or what the launcher says
