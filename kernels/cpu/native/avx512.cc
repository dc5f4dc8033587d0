// x86-64 with AVX-512 VNNI; bfloat16 products where AVX512_BF16 is there too.

#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace rabit {
namespace {

struct V {
  static constexpr int kLanes = 16, kRows = 8, kFewSums = 6, kBias = 128, kPanel = 12, kGroup = 2;
  using I = __m512i;
  using F = __m512;

  // The distance at which one thread reads weights fastest from the memory of a Zen 5: 25% faster
  // than 2 KB with one limb, and 10% with two.
  static void prefetch(const uint32_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at) + 8192, _MM_HINT_T0);
  }
  static I zero() { return _mm512_setzero_si512(); }
  static I set(int32_t x) { return _mm512_set1_epi32(x); }
  static I load(const void* from) { return _mm512_loadu_si512(from); }
  static void store(void* to, I x) { _mm512_storeu_si512(to, x); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  template <int S>
  static I right(I a) {
    return _mm512_srli_epi32(a, S);
  }
  template <int S>
  static I right_signed(I a) {
    return _mm512_srai_epi32(a, S);
  }
  static I dot_top(I acc, I t, I x) { return _mm512_dpbusd_epi32(acc, t, x); }
  static I dot_low(I acc, I t, I x) { return _mm512_dpbusd_epi32(acc, x, t); }
  static I dot_block(I acc, I t, I x) { return dot_top(acc, t, x); }
  static I whole(I acc) { return acc; }
  static I biased(I t) { return _mm512_xor_si512(t, _mm512_set1_epi8(-128)); }
  static I dot_table(I acc, I t, I x) { return _mm512_dpbusd_epi32(acc, t, x); }

  static I left(I a, int s) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(s)); }
  template <int S>
  static I left_by(I a) {
    return _mm512_slli_epi32(a, S);
  }
  static F setf(float x) { return _mm512_set1_ps(x); }
  static F loadf(const float* from) { return _mm512_loadu_ps(from); }
  static void storef(float* to, F x) { _mm512_storeu_ps(to, x); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F addf(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float sumf(F x) { return _mm512_reduce_add_ps(x); }
  static F negated_where_clear(I at, F x) {
    const I top = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    // (~at & top) ^ x in one instruction.
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(at, top, _mm512_castps_si512(x), (~0xf0 & 0xcc) ^ 0xaa));
  }
  // Lane o holds the two inputs of output o.
  static void store_pairs(uint32_t* to, F first, F second) {
    const I both = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(second, first));
    const I order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                     23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
  }
  static F dot_pairs(F acc, F a, F b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

// Compilers make slow code of a plain loop over halves: 25 times the instruction.
void widen_halves(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(
        to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  const __mmask16 rest = static_cast<__mmask16>((1u << (n - i)) - 1u);
  _mm512_mask_storeu_ps(to + i, rest,
                        _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rest, from + i)));
}

}  // namespace
}  // namespace rabit

#define RB_BFLOAT16 1
#include "loops.h"

namespace rabit {

const Isa* avx512() {
  static const Isa isa = RB_ISA("avx512", {});
  static const Isa with_bfloat16 = RB_ISA("avx512", RB_FLOATS(true));
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("fma")))
    return nullptr;
  return __builtin_cpu_supports("avx512bf16") ? &with_bfloat16 : &isa;
}

}  // namespace rabit

#else

const rabit::Isa* rabit::avx512() { return nullptr; }

#endif
