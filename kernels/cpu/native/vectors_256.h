// Vectors of 256 bits on x86-64: what avx2.cc and avxvnni.cc have in common.

#pragma once

#include <immintrin.h>

#include "isa.h"

namespace rabit {
namespace {

struct Vectors256 {
  static constexpr int kLanes = 8, kPanel = 6, kGroup = 1;
  using I = __m256i;
  using F = __m256;

  static void prefetch(const uint32_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at) + 2048, _MM_HINT_T0);
  }
  static I zero() { return _mm256_setzero_si256(); }
  static I set(int32_t x) { return _mm256_set1_epi32(x); }
  static I load(const void* from) { return _mm256_loadu_si256(static_cast<const I*>(from)); }
  static void store(void* to, I x) { _mm256_storeu_si256(static_cast<I*>(to), x); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  template <int S>
  static I right(I a) {
    return _mm256_srli_epi32(a, S);
  }
  template <int S>
  static I right_signed(I a) {
    return _mm256_srai_epi32(a, S);
  }
  static I left(I a, int s) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(s)); }
  template <int S>
  static I left_by(I a) {
    return _mm256_slli_epi32(a, S);
  }
  static F setf(float x) { return _mm256_set1_ps(x); }
  static F loadf(const float* from) { return _mm256_loadu_ps(from); }
  static void storef(float* to, F x) { _mm256_storeu_ps(to, x); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F addf(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float sumf(F x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  static F negated_where_clear(I at, F x) {
    const I top = _mm256_set1_epi32(static_cast<int>(0x80000000u));
    return _mm256_xor_ps(x, _mm256_castsi256_ps(_mm256_andnot_si256(at, top)));
  }
};

void widen_halves(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(
        to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i]);
}

}  // namespace
}  // namespace rabit
