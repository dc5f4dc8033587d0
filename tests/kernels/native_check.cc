// Every instruction set of this machine against the portable one, without XLA: for machines that
// the tests in Python do not run on, such as an emulated ARM. Exit code 0 where all agree.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "isa.h"

using namespace rabit;

namespace {

std::mt19937 generator(0);
int failures = 0;

void expect(bool right, const char* isa, const char* what, int a, int b) {
  if (right) return;
  ++failures;
  std::printf("%s: %s differs at %d, %d\n", isa, what, a, b);
}

std::vector<uint32_t> words(size_t n) {
  std::vector<uint32_t> found(n);
  for (uint32_t& w : found) w = generator();
  return found;
}

std::vector<float> floats(size_t n) {
  std::vector<float> found(n);
  std::normal_distribution<float> normal;
  for (float& x : found) x = normal(generator);
  return found;
}

// A block of rows against each of its rows alone.
void dots(const Isa& isa, const Isa& plain, bool signs) {
  const int64_t steps = 24, parts = signs ? 8 : 1;
  for (int limbs = signs ? 2 : 1; limbs <= kMaxLimbs; ++limbs)
    for (int size = 0; size < 4; ++size) {
      const int rows = size < 3 ? 1 << size : isa.largest_rows, n = rows * limbs;
      const auto w = words(steps * kTile), a = words(steps * parts * n);
      std::vector<int32_t> totals(n), sums(n * kTile), one(steps * parts * limbs),
          want(limbs * kTile);
      for (int64_t s = 0; s < steps * parts; ++s)
        for (int j = 0; j < n; ++j)
          for (int b = 0; b < 4; ++b)
            totals[j] += static_cast<int8_t>(a[s * n + j] >> (8 * b));
      const int32_t* all = reinterpret_cast<const int32_t*>(a.data());
      (signs ? isa.signs : isa.table)[size][limbs - 1](w.data(), all, steps, totals.data(),
                                                       sums.data());
      for (int r = 0; r < rows; ++r) {
        for (int64_t s = 0; s < steps * parts; ++s)
          std::memcpy(&one[s * limbs], all + s * n + r * limbs, sizeof(int32_t) * limbs);
        (signs ? plain.signs : plain.table)[0][limbs - 1](w.data(), one.data(), steps,
                                                          totals.data() + r * limbs, want.data());
        expect(!std::memcmp(want.data(), &sums[r * limbs * kTile], want.size() * 4), isa.name,
               signs ? "signs" : "table", rows, limbs);
      }
    }
}

// Blocks of inputs with scales of their own, the last of 192: a block of rows against the portable
// sums of each of its rows, from the portable integers, to the bit.
void blocks(const Isa& isa, const Isa& plain) {
  const int64_t inputs = 700, padded = 704, steps = padded / 32, count = 3;
  for (int size = 0; size < 4; ++size) {
    const int rows = size < 3 ? 1 << size : isa.largest_rows;
    const auto w = words(steps * kTile);
    const auto x = floats(rows * inputs), h = floats(inputs), g = floats(kTile);
    std::vector<float> y = floats(rows * kTile), z = y, work(3 * padded);
    std::vector<int32_t> all(padded / 4 * rows), one(padded / 4);
    std::vector<Block> of_all(count * rows), of_one(count);
    for (int r = 0; r < rows; ++r) {
      const float* row = x.data() + r * inputs;
      const Scales scales{h.data(), false};
      isa.fix_blocks(row, scales, inputs, padded, work.data(), &all[r], rows, &of_all[r]);
      plain.fix_blocks(row, scales, inputs, padded, work.data(), one.data(), 1, of_one.data());
      for (int c = 0; c < count; ++c)
        expect(of_all[c * rows + r].scale == of_one[c].scale &&
                   of_all[c * rows + r].minus == of_one[c].minus,
               isa.name, "fix_blocks", rows, c);
      plain.blocks[0](w.data(), one.data(), steps, of_one.data(), g.data(), &z[r * kTile]);
    }
    isa.blocks[size](w.data(), all.data(), steps, of_all.data(), g.data(), y.data());
    expect(y == z, isa.name, "blocks", rows, 0);
  }
}

void fixed_point(const Isa& isa, const Isa& plain) {
  const int64_t inputs = 300, padded = 512;
  const auto x = floats(inputs), h32 = floats(inputs), y32 = floats(kTile);
  std::vector<uint16_t> h16(inputs);
  for (uint16_t& h : h16) h = generator() % 0x7c00;  // finite, subnormal ones among them
  for (int limbs = 1; limbs <= kMaxLimbs; ++limbs)
    for (int kind = 0; kind < 4; ++kind) {
      const bool signs = kind & 1, half = kind & 2;
      const Scales h{half ? static_cast<const void*>(h16.data()) : h32.data(), half};
      std::vector<float> work(3 * padded);
      std::vector<int32_t> one(padded / 4 * limbs), two(one);
      const int64_t group = padded / 16;  // four groups of positions
      std::vector<int32_t> first(4 * limbs), second(first);
      Fixed a{0.0f, first.data()}, b{0.0f, second.data()};
      isa.fix(x.data(), h, inputs, padded, limbs, signs, group, work.data(), one.data(), limbs,
              &a);
      plain.fix(x.data(), h, inputs, padded, limbs, signs, group, work.data(), two.data(), limbs,
                &b);
      expect(one == two && a.scale == b.scale && first == second, isa.name, "fix", limbs, kind);
      std::vector<float> y = y32, z = y32;
      isa.add(one.data(), limbs, a.scale, a.total(1, limbs), signs, h, 13, y.data());
      plain.add(two.data(), limbs, b.scale, b.total(1, limbs), signs, h, 13, z.data());
      expect(y == z, isa.name, "add", limbs, kind);
    }
}

void float_loops(const Isa& isa, const Isa& plain) {
  const int inputs = 96, group = isa.group;
  for (int k = 1; k <= 4; ++k) {
    const auto w = words(k * 8 * kTile);
    const int64_t g_stride = k * kTile;  // each word has scales of its own
    const auto g = floats(8 * g_stride), h = floats(k * kBlock);
    std::vector<uint32_t> one(inputs * group * kTile), two(inputs * kTile);
    isa.float32.expand(w.data(), 8 * kTile, k, g.data(), g_stride, h.data(), kBlock, 8, inputs / 32,
                       group, one.data());
    plain.float32.expand(w.data(), 8 * kTile, k, g.data(), g_stride, h.data(), kBlock, 8,
                         inputs / 32, 1, two.data());
    for (int i = 0; i < inputs; ++i)
      expect(!std::memcmp(&one[i * group * kTile], &two[i * kTile], 4 * kTile), isa.name, "expand",
             k, i);
  }
  for (int rows = 1; rows <= isa.largest_panel; ++rows) {
    const auto w = floats(inputs * group * kTile), x = floats(inputs * rows);
    std::vector<float> y(rows * group * kTile);
    std::vector<uint32_t> panel(inputs * rows);
    isa.float32.panel(x.data(), inputs, rows, rows, inputs, inputs, panel.data());
    isa.float32.multiply[rows](reinterpret_cast<const uint32_t*>(w.data()), panel.data(), inputs,
                               y.data());
    for (int r = 0; r < rows; ++r)
      for (int o = 0; o < group * kTile; ++o) {
        float want = 0;
        for (int i = 0; i < inputs; ++i)
          want = std::fmaf(w[i * group * kTile + o], x[r * inputs + i], want);
        expect(y[r * group * kTile + o] == want, isa.name, "multiply", rows, o);
      }
  }
}

void attention(const Isa& isa, const Isa& plain) {
  const int slots = 150, size = 48;
  for (int g = 1; g <= 7; ++g) {
    const auto q = floats(g * size), k = floats(slots * size), v = floats(slots * size);
    std::vector<uint8_t> allowed(slots);
    for (uint8_t& a : allowed) a = generator() % 3 > 0;
    std::vector<float> work(kAttentionWork), acc(2 * g * size), top(2 * g), sum(2 * g);
    isa.attend(q.data(), k.data(), v.data(), allowed.data(), slots, g, size, 0.14f, 0, work.data(),
               &acc[0], &top[0], &sum[0]);
    plain.attend(q.data(), k.data(), v.data(), allowed.data(), slots, g, size, 0.14f, 0,
                 work.data(), &acc[g * size], &top[g], &sum[g]);
    for (int i = 0; i < g * size; ++i)
      expect(std::fabs(acc[i] - acc[g * size + i]) < 1e-4f, isa.name, "attend", g, i);
  }
}

// Codes of a cache: every value is one product, and one sum with 4 bits.
void codes(const Isa& isa, const Isa& plain) {
  const int slots = 9, size = 96;
  for (int count : {1, 4, 8}) {
    std::vector<uint8_t> bytes(slots * (count == 1 ? size : size / 2));
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(generator());
    std::vector<uint16_t> scales(slots * count);
    for (uint16_t& s : scales) s = 0x2c00 + generator() % 0x1000;  // 0.06 to 1
    std::vector<float> found(slots * size), want(slots * size);
    isa.unpack(bytes.data(), scales.data(), slots, size, count, found.data());
    plain.unpack(bytes.data(), scales.data(), slots, size, count, want.data());
    for (int i = 0; i < slots * size; ++i)
      expect(found[i] == want[i], isa.name, "unpack", count, i);
  }
}

}  // namespace

int main() {
  const Isa& plain = *portable();
  for (const Isa* isa : {avx512(), avxvnni(), avx2(), neon()}) {
    if (!isa) continue;
    std::printf("%s\n", isa->name);
    dots(*isa, plain, true);
    dots(*isa, plain, false);
    blocks(*isa, plain);
    fixed_point(*isa, plain);
    float_loops(*isa, plain);
    attention(*isa, plain);
    codes(*isa, plain);
  }
  return failures > 0;
}
