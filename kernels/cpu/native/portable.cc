// Plain C++: the meaning of every operation that loops.h uses, and the build for any machine.

#include <cmath>
#include <cstring>

#include "isa.h"

namespace rabit {
namespace {

struct V {
  static constexpr int kLanes = 16;    // dwords of one vector
  static constexpr int kRows = 4;      // largest block of rows of the integer loops
  static constexpr int kFewSums = 0;   // sums up to which classes of bits are kept apart
  static constexpr int kBias = 0;      // what `biased` adds to the bytes of a table
  static constexpr int kPanel = 4;     // largest panel of the float loops
  static constexpr int kGroup = 1;     // tiles that they multiply at a time

  struct I {
    uint32_t lane[kLanes];
  };
  struct F {
    float lane[kLanes];
  };

  template <class To, class Function>
  static To each(Function f) {
    To y;
    for (int n = 0; n < kLanes; ++n) y.lane[n] = f(n);
    return y;
  }
  static int32_t byte_at(uint32_t dword, int b, bool is_signed) {
    const uint8_t byte = static_cast<uint8_t>(dword >> (8 * b));
    return is_signed ? static_cast<int8_t>(byte) : byte;
  }
  static I dot(I acc, I t, bool t_signed, I x, bool x_signed) {
    return each<I>([&](int n) {
      int32_t sum = static_cast<int32_t>(acc.lane[n]);
      for (int b = 0; b < 4; ++b)
        sum += byte_at(t.lane[n], b, t_signed) * byte_at(x.lane[n], b, x_signed);
      return static_cast<uint32_t>(sum);
    });
  }

  static void prefetch(const uint32_t*) {}  // what lies a little beyond
  static I zero() { return I{}; }
  static I set(uint32_t x) { return each<I>([&](int) { return x; }); }
  static I load(const void* from) {
    I y;
    std::memcpy(&y, from, sizeof y);
    return y;
  }
  static void store(void* to, I x) { std::memcpy(to, &x, sizeof x); }
  static I bit_and(I a, I b) { return each<I>([&](int n) { return a.lane[n] & b.lane[n]; }); }
  static I add(I a, I b) { return each<I>([&](int n) { return a.lane[n] + b.lane[n]; }); }
  template <int S>
  static I right(I a) {
    return each<I>([&](int n) { return a.lane[n] >> S; });
  }
  template <int S>
  static I right_signed(I a) {
    return each<I>([&](int n) { return static_cast<uint32_t>(static_cast<int32_t>(a.lane[n]) >> S); });
  }
  // acc + sum over the four bytes: bits t by the signed top limb, by an unsigned limb, and bytes of
  // a table by signed limbs.
  static I dot_top(I acc, I t, I x) { return dot(acc, t, false, x, true); }
  static I dot_low(I acc, I t, I x) { return dot(acc, t, false, x, false); }
  // The same as dot_top, in sums that hold one block of inputs; `whole` makes dwords of them.
  static I dot_block(I acc, I t, I x) { return dot_top(acc, t, x); }
  static I whole(I acc) { return acc; }
  static I biased(I t) { return t; }
  static I dot_table(I acc, I t, I x) { return dot(acc, t, true, x, true); }

  static I left(I a, int s) { return each<I>([&](int n) { return a.lane[n] << s; }); }
  template <int S>
  static I left_by(I a) {
    return left(a, S);
  }
  static F setf(float x) { return each<F>([&](int) { return x; }); }
  static F loadf(const float* from) {
    F y;
    std::memcpy(&y, from, sizeof y);
    return y;
  }
  static void storef(float* to, F x) { std::memcpy(to, &x, sizeof x); }
  static F to_float(I a) {
    return each<F>([&](int n) { return static_cast<float>(static_cast<int32_t>(a.lane[n])); });
  }
  static F mul(F a, F b) { return each<F>([&](int n) { return a.lane[n] * b.lane[n]; }); }
  static F addf(F a, F b) { return each<F>([&](int n) { return a.lane[n] + b.lane[n]; }); }
  static F fma(F a, F b, F c) {
    return each<F>([&](int n) { return std::fmaf(a.lane[n], b.lane[n], c.lane[n]); });
  }
  static float sumf(F x) {
    float sum = 0.0f;
    for (float lane : x.lane) sum += lane;
    return sum;
  }
  // x where the top bit of `at` is 1, else -x.
  static F negated_where_clear(I at, F x) {
    return each<F>([&](int n) { return at.lane[n] >> 31 ? x.lane[n] : -x.lane[n]; });
  }
};

// XLA's threads may treat subnormal floats as 0, so none is made on the way.
void widen_halves(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t rest = from[i] & 0x7fffu, sign = (from[i] & 0x8000u) << 16;
    const float small = static_cast<float>(static_cast<int>(rest)) * 0x1p-24f;
    uint32_t bits = (rest << 13) + (rest >= 0x7c00u ? 224u << 23 : 112u << 23);
    if (rest < 0x400u) std::memcpy(&bits, &small, sizeof bits);
    bits |= sign;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

}  // namespace
}  // namespace rabit

#include "loops.h"

namespace rabit {

const Isa* portable() {
  static const Isa isa = RB_ISA("portable", {});
  return &isa;
}

}  // namespace rabit
