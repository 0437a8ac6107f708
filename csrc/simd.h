// The vector operations that rows_cpu.cpp needs besides + - *, for AVX-512 (with BF16), AVX2 with FMA, and any other machine.
//   store_pair, stream_pair: two consecutive vectors without NaN; stream_pair bypasses the caches and needs kPairBytes alignment.
//   fraction(x, c, whole): x c - whole, rounded once. larger(a, b): b if one is NaN.
//   scale(a, n): a * 2^n for integer n >= -161, at least a * 2^120 above n = 120.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace srpo {
namespace {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

// Conversions of one element, for tails and labels. Rounds to nearest even; NaN stays NaN.
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400u) { const float f = float(rest) * 0x1p-24f; return sign ? -f : f; }
  return bits_to_float(sign | ((rest << 13) + (112u << 23)));
}
inline void from_float(float f, float* to) { *to = f; }
inline void from_float(float f, BFloat16* to) {
  const uint32_t u = float_to_bits(f);
  to->bits = f != f ? uint16_t(u >> 16 | 0x40u) : uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline void from_float(float f, Float16* to) {
  const uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) half = 0x7e00u;
  else if (rest >= 0x477ff000u) half = 0x7c00u;  // 65520 and above: infinite
  else if (rest < 0x38800000u) half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;  // the addition rounds
  else half = (rest + 0xfffu + (rest >> 13 & 1u) - (112u << 23)) >> 13;
  to->bits = uint16_t(sign | half);
}
template <class T> inline T negative_infinity() { T x; from_float(-std::numeric_limits<float>::infinity(), &x); return x; }

#if defined(__AVX512F__)

typedef __m512 Vec;
constexpr int kLanes = 16;
inline Vec fill(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline Vec load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline __m256i narrow(Vec v, BFloat16*) {
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __m512i out = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
}
inline __m256i narrow(Vec v, Float16*) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <class T> inline void store(T* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p)); }
#if defined(__AVX512BF16__)  // one instruction, which flushes gradients below 2^-126 to 0
inline __m512i narrow_pair(Vec a, Vec b, BFloat16*) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }
#else
inline __m512i narrow_pair(Vec a, Vec b, BFloat16*) {
  const __m512i u = _mm512_castps_si512(a), v = _mm512_castps_si512(b), one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff);
  const __m512i ru = _mm512_add_epi32(_mm512_add_epi32(u, half), _mm512_and_si512(_mm512_srli_epi32(u, 16), one));
  const __m512i rv = _mm512_add_epi32(_mm512_add_epi32(v, half), _mm512_and_si512(_mm512_srli_epi32(v, 16), one));
  const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23,
                                                21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(ru, upper_halves, rv);
}
#endif
inline __m512i narrow_pair(Vec a, Vec b, Float16* p) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a, p)), narrow(b, p), 1);
}
template <class T> inline void store_pair(T* p, Vec a, Vec b) { _mm512_storeu_si512(p, narrow_pair(a, b, p)); }
template <class T> inline void stream_pair(T* p, Vec a, Vec b) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_pair(a, b, p)); }
inline void stream_pair(float* p, Vec a, Vec b) { _mm512_stream_ps(p, a), _mm512_stream_ps(p + kLanes, b); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fraction(Vec x, Vec c, Vec whole) { return _mm512_fmsub_ps(x, c, whole); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

typedef __m256 Vec;
constexpr int kLanes = 8;
inline Vec fill(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline Vec load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline __m128i narrow(Vec v, BFloat16*) {
  const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i out = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
}
inline __m128i narrow(Vec v, Float16*) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <class T> inline void store(T* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, p)); }
template <class T> inline void store_pair(T* p, Vec a, Vec b) { store(p, a), store(p + kLanes, b); }
template <class T> inline void stream_pair(T* p, Vec a, Vec b) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(narrow(b, p), narrow(a, p)));
}
inline void stream_pair(float* p, Vec a, Vec b) { _mm256_stream_ps(p, a), _mm256_stream_ps(p + kLanes, b); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fraction(Vec x, Vec c, Vec whole) { return _mm256_fmsub_ps(x, c, whole); }
inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale(Vec a, Vec n) {  // in two halves, since 2^-161 is not a float
  const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(n, fill(120.0f))), half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const Vec first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  return a * first * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
}

#else

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
inline Vec fill(float x) { return Vec{x, x, x, x}; }
template <class T> inline Vec load(const T* p) { return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
template <class T> inline void store(T* p, Vec v) { for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i); }
template <class T> inline void store_pair(T* p, Vec a, Vec b) { store(p, a), store(p + kLanes, b); }
template <class T> inline void stream_pair(T* p, Vec a, Vec b) { store_pair(p, a, b); }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec fraction(Vec x, Vec c, Vec whole) {  // rounded once, also without a fused multiply-add
  typedef double Wide __attribute__((vector_size(32)));
  return __builtin_convertvector(
      __builtin_convertvector(x, Wide) * __builtin_convertvector(c, Wide) - __builtin_convertvector(whole, Wide), Vec);
}
inline Vec round(Vec a) {  // to an integer if |a| < 2^22; larger floats are close to an integer anyway
  const Vec magic = fill(0x1.8p23f), limit = fill(0x1p22f);
  const Vec near = (a + magic) - magic;
  return ((a < limit) & (a > -limit)) ? near : a;
}
inline Vec scale(Vec a, Vec n) {
  const IntVec whole = __builtin_convertvector(n < fill(120.0f) ? n : fill(120.0f), IntVec), half = whole >> 1, rest = whole - half;
  return a * (Vec)((half + 127) << 23) * (Vec)((rest + 127) << 23);
}

#endif

inline void store_pair(float* p, Vec a, Vec b) { store(p, a), store(p + kLanes, b); }

inline void stream_fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}
template <class T> constexpr int64_t kPairBytes = 2 * kLanes * sizeof(T) < 64 ? 2 * kLanes * sizeof(T) : 64;
inline double add_lanes(Vec v) {
  float lanes[kLanes];
  double sum = 0;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}
inline float largest_lane(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  float most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// 2^(t) as 2^f scaled by the integer n = t - f, |f| <= 1/2; coefficients: least squares of the relative error, p(0) = 1.
// Relative error 1.0e-7 with five coefficients, 2.2e-9 with six.
template <int kDegree> inline Vec exp2_fraction(Vec f) {
  static_assert(kDegree == 5 || kDegree == 6, "");
  Vec p;
  if (kDegree == 6) {
    p = fill(1.5370705e-4f);
    p = fma(p, f, fill(1.3399848e-3f));
    p = fma(p, f, fill(9.6183733e-3f));
    p = fma(p, f, fill(5.5503290e-2f));
    p = fma(p, f, fill(2.4022648e-1f));
    p = fma(p, f, fill(6.9314721e-1f));
  } else {
    p = fill(1.3218672e-3f);
    p = fma(p, f, fill(9.6716979e-3f));
    p = fma(p, f, fill(5.5508930e-2f));
    p = fma(p, f, fill(2.4022238e-1f));
    p = fma(p, f, fill(6.9314686e-1f));
  }
  return fma(p, f, fill(1.0f));
}

}  // namespace
}  // namespace srpo
