// The project's launcher and kernels, called as csrc/cuda/ops.cpp does, on memory of the host.
#include <cstdio>

#include "../../csrc/cuda/launch.h"
#include "record.h"
#include "simulator.h"
#include "world.h"

using namespace kdfuse;

namespace {

Matrix matrix(const Given& g) { return {g.data, g.stride, static_cast<DType>(g.type)}; }
Numbers numbers(const Given* g) {
  if (!g) return {nullptr, DType::f64, 0};
  return {g->data, static_cast<DType>(g->type), g->stride};
}

char message[512];

const char* said(const std::string& text) {
  std::snprintf(message, sizeof(message), "%s", text.c_str());
  return message;
}

FILE* records = nullptr;

template <class T>
void put(const T& x) {
  std::fwrite(&x, sizeof(x), 1, records);
}

void put_bytes(const void* data, size_t bytes) {
  put(static_cast<uint64_t>(bytes));
  if (bytes) std::fwrite(data, 1, bytes, records);
}

// Of every tensor.
std::vector<std::vector<char>> contents() {
  std::vector<std::vector<char>> all;
  for (const auto& r : simulator::memory()) {
    if (records) all.emplace_back(r.at, r.at + r.bytes);
  }
  return all;
}

void keep(const Asked& a, const std::vector<std::vector<char>>& before) {
  put(simulator::device_in_use()), put(simulator::seed_in_use()), put(a);
  const auto& all = simulator::memory();
  put(static_cast<uint64_t>(all.size()));
  for (size_t k = 0; k < all.size(); ++k) {
    put(reinterpret_cast<uintptr_t>(all[k].at)), put_bytes(all[k].name.data(), all[k].name.size());
    put(all[k].writable), put_bytes(before[k].data(), before[k].size()), put_bytes(all[k].at, all[k].bytes);
  }
  put_bytes(a.logits, (a.students + a.teachers) * sizeof(Given));
  put_bytes(a.gradients, a.gradients ? a.students * sizeof(Given) : 0);
  for (const Given* one : {a.soft, a.denominator, a.upstream}) put_bytes(one, one ? sizeof(Given) : 0);
  put_bytes(a.listed, a.listed ? a.teachers * sizeof(Listed) : 0);
  put_bytes(a.params, a.num_params * sizeof(double));
  put_bytes(a.counts, kMaxColumns / 64 * sizeof(uint64_t));
}

struct Named {
  const void* kernel;
  char name[64];
};

size_t add(Named* all, size_t count, const void* kernel, const char* kind, const char* loss, const char* type,
           const char* variant) {
  if (!kernel) return count;
  all[count].kernel = kernel;
  std::snprintf(all[count].name, sizeof(all[count].name), "%s-%s-%s-%s", kind, loss, type, variant);
  return count + 1;
}

}  // namespace

extern "C" {

// From here on calls are kept in a file, for replay.cpp; null: no longer.
void record(const char* path) {
  if (records) std::fclose(records);
  records = path ? std::fopen(path, "wb") : nullptr;
}

const char* run(const Asked& a) {
  Task p = {};
  p.rows = a.rows, p.classes = static_cast<int>(a.classes);
  p.num_students = static_cast<int>(a.students), p.num_teachers = static_cast<int>(a.teachers);
  p.num_terms = static_cast<int>(a.num_terms);
  for (int k = 0; k < a.students + a.teachers; ++k) p.logits[k] = matrix(a.logits[k]);
  p.sparse = a.listed != nullptr;
  for (int k = 0; a.listed && k < a.teachers; ++k) {
    p.top_k[k] = {a.listed[k].classes, a.listed[k].count, a.listed[k].count, matrix(a.listed[k].mass)};
  }
  p.with_gradient = a.gradients != nullptr;
  for (int k = 0; a.gradients && k < a.students; ++k) {
    p.gradients[k] = {a.gradients[k].data, static_cast<DType>(a.gradients[k].type)};
  }
  p.labels = a.labels, p.label_stride = a.label_stride, p.ignore_index = a.ignore_index;
  if (a.soft) p.soft = matrix(*a.soft);
  for (int k = 0; k < a.num_params; ++k) p.params[k] = a.params[k];
  p.mean = a.reduction == 1, p.each_row = a.reduction == 0;
  p.denominator = numbers(a.denominator), p.divisor = a.divisor, p.upstream = numbers(a.upstream);
  set_scratch(p, a.scratch);
  p.loss = a.loss, p.terms = a.terms, p.type = a.wide ? DType::f64 : DType::f32;
  for (int k = 0; k < kMaxColumns / 64; ++k) p.counts[k] = a.counts[k];
  const auto before = contents();
  const std::string failed = launch(static_cast<Loss>(a.op), p, a.wide != 0, static_cast<int>(a.device), a.stream);
  if (records) keep(a, before);
  return said(failed);
}

// Into a graph each, which is gone before the next one begins, or with all others at the end. No graph of an earlier
// call comes again, so that what has not been given back stays taken.
const char* capture(const Asked& asked, int64_t count, int64_t destroyed) {
  static int64_t first = 0;
  const auto stream = [](int64_t k) { return reinterpret_cast<void*>(2 * (first + k) + 1); };
  Asked a = asked;
  const char* failed = "";
  for (int64_t k = 0; k < count && !*failed; ++k) {
    a.stream = stream(k);
    failed = run(a);
    if (destroyed) destroy_graph(a.stream);
  }
  for (int64_t k = 0; k < count; ++k) destroy_graph(stream(k));
  first += count;
  return failed;
}

const char* scale(const Given* gradients, void* const* halves, int64_t count, int64_t rows, int64_t classes,
                  const Given* factor, int64_t device) {
  Output outputs[64];
  for (int64_t k = 0; k < count; ++k) outputs[k] = {gradients[k].data, static_cast<DType>(gradients[k].type)};
  return said(launch_scale(outputs, halves, static_cast<int>(count), rows, classes, numbers(factor),
                           static_cast<int>(device), nullptr));
}

// Doubles.
int64_t scratch(int64_t rows, int64_t terms) {
  Call p = {};
  p.rows = rows, p.num_terms = static_cast<int>(terms);
  return scratch_numbers(p, true);
}

// Every kernel of the table, with the names that the disassembly gives them.
size_t table(Named* all) {
  size_t n = 0;
  const struct {
    DType type;
    const char* name;
  } types[] = {{DType::f32, "f32"}, {DType::bf16, "bf16"}, {DType::f16, "f16"}};
  const struct {
    const char* loss;
    LossKernels of;
  } losses[] = {
#define KDFUSE_OTHER(name) {#name, name##_kernels()},
#include "../../csrc/losses/all.def"
  };
  const int64_t label = 0;
  for (const auto& [loss, of] : losses) {
    const GeneralKernels general = of.general();
    n = add(all, n, general.warps, "general_warps", loss, "f32", "any");
    n = add(all, n, general.blocks, "general_blocks", loss, "f32", "any");
    n = add(all, n, general.wide, "general_blocks", loss, "f64", "any");
    for (const auto& t : types) {
      const auto add_fast = [&](const char* variant, int students, int teachers, bool labelled, bool soft, bool any) {
        Task p = {};
        p.num_students = students, p.num_teachers = teachers;
        for (int k = 0; k < students + teachers; ++k) p.logits[k].type = t.type;
        if (any) p.logits[1].type = t.type == DType::f32 ? DType::bf16 : DType::f32;
        p.labels = labelled ? &label : nullptr, p.soft.data = soft ? &label : nullptr;
        const FastKernels k = of.fast(p);
        for (size_t i = 0; i < n; ++i) {
          if (all[i].kernel == k.warps) return;  // the same as before
        }
        n = add(all, n, k.warps, "fast_warps", loss, t.name, variant);
        n = add(all, n, k.blocks, "fast_blocks", loss, t.name, variant);
        n = add(all, n, k.clusters, "fast_clusters", loss, t.name, variant);
        n = add(all, n, k.streams, "fast_streams", loss, t.name, variant);
      };
      if (!of.fast) continue;
      if (of.fused) {
        add_fast("1", 2, 1, true, false, false), add_fast("2", 3, 1, true, false, false);
      } else {
        add_fast("labelled", 1, 1, true, false, false), add_fast("bare", 1, 1, false, false, false);
        add_fast("mixed", 1, 1, true, false, true), add_fast("two", 1, 2, true, false, false);
        add_fast("soft", 1, 1, false, true, false);
      }
    }
  }
  return n;
}
}
