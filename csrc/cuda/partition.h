// Chunks of a row: how a team of threads divides it, reads it in any type and writes its gradient.
//
// A team is whoever works on one row together: a warp, a block, or, on the host, a thread. It has
// rank(), size(), sum(), max(), sync() and memory(). A thread keeps to its own chunks, so that what
// it leaves in the team's memory about a chunk needs no sync().
#pragma once
#include "../core/device.h"
#include "kernel_args.h"

namespace kdfuse {

constexpr int kChunk = 8;  // classes
constexpr int kNote = 6;  // numbers that a team keeps for an input of its row
constexpr int kNotes = kNote * kMaxStreams;
constexpr int kNowhere = -(1 << 30);  // a label that no chunk holds

// Chunk i holds the classes from first(i) on. Chunks lie on 16-byte boundaries of the student's row,
// so the first and the last may reach outside it.
struct Span {
  int classes, shift, chunks;

  KDFUSE_DEVICE_MEMBER int first(int i) const { return i * kChunk - shift; }
  KDFUSE_DEVICE_MEMBER bool whole(int i) const {
    const unsigned starts = classes < kChunk ? 0 : classes - kChunk + 1;  // where a whole chunk may
    return static_cast<unsigned>(first(i)) < starts;
  }
  KDFUSE_DEVICE_MEMBER int chunk_of(int label) const { return label < 0 ? -1 : (label + shift) / kChunk; }
};

// The most chunks that a row can have.
KDFUSE_HD int max_chunks(int classes) { return (classes + 2 * kChunk - 2) / kChunk; }

KDFUSE_HD int log_bytes(DType type) { return type == DType::f64 ? 3 : type == DType::f32 ? 2 : 1; }
KDFUSE_HD int64_t bytes_of(DType type) { return int64_t{1} << log_bytes(type); }

// A row of the input: its padding and its labels read as `pad`.
template <class T>
struct Source {
  const char* row;  // its class 0
  DType type;
  bool vectors;  // chunks of it lie on 16-byte boundaries
  int held;  // where the team's memory keeps it, or -1
  T pad;
  // Of a top-k teacher: `row` holds the logits of these classes, less `shift`; the others have the logit `fill`.
  const int64_t* listed;  // or null
  int count;
  T shift, fill;
};

template <class T>
struct Sink {
  char* row;
  DType type;
  bool vectors;
};

struct alignas(16) Words {
  uint32_t w[4];
};

KDFUSE_DEVICE Words load_words(const void* at) {
  const uint4 v = __ldg(static_cast<const uint4*>(at));
  return {{v.x, v.y, v.z, v.w}};
}

KDFUSE_DEVICE void store_words(void* at, const Words& words) {
  *static_cast<uint4*>(at) = make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]);
}

// One number of a row. Rows of doubles are computed in double only.
template <class T>
KDFUSE_DEVICE T stored(const Source<T>& s, int64_t j) {
  if (sizeof(T) == sizeof(double) && s.type == DType::f64) {
    return static_cast<T>(reinterpret_cast<const double*>(s.row)[j]);
  }
  const bool wide = s.type == DType::f32;
  const uint32_t bits =
      wide ? reinterpret_cast<const uint32_t*>(s.row)[j] : reinterpret_cast<const uint16_t*>(s.row)[j];
  return static_cast<T>(unpack_one(s.type, bits));
}

template <class T>
KDFUSE_DEVICE T element(const Source<T>& s, int64_t j) {
  if (!s.listed) return stored(s, j);
  for (int k = 0; k < s.count; ++k) {
    if (s.listed[k] == j) return stored(s, k) - s.shift;
  }
  return s.fill;
}

// Chunk i of a top-k teacher. Every thread goes through the list: it is short, and near.
template <class T>
KDFUSE_DEVICE void read_listed(const Source<T>& s, const Span& span, int i, T (&x)[kChunk]) {
  const int first = span.first(i);
#pragma unroll
  for (int v = 0; v < kChunk; ++v) {
    x[v] = static_cast<unsigned>(first + v) < static_cast<unsigned>(span.classes) ? s.fill : s.pad;
  }
#pragma unroll 1
  for (int k = 0; k < s.count; ++k) {
    const auto place = static_cast<uint64_t>(s.listed[k] - first);
    if (place >= kChunk) continue;
    const T value = stored(s, k) - s.shift;
#pragma unroll
    for (unsigned v = 0; v < kChunk; ++v) x[v] = v == place ? value : x[v];
  }
}

// A chunk as it comes: eight words, or four of two 16-bit numbers each.
struct Raw {
  uint32_t w[kChunk];
};

KDFUSE_DEVICE Raw fetch_vectors(const char* row, bool wide, int64_t j) {
  const Words a = load_words(row + (wide ? 4 : 2) * j);
  const Words b = wide ? load_words(row + 4 * j + 16) : a;
  return {{a.w[0], a.w[1], a.w[2], a.w[3], b.w[0], b.w[1], b.w[2], b.w[3]}};
}

// Element by element, those outside the row left out.
KDFUSE_DEVICE Raw fetch_elements(const char* row, bool wide, int j, int classes) {
  Raw raw = {};
#pragma unroll
  for (int v = 0; v < kChunk; ++v) {
    if (static_cast<unsigned>(j + v) >= static_cast<unsigned>(classes)) continue;
    if (wide) {
      raw.w[v] = reinterpret_cast<const uint32_t*>(row)[j + v];
    } else {
      const uint32_t bits = reinterpret_cast<const uint16_t*>(row)[j + v];
      raw.w[v / 2] |= v % 2 ? bits << 16 : bits;
    }
  }
  return raw;
}

KDFUSE_DEVICE void decode(DType type, const Raw& raw, float (&x)[kChunk]) {
#pragma unroll
  for (int v = 0; v < kChunk; ++v) {
    const uint32_t two = raw.w[v / 2];
    if (type == DType::f32) {
      x[v] = as_float(raw.w[v]);
    } else if (type == DType::bf16) {
      x[v] = as_float(v % 2 ? two & 0xffff0000u : two << 16);
    } else {
      x[v] = from_f16(v % 2 ? two >> 16 : two & 0xffffu);
    }
  }
}

// Chunk i as it stands in the input, its labels included.
KDFUSE_DEVICE void read_input(const Source<float>& s, const Span& span, int i, float (&x)[kChunk]) {
  if (s.listed) return read_listed(s, span, i, x);
  const int j = span.first(i);
  const bool wide = s.type == DType::f32;
  if (s.vectors && span.whole(i)) return decode(s.type, fetch_vectors(s.row, wide, j), x);
  decode(s.type, fetch_elements(s.row, wide, j, span.classes), x);
#pragma unroll
  for (int v = 0; v < kChunk; ++v) {
    if (static_cast<unsigned>(j + v) >= static_cast<unsigned>(span.classes)) x[v] = s.pad;
  }
}

KDFUSE_DEVICE void read_input(const Source<double>& s, const Span& span, int i, double (&x)[kChunk]) {
  if (s.listed) return read_listed(s, span, i, x);
  const int j = span.first(i);
#pragma unroll
  for (int v = 0; v < kChunk; ++v) x[v] = j + v >= 0 && j + v < span.classes ? stored(s, j + v) : s.pad;
}

// What a team keeps for one of the inputs of its row.
template <class T, class Team>
KDFUSE_DEVICE T* notes(const Team& team, int k) {
  return static_cast<T*>(team.memory()) + kNote * k;
}

// A held row. It stands in two halves, so that the threads of a warp meet no bank conflicts.
template <class T, class Team>
KDFUSE_DEVICE T* held_row(const Team& team, const Task& p, int which) {
  return static_cast<T*>(team.memory()) + kNotes + which * int64_t{kChunk} * max_chunks(p.classes);
}

KDFUSE_DEVICE void get_half(const float* from, float* x) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

KDFUSE_DEVICE void get_half(const double* from, double* x) {
  for (int v = 0; v < kChunk / 2; ++v) x[v] = from[v];
}

KDFUSE_DEVICE void put_half(float* to, const float* x) {
  store_words(to, {{as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])}});
}

KDFUSE_DEVICE void put_half(double* to, const double* x) {
  for (int v = 0; v < kChunk / 2; ++v) to[v] = x[v];
}

template <class T, class Team>
KDFUSE_DEVICE void hold(const Team& team, const Task& p, int which, const Span& span, int i, const T (&x)[kChunk]) {
  T* const row = held_row<T>(team, p, which);
  put_half(row + i * (kChunk / 2), x);
  put_half(row + (span.chunks + i) * (kChunk / 2), x + kChunk / 2);
}

template <class T, class Team>
KDFUSE_DEVICE void get_held(const Team& team, const Task& p, int which, const Span& span, int i, T (&x)[kChunk]) {
  const T* const row = held_row<T>(team, p, which);
  get_half(row + i * (kChunk / 2), x);
  get_half(row + (span.chunks + i) * (kChunk / 2), x + kChunk / 2);
}

template <class T>
KDFUSE_DEVICE void write_vectors(const Sink<T>& s, int64_t j, const T (&g)[kChunk]) {
  if (s.type == DType::f32) {
    store_words(s.row + 4 * j, {{as_bits(g[0]), as_bits(g[1]), as_bits(g[2]), as_bits(g[3])}});
    store_words(s.row + 4 * j + 16, {{as_bits(g[4]), as_bits(g[5]), as_bits(g[6]), as_bits(g[7])}});
  } else {
    store_words(s.row + 2 * j, {{to_bf16(g[0], g[1]), to_bf16(g[2], g[3]), to_bf16(g[4], g[5]), to_bf16(g[6], g[7])}});
  }
}

template <class T>
KDFUSE_DEVICE void write_element(const Sink<T>& s, int64_t j, T g) {
  if (s.type == DType::f32) {
    reinterpret_cast<float*>(s.row)[j] = static_cast<float>(g);
  } else if (s.type == DType::bf16) {
    reinterpret_cast<uint16_t*>(s.row)[j] = static_cast<uint16_t>(to_bf16(static_cast<float>(g), 0.f));
  } else if (sizeof(T) == sizeof(double)) {
    reinterpret_cast<double*>(s.row)[j] = static_cast<double>(g);
  }
}

template <class T>
KDFUSE_DEVICE void write_output(const Sink<T>& s, const Span& span, int i, const T (&g)[kChunk]) {
  const int j = span.first(i);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (s.vectors && span.whole(i)) return write_vectors(s, j, g);
  }
#pragma unroll
  for (int v = 0; v < kChunk; ++v) {
    if (j + v >= 0 && j + v < span.classes) write_element(s, j + v, g[v]);
  }
}

}  // namespace kdfuse
