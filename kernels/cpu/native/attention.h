// Attention of single queries to a key-value cache, by the loops of an instruction set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "product.h"
#include "team.h"

namespace rabit {

constexpr int64_t kSlotsPerItem = 256;          // a key head's cache is cut into pieces of these
constexpr int64_t kFewSlots = 1 << 15;          // floats of keys that one thread reads alone

// Keys or values [b, n, s, h]: floats, or codes with `count` scales for each slot, see Unpack.
struct Cached {
  const void* data;
  const uint16_t* scales;
  int count;  // 0 for floats

  // Those of `slots` slots from `first` on, in `work` where they are codes.
  const float* read(int64_t first, int64_t slots, int size, const Isa& isa, float* work) const {
    if (!count) return static_cast<const float*>(data) + first * size;
    const int64_t bytes = count == 1 ? size : size / 2;
    isa.unpack(static_cast<const uint8_t*>(data) + first * bytes, scales + first * count, slots,
               size, count, work);
    return work;
  }
};

struct Attention {
  const float* q;  // [b, n g, h]
  Cached k, v;
  const uint8_t* allowed;  // [b or 1, s]
  bool own_slots;          // of each row of the batch
  int64_t batch, heads, slots;
  int queries, size;       // g and h
  float scale, cap;
  float* y;                // [b, n g, h]
};

// Pieces of the cache are attended to one by one, then joined by their largest scores.
inline void attention(const Attention& a, const Isa& isa, xla::ffi::ThreadPool& pool) {
  thread_local std::vector<float> held;
  int64_t live = 0;  // slots up to the last one that any row may see
  for (int64_t b = 0; b < (a.own_slots ? a.batch : 1); ++b)
    for (int64_t s = a.slots; s > live; --s)
      if (a.allowed[b * a.slots + s - 1]) live = s;
  const int64_t items = a.batch * a.heads;
  const int64_t pieces = std::max<int64_t>(1, (live + kSlotsPerItem - 1) / kSlotsPerItem);
  const int64_t own = a.queries * (a.size + 2);  // floats of a piece: acc, top, sum
  float* found = scratch(held, items * pieces * own);

  const auto attend_one = [&](int64_t item) {
    alignas(64) float work[kAttentionWork];
    const int64_t head = item / pieces, first = item % pieces * kSlotsPerItem;
    const int64_t at = head * a.slots + first, slots = std::min(kSlotsPerItem, live - first);
    thread_local std::vector<float> held_codes;
    float* codes = a.k.count ? scratch(held_codes, 2 * kSlotsPerItem * a.size) : nullptr;
    const float* k = a.k.read(at, slots, a.size, isa, codes);
    const float* v =
        a.v.read(at, slots, a.size, isa, codes ? codes + kSlotsPerItem * a.size : nullptr);
    const uint8_t* allowed =
        a.allowed + (a.own_slots ? head / a.heads * a.slots : 0) + first;
    float* acc = found + item * own;
    isa.attend(a.q + head * a.queries * a.size, k, v, allowed, slots, a.queries,
               a.size, a.scale, a.cap, work, acc, acc + a.queries * a.size, acc + a.queries * (a.size + 1));
  };
  const auto join_one = [&](int64_t head) {
    for (int r = 0; r < a.queries; ++r) {
      float* y = a.y + (head * a.queries + r) * a.size;
      std::memset(y, 0, sizeof(float) * a.size);
      float largest = -1e30f, sum = 0.0f;
      for (int64_t p = 0; p < pieces; ++p)
        largest = std::max(largest, found[(head * pieces + p) * own + a.queries * a.size + r]);
      for (int64_t p = 0; p < pieces; ++p) {
        const float* piece = found + (head * pieces + p) * own;
        const float weight = std::exp(piece[a.queries * a.size + r] - largest);
        sum += weight * piece[a.queries * (a.size + 1) + r];
        for (int i = 0; i < a.size; ++i) y[i] += weight * piece[r * a.size + i];
      }
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      for (int i = 0; i < a.size; ++i) y[i] *= inverse;
    }
  };
  const bool small = items * live * a.size < kFewSlots;
  const int64_t threads = small ? 1 : std::max<int64_t>(1, pool.num_threads());
  in_two_phases(pool, threads, items * pieces, attend_one, items, join_one);
}

}  // namespace rabit
