// x86-64 with AVX2 and FMA. Its byte products add pairs to 16 bits, so sums are widened in time.

#include "isa.h"

#if defined(__x86_64__)

#include <cstring>

#include "vectors_256.h"

namespace rabit {
namespace {

struct V : Vectors256 {
  static constexpr int kRows = 4, kFewSums = 1;

  // 16-bit sums of two bytes each: of one block and class of bits, 16 * 2 * 8 * 127 at most, and
  // without classes 64 * 2 * 127.
  static I dot_block(I acc, I t, I x) {
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(t, x));
  }
  static I whole(I acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
};

}  // namespace
}  // namespace rabit

#define RB_OWN_DOTS
#include "loops.h"

namespace rabit {
namespace {

template <int M, int L>
void signs_dot(const uint32_t* w, const int32_t* a, int64_t steps, const int32_t*, int32_t* sums) {
  constexpr int n = M * L;
  std::memset(sums, 0, sizeof(int32_t) * n * kTile);
  for (int half = 0; half < kTile; half += 8) {
    const uint32_t* word = w + half;
    const int32_t* v = a;
    for (int64_t s = 0; s < steps; s += 8) {
      // 64 sums of two bytes, 64 * 2 * 255 at most, fit int16.
      __m256i acc[n];
      RB_UNROLL for (int j = 0; j < n; ++j) acc[j] = _mm256_setzero_si256();
      for (int64_t i = s; i < s + 8 && i < steps; ++i, word += kTile, v += 8 * n) {
        if (half == 0) V::prefetch(word);
        __m256i bits = V::load(word);
        RB_UNROLL for (int p = 0; p < 8; ++p) {
          const __m256i t = _mm256_and_si256(bits, _mm256_set1_epi32(kOnes));
          bits = _mm256_srli_epi32(bits, 1);
          RB_UNROLL for (int j = 0; j < n; ++j) {
            const __m256i x = _mm256_set1_epi32(v[p * n + j]);
            acc[j] = _mm256_add_epi16(
                acc[j], j % L == 0 ? _mm256_maddubs_epi16(t, x) : _mm256_maddubs_epi16(x, t));
          }
        }
      }
      RB_UNROLL for (int j = 0; j < n; ++j) {
        int32_t* sum = sums + j * kTile + half;
        const __m256i pairs = _mm256_madd_epi16(acc[j], _mm256_set1_epi16(1));
        V::store(sum, _mm256_add_epi32(V::load(sum), pairs));
      }
    }
  }
}

// Bytes are widened first: pairs of them reach 2 * 128 * 128 and would saturate.
template <int M, int L>
void table_dot(const uint32_t* w, const int32_t* a, int64_t steps, const int32_t*, int32_t* sums) {
  constexpr int n = M * L;
  for (int part = 0; part < kTile; part += 4) {
    __m256i acc[n];
    RB_UNROLL for (int j = 0; j < n; ++j) acc[j] = _mm256_setzero_si256();
    for (int64_t s = 0; s < steps; ++s) {
      if (part == 0) V::prefetch(w + s * kTile);
      const __m256i t = _mm256_cvtepi8_epi16(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + s * kTile + part)));
      RB_UNROLL for (int j = 0; j < n; ++j) {
        const __m256i x = _mm256_cvtepi8_epi16(_mm_set1_epi32(a[s * n + j]));
        acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(t, x));
      }
    }
    RB_UNROLL for (int j = 0; j < n; ++j) {
      const __m256i pairs = _mm256_hadd_epi32(acc[j], acc[j]);  // 0 1 0 1 | 2 3 2 3
      const __m256i four = _mm256_permute4x64_epi64(pairs, 0x08);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + j * kTile + part),
                       _mm256_castsi256_si128(four));
    }
  }
}

}  // namespace

const Isa* avx2() {
  static const Isa isa = RB_ISA("avx2", {});
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                 __builtin_cpu_supports("f16c")
             ? &isa
             : nullptr;
}

}  // namespace rabit

#else

const rabit::Isa* rabit::avx2() { return nullptr; }

#endif
