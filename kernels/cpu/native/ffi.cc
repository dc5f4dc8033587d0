// The calls that XLA makes: `rabit_signs_matmul`, `rabit_table_matmul` and `rabit_attention`. They
// check shapes, pick the instruction set and hand over to product.h and attention.h.

#include <string>
#include <vector>

#include "attention.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace rabit {
namespace {

namespace ffi = xla::ffi;

// Those that this machine has, the best first.
const std::vector<const Isa*>& isas() {
  static const std::vector<const Isa*> found = [] {
    std::vector<const Isa*> list;
    for (const Isa* isa : {avx512(), avxvnni(), avx2(), neon(), portable()})
      if (isa) list.push_back(isa);
    return list;
  }();
  return found;
}

enum Arithmetic : int64_t { kIntegers = 0, kFloat32 = 1, kBfloat16 = 2 };

ffi::Error wrong(const char* call, const std::string& what) {
  return ffi::Error::InvalidArgument(std::string(call) + ": " + what);
}

ffi::Error run(const char* call, const Product& p, int64_t arithmetic, int64_t isa_index,
               ffi::ThreadPool& pool) {
  if (isa_index < 0 || isa_index >= static_cast<int64_t>(isas().size()))
    return wrong(call, "no instruction set " + std::to_string(isa_index));
  const Isa& isa = *isas()[isa_index];
  if (p.batch == 0 || p.outputs == 0) return ffi::Error::Success();
  if (arithmetic == kIntegers) {
    integer_product(p, isa, pool);
    return ffi::Error::Success();
  }
  // A machine without bfloat16 products takes float32, which is the finer one.
  const Floats& loops =
      arithmetic == kBfloat16 && isa.bfloat16.inputs_per_step ? isa.bfloat16 : isa.float32;
  float_product(p, isa, loops, pool);
  return ffi::Error::Success();
}

bool scales_fit(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  return a.element_type() == b.element_type() &&
         (a.element_type() == ffi::F16 || a.element_type() == ffi::F32);
}

// x [b, i] or [b, k, i]; w [l, tile, k, word, 16] uint32 or [l, k, o, byte] uint8;
// g [l, k, n, o], n groups of `group` words, one of all where that is 0; h [l, k, m, i], of size 0
// for none; layer -> y [b, o]
ffi::Error signs_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w,
                        ffi::AnyBuffer g, ffi::AnyBuffer h, ffi::Buffer<ffi::S32> layer,
                        ffi::Result<ffi::Buffer<ffi::F32>> y, ffi::Span<const int64_t> rows,
                        int64_t limbs, int64_t group, int64_t arithmetic, int64_t isa) {
  const char* call = "rabit_signs_matmul";
  const auto xs = x.dimensions(), ws = w.dimensions(), gs = g.dimensions(), hs = h.dimensions();
  const bool w_rows = w.element_type() == ffi::U8, x_paths = xs.size() == 3;
  if (xs.size() < 2 || xs.size() > 3 || gs.size() != 4 || hs.size() != 4 ||
      ws.size() != (w_rows ? 4u : 5u))
    return wrong(call, "wrong number of axes");
  int64_t outputs = 0, tiles = 0;
  for (int64_t n : rows) outputs += n, tiles += (n + kTile - 1) / kTile;
  const int64_t inputs = xs[xs.size() - 1];
  const int64_t words = w_rows ? (inputs + 255) / 256 * 8 : (inputs + 63) / 64 * 2;
  const int64_t l = gs[0], k = gs[1], n = gs[2], at = layer.typed_data()[0];
  const int64_t group_steps = group ? group : words;
  const bool has_h = h.element_count() > 0;
  const bool w_fits = w_rows ? ws[1] == k && ws[2] == outputs && ws[3] == words * 4
                             : w.element_type() == ffi::U32 && ws[1] == tiles && ws[2] == k &&
                                   ws[3] == words && ws[4] == kTile;
  const bool fits = ws[0] == l && w_fits && gs[3] == outputs && k >= 1 && k <= 4 && n >= 1 &&
                    group_steps >= 1 && (n - 1) * group_steps < words && (n == 1 || !w_rows) &&
                    scales_fit(g, h) && limbs >= 1 && limbs <= kMaxLimbs &&
                    y->dimensions()[0] == xs[0] && y->dimensions()[1] == outputs &&
                    (!x_paths || xs[1] == k) && at >= 0 && at < l;
  const bool h_fits = hs[0] == l && hs[1] == k && hs[2] == static_cast<int64_t>(rows.size()) &&
                      (!has_h || hs[3] == inputs);
  if (!fits || !h_fits) return wrong(call, "shapes or dtypes do not fit");
  if (arithmetic == kIntegers && inputs > 32768) return wrong(call, "more than 32768 inputs");
  if (arithmetic == kIntegers && limbs == 1 && n > 1)
    return wrong(call, "one limb has blocks of 256 inputs, wanted one group");
  if (arithmetic != kIntegers && (x_paths || !has_h))
    return wrong(call, "floats want x [b, i] and scales h");
  const bool half = g.element_type() == ffi::F16;
  const int64_t layer_words = w_rows ? k * outputs * words : tiles * k * words * kTile;
  const Scales h_all{h.untyped_data(), half};
  return run(call,
             {x.typed_data(), x_paths,
              static_cast<const uint32_t*>(w.untyped_data()) + at * layer_words, w_rows,
              Scales{g.untyped_data(), half}.from(at * k * n * outputs),
              has_h ? h_all.from(at * k * hs[2] * inputs) : Scales{nullptr, half}, true, xs[0],
              inputs, words * 32, k, outputs, static_cast<int>(limbs), n, group_steps,
              {rows.begin(), rows.end()}, y->typed_data()},
             arithmetic, isa, pool);
}

// x [b, i]; w int8 [l, tile, step, 16, 4]; g [l, n, o], n groups of `group` steps, one of all where
// that is 0; layer -> y [b, o]
ffi::Error table_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> w,
                        ffi::AnyBuffer g, ffi::Buffer<ffi::S32> layer,
                        ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t limbs, int64_t group,
                        int64_t isa) {
  const char* call = "rabit_table_matmul";
  const auto xs = x.dimensions(), ws = w.dimensions(), gs = g.dimensions();
  if (xs.size() != 2 || ws.size() != 5 || gs.size() != 3)
    return wrong(call, "wrong number of axes");
  const int64_t l = gs[0], n = gs[1], outputs = gs[2], at = layer.typed_data()[0];
  const int64_t steps = ws[2], group_steps = group ? group : steps;
  const bool fits = ws[0] == l && ws[1] == (outputs + kTile - 1) / kTile &&
                    steps == (xs[1] + 3) / 4 && ws[3] == kTile && ws[4] == 4 && n >= 1 &&
                    group_steps >= 1 && (n - 1) * group_steps < steps && limbs >= 1 &&
                    limbs <= kMaxLimbs && y->dimensions()[0] == xs[0] &&
                    y->dimensions()[1] == outputs && scales_fit(g, g) && at >= 0 && at < l;
  if (!fits) return wrong(call, "shapes or dtypes do not fit");
  if (xs[1] > 32768) return wrong(call, "more than 32768 inputs");
  const bool half = g.element_type() == ffi::F16;
  return run(call,
             {x.typed_data(), false,
              reinterpret_cast<const uint32_t*>(w.typed_data()) + at * ws[1] * steps * kTile, false,
              Scales{g.untyped_data(), half}.from(at * n * outputs), Scales{nullptr, half}, false,
              xs[0], xs[1], steps * 4, 1, outputs, static_cast<int>(limbs), n, group_steps,
              {outputs}, y->typed_data()},
             kIntegers, isa, pool);
}

// Layer `at` of keys or values [l, b, n, s, *] with scales uint16 [l, b, n, s, count]; data is null
// where they do not fit heads of `size`.
Cached layer_of(const ffi::AnyBuffer& values, const ffi::Buffer<ffi::U16>& scales, int64_t at,
                int64_t size) {
  const auto vs = values.dimensions(), ss = scales.dimensions();
  if (vs.size() != 5 || ss.size() != 5) return {nullptr, nullptr, 0};
  const int64_t count = ss[4], rows = vs[1] * vs[2] * vs[3];
  bool fits = ss[0] == vs[0] && ss[1] == vs[1] && ss[2] == vs[2] && ss[3] == vs[3];
  const auto type = values.element_type();
  if (count == 0)
    fits &= type == ffi::F32 && vs[4] == size;
  else if (count == 1)
    fits &= type == ffi::S8 && vs[4] == size;
  else
    fits &= type == ffi::U8 && 2 * vs[4] == size && count % 4 == 0 && count <= kMaxScales &&
            size % count == 0;
  if (!fits) return {nullptr, nullptr, 0};
  const int64_t bytes = rows * vs[4] * (count ? 1 : 4);
  return {static_cast<const char*>(values.untyped_data()) + at * bytes,
          scales.typed_data() + at * rows * count, static_cast<int>(count)};
}

// q [b, n g, h]; the stacks k, v [l, b, n, s, h], or codes with their scales; allowed [b or 1, s];
// layer -> y [b, n g, h]
ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k,
                  ffi::Buffer<ffi::U16> k_scales, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::U16> v_scales, ffi::Buffer<ffi::PRED> allowed,
                  ffi::Buffer<ffi::S32> layer, ffi::Result<ffi::Buffer<ffi::F32>> y, double scale,
                  double cap, int64_t isa) {
  const char* call = "rabit_attention";
  const auto qs = q.dimensions(), ks = k.dimensions(), as = allowed.dimensions();
  if (qs.size() != 3 || ks.size() != 5 || as.size() != 2)
    return wrong(call, "wrong number of axes");
  const int64_t at = layer.typed_data()[0], queries = ks[2] ? qs[1] / ks[2] : 0;
  if (at < 0 || at >= ks[0]) return wrong(call, "no such layer");
  const Cached keys = layer_of(k, k_scales, at, qs[2]), values = layer_of(v, v_scales, at, qs[2]);
  const bool fits = keys.data && values.data && ks[1] == qs[0] && queries * ks[2] == qs[1] &&
                    queries <= kMaxQueries && qs[2] % 16 == 0 && as[1] == ks[3] &&
                    (as[0] == 1 || as[0] == qs[0]) &&
                    v.element_count() == k.element_count() &&
                    y->element_count() == q.element_count();
  if (!fits) return wrong(call, "shapes do not fit");
  if (isa < 0 || isa >= static_cast<int64_t>(isas().size()))
    return wrong(call, "no instruction set " + std::to_string(isa));
  attention({q.typed_data(), keys, values,
             reinterpret_cast<const uint8_t*>(allowed.untyped_data()), as[0] > 1, qs[0], ks[2],
             ks[3], static_cast<int>(queries), static_cast<int>(qs[2]),
             static_cast<float>(scale), static_cast<float>(cap), y->typed_data()},
            *isas()[isa], pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace rabit

XLA_FFI_DEFINE_HANDLER_SYMBOL(rabit_attention, rabit::attend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U16>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<double>("scale")
                                  .Attr<double>("cap")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(rabit_signs_matmul, rabit::signs_matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("rows")
                                  .Attr<int64_t>("limbs")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("arithmetic")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(rabit_table_matmul, rabit::table_matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("limbs")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("isa"));

// Name of the n-th best instruction set that this machine has, or null.
extern "C" const char* rabit_isa(int n) {
  const auto& found = rabit::isas();
  return n >= 0 && n < static_cast<int>(found.size()) ? found[n]->name : nullptr;
}

// Whether it multiplies in bfloat16.
extern "C" int rabit_isa_bfloat16(int n) {
  const auto& found = rabit::isas();
  return n >= 0 && n < static_cast<int>(found.size()) && found[n]->bfloat16.inputs_per_step > 0;
}
