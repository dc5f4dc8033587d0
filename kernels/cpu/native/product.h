// y[b, o] = sum_k sum_n g[k, n, o] sum_{i in n} W[k, o, i] h[k, m(o), i] x[b, k, i] of one layer, by
// the loops of an instruction set: as integers tile by tile, or as floats through an expanded tile.
// The groups n are runs of steps of a tile; most matrices have one.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "team.h"

namespace rabit {

// Rows of x for which an integer tile is read once, and for which a float tile is expanded once.
constexpr int64_t kRowsPerTile = 64, kRowsPerExpansion = 252;

struct Product {
  const float* x;       // [b, i], or [b, k, i] where x_paths
  bool x_paths;
  const uint32_t* w;    // [tile, k, step, 16]; or rows of bytes [k, o, words]
  bool w_rows;
  Scales g;             // [k, n, o]
  Scales h;             // [k, m, i], or null
  bool signs;           // else a table of int8
  int64_t batch, inputs, padded, k, outputs;
  int limbs;
  int64_t groups;       // n
  int64_t group_steps;  // of each; steps beyond the last group hold nothing
  std::vector<int64_t> members;  // outputs of each
  float* y;             // [b, o]

  int64_t steps() const { return padded / (signs ? 32 : 4); }
  bool blocks() const { return signs && limbs == 1; }  // a scale for each block of inputs
  int64_t step_dwords() const { return signs ? 8 : 1; }  // of activations
  const float* row(int64_t b, int64_t path) const {
    return x + (x_paths ? b * k + path : b) * inputs;
  }
};

template <class T>
T* scratch(std::vector<T>& held, int64_t size) {
  if (static_cast<int64_t>(held.size()) < size) held.resize(size);
  return held.data();
}

// Where each tile lies: its member, its first output and how many it has.
struct Tiles {
  struct At {
    int64_t member, output;
    int outputs;
  };
  std::vector<At> at;

  explicit Tiles(const std::vector<int64_t>& members) {
    int64_t start = 0;
    for (size_t m = 0; m < members.size(); start += members[m++])
      for (int64_t o = 0; o < members[m]; o += kTile)
        at.push_back({static_cast<int64_t>(m), start + o,
                      static_cast<int>(std::min<int64_t>(kTile, members[m] - o))});
  }
  int64_t count() const { return at.size(); }
};

// The words of path k of a tile, [step][16]; rows of bytes are turned into `held`.
inline const uint32_t* words_of(const Product& p, const Tiles& tiles, int64_t tile, int64_t k,
                                std::vector<uint32_t>& held) {
  const int64_t steps = p.steps();
  if (!p.w_rows) return p.w + (tile * p.k + k) * steps * kTile;
  uint32_t* to = scratch(held, steps * kTile);
  const Tiles::At& at = tiles.at[tile];
  if (at.outputs < kTile) std::memset(to, 0, sizeof(uint32_t) * steps * kTile);
  for (int o = 0; o < at.outputs; ++o) {
    const uint32_t* row = p.w + (k * p.outputs + at.output + o) * steps;
    for (int64_t s = 0; s < steps; ++s) to[s * kTile + o] = row[s];
  }
  return to;
}

struct Rows {
  int64_t start, size;
};

// Rows of x in blocks of 8, 4, 2 and 1.
inline std::vector<Rows> row_blocks(int64_t rows, int64_t largest) {
  std::vector<Rows> blocks;
  for (int64_t start = 0, size = largest; start < rows; start += size) {
    while (size > rows - start) size /= 2;
    blocks.push_back({start, size});
  }
  return blocks;
}

inline void integer_product(const Product& p, const Isa& isa, xla::ffi::ThreadPool& pool) {
  thread_local std::vector<int32_t> held_a;
  thread_local std::vector<Fixed> held_fixed;
  thread_local std::vector<int32_t> held_totals;
  thread_local std::vector<Block> held_blocks;
  const int64_t members = p.members.size(), dwords = p.padded / 4, limbs = p.limbs;
  const Tiles tiles(p.members);
  const std::vector<Rows> blocks = row_blocks(p.batch, isa.largest_rows);
  // a: [k, m, block][position][row of block][limb]
  int32_t* a = scratch(held_a, p.k * members * p.batch * limbs * dwords);
  Fixed* fixed = scratch(held_fixed, p.k * members * p.batch);
  const int64_t group = p.group_steps * p.step_dwords(), parts = (dwords + group - 1) / group;
  int32_t* totals = scratch(held_totals, p.k * members * p.batch * parts * limbs);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  // of_inputs: [k, m, block of rows][block of inputs][row of block]
  const int64_t count = (p.padded + kBlock - 1) / kBlock;
  Block* of_inputs = p.blocks() ? scratch(held_blocks, p.k * members * p.batch * count) : nullptr;

  const int64_t fix_items = p.k * members * p.batch;
  const auto fix_one = [&](int64_t item) {
    thread_local std::vector<float> held;
    const int64_t km = item / p.batch, b = item % p.batch;
    const auto block = std::find_if(blocks.begin(), blocks.end(), [b](const Rows& r) {
      return b < r.start + r.size;
    });
    int32_t* out = a + ((km * p.batch + block->start) * dwords + (b - block->start)) * limbs;
    const Scales h = p.h.data ? p.h.from(km * p.inputs) : p.h;
    if (p.blocks()) {
      isa.fix_blocks(p.row(b, km / members), h, p.inputs, p.padded, scratch(held, 3 * p.padded),
                     out, block->size,
                     of_inputs + (km * p.batch + block->start) * count + (b - block->start));
      return;
    }
    fixed[item].totals = totals + item * parts * limbs;
    isa.fix(p.row(b, km / members), h, p.inputs, p.padded, p.limbs, p.signs, group,
            scratch(held, 3 * p.padded), out, block->size * limbs, fixed + item);
  };

  const auto tile_one = [&](int64_t tile) {
    thread_local std::vector<uint32_t> held;
    const Tiles::At& at = tiles.at[tile];
    alignas(64) int32_t sums[kMaxRows * kMaxLimbs * kTile];
    alignas(64) float y[kRowsPerTile * kTile], size_of_path[kTile] = {0};
    for (int64_t begin = 0; begin < p.batch; begin += kRowsPerTile) {
      const int64_t end = std::min(p.batch, begin + kRowsPerTile);
      std::memset(y, 0, sizeof(float) * (end - begin) * kTile);
      for (int64_t k = 0; k < p.k; ++k) {
        const uint32_t* w = words_of(p, tiles, tile, k, held);
        const int64_t km = k * members + at.member;
        if (p.blocks()) isa.widen(p.g.from(k * p.outputs + at.output), at.outputs, size_of_path);
        for (const Rows& block : blocks) {
          if (block.start < begin || block.start >= end) continue;
          const int size = block.size >= 8 ? 3 : block.size >= 4 ? 2 : block.size - 1;
          const int32_t* of_block = a + (km * p.batch + block.start) * limbs * dwords;
          if (p.blocks()) {
            isa.blocks[size](w, of_block, p.steps(),
                             of_inputs + (km * p.batch + block.start) * count, size_of_path,
                             y + (block.start - begin) * kTile);
            continue;
          }
          const Dot dot = (p.signs ? isa.signs : isa.table)[size][limbs - 1];
          const Fixed* here = fixed + km * p.batch + block.start;
          for (int64_t n = 0; n < p.groups; ++n) {
            const Scales g = p.g.from((k * p.groups + n) * p.outputs + at.output);
            const int64_t first = n * p.group_steps;
            int32_t sums_of_a[kMaxRows * kMaxLimbs];
            for (int64_t r = 0; r < block.size; ++r)
              for (int64_t l = 0; l < limbs; ++l)
                sums_of_a[r * limbs + l] = here[r].totals[n * limbs + l];
            dot(w + first * kTile, of_block + first * p.step_dwords() * block.size * limbs,
                std::min(p.group_steps, p.steps() - first), sums_of_a, sums);
            for (int64_t r = 0; r < block.size; ++r)
              isa.add(sums + r * limbs * kTile, p.limbs, here[r].scale,
                      here[r].total(n, p.limbs), p.signs, g, at.outputs,
                      y + (block.start - begin + r) * kTile);
          }
        }
      }
      for (int64_t b = begin; b < end; ++b)
        std::memcpy(p.y + b * p.outputs + at.output, y + (b - begin) * kTile,
                    sizeof(float) * at.outputs);
    }
  };

  const int64_t chunk = std::max<int64_t>(1, tiles.count() / (threads * 8));
  const auto chunk_one = [&](int64_t item) {
    for (int64_t t = item * chunk; t < std::min(tiles.count(), (item + 1) * chunk); ++t)
      tile_one(t);
  };
  in_two_phases(pool, threads, fix_items, fix_one, (tiles.count() + chunk - 1) / chunk, chunk_one);
}

// Rows of x are cut into panels; a tile group of W_hat is expanded block by block of its inputs
// and multiplied with all panels of at most kRowsPerExpansion rows.
inline void float_product(const Product& p, const Isa& isa, const Floats& loops,
                          xla::ffi::ThreadPool& pool) {
  thread_local std::vector<uint32_t> held_panels;
  thread_local std::vector<float> held_h;
  const Tiles tiles(p.members);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t members = p.members.size(), per_step = loops.inputs_per_step;
  const int64_t group = isa.group, groups = (tiles.count() + group - 1) / group;
  // Panels of one size for all rows, as equal as they can be.
  const int64_t count = (p.batch + isa.largest_panel - 1) / isa.largest_panel;
  const int64_t panel = (p.batch + count - 1) / count, panels = (p.batch + panel - 1) / panel;
  const int64_t blocks = (p.padded + kBlock - 1) / kBlock;
  const int64_t panel_dwords = p.padded / per_step * panel;
  uint32_t* x = scratch(held_panels, panels * panel_dwords);
  float* h = scratch(held_h, p.k * members * p.padded);

  const auto prepare_one = [&](int64_t item) {
    if (item < panels) {
      const int64_t rows = std::min(panel, p.batch - item * panel);
      loops.panel(p.x + item * panel * p.inputs, p.inputs, rows, panel, p.inputs, p.padded,
                  x + item * panel_dwords);
      return;
    }
    for (int64_t km = 0; km < p.k * members; ++km) {
      float* to = h + km * p.padded;
      std::memset(to, 0, sizeof(float) * p.padded);
      isa.widen(p.h.from(km * p.inputs), p.inputs, to);
    }
  };

  // An item: some groups of tiles for the rows of one expansion. More groups read the panels from
  // a nearer cache, but there should be several items for each thread.
  const int64_t panels_at_once = std::max<int64_t>(1, kRowsPerExpansion / panel);
  const int64_t row_parts = (panels + panels_at_once - 1) / panels_at_once;
  const int64_t together =
      std::max<int64_t>(1, std::min<int64_t>(4, groups * row_parts / (threads * 4)));
  const int64_t group_items = (groups + together - 1) / together;
  const auto multiply_one = [&](int64_t item) {
    thread_local std::vector<uint32_t> held_w, held_words;
    thread_local std::vector<float> held_y;
    const int64_t first_panel = item / group_items * panels_at_once;
    const int64_t last_panel = std::min(panels, first_panel + panels_at_once);
    const int64_t first_group = item % group_items * together;
    const int64_t here = std::min(together, groups - first_group);
    const int64_t width = group * kTile, panel_size = panel * width;
    const int64_t own = last_panel - first_panel;
    uint32_t* w = scratch(held_w, kBlock * width);
    float* y = scratch(held_y, here * own * panel_size);
    std::memset(y, 0, sizeof(float) * here * own * panel_size);
    const int64_t word_stride = p.steps() * kTile;
    alignas(64) float g[kWordsPerBlock * 4 * kTile];
    const int64_t g_stride = p.groups > 1 ? p.k * kTile : 0;  // words share the scales of one group
    for (int64_t block = 0; block < blocks; ++block) {
      const int count = static_cast<int>(words_of_block(p.steps(), block));
      const int parts = count < kWordsPerBlock
                            ? 8
                            : static_cast<int>(std::min<int64_t>(
                                  8, (p.inputs - block * kBlock + 31) / 32));
      const int inputs = 4 * count * parts;
      for (int64_t n = 0; n < here; ++n) {
        for (int64_t t = 0; t < group; ++t) {
          const int64_t tile = (first_group + n) * group + t;
          if (tile >= tiles.count()) continue;  // what is left there is never copied
          const Tiles::At& at = tiles.at[tile];
          const uint32_t* words = p.w + tile * p.k * word_stride + block * kWordsPerBlock * kTile;
          int64_t stride = word_stride;
          if (p.w_rows) {
            stride = kWordsPerBlock * kTile;
            uint32_t* to = scratch(held_words, p.k * stride);
            std::memset(to, 0, sizeof(uint32_t) * p.k * stride);
            for (int64_t k = 0; k < p.k; ++k)
              for (int o = 0; o < at.outputs; ++o) {
                const uint32_t* row =
                    p.w + (k * p.outputs + at.output + o) * p.steps() + block * kWordsPerBlock;
                for (int s = 0; s < kWordsPerBlock; ++s)
                  to[k * stride + s * kTile + o] = row[s];
              }
            words = to;
          }
          std::memset(g, 0, sizeof g);
          for (int64_t m = 0; m < (g_stride ? kWordsPerBlock : 1); ++m) {
            const int64_t own_group = (block * kWordsPerBlock + m) / p.group_steps;
            if (own_group >= p.groups) continue;  // steps that hold nothing
            for (int64_t k = 0; k < p.k; ++k)
              isa.widen(p.g.from((k * p.groups + own_group) * p.outputs + at.output), at.outputs,
                        g + m * g_stride + k * kTile);
          }
          loops.expand(words, stride, static_cast<int>(p.k), g, g_stride,
                       h + at.member * p.padded + block * kBlock, members * p.padded, count, parts,
                       static_cast<int>(group), w + t * kTile);
        }
        for (int64_t q = 0; q < own; ++q)
          loops.multiply[panel](
              w, x + (first_panel + q) * panel_dwords + block * kBlock / per_step * panel,
              inputs / per_step, y + (n * own + q) * panel_size);
      }
    }
    for (int64_t n = 0; n < here; ++n)
      for (int64_t q = 0; q < own; ++q)
        for (int64_t r = 0; r < std::min(panel, p.batch - (first_panel + q) * panel); ++r)
          for (int64_t t = 0; t < group; ++t) {
            const int64_t tile = (first_group + n) * group + t;
            if (tile >= tiles.count()) continue;
            const Tiles::At& at = tiles.at[tile];
            std::memcpy(p.y + ((first_panel + q) * panel + r) * p.outputs + at.output,
                        y + (n * own + q) * panel_size + r * width + t * kTile,
                        sizeof(float) * at.outputs);
          }
  };
  in_two_phases(pool, threads, panels + 1, prepare_one, group_items * row_parts, multiply_one);
}

}  // namespace rabit
