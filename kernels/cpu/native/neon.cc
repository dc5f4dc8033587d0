// ARM, 64 bits, with the dot product instructions.

#include "isa.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace rabit {
namespace {

struct V {
  static constexpr int kLanes = 4, kRows = 8, kFewSums = 6, kBias = 0, kPanel = 6, kGroup = 1;
  using I = uint32x4_t;
  using F = float32x4_t;

  static void prefetch(const uint32_t* at) {
    __builtin_prefetch(reinterpret_cast<const char*>(at) + 2048);
  }
  static I zero() { return vdupq_n_u32(0); }
  static I set(uint32_t x) { return vdupq_n_u32(x); }
  static I load(const void* from) { return vld1q_u32(static_cast<const uint32_t*>(from)); }
  static void store(void* to, I x) { vst1q_u32(static_cast<uint32_t*>(to), x); }
  static I bit_and(I a, I b) { return vandq_u32(a, b); }
  static I add(I a, I b) { return vaddq_u32(a, b); }
  template <int S>
  static I right(I a) {
    return vshrq_n_u32(a, S);
  }
  template <int S>
  static I right_signed(I a) {
    return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a), S));
  }
  static I dot_top(I acc, I t, I x) {
    return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(acc), vreinterpretq_s8_u32(t),
                                           vreinterpretq_s8_u32(x)));
  }
  static I dot_low(I acc, I t, I x) {
    return vdotq_u32(acc, vreinterpretq_u8_u32(t), vreinterpretq_u8_u32(x));
  }
  static I dot_block(I acc, I t, I x) { return dot_top(acc, t, x); }
  static I whole(I acc) { return acc; }
  static I biased(I t) { return t; }
  static I dot_table(I acc, I t, I x) { return dot_top(acc, t, x); }

  static I left(I a, int s) { return vshlq_u32(a, vdupq_n_s32(s)); }
  template <int S>
  static I left_by(I a) {
    return vshlq_n_u32(a, S);
  }
  static F setf(float x) { return vdupq_n_f32(x); }
  static F loadf(const float* from) { return vld1q_f32(from); }
  static void storef(float* to, F x) { vst1q_f32(to, x); }
  static F to_float(I a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F addf(F a, F b) { return vaddq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static float sumf(F x) { return vaddvq_f32(x); }
  static F negated_where_clear(I at, F x) {
    const I flip = vbicq_u32(vdupq_n_u32(0x80000000u), at);
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), flip));
  }
};

void widen_halves(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
  for (; i < n; ++i) {
    __fp16 half;
    __builtin_memcpy(&half, from + i, sizeof half);
    to[i] = half;
  }
}

}  // namespace
}  // namespace rabit

#include "loops.h"

namespace rabit {

const Isa* neon() {
  static const Isa isa = RB_ISA("neon", {});
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? &isa : nullptr;
#else
  return &isa;
#endif
}

}  // namespace rabit

#else

const rabit::Isa* rabit::neon() { return nullptr; }

#endif
