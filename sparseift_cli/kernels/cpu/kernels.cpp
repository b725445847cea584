// Linear layers whose weight is stored as R x C cells, on a CPU: y = x W^T, and dX and dW in one walk.
//
// Activations are in tiles of 64 tokens, [tiles][features][64], so that one stored weight multiplies 64 consecutive floats.
// Written with the vector extensions of GCC and Clang alone: the width of a vector follows from the flags of the compiler
// (AVX-512, AVX2, NEON, or SSE). Nothing here depends on torch; `library.py` compiles this file once and calls it.
//
// Each output value is computed by one thread, in an order that depends on nothing but the index: results repeat to the bit.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kWidth = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kWidth = 4, kRegisters = 32;
#else
constexpr int kWidth = 4, kRegisters = 16;
#endif

constexpr int kTile = 64;                // tokens in a tile
constexpr int kVectors = kTile / kWidth;  // vectors in 64 tokens of one feature

typedef float Vec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t Lanes __attribute__((vector_size(4 * kWidth)));

#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
INLINE Vec splat(float f) { return Vec{} + f; }

// Calls f(std::integral_constant<int, 0>) to f(.. N - 1): a loop that is unrolled whatever the compiler thinks of it.
template <int... I, class F>
INLINE void unrolled(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
INLINE void repeat(F&& f) {
  unrolled(std::make_integer_sequence<int, N>{}, f);
}

// Elements of the concatenation of a and b: `first`, `first` + `step`, ...
template <int... I>
INLINE Vec pick(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Lanes{I...});
#endif
}
template <int First, int... I>
constexpr auto every_second(std::integer_sequence<int, I...>) {
  return std::integer_sequence<int, (2 * I + First)...>{};
}
template <int First, int... I>
constexpr auto zipped(std::integer_sequence<int, I...>) {
  return std::integer_sequence<int, (First + I / 2 + (I % 2) * kWidth)...>{};
}
using Places = std::make_integer_sequence<int, kWidth>;

// Element k of the result is the sum of the elements of v[k]; v [kWidth] is overwritten.
INLINE Vec sums_of(Vec* v) {
  for (int n = kWidth; n > 1; n /= 2)
    for (int k = 0; k < n / 2; ++k)
      v[k] = pick(v[2 * k], v[2 * k + 1], every_second<0>(Places{})) +
             pick(v[2 * k], v[2 * k + 1], every_second<1>(Places{}));
  return v[0];
}

// Transposes v, a matrix [kWidth][kWidth].
INLINE void transpose(Vec* v) {
  constexpr int half = kWidth / 2;
  for (int n = 1; n < kWidth; n *= 2) {
    Vec w[kWidth];
    for (int k = 0; k < half; ++k) {
      w[2 * k] = pick(v[k], v[k + half], zipped<0>(Places{}));
      w[2 * k + 1] = pick(v[k], v[k + half], zipped<half>(Places{}));
    }
    for (int k = 0; k < kWidth; ++k) v[k] = w[k];
  }
}

// Bytes of a panel of activations, which is read again and again: three quarters of the second-level cache.
int64_t panel_bytes() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::clamp<int64_t>(size / 4 * 3, 256 << 10, 4 << 20);
  }();
  return bytes;
}

// The range of lists, out of n, that belongs to thread `part` of `parts`: about as many cells as any other's.
std::pair<int64_t, int64_t> share_of(const int32_t* offsets, int64_t n, int part, int parts) {
  const auto bound = [&](int64_t k) {
    return k == parts ? n : std::lower_bound(offsets, offsets + n, static_cast<double>(offsets[n]) * k / parts) - offsets;
  };
  return {part ? bound(part) : 0, bound(part + 1)};
}

// Runs f(part, parts) in `threads` threads. All of them meet wherever one calls `meet`.
template <class F>
void in_threads(int threads, F&& f) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
  f(omp_get_thread_num(), omp_get_num_threads());
#else
  f(0, 1);
#endif
}
INLINE void meet() {
#pragma omp barrier
}

// Where each list [begin, end) enters each panel of `step` cells of the other side: [panels + 1][end - begin].
std::vector<int32_t> panel_offsets(const int32_t* offsets, const int32_t* other, int64_t begin, int64_t end,
                                   int64_t panels, int64_t step) {
  const int64_t n = end - begin;
  std::vector<int32_t> found((panels + 1) * n);
  for (int64_t i = 0; i < n; ++i) {
    int32_t p = offsets[begin + i];
    const int32_t last = offsets[begin + i + 1];
    found[i] = p;
    for (int64_t panel = 1; panel < panels; ++panel) {
      p = static_cast<int32_t>(std::lower_bound(other + p, other + last, panel * step) - other);
      found[panel * n + i] = p;
    }
    found[panels * n + i] = last;
  }
  return found;
}

// How panels of `features` rows of activations, in cells of `side`, are cut when `tiles` tiles are walked at once.
struct Panels {
  int64_t step, count;
  Panels(int64_t cells, int side, int tiles) {
    const int64_t fit = std::max<int64_t>(1, panel_bytes() / (int64_t{side} * tiles * kTile * 4));
    count = std::max<int64_t>(1, (cells + fit - 1) / fit);
    step = (cells + count - 1) / count;
    count = std::max<int64_t>(1, (cells + step - 1) / std::max<int64_t>(step, 1));
  }
};

// Memory that is not set.
struct Buffer {
  explicit Buffer(int64_t floats) : floats_(new float[std::max<int64_t>(floats, 1)]) {}
  float* get() const { return floats_.get(); }

 private:
  std::unique_ptr<float[]> floats_;
};

// One index of cells by lists: by rows for the forward pass, by columns for the backward one.
struct Lists {
  const int32_t *offsets, *other;
  int64_t count, others;
};

// --- forward, and dX of blocks ---

// Tiles that are walked at once, so that an index and a value are read once for all of them.
constexpr int kGroup = 2;
// Tiles whose sums are in registers at once, for weights of one row or column.
constexpr int kAtOnce = kRegisters * kWidth >= 512 ? 2 : 1;

// Where sums begin: at what is in y already, or, where `fresh`, at the bias of each row (null: zero).
struct Start {
  bool fresh;
  const float* bias;
  Start at(int64_t row) const { return {fresh, bias ? bias + row : nullptr}; }
};

// y[r][.] (+)= sum over cells p in [begin, end): v[p][r][c] x[other[p] * C + c][.], for kRows rows and one strip of tokens.
// v[p][r][c] is values[p * cell + r * C + c], or where kTransposed values[p * cell + c * R + r].
template <int R, int C, bool kTransposed, int kRows, int kTiles, int kStrip>
INLINE void multiply_strip(const int32_t* other, const float* values, int32_t begin, int32_t end, const float* x,
                           int64_t x_tile, float* y, int64_t y_tile, Start start) {
  Vec sum[kRows][kTiles][kStrip];
  repeat<kRows>([&](auto r) {
    const Vec first = start.bias ? splat(start.bias[r]) : Vec{};
    repeat<kTiles>([&](auto t) {
      repeat<kStrip>([&](auto z) {
        sum[r][t][z] = start.fresh ? first : load(y + t * y_tile + r * kTile + z * kWidth);
      });
    });
  });
  for (int32_t p = begin; p < end; ++p) {
    const float* from = x + int64_t{other[p]} * (C * kTile);
    const float* v = values + int64_t{p} * (R * C);
    repeat<(C < 4 ? C : 4)>([&](auto low) {
      for (int c = low; c < C; c += 4) {
        repeat<kTiles>([&](auto t) {
          Vec in[kStrip];
          repeat<kStrip>([&](auto z) { in[z] = load(from + t * x_tile + c * kTile + z * kWidth); });
          repeat<kRows>([&](auto r) {
            const Vec w = splat(kTransposed ? v[c * R + r] : v[r * C + c]);
            repeat<kStrip>([&](auto z) { sum[r][t][z] += w * in[z]; });
          });
        });
      }
    });
  }
  repeat<kRows>([&](auto r) {
    repeat<kTiles>([&](auto t) {
      repeat<kStrip>([&](auto z) { store(y + t * y_tile + r * kTile + z * kWidth, sum[r][t][z]); });
    });
  });
}

// How many vectors of one row are summed at once, so that all sums stay in registers.
template <int kRows, int kTiles>
constexpr int strip() {
  const int most = std::max(1, kRegisters / 2 / (kRows * kTiles));
  int strip = 1;
  while (2 * strip <= most && 2 * strip <= kVectors) strip *= 2;
  return strip;
}

// y (+)= for the R rows of one list and kTiles tiles.
template <int R, int C, bool kTransposed, int kTiles>
INLINE void multiply_list(const int32_t* other, const float* values, int32_t begin, int32_t end, const float* x,
                          int64_t x_tile, float* y, int64_t y_tile, Start start) {
  constexpr int kRows = R < 4 ? R : 4, kStrip = strip<kRows, kTiles>();
  for (int r = 0; r < R; r += kRows)
    for (int z = 0; z < kVectors; z += kStrip)
      multiply_strip<R, C, kTransposed, kRows, kTiles, kStrip>(other, values + r * (kTransposed ? 1 : C), begin, end,
                                                               x + z * kWidth, x_tile, y + r * kTile + z * kWidth,
                                                               y_tile, start.at(r));
}

// The same for up to kGroup tiles, kTiles of them at a time.
template <int R, int C, bool kTransposed>
INLINE void multiply_tiles(int tiles, const int32_t* other, const float* values, int32_t begin, int32_t end,
                           const float* x, int64_t x_tile, float* y, int64_t y_tile, Start start) {
  constexpr int kTiles = R == 1 ? kAtOnce : 1;
  int t = 0;
  for (; t + kTiles <= tiles; t += kTiles)
    multiply_list<R, C, kTransposed, kTiles>(other, values, begin, end, x + t * x_tile, x_tile, y + t * y_tile, y_tile,
                                             start);
  if constexpr (kTiles > 1)
    for (; t < tiles; ++t)
      multiply_list<R, C, kTransposed, 1>(other, values, begin, end, x + t * x_tile, x_tile, y + t * y_tile, y_tile,
                                          start);
}

// Asks for rows of up to kGroup tiles, which are needed next.
template <int kRows>
INLINE void prefetch(int tiles, const float* rows, int64_t tile) {
  for (int t = 0; t < tiles; ++t)
    for (int k = 0; k < kRows * kTile; k += 16) __builtin_prefetch(rows + t * tile + k);
}

// sums[f] += the 64 values of each feature in [begin, end).
void add_sums(const float* tile, float* sums, int64_t begin, int64_t end) {
  for (int64_t f = begin; f < end; ++f) {
    Vec sum = load(tile + f * kTile);
    for (int z = 1; z < kVectors; ++z) sum += load(tile + f * kTile + z * kWidth);
    float total = 0;
    for (int k = 0; k < kWidth; ++k) total += sum[k];
    sums[f] += total;
  }
}

// --- between [tokens][features] and tiles ---

// Features [begin, end) of tiles [..][features][64] from x [tokens][features]; tokens that fill up the last tile are zero.
void to_tiles(const float* x, float* tiles, int64_t tokens, int64_t begin, int64_t end, int64_t features) {
  for (; tokens > 0; tokens -= kTile, x += kTile * features, tiles += kTile * features) {
    int64_t f = begin;
    for (; f + kWidth <= end; f += kWidth)
      for (int k = 0; k < kTile; k += kWidth) {
        Vec v[kWidth];
        for (int j = 0; j < kWidth; ++j) v[j] = k + j < tokens ? load(x + (k + j) * features + f) : Vec{};
        transpose(v);
        for (int j = 0; j < kWidth; ++j) store(tiles + (f + j) * kTile + k, v[j]);
      }
    for (; f < end; ++f)
      for (int k = 0; k < kTile; ++k) tiles[f * kTile + k] = k < tokens ? x[k * features + f] : 0.0f;
  }
}

// The inverse, which leaves out the tokens that filled up the last tile.
void from_tiles(const float* tiles, float* x, int64_t tokens, int64_t begin, int64_t end, int64_t features) {
  for (; tokens > 0; tokens -= kTile, x += kTile * features, tiles += kTile * features) {
    int64_t f = begin;
    for (; f + kWidth <= end; f += kWidth)
      for (int k = 0; k < kTile && k < tokens; k += kWidth) {
        Vec v[kWidth];
        for (int j = 0; j < kWidth; ++j) v[j] = load(tiles + (f + j) * kTile + k);
        transpose(v);
        for (int j = 0; j < kWidth && k + j < tokens; ++j) store(x + (k + j) * features + f, v[j]);
      }
    for (; f < end; ++f)
      for (int k = 0; k < kTile && k < tokens; ++k) x[k * features + f] = tiles[f * kTile + k];
  }
}

// Writes features as soon as a vector of them is computed, while they are in the cache.
struct Finished {
  int64_t next;
  explicit Finished(int64_t begin) : next(begin) {}
  INLINE void until(int64_t end, bool last, const float* tiles, float* x, int64_t tokens, int64_t features) {
    if (end - next < kWidth && !last) return;
    from_tiles(tiles, x, tokens, next, end, features);
    next = end;
  }
};

// The features that thread `part` of `parts` converts.
std::pair<int64_t, int64_t> features_of(int64_t features, int64_t part, int64_t parts) {
  const auto bound = [&](int64_t k) { return k == parts ? features : features * k / parts / kWidth * kWidth; };
  return {bound(part), bound(part + 1)};
}

template <int R, int C>
void forward(Lists rows, const float* values, const float* bias, const float* x, float* y, int64_t tokens,
             int threads) {
  const int64_t inputs = rows.others * C, outputs = rows.count * R;
  const Panels panels(rows.others, C, kGroup);
  const Buffer x_tiles(kGroup * inputs * kTile), y_tiles(kGroup * outputs * kTile);
  in_threads(threads, [&](int part, int parts) {
    const auto [begin, end] = share_of(rows.offsets, rows.count, part, parts);
    const int64_t n = end - begin;
    const auto enter = panel_offsets(rows.offsets, rows.other, begin, end, panels.count, panels.step);
    for (int64_t at = 0; at < tokens; at += kGroup * kTile) {
      const int64_t count = std::min<int64_t>(kGroup * kTile, tokens - at);
      const int tiles = static_cast<int>((count + kTile - 1) / kTile);
      const auto [first, last] = features_of(inputs, part, parts);
      to_tiles(x + at * inputs, x_tiles.get(), count, first, last, inputs);
      meet();
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        Finished done(begin * R);
        for (int64_t i = 0; i < n; ++i) {
          const int32_t from = enter[panel * n + i], to = enter[(panel + 1) * n + i];
          const int64_t row = (begin + i) * R;
          float* out = y_tiles.get() + row * kTile;
          if (panel && i + 1 < n) prefetch<R>(tiles, out + R * kTile, outputs * kTile);
          if (from < to || panel == 0)
            multiply_tiles<R, C, false>(tiles, rows.other, values, from, to, x_tiles.get(), inputs * kTile, out,
                                        outputs * kTile, {panel == 0, bias ? bias + row : nullptr});
          if (panel + 1 == panels.count)
            done.until(row + R, i + 1 == n, y_tiles.get(), y + at * outputs, count, outputs);
        }
      }
      meet();
    }
  });
}

// --- backward ---

// dx (+)= and dvalues (+)= for cells of one column (C = 1) and kTiles tiles, sharing every load of grad.
// values and dvalues are in the order of the walk: entry p * R + r belongs to row other[p] * R + r.
template <int R, int kTiles>
INLINE void backward_column(const int32_t* other, const float* values, float* dvalues, int32_t begin, int32_t end,
                            const float* grad, int64_t g_tile, const float* x, float* dx, int64_t x_tile, bool fresh) {
  Vec in[kTiles][kVectors], sum[kTiles][kVectors], part[kWidth];
  repeat<kTiles>([&](auto t) {
    repeat<kVectors>([&](auto z) {
      in[t][z] = load(x + t * x_tile + z * kWidth);
      sum[t][z] = fresh ? Vec{} : load(dx + t * x_tile + z * kWidth);
    });
  });
  const auto entry = [&](int64_t k) {
    const float* g = grad + (int64_t{other[k / R]} * R + k % R) * kTile;
    const Vec w = splat(values[k]);
    Vec product[2] = {};
    repeat<kTiles>([&](auto t) {
      repeat<kVectors>([&](auto z) {
        const Vec q = load(g + t * g_tile + z * kWidth);
        sum[t][z] += w * q;
        product[z % 2] += q * in[t][z];
      });
    });
    return product[0] + product[1];
  };
  int64_t k = int64_t{begin} * R;
  const int64_t last = int64_t{end} * R;
  for (; k + kWidth <= last; k += kWidth) {
    for (int j = 0; j < kWidth; ++j) part[j] = entry(k + j);
    store(dvalues + k, load(dvalues + k) + sums_of(part));
  }
  if (k < last) {
    const int64_t rest = last - k;
    for (int64_t j = 0; j < kWidth; ++j) part[j] = j < rest ? entry(k + j) : Vec{};
    const Vec sums = sums_of(part);
    for (int64_t j = 0; j < rest; ++j) dvalues[k + j] += sums[j];
  }
  repeat<kTiles>([&](auto t) {
    repeat<kVectors>([&](auto z) { store(dx + t * x_tile + z * kWidth, sum[t][z]); });
  });
}

// dvalues[r][c] (+)= of one cell R x C.
template <int R, int C>
INLINE void gradient_of_cell(int tiles, float* dvalues, const float* grad, int64_t g_tile, const float* x,
                             int64_t x_tile) {
  constexpr int kColumns = C < 4 ? C : 4, kRows = R < 4 ? R : kWidth == 8 && C > 1 ? 2 : 4;
  constexpr int kSums = kColumns * kRows, kPadded = (kSums + kWidth - 1) / kWidth * kWidth;
  for (int r = 0; r < R; r += kRows)
    for (int c = 0; c < C; c += kColumns) {
      Vec sum[kPadded] = {};
      for (int t = 0; t < tiles; ++t)
        for (int z = 0; z < kTile; z += kWidth) {
          Vec in[kColumns];
          repeat<kColumns>([&](auto j) { in[j] = load(x + t * x_tile + (c + j) * kTile + z); });
          repeat<kRows>([&](auto i) {
            const Vec q = load(grad + t * g_tile + (r + i) * kTile + z);
            repeat<kColumns>([&](auto j) { sum[i * kColumns + j] += q * in[j]; });
          });
        }
      float total[kPadded];
      for (int k = 0; k < kPadded; k += kWidth) store(total + k, sums_of(sum + k));
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kColumns; ++j) dvalues[(r + i) * C + c + j] += total[i * kColumns + j];
    }
}

// Values and their gradients of the cells [first, last), in the order of the walk by columns.
template <int R, int C>
struct InOrder {
  static constexpr int64_t cell = R * C;
  const int32_t* order;
  int64_t first, last;
  Buffer values, gradient;

  InOrder(const int32_t* order, int64_t first, int64_t last, const float* from)
      : order(order), first(first), last(last), values((last - first) * cell), gradient((last - first) * cell) {
    for (int64_t p = first; p < last; ++p)
      std::memcpy(values.get() + (p - first) * cell, from + order[p] * cell, cell * sizeof(float));
    std::fill_n(gradient.get(), (last - first) * cell, 0.0f);
  }
  void write(float* to) const {
    for (int64_t p = first; p < last; ++p)
      std::memcpy(to + order[p] * cell, gradient.get() + (p - first) * cell, cell * sizeof(float));
  }
};

// dx and dvalues of the cells [from, to) of one column, for up to kGroup tiles; dx or dvalues may be null.
template <int R, int C>
INLINE void backward_list(int tiles, const int32_t* other, const float* values, float* dvalues, int32_t from,
                          int32_t to, const float* grad, int64_t g_tile, const float* x, float* dx, int64_t x_tile,
                          bool fresh) {
  constexpr int kTiles = C == 1 && R == 1 ? kAtOnce : 1;
  if (C == 1 && dx && dvalues) {
    int t = 0;
    for (; t + kTiles <= tiles; t += kTiles)
      backward_column<R, kTiles>(other, values, dvalues, from, to, grad + t * g_tile, g_tile, x + t * x_tile,
                                 dx + t * x_tile, x_tile, fresh);
    if constexpr (kTiles > 1)
      for (; t < tiles; ++t)
        backward_column<R, 1>(other, values, dvalues, from, to, grad + t * g_tile, g_tile, x + t * x_tile,
                              dx + t * x_tile, x_tile, fresh);
    return;
  }
  if (dx)
    multiply_tiles<C, R, true>(tiles, other, values, from, to, grad, g_tile, dx, x_tile, {fresh, nullptr});
  if (dvalues)
    for (int32_t p = from; p < to; ++p)
      gradient_of_cell<R, C>(tiles, dvalues + int64_t{p} * (R * C), grad + int64_t{other[p]} * (R * kTile), g_tile, x,
                             x_tile);
}

// What the backward pass computes; each may be null.
struct Gradients {
  float *x, *values, *bias;
};

template <int R, int C>
void backward(Lists columns, const int32_t* order, const float* values, const float* grad, const float* x, Gradients to,
              int64_t tokens, int threads) {
  const int64_t inputs = columns.count * C, outputs = columns.others * R;
  const Panels panels(columns.others, R, kGroup);
  const Buffer g_tiles(kGroup * outputs * kTile), x_tiles(kGroup * inputs * kTile), dx_tiles(kGroup * inputs * kTile);
  if (to.bias) std::fill_n(to.bias, outputs, 0.0f);
  in_threads(threads, [&](int part, int parts) {
    const auto [begin, end] = share_of(columns.offsets, columns.count, part, parts);
    const int64_t n = end - begin;
    const auto enter = panel_offsets(columns.offsets, columns.other, begin, end, panels.count, panels.step);
    const InOrder<R, C> own(order, columns.offsets[begin], columns.offsets[end], values);
    const float* in_order = own.values.get() - own.first * own.cell;
    float* gradient = to.values ? own.gradient.get() - own.first * own.cell : nullptr;
    for (int64_t at = 0; at < tokens; at += kGroup * kTile) {
      const int64_t count = std::min<int64_t>(kGroup * kTile, tokens - at);
      const int tiles = static_cast<int>((count + kTile - 1) / kTile);
      const auto [first, last] = features_of(outputs, part, parts);
      to_tiles(grad + at * outputs, g_tiles.get(), count, first, last, outputs);
      if (to.bias)
        for (int t = 0; t < tiles; ++t) add_sums(g_tiles.get() + t * outputs * kTile, to.bias, first, last);
      if (to.values) to_tiles(x + at * inputs, x_tiles.get(), count, begin * C, end * C, inputs);
      meet();
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        Finished done(begin * C);
        for (int64_t i = 0; i < n; ++i) {
          const int32_t from = enter[panel * n + i], to_ = enter[(panel + 1) * n + i];
          const int64_t column = (begin + i) * C;
          const float* in = x_tiles.get() + column * kTile;
          float* out = to.x ? dx_tiles.get() + column * kTile : nullptr;
          if (i + 1 < n) {
            if (to.values) prefetch<C>(tiles, in + C * kTile, inputs * kTile);
            if (to.x && panel) prefetch<C>(tiles, out + C * kTile, inputs * kTile);
          }
          if (from < to_ || panel == 0)
            backward_list<R, C>(tiles, columns.other, in_order, gradient, from, to_, g_tiles.get(), outputs * kTile, in,
                                out, inputs * kTile, panel == 0);
          if (to.x && panel + 1 == panels.count)
            done.until(column + C, i + 1 == n, dx_tiles.get(), to.x + at * inputs, count, inputs);
        }
      }
      meet();
    }
    if (to.values) own.write(to.values);
  });
}

// Calls f with the sizes of a cell as types; false where there are no kernels of this size.
template <class F>
bool with_cell(int rows, int columns, F&& f) {
#define CELL(R, C)                                                                       \
  if (rows == R && columns == C) {                                                       \
    f(std::integral_constant<int, R>{}, std::integral_constant<int, C>{});               \
    return true;                                                                         \
  }
  CELL(1, 1)
  CELL(4, 1)
  CELL(4, 4)
  CELL(8, 8)
  CELL(16, 16)
#undef CELL
  return false;
}

}  // namespace

extern "C" {

// Floats in a vector, and whether there are threads.
int sparseift_vector_width() { return kWidth; }
int sparseift_threads() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

// y [tokens][R * rows] = x W^T + bias, for x [tokens][C * columns]; bias may be null. Returns 1 where there are no kernels
// for cells of R x C.
int sparseift_forward(int R, int C, int64_t rows, int64_t columns, const int32_t* row_offsets,
                      const int32_t* cell_columns, const float* values, const float* bias, const float* x, float* y,
                      int64_t tokens, int threads) {
  const Lists lists{row_offsets, cell_columns, rows, columns};
  return !with_cell(R, C, [&](auto r, auto c) {
    forward<decltype(r)::value, decltype(c)::value>(lists, values, bias, x, y, tokens, threads);
  });
}

// dx [tokens][C * columns], dvalues [cells][R][C] and dbias [R * rows], of which any may be null, for grad
// [tokens][R * rows]. Cell p of the walk by columns is cell order[p] of `values`, and in row cell_rows[p].
int sparseift_backward(int R, int C, int64_t rows, int64_t columns, const int32_t* column_offsets,
                       const int32_t* cell_rows, const int32_t* order, const float* values, const float* grad,
                       const float* x, float* dx, float* dvalues, float* dbias, int64_t tokens, int threads) {
  const Lists lists{column_offsets, cell_rows, columns, rows};
  return !with_cell(R, C, [&](auto r, auto c) {
    backward<decltype(r)::value, decltype(c)::value>(lists, order, values, grad, x, {dx, dvalues, dbias}, tokens,
                                                     threads);
  });
}
}
