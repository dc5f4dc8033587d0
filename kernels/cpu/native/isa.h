// What every instruction set provides: the inner loops of the products, as function pointers.
//
// Weights lie in tiles of 16 outputs. A step of a tile is 16 dwords, one per output:
//   signs: bit 8 b + p of word w = 8 c + m is input 256 c + 4 (v p + m) + b, v the words of block c:
//   8, or as many as the inputs beyond the last whole block take, in twos;
//   table: four consecutive inputs, int8.
// So "AND with 0x01010101 << p" makes four bytes of each of 16 outputs, and one dot instruction
// (four bytes by four bytes, added to a dword) multiplies them with four activations that are the
// same for all outputs: a broadcast dword. No sum ever runs across lanes.
//
// Few rows are multiplied as integers: an activation is fixed point, u = scale * v, and v is cut
// into `limbs` bytes, the most significant first:
//   signs: |v| < 2^(8 n - 1), the top limb signed, the others unsigned (as `bit_planes`);
//   table: all limbs signed (as `limbs`), since a dot instruction takes unsigned by signed bytes.
// Integer sums are exact on every instruction set, and floats are made of them in one order, so
// all instruction sets return the same bits. Build with -ffp-contract=off.
//
// One limb for signs means a scale for each block c of 256 inputs, u = scale_c v with |v| <= 127,
// and so a float sum over the blocks.
//
// Many rows are multiplied as floats: a tile of W_hat is expanded once, then read for all rows.
// Every sum runs over the inputs in order by fused multiply-add, so there too the bits agree.

#pragma once

#include <cstdint>

namespace rabit {

constexpr int kTile = 16;
constexpr int kMaxLimbs = 3;
constexpr int kMaxRows = 8;           // of activations, in one call of an integer loop
constexpr int kMaxPanel = 12;         // of activations, in one call of a float loop
constexpr int kMaxGroup = 2;          // tiles, in one call of a float loop
constexpr int kBlock = 256;           // inputs that are expanded at a time: one block of rb256
constexpr int kWordsPerBlock = kBlock / 32;

// One row of activations as integers, and the sums of each limb over every group of inputs.
struct Fixed {
  float scale;
  int32_t* totals;  // [group][limb]

  // The sum of v over a group of inputs.
  int64_t total(int64_t group, int limbs) const {
    int64_t sum = 0;
    for (int l = 0; l < limbs; ++l) sum = sum * 256 + totals[group * limbs + l];
    return sum;
  }
};

// One block of 256 inputs of a row of activations of one byte: u = scale v, and minus the sum of v.
struct Block {
  float scale;
  int32_t minus;
};

// 16-bit or 32-bit floats, as the scales of weights are stored.
struct Scales {
  const void* data;
  bool half;
  Scales from(int64_t at) const {
    return {static_cast<const char*>(data) + at * (half ? 2 : 4), half};
  }
};

// sums[m][l][o] = sum_i w[o][i] a[m][l][i] of one tile.
//   a: dwords [step][8][m][l] for signs, [step][m][l] for a table; signs are 0 or 1 here;
//   totals: [m][l], sum_i a[m][l][i].
using Dot = void (*)(const uint32_t* w, const int32_t* a, int64_t steps, const int32_t* totals,
                     int32_t* sums);

// Words of block c of `words`.
static constexpr int64_t words_of_block(int64_t words, int64_t c) {
  return words - c * kWordsPerBlock < kWordsPerBlock ? words - c * kWordsPerBlock : kWordsPerBlock;
}

// y[m][o] += g[o] sum_c scale[c][m] float(2 sum_{i in c} w[o][i] a[m][i] - total[c][m]) of one tile
// and the path's signs, 0 or 1; every product and sum is rounded by itself.
//   a: dwords [step][8][m]; blocks: [c][m]; g: floats.
using Blocks = void (*)(const uint32_t* w, const int32_t* a, int64_t steps, const Block* blocks,
                        const float* g, float* y);

// The integers of one row u = x * h (h.data may be null); limb l of the four inputs of position p
// goes to out[p * stride + l]; `group` positions share totals. `work` holds 3 * padded floats.
using Fix = void (*)(const float* x, Scales h, int64_t inputs, int64_t padded, int limbs,
                     bool signs, int64_t group, float* work, int32_t* out, int64_t stride,
                     Fixed* fixed);

// The same for `Blocks`: the four inputs of position p go to out[p * stride], block c to
// blocks[c * stride]. `work` holds 3 * padded floats.
using FixBlocks = void (*)(const float* x, Scales h, int64_t inputs, int64_t padded, float* work,
                           int32_t* out, int64_t stride, Block* blocks);

// y[o] += (g[o] scale) float(signs ? 2 sum - total : sum), sum = sum_l 256^(n - 1 - l) sums[l].
using Add = void (*)(const int32_t* sums, int limbs, float scale, int64_t total, bool signs,
                     Scales g, int outputs, float* y);

// Floats of n scales.
using Widen = void (*)(Scales from, int64_t n, float* to);

// W_hat of one tile in a block of `count` words, of which the first `parts` bits of bytes matter:
//   words: path k at words + k * stride, [count][16]; g: floats [k][16], those of word m at
//   g + m * g_stride; h: floats, path k at h + k * h_stride; to: [steps][group][16] dwords, of
//   which this tile's are written.
using Expand = void (*)(const uint32_t* words, int64_t stride, int k, const float* g,
                        int64_t g_stride, const float* h, int64_t h_stride, int count, int parts,
                        int group, uint32_t* to);

// y[r][o] += sum_s w[s][o] x[s][r] for one panel of rows and one group of tiles.
using Multiply = void (*)(const uint32_t* w, const uint32_t* x, int64_t steps, float* y);

// Rows x[r][0..inputs) of one panel -> dwords [step][panel]; inputs beyond are 0.
using Panel = void (*)(const float* x, int64_t stride, int rows, int panel, int64_t inputs,
                       int64_t padded, uint32_t* to);

// The float product; a step is `inputs_per_step` inputs.
struct Floats {
  int inputs_per_step;  // 0 where the instruction set has no such product
  Panel panel;
  Expand expand;
  Multiply multiply[kMaxPanel + 1];  // by rows of the panel; only up to `largest_panel`
};

// Attention of the g queries of one key head to `slots` slots of its cache, as far as it goes:
//   q: [g][size]; k, v: [slots][size]; allowed: one byte per slot; score = scale q k, capped where
//   cap > 0: cap tanh(score / cap). Results: acc[g][size] = sum_s e^(score_s - top) v_s and
//   sum[g] = sum_s e^(score_s - top), top[g] the largest score; no slot allowed gives zeros.
//   work: kAttentionWork floats. `size` is a multiple of 16.
using Attend = void (*)(const float* q, const float* k, const float* v, const uint8_t* allowed,
                        int64_t slots, int g, int size, float scale, float cap, float* work,
                        float* acc, float* top, float* sum);
// Values [slots][size] of codes of a cache. One scale for each slot: int8 [slots][size], x = s c.
// Else 2 m: [slots][size / 2] bytes, value i in the low half of byte i and i + size / 2 in the high
// one; x = low + s c in each of m groups, the m values of s before those of low; m is even.
using Unpack = void (*)(const uint8_t* codes, const uint16_t* scales, int64_t slots, int size,
                        int count, float* to);
constexpr int kMaxScales = 64;
constexpr int kAttentionBlock = 64, kMaxQueries = 32;
constexpr int kAttentionWork = kAttentionBlock * kMaxQueries;

struct Isa {
  const char* name;
  int largest_rows;         // of the integer loops
  Dot signs[4][kMaxLimbs];  // rows 1, 2, 4, 8; limbs 1, 2, 3; null for 1, which `blocks` is for
  Dot table[4][kMaxLimbs];
  Blocks blocks[4];  // rows 1, 2, 4, 8
  Fix fix;
  FixBlocks fix_blocks;
  Add add;
  Widen widen;
  Attend attend;
  Unpack unpack;
  int largest_panel, group;  // rows and tiles of the float loops
  Floats float32, bfloat16;
};

// Null where this build or this machine does not have it.
const Isa* avx512();
const Isa* avxvnni();
const Isa* avx2();
const Isa* neon();
const Isa* portable();

}  // namespace rabit
