// The loops of isa.h, written once over the vectors of an instruction set.
//
// A file that includes this has defined, in an anonymous namespace, `struct V` (see portable.cc,
// which says what each operation does) and `widen_halves(const uint16_t*, int64_t, float*)`.
// Everything here has internal linkage and calls nothing of the standard library: a template that
// the linker shared between files would be compiled for one machine and run on another.

#pragma once

#include <cstring>

#include "isa.h"

#define RB_INLINE inline __attribute__((always_inline))
#define RB_LAMBDA __attribute__((always_inline))
#define RB_UNROLL _Pragma("GCC unroll 32")

namespace rabit {
namespace {

constexpr uint32_t kOnes = 0x01010101u;
constexpr int kLanes = V::kLanes;
constexpr int kParts = kTile / kLanes;  // vectors of one step of a tile

template <class To, class From>
RB_INLINE To bits_as(From x) {
  To y;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// ---------------------------------------------------------------------------------------------
// Integer loops

// Sums for which bits of class c, which stand for 2^c, are kept apart until the end: with few sums
// there are registers for it, and no shift for each bit.
constexpr int classes_of(int sums) { return sums <= V::kFewSums ? 4 : 1; }

// body(p, c, t) for the eight parts p of a word of bits: t holds four signs of each output, as
// bytes of 0 or 2^c.
template <int Classes, class Body>
RB_INLINE void each_part(typename V::I bits, const Body& body) {
  RB_UNROLL for (int p = 0; p < 8; ++p) {
    const int c = p % Classes;
    if (Classes == 1 ? p > 0 : p == 4) bits = V::template right<Classes>(bits);
    body(p, c, V::bit_and(bits, V::set(kOnes << c)));
  }
}

#ifndef RB_OWN_DOTS

template <int M, int L>
void signs_dot(const uint32_t* w, const int32_t* a, int64_t steps, const int32_t*, int32_t* sums) {
  constexpr int n = M * L;
  constexpr int classes = classes_of(n);
  for (int part = 0; part < kParts; ++part) {
    typename V::I acc[n][classes];
    RB_UNROLL for (int j = 0; j < n; ++j)
      RB_UNROLL for (int c = 0; c < classes; ++c) acc[j][c] = V::zero();
    const uint32_t* word = w + part * kLanes;
    const int32_t* v = a;
    for (int64_t s = 0; s < steps; ++s, word += kTile, v += 8 * n) {
      if (part == 0) V::prefetch(word);
      each_part<classes>(V::load(word), [&](int p, int c, typename V::I t) RB_LAMBDA {
        RB_UNROLL for (int j = 0; j < n; ++j) {
          const typename V::I x = V::set(v[p * n + j]);
          acc[j][c] = j % L == 0 ? V::dot_top(acc[j][c], t, x) : V::dot_low(acc[j][c], t, x);
        }
      });
    }
    RB_UNROLL for (int j = 0; j < n; ++j) {
      typename V::I sum = acc[j][0];
      RB_UNROLL for (int c = 1; c < classes; ++c)
        sum = V::add(sum, c == 1   ? V::template right_signed<1>(acc[j][c])
                          : c == 2 ? V::template right_signed<2>(acc[j][c])
                                   : V::template right_signed<3>(acc[j][c]));
      V::store(sums + j * kTile + part * kLanes, sum);
    }
  }
}

template <int M, int L>
void table_dot(const uint32_t* w, const int32_t* a, int64_t steps, const int32_t* totals,
               int32_t* sums) {
  constexpr int n = M * L;
  for (int part = 0; part < kParts; ++part) {
    typename V::I acc[n];
    RB_UNROLL for (int j = 0; j < n; ++j) acc[j] = V::set(-V::kBias * totals[j]);
    const uint32_t* word = w + part * kLanes;
    const int32_t* v = a;
    for (int64_t s = 0; s < steps; ++s, word += kTile, v += n) {
      if (part == 0) V::prefetch(word);
      const typename V::I t = V::biased(V::load(word));
      RB_UNROLL for (int j = 0; j < n; ++j) acc[j] = V::dot_table(acc[j], t, V::set(v[j]));
    }
    RB_UNROLL for (int j = 0; j < n; ++j) V::store(sums + j * kTile + part * kLanes, acc[j]);
  }
}

#endif  // RB_OWN_DOTS

template <int M>
void signs_blocks(const uint32_t* w, const int32_t* a, int64_t steps, const Block* blocks,
                  const float* g, float* y) {
  constexpr int classes = classes_of(M);
  for (int part = 0; part < kParts; ++part) {
    typename V::F total[M];
    RB_UNROLL for (int m = 0; m < M; ++m) total[m] = V::setf(0.0f);
    const uint32_t* word = w + part * kLanes;
    const int32_t* v = a;
    const Block* block = blocks;
    for (int64_t first = 0; first < steps; first += kWordsPerBlock, block += M) {
      const int64_t end = first + kWordsPerBlock < steps ? first + kWordsPerBlock : steps;
      typename V::I acc[M][classes];
      RB_UNROLL for (int m = 0; m < M; ++m)
        RB_UNROLL for (int c = 0; c < classes; ++c) acc[m][c] = V::zero();
      for (int64_t s = first; s < end; ++s, word += kTile, v += 8 * M) {
        if (part == 0) V::prefetch(word);
        each_part<classes>(V::load(word), [&](int p, int c, typename V::I t) RB_LAMBDA {
          RB_UNROLL for (int m = 0; m < M; ++m)
            acc[m][c] = V::dot_block(acc[m][c], t, V::set(v[p * M + m]));
        });
      }
      RB_UNROLL for (int m = 0; m < M; ++m) {
        // Twice the sum: class c holds 2^c times what it stands for.
        typename V::I sum = V::whole(acc[m][0]);
        sum = V::add(V::add(sum, sum), V::set(block[m].minus));
        RB_UNROLL for (int c = 1; c < classes; ++c) {
          const typename V::I one = V::whole(acc[m][c]);
          sum = V::add(sum, c == 1   ? one
                            : c == 2 ? V::template right_signed<1>(one)
                                     : V::template right_signed<2>(one));
        }
        total[m] = V::addf(total[m], V::mul(V::setf(block[m].scale), V::to_float(sum)));
      }
    }
    const typename V::F size = V::loadf(g + part * kLanes);
    RB_UNROLL for (int m = 0; m < M; ++m) {
      float* to = y + m * kTile + part * kLanes;
      V::storef(to, V::addf(V::loadf(to), V::mul(size, total[m])));
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Fixed point, and floats of sums

void widen(Scales from, int64_t n, float* to) {
  if (from.half)
    widen_halves(static_cast<const uint16_t*>(from.data), n, to);
  else
    std::memcpy(to, from.data, n * sizeof(float));
}

// Sums of the bytes of `group` dwords after another.
inline void group_totals(const int32_t* dwords, int64_t count, int64_t stride, int64_t group,
                         bool negative, int32_t* totals, int64_t totals_stride) {
  for (int64_t p = 0; p < count; ++p, dwords += stride) {
    if (p % group == 0) totals[p / group * totals_stride] = 0;
    int32_t sum = 0;
    for (int b = 0; b < 4; ++b) {
      const uint8_t byte = static_cast<uint8_t>(static_cast<uint32_t>(*dwords) >> (8 * b));
      sum += negative ? static_cast<int8_t>(byte) : byte;
    }
    totals[p / group * totals_stride] += sum;
  }
}

// u = x * h, or x where h.data is null.
RB_INLINE void scaled(const float* x, Scales h, int64_t n, float* u) {
  if (h.data) {
    widen(h, n, u);
    for (int64_t i = 0; i < n; ++i) u[i] *= x[i];
  } else {
    std::memcpy(u, x, n * sizeof(float));
  }
}

// The scale that makes u integers up to `largest`, by a reciprocal, as XLA divides by a constant.
RB_INLINE float scale_of(const float* u, int64_t n, float largest) {
  int32_t top_bits = 0;  // NaN lies above infinity, and so wins
  for (int64_t i = 0; i < n; ++i) {
    const int32_t size = bits_as<int32_t>(u[i]) & 0x7fffffff;
    top_bits = size > top_bits ? size : top_bits;
  }
  const float top = bits_as<float>(top_bits);
  return top < 1e-30f ? 1.0f : top * (1.0f / largest);
}

// v = u / scale, by a reciprocal as XLA divides by a broadcast scalar.
RB_INLINE void rounded(const float* u, int64_t n, float scale, float largest, int32_t* v) {
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < n; ++i) {
    const float q = u[i] * inverse;
    // Halves to even: adding 2^23 leaves no bits for a fraction.
    float size = bits_as<float>(bits_as<int32_t>(q) & 0x7fffffff);
    size = size < largest ? size : largest;
    const int32_t whole = static_cast<int32_t>((size + 0x1p23f) - 0x1p23f);
    const int32_t negative = bits_as<int32_t>(q) >> 31;
    v[i] = (whole ^ negative) - negative;
  }
}

// Where position p of the steps lies among the dwords of four inputs in their order: word m of a
// block has its eight parts as many dwords apart as there are words.
RB_INLINE int64_t dword_of(int64_t p, int64_t padded) {
  const int64_t words = words_of_block(padded / 32, p >> 6);
  return (p & ~63) + (p & 7) * words + (p >> 3 & 7);
}

void fix(const float* x, Scales h, int64_t inputs, int64_t padded, int limbs, bool signs,
         int64_t group, float* work, int32_t* out, int64_t stride, Fixed* fixed) {
  float* u = work;
  int32_t* v = reinterpret_cast<int32_t*>(work + padded);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(work + 2 * padded);
  scaled(x, h, inputs, u);
  const float largest = signs ? static_cast<float>((1 << (8 * limbs - 1)) - 1)
                              : static_cast<float>((127 << (8 * (limbs - 1))) -
                                                   (limbs > 1 ? 128 : 0));
  fixed->scale = scale_of(u, inputs, largest);
  rounded(u, inputs, fixed->scale, largest, v);
  std::memset(v + inputs, 0, sizeof(int32_t) * (padded - inputs));
  for (int l = limbs - 1; l >= 0; --l) {
    const int32_t shift = signs ? 0 : 128, mask = l == 0 ? -1 : 255, back = l == 0 ? 0 : shift;
    int32_t sum = 0;
    for (int64_t i = 0; i < padded; ++i) {
      const int32_t low = ((v[i] + back) & mask) - back;
      sum += low;
      bytes[i] = static_cast<uint8_t>(low);
      v[i] = (v[i] - low) >> 8;
    }
    int32_t* to = out + l;
    for (int64_t p = 0; p < padded / 4; ++p, to += stride)
      std::memcpy(to, bytes + 4 * (signs ? dword_of(p, padded) : p), 4);
    if (group >= padded / 4)
      fixed->totals[l] = sum;
    else
      group_totals(out + l, padded / 4, stride, group, l == 0 || !signs, fixed->totals + l, limbs);
  }
}

void fix_blocks(const float* x, Scales h, int64_t inputs, int64_t padded, float* work,
                int32_t* out, int64_t stride, Block* blocks) {
  float* u = work;
  int32_t* v = reinterpret_cast<int32_t*>(work + padded);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(work + 2 * padded);
  scaled(x, h, inputs, u);
  std::memset(u + inputs, 0, sizeof(float) * (padded - inputs));
  for (int64_t first = 0; first < padded; first += kBlock, blocks += stride) {
    const int64_t n = padded - first < kBlock ? padded - first : kBlock;
    blocks->scale = scale_of(u + first, n, 127.0f);
    rounded(u + first, n, blocks->scale, 127.0f, v);
    int32_t minus = 0;
    for (int64_t i = 0; i < n; ++i) {
      minus -= v[i];
      bytes[first + i] = static_cast<uint8_t>(v[i]);
    }
    blocks->minus = minus;
  }
  for (int64_t p = 0; p < padded / 4; ++p, out += stride)
    std::memcpy(out, bytes + 4 * dword_of(p, padded), 4);
}

void add(const int32_t* sums, int limbs, float scale, int64_t total, bool signs, Scales g,
         int outputs, float* y) {
  float size[kTile] = {0};
  widen(g, outputs, size);
  for (int o = 0; o < kTile; ++o) size[o] *= scale;
  if (signs && limbs == 2) {  // fits 32 bits, which vectors convert everywhere
    const uint32_t all = static_cast<uint32_t>(total);
    for (int o = 0; o < kTile; ++o) {
      const uint32_t sum = static_cast<uint32_t>(sums[o]) * 256u + sums[kTile + o];
      y[o] += size[o] * static_cast<float>(static_cast<int32_t>(2u * sum - all));
    }
    return;
  }
  for (int o = 0; o < kTile; ++o) {
    int64_t sum = sums[o];
    for (int l = 1; l < limbs; ++l) sum = sum * 256 + sums[l * kTile + o];
    y[o] += size[o] * static_cast<float>(signs ? 2 * sum - total : sum);
  }
}

// ---------------------------------------------------------------------------------------------
// Float loops

// W_hat of the four inputs 4 m .. 4 m + 3 of part p, in the lanes of the outputs.
template <int K>
RB_INLINE void four_inputs(const uint32_t* word, int64_t stride, int p, const typename V::F* g,
                           const float* h, int64_t h_stride, typename V::F* w) {
  RB_UNROLL for (int k = 0; k < K; ++k) {
    const typename V::I bits = V::left(V::load(word + k * stride), 7 - p);
    RB_UNROLL for (int b = 0; b < 4; ++b) {
      const typename V::I at = b == 3   ? bits
                               : b == 2 ? V::template left_by<8>(bits)
                               : b == 1 ? V::template left_by<16>(bits)
                                        : V::template left_by<24>(bits);
      const typename V::F sign_g = V::negated_where_clear(at, g[k]);
      const typename V::F scale = V::setf(h[k * h_stride + b]);
      w[b] = k == 0 ? V::mul(sign_g, scale) : V::fma(sign_g, scale, w[b]);
    }
  }
}

#ifndef RB_BFLOAT16
#define RB_BFLOAT16 0
#endif

// Lane o of a step holds output o: a float32, or two inputs in bfloat16.
template <bool Bfloat16>
RB_INLINE void store_four(uint32_t* to, int i, int group, const typename V::F* w) {
#if RB_BFLOAT16
  if constexpr (Bfloat16) {
    RB_UNROLL for (int b = 0; b < 4; b += 2)
      V::store_pairs(to + (i + b) / 2 * group * kTile, w[b], w[b + 1]);
    return;
  }
#endif
  RB_UNROLL for (int b = 0; b < 4; ++b)
    V::storef(reinterpret_cast<float*>(to + (i + b) * group * kTile), w[b]);
}

template <bool Bfloat16>
RB_INLINE typename V::F multiply_add(typename V::F w, typename V::F x, typename V::F acc) {
#if RB_BFLOAT16
  if constexpr (Bfloat16) return V::dot_pairs(acc, w, x);
#endif
  return V::fma(w, x, acc);
}

template <int K, bool Bfloat16>
void expand_paths(const uint32_t* words, int64_t stride, const float* g, int64_t g_stride,
                  const float* h, int64_t h_stride, int count, int parts, int group,
                  uint32_t* to) {
  for (int part = 0; part < kParts; ++part) {
    for (int m = 0; m < count; ++m) {
      typename V::F scales[K];
      RB_UNROLL for (int k = 0; k < K; ++k)
        scales[k] = V::loadf(g + m * g_stride + k * kTile + part * kLanes);
      for (int p = 0; p < parts; ++p) {
        const int i = 4 * (count * p + m);
        typename V::F w[4];
        four_inputs<K>(words + m * kTile + part * kLanes, stride, p, scales, h + i,
                       h_stride, w);
        uint32_t* here = to + part * kLanes;
        store_four<Bfloat16>(here, i, group, w);
      }
    }
  }
}

template <bool Bfloat16>
void expand(const uint32_t* words, int64_t stride, int k, const float* g, int64_t g_stride,
            const float* h, int64_t h_stride, int count, int parts, int group, uint32_t* to) {
  constexpr auto one = expand_paths<1, Bfloat16>, two = expand_paths<2, Bfloat16>,
                 three = expand_paths<3, Bfloat16>, four = expand_paths<4, Bfloat16>;
  (k == 1 ? one : k == 2 ? two : k == 3 ? three : four)(words, stride, g, g_stride, h, h_stride,
                                                       count, parts, group, to);
}

template <int R, bool Bfloat16>
void multiply(const uint32_t* w, const uint32_t* x, int64_t steps, float* y) {
  constexpr int parts = V::kGroup * kParts;
  typename V::F acc[R][parts];
  RB_UNROLL for (int r = 0; r < R; ++r)
    RB_UNROLL for (int n = 0; n < parts; ++n)
      acc[r][n] = V::loadf(y + (r * parts + n) * kLanes);
  for (int64_t s = 0; s < steps; ++s, w += parts * kLanes, x += R) {
    typename V::F weights[parts];
    RB_UNROLL for (int n = 0; n < parts; ++n)
      weights[n] = V::loadf(reinterpret_cast<const float*>(w + n * kLanes));
    RB_UNROLL for (int r = 0; r < R; ++r) {
      const typename V::F row = V::setf(bits_as<float>(x[r]));
      RB_UNROLL for (int n = 0; n < parts; ++n)
        acc[r][n] = multiply_add<Bfloat16>(weights[n], row, acc[r][n]);
    }
  }
  RB_UNROLL for (int r = 0; r < R; ++r)
    RB_UNROLL for (int n = 0; n < parts; ++n)
      V::storef(y + (r * parts + n) * kLanes, acc[r][n]);
}

RB_INLINE uint32_t to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;  // stays a NaN
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

template <bool Bfloat16>
void panel(const float* x, int64_t stride, int rows, int panel, int64_t inputs, int64_t padded,
           uint32_t* to) {
  constexpr int per_step = Bfloat16 ? 2 : 1;
  std::memset(to, 0, sizeof(uint32_t) * (padded / per_step) * panel);
  for (int r = 0; r < rows; ++r) {
    const float* row = x + r * stride;
    for (int64_t i = 0; i < inputs; i += per_step) {
      if constexpr (Bfloat16) {
        const float next = i + 1 < inputs ? row[i + 1] : 0.0f;
        to[i / 2 * panel + r] = to_bfloat16(row[i]) | to_bfloat16(next) << 16;
      } else {
        to[i * panel + r] = bits_as<uint32_t>(row[i]);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Attention

constexpr float kNever = -1e30f;  // the score of a slot that is not allowed

// Scores of R queries for n slots: score[r * kAttentionBlock + s].
template <int R>
void dot_queries(const float* q, const float* k, int n, int size, float* score) {
  for (int s = 0; s < n; ++s, k += size) {
    typename V::F acc[R];
    RB_UNROLL for (int r = 0; r < R; ++r) acc[r] = V::setf(0.0f);
    for (int i = 0; i < size; i += kLanes) {
      const typename V::F key = V::loadf(k + i);
      RB_UNROLL for (int r = 0; r < R; ++r)
        acc[r] = V::fma(V::loadf(q + r * size + i), key, acc[r]);
    }
    RB_UNROLL for (int r = 0; r < R; ++r) score[r * kAttentionBlock + s] = V::sumf(acc[r]);
  }
}

// acc[r][i] += sum_s share[r * kAttentionBlock + s] v[s][i] for R queries and P vectors of i.
template <int R, int P>
void add_values(const float* share, const float* v, int n, int size, float* acc) {
  typename V::F sum[R][P];
  RB_UNROLL for (int r = 0; r < R; ++r)
    RB_UNROLL for (int p = 0; p < P; ++p) sum[r][p] = V::loadf(acc + r * size + p * kLanes);
  for (int s = 0; s < n; ++s, v += size) {
    typename V::F value[P];
    RB_UNROLL for (int p = 0; p < P; ++p) value[p] = V::loadf(v + p * kLanes);
    RB_UNROLL for (int r = 0; r < R; ++r) {
      const typename V::F one = V::setf(share[r * kAttentionBlock + s]);
      RB_UNROLL for (int p = 0; p < P; ++p) sum[r][p] = V::fma(one, value[p], sum[r][p]);
    }
  }
  RB_UNROLL for (int r = 0; r < R; ++r)
    RB_UNROLL for (int p = 0; p < P; ++p) V::storef(acc + r * size + p * kLanes, sum[r][p]);
}

// e^x for x <= 0 to about one rounding, in operations that compilers vectorise.
RB_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float whole = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float y = 1.9875691e-4f;
  y = y * r + 1.3981999e-3f;
  y = y * r + 8.3334519e-3f;
  y = y * r + 4.1665796e-2f;
  y = y * r + 1.6666665e-1f;
  y = y * r + 5.0000001e-1f;
  y = y * r * r + r + 1.0f;
  return bits_as<float>(bits_as<int32_t>(y) + (static_cast<int32_t>(whole) << 23));
}

// Scores of one query and one block -> shares e^(score - top), with the top and the sum so far;
// returns what the sums before this block are to be multiplied by.
inline float shares(const uint8_t* allowed, int n, float scale, float cap, float* score, float* top,
                    float* sum) {
  float most[16], total[16] = {0};
  for (int s = 0; s < kAttentionBlock; ++s) {
    float x = score[s] * scale;
    if (cap > 0) x = cap * __builtin_tanhf(x / cap);
    score[s] = s < n && allowed[s] ? x : kNever;
  }
  for (int j = 0; j < 16; ++j) most[j] = *top;
  for (int s = 0; s < kAttentionBlock; s += 16)
    for (int j = 0; j < 16; ++j) most[j] = score[s + j] > most[j] ? score[s + j] : most[j];
  float largest = most[0];
  for (int j = 1; j < 16; ++j) largest = most[j] > largest ? most[j] : largest;
  const float shrink = *top == largest ? 1.0f : exponential(*top - largest);
  for (int s = 0; s < kAttentionBlock; s += 16)
    for (int j = 0; j < 16; ++j) {
      const float share = exponential(score[s + j] - largest);
      score[s + j] = score[s + j] > kNever ? share : 0.0f;
      total[j] += score[s + j];
    }
  float all = 0.0f;
  for (int j = 0; j < 16; ++j) all += total[j];
  *top = largest;
  *sum = *sum * shrink + all;
  return shrink;
}

void attend(const float* q, const float* k, const float* v, const uint8_t* allowed, int64_t slots,
            int g, int size, float scale, float cap, float* work, float* acc, float* top,
            float* sum) {
  constexpr int rows = 4, parts = 16 / kLanes < 2 ? 1 : 2;  // vectors of values at a time
  std::memset(acc, 0, sizeof(float) * g * size);
  std::memset(work, 0, sizeof(float) * kAttentionWork);
  for (int r = 0; r < g; ++r) top[r] = kNever, sum[r] = 0.0f;
  for (int64_t first = 0; first < slots; first += kAttentionBlock) {
    const int n = static_cast<int>(slots - first < kAttentionBlock ? slots - first
                                                                    : kAttentionBlock);
    bool any = false;
    for (int s = 0; s < n; ++s) any |= allowed[first + s] != 0;
    if (!any) continue;
    const float *keys = k + first * size, *values = v + first * size;
    for (int r = 0; r < g; r += rows) {
      float* score = work + r * kAttentionBlock;
      if (g - r >= 4) dot_queries<4>(q + r * size, keys, n, size, score);
      else if (g - r == 3) dot_queries<3>(q + r * size, keys, n, size, score);
      else if (g - r == 2) dot_queries<2>(q + r * size, keys, n, size, score);
      else dot_queries<1>(q + r * size, keys, n, size, score);
    }
    for (int r = 0; r < g; ++r) {
      const float shrink = shares(allowed + first, n, scale, cap, work + r * kAttentionBlock,
                                  top + r, sum + r);
      if (shrink != 1.0f)
        for (int i = 0; i < size; ++i) acc[r * size + i] *= shrink;
    }
    for (int r = 0; r < g; r += rows) {
      const float* share = work + r * kAttentionBlock;
      for (int i = 0; i < size; i += parts * kLanes) {
        float* to = acc + r * size + i;
        if (g - r >= 4) add_values<4, parts>(share, values + i, n, size, to);
        else if (g - r == 3) add_values<3, parts>(share, values + i, n, size, to);
        else if (g - r == 2) add_values<2, parts>(share, values + i, n, size, to);
        else add_values<1, parts>(share, values + i, n, size, to);
      }
    }
  }
}

void unpack(const uint8_t* codes, const uint16_t* scales, int64_t slots, int size, int count,
            float* to) {
  float wide[kMaxScales];
  const int half = size / 2, groups = count / 2, group = count > 1 ? size / groups : 0;
  for (int64_t s = 0; s < slots; ++s, scales += count, to += size) {
    widen_halves(scales, count, wide);
    if (count == 1) {
      const int8_t* c = reinterpret_cast<const int8_t*>(codes);
      for (int i = 0; i < size; ++i) to[i] = wide[0] * static_cast<float>(c[i]);
      codes += size;
      continue;
    }
    for (int g = 0; g < groups / 2; ++g) {
      const float *step = wide + g, *low = step + groups;
      const int other = groups / 2;
      for (int i = g * group; i < (g + 1) * group; ++i) {
        const int byte = codes[i];
        to[i] = low[0] + step[0] * static_cast<float>(byte & 15);
        to[half + i] = low[other] + step[other] * static_cast<float>(byte >> 4);
      }
    }
    codes += half;
  }
}

#define RB_SIGNS(M) {nullptr, signs_dot<M, 2>, signs_dot<M, 3>}
#define RB_TABLE(M) {table_dot<M, 1>, table_dot<M, 2>, table_dot<M, 3>}
#define RB_BLOCKS(M) signs_blocks<M>
#define RB_BY_ROWS(F) {F(1), F(2), F(4), F(V::kRows)}

template <int R, bool Bfloat16>
constexpr Multiply multiply_or_null() {
  if constexpr (R <= V::kPanel)
    return multiply<R, Bfloat16>;
  else
    return nullptr;
}

#define RB_ROWS(R, B) multiply_or_null<R, B>()
#define RB_FLOATS(B)                                                                             \
  {B ? 2 : 1, panel<B>, expand<B>,                                                               \
   {nullptr, RB_ROWS(1, B), RB_ROWS(2, B), RB_ROWS(3, B), RB_ROWS(4, B), RB_ROWS(5, B),          \
    RB_ROWS(6, B), RB_ROWS(7, B), RB_ROWS(8, B), RB_ROWS(9, B), RB_ROWS(10, B), RB_ROWS(11, B),  \
    RB_ROWS(12, B)}}

#define RB_ISA(NAME, BFLOAT16)                                                                   \
  {NAME, V::kRows, RB_BY_ROWS(RB_SIGNS), RB_BY_ROWS(RB_TABLE), RB_BY_ROWS(RB_BLOCKS), fix, \
   fix_blocks, add, widen, attend, unpack, V::kPanel, V::kGroup, RB_FLOATS(false), BFLOAT16}

}  // namespace
}  // namespace rabit
