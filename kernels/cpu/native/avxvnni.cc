// x86-64 with AVX-VNNI: the dot product of AVX-512 VNNI on vectors of 256 bits.

#include "isa.h"

#if defined(__x86_64__) && defined(__AVXVNNI__)

#include "vectors_256.h"

namespace rabit {
namespace {

struct V : Vectors256 {
  static constexpr int kRows = 4, kFewSums = 3, kBias = 128;

  static I dot_top(I acc, I t, I x) { return _mm256_dpbusd_avx_epi32(acc, t, x); }
  static I dot_low(I acc, I t, I x) { return _mm256_dpbusd_avx_epi32(acc, x, t); }
  static I dot_block(I acc, I t, I x) { return dot_top(acc, t, x); }
  static I whole(I acc) { return acc; }
  static I biased(I t) { return _mm256_xor_si256(t, _mm256_set1_epi8(-128)); }
  static I dot_table(I acc, I t, I x) { return _mm256_dpbusd_avx_epi32(acc, t, x); }
};

}  // namespace
}  // namespace rabit

#include <cpuid.h>

#include "loops.h"

namespace rabit {

const Isa* avxvnni() {
  static const Isa isa = RB_ISA("avxvnni", {});
  unsigned a = 0, b = 0, c = 0, d = 0;
  // Compilers older than the instruction do not know its name; leaf 7.1, EAX bit 4, tells.
  const bool there = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1u);
  __builtin_cpu_init();
  return there && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &isa : nullptr;
}

}  // namespace rabit

#else

const rabit::Isa* rabit::avxvnni() { return nullptr; }

#endif
