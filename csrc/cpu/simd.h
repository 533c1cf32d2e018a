// Vectors of one instruction-set level, in the compilers' own vector types. The level is the one that
// the file is compiled for; only fused multiply-add and maximum need intrinsics.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace kdfuse {

#if defined(__AVX512F__)
constexpr int kFloatLanes = 16;
#elif defined(__AVX2__)
constexpr int kFloatLanes = 8;
#else
constexpr int kFloatLanes = 4;
#endif

// T: float (a full register) or double (one lane: the float64 path exists for precision, not speed).
template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int lanes = kFloatLanes;
  typedef float vec __attribute__((vector_size(sizeof(float) * lanes)));
  typedef int32_t lane;
  typedef int32_t ints __attribute__((vector_size(sizeof(float) * lanes)));
  typedef uint16_t halves __attribute__((vector_size(sizeof(uint16_t) * lanes)));
  typedef uint32_t words __attribute__((vector_size(sizeof(float) * lanes)));
};

template <>
struct Simd<double> {
  static constexpr int lanes = 1;
  typedef double vec __attribute__((vector_size(sizeof(double))));
  typedef int64_t lane;
  typedef int64_t ints __attribute__((vector_size(sizeof(double))));
};

using vecf = Simd<float>::vec;
using vecd = Simd<double>::vec;

template <class T>
static inline typename Simd<T>::vec load(const T* p) {
  typename Simd<T>::vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
static inline void store(T* p, typename Simd<T>::vec v) {
  std::memcpy(p, &v, sizeof(v));
}

template <class T>
static inline typename Simd<T>::vec fill(T x) {
  typename Simd<T>::vec zero = {};
  return zero + x;
}

#if defined(__AVX512F__) || defined(__FMA__) || defined(__ARM_NEON)
constexpr bool kFused = true;  // fma() rounds once
#else
constexpr bool kFused = false;
#endif

static inline vecf fma(vecf a, vecf b, vecf c) {
#if defined(__AVX512F__)
  return (vecf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vecf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (vecf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

static inline vecf maximum(vecf a, vecf b) {
#if defined(__AVX512F__)
  return (vecf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vecf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

static inline vecd fma(vecd a, vecd b, vecd c) { return vecd{std::fma(a[0], b[0], c[0])}; }
static inline vecd maximum(vecd a, vecd b) { return a > b ? a : b; }

// base^x of the type's own base, 2 for float and e for double, for x <= 0 (or just above it).
// Float: to 1.5 ulp; below the normal numbers 0 or nearly so, at -inf exactly 0; NaN stays NaN.
template <class T>
struct Power;

template <>
struct Power<float> {
  static constexpr double log_base = 0.693147180559945309417;
};
template <>
struct Power<double> {
  static constexpr double log_base = 1;
};

static inline vecf power(vecf x) {
#if defined(__AVX512F__)
  // Of two operands maxps returns the second where one is NaN.
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x);
  const __m512 n = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vecf f = (vecf)clamped - (vecf)n;
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; + 127 is the exponent's bias.
  const vecf magic = fill<float>(12582912.f + 127.f), shifted = x + magic;
  const vecf f = x - (shifted - magic);
#endif
  // 2^f, minimax on |f| <= 1/2 for the relative error (2e-9).
  vecf p = fma(fill<float>(1.53533096e-4f), f, fill<float>(1.33989390e-3f));
  p = fma(p, f, fill<float>(9.61843785e-3f));
  p = fma(p, f, fill<float>(5.55033237e-2f));
  p = fma(p, f, fill<float>(2.40226477e-1f));
  p = fma(p, f, fill<float>(6.93147182e-1f));
  p = fma(p, f, fill<float>(1.f));
#if defined(__AVX512F__)
  return (vecf)_mm512_scalef_ps((__m512)p, n);
#else
  const vecf zero = {};
  return x < -126.f ? zero : p * (vecf)((Simd<float>::ints)shifted << 23);
#endif
}

static inline vecd power(vecd x) { return vecd{std::exp(x[0])}; }

// In halves: a chain of sixteen additions would cost more than the loop over a short row.
static inline double sum_lanes(vecf v) {
  double s[kFloatLanes];
  for (int i = 0; i < kFloatLanes; ++i) s[i] = v[i];
  for (int half = kFloatLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  }
  return s[0];
}
static inline double sum_lanes(vecd v) { return v[0]; }

static inline float max_lanes(vecf v) {
  float m[kFloatLanes];
  store(m, v);
  for (int half = kFloatLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) m[i] = m[i + half] > m[i] ? m[i + half] : m[i];
  }
  return m[0];
}
static inline double max_lanes(vecd v) { return v[0]; }

// The 16-bit types as bits.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline Simd<float>::words widen(const uint16_t* p) {
  Simd<float>::halves h;
  std::memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, Simd<float>::words);
}

static inline void narrow(uint16_t* p, Simd<float>::words w) {
  const Simd<float>::halves h = __builtin_convertvector(w, Simd<float>::halves);
  std::memcpy(p, &h, sizeof(h));
}

static inline vecf load_as(const float* p, float) { return load(p); }
static inline vecf load_as(const bf16* p, float) { return (vecf)(widen(&p->bits) << 16); }
static inline vecf load_as(const f16* p, float) {
#if defined(__AVX512F__)
  return (vecf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vecf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const Simd<float>::words h = widen(&p->bits), sign = (h & 0x8000u) << 16, body = (h & 0x7fffu) << 13;
  // The exponent's bias is moved by a multiplication, which turns subnormals right as well.
  const Simd<float>::words finite = (Simd<float>::words)((vecf)body * 5.192296858534828e33f);
  const Simd<float>::words special = body | 0x7f800000u;
  return (vecf)(sign | ((h & 0x7c00u) == 0x7c00u ? special : finite));
#endif
}
static inline vecd load_as(const double* p, double) { return load(p); }
static inline vecd load_as(const float* p, double) { return vecd{static_cast<double>(*p)}; }
template <class H>
static inline vecd load_as(const H* p, double) {
  H padded[kFloatLanes] = {*p};
  return vecd{static_cast<double>(load_as(padded, 0.f)[0])};
}

static inline void store_as(float* p, vecf v) { store(p, v); }
static inline void store_as(double* p, vecd v) { store(p, v); }
static inline void store_as(float* p, vecd v) { *p = static_cast<float>(v[0]); }
static inline void store_as(bf16* p, vecf v) {
  const Simd<float>::words w = (Simd<float>::words)v;
  // Round to nearest even; a NaN must not be rounded into an infinity.
  const Simd<float>::words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  narrow(&p->bits, v != v ? (w >> 16) | 0x40u : rounded);
}
static inline void store_as(bf16* p, vecd v) {
  bf16 lanes[kFloatLanes];
  store_as(lanes, fill<float>(static_cast<float>(v[0])));
  *p = lanes[0];
}

}  // namespace kdfuse
