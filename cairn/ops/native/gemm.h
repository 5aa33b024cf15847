// Products of large matrices. Both operands are laid out anew as whole tiles, in the order in which they are read: the
// right one once, for all threads; the left one a cache-sized block at a time, by the thread that works on it.
//
// A thread owns the rows of a block, and every sum is taken in the same order whatever their number.
#pragma once

#include "elementwise.h"

// What is read again and again fits a core's caches: 32 rows of the left operand the first, the columns and the sums of
// more than one pass along the depth the second.
struct Blocks {
  int64_t rows;     // of the left operand at once
  int64_t columns;  // of the right operand at once
  int64_t depth;    // in steps of 32
};
constexpr Blocks kOnePass{512, 384, 768 / 32}, kPasses{256, 768, 512 / 32};
constexpr int64_t kStep = 1024;  // elements of two neighbouring tiles: what one step of 32 along the depth reads

struct Matrix {  // row-major, element (i, j) at data[i * stride + j]; `turned` means that its transpose is meant
  const bf16* data;
  int64_t stride;
  int64_t turned;
};

// 32 rows of a matrix, or fewer columns of them than there are, with zeros where it ends. They are copied one after the
// other: 32 rows read side by side come from memory at half the speed, and conflict in the first-level cache.
class Strip {
 public:
  explicit Strip(int64_t columns) : pitch_(columns + 32), data_(32 * pitch_) {}

  void fetch(const Matrix& from, int64_t rows, int64_t columns, int64_t i, int64_t j, int64_t width) {
    const int64_t n = std::clamp<int64_t>(rows - i, 0, 32), m = std::clamp<int64_t>(columns - j, 0, width);
    for (int64_t r = 0; r < 32; ++r) {
      if (r < n) std::memcpy(row(r), from.data + (i + r) * from.stride + j, m * sizeof(bf16));
      const int64_t filled = r < n ? m : 0;
      if (filled < width) std::memset(row(r) + filled, 0, (width - filled) * sizeof(bf16));
    }
  }
  bf16* row(int64_t r) const { return data_ + r * pitch_; }

 private:
  int64_t pitch_;
  Buffer<bf16> data_;
};

// Two tiles of 16 rows each of 32 columns, as they are.
inline void rows(const Strip& from, int64_t column, bf16* to) {
  for (int64_t i = 0; i < 32; ++i) _mm512_store_si512(to + 32 * i, _mm512_loadu_si512(from.row(i) + column));
}

// The same, of the transpose of 32 rows: eight columns at a time, four eights of rows in the four lanes of a register.
inline void columns(const Strip& from, int64_t column, bf16* to) {
  for (int64_t c = 0; c < 32; c += 8, to += 8 * 32) {
    __m512i r[8], s[8];
    for (int64_t i = 0; i < 8; ++i) {
      r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(from.row(i) + column + c)));
      for (int64_t lane = 1; lane < 4; ++lane) {
        const __m128i eight = _mm_loadu_si128((const __m128i*)(from.row(8 * lane + i) + column + c));
        r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xF << 4 * lane, eight);
      }
    }
    for (int64_t i = 0; i < 8; i += 2) {
      s[i] = _mm512_unpacklo_epi16(r[i], r[i + 1]);
      s[i + 1] = _mm512_unpackhi_epi16(r[i], r[i + 1]);
    }
    for (int64_t i = 0; i < 8; i += 4)
      for (int64_t half = 0; half < 2; ++half) {
        r[i + 2 * half] = _mm512_unpacklo_epi32(s[i + half], s[i + half + 2]);
        r[i + 2 * half + 1] = _mm512_unpackhi_epi32(s[i + half], s[i + half + 2]);
      }
    for (int64_t j = 0; j < 4; ++j) {
      _mm512_store_si512(to + 32 * (2 * j), _mm512_unpacklo_epi64(r[j], r[j + 4]));
      _mm512_store_si512(to + 32 * (2 * j + 1), _mm512_unpackhi_epi64(r[j], r[j + 4]));
    }
  }
}

// Two tiles of 16 paired rows each of 16 columns, from 32 rows.
inline void paired_rows(const Strip& from, int64_t column, bf16* to) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t i = 0; i < 16; ++i, to += 32) {
      const __m256i even = _mm256_loadu_si256((const __m256i*)(from.row(2 * i) + column + 16 * half));
      const __m256i odd = _mm256_loadu_si256((const __m256i*)(from.row(2 * i + 1) + column + 16 * half));
      _mm512_store_si512(to, paired(even, odd));
    }
}

// The same, of the transpose of 32 rows.
inline void paired_columns(const Strip& from, int64_t column, bf16* to) {
  for (int64_t half = 0; half < 2; ++half) {
    __m512i r[16];
    for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from.row(16 * half + i) + column);
    transpose16(r);
    for (int64_t i = 0; i < 16; ++i, to += 32) _mm512_store_si512(to, r[i]);
  }
}

// sums[0, width) += the 32 rows. Of every 32 columns the even ones come first.
inline void add_rows(const Strip& from, int64_t width, float* sums) {
  const __m512bh even = (__m512bh)_mm512_set1_epi32(0x00003F80), odd = (__m512bh)_mm512_set1_epi32(0x3F800000);
  for (int64_t j = 0; j < width; j += 32, sums += 32) {
    __m512 evens[4] = {}, odds[4] = {};
    for (int64_t i = 0; i < 32; i += 4)
      for (int64_t n = 0; n < 4; ++n) {  // four chains of additions side by side
        const __m512bh row = (__m512bh)_mm512_loadu_si512(from.row(i + n) + j);
        evens[n] = _mm512_dpbf16_ps(evens[n], row, even);
        odds[n] = _mm512_dpbf16_ps(odds[n], row, odd);
      }
    const __m512 low = _mm512_add_ps(_mm512_add_ps(evens[0], evens[1]), _mm512_add_ps(evens[2], evens[3]));
    const __m512 high = _mm512_add_ps(_mm512_add_ps(odds[0], odds[1]), _mm512_add_ps(odds[2], odds[3]));
    _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), low));
    _mm512_store_ps(sums + 16, _mm512_add_ps(_mm512_load_ps(sums + 16), high));
  }
}

// What `add_rows` added up, as n numbers in their order.
inline void store_row_sums(const float* sums, int64_t n, bf16* to) {
  for (int64_t j = 0; j < n; j += 32, sums += 32) {
    const __m256i evens = rounded(_mm512_load_ps(sums)), odds = rounded(_mm512_load_ps(sums + 16));
    _mm512_mask_storeu_epi16(to + j, first32(n - j), paired(evens, odds));
  }
}

// Sums (32, 32) on their way to memory: they are rounded and stored a few rows at a time between the tile instructions
// of the next ones, which leave the vector units idle.
struct Result {
  float* sums = nullptr;
  bf16* to = nullptr;
  int64_t stride = 0, rows = 0, columns = 0;
  bool turned = false;          // to the transpose of C
  bf16* mirrored = nullptr;     // where the transpose goes as well, or null
  const bf16* added = nullptr;  // of these rows and columns, or null
  float scale = 1, added_scale = 0;
  const bf16* bias = nullptr;  // of these columns, or null
  bf16* activated = nullptr;   // where the activation's value goes, or null
  Activation activation = Activation::none;

  void store_rows(int64_t begin, int64_t end) const {
    end = std::min(end, rows);
    if (turned) {
      for (int64_t i = round_up(begin, 16); i < end; i += 16) store_columns(i, to);
      return;
    }
    const __mmask32 which = first32(columns);
    for (int64_t i = begin; i < end; ++i) {
      __m512 low = _mm512_load_ps(sums + 32 * i), high = _mm512_load_ps(sums + 32 * i + 16);
      if (bias) {
        low = _mm512_add_ps(low, load(bias, first(columns)));
        high = _mm512_add_ps(high, load(bias + 16, first(columns - 16)));
      }
      if (added) {
        const __m512 by = _mm512_set1_ps(scale), added_by = _mm512_set1_ps(added_scale);
        low = _mm512_fmadd_ps(low, by, _mm512_mul_ps(load(added + i * stride, first(columns)), added_by));
        high = _mm512_fmadd_ps(high, by, _mm512_mul_ps(load(added + i * stride + 16, first(columns - 16)), added_by));
      }
      store(to + i * stride, low, high, which);
      if (activated)
        store(activated + i * stride, ::activated(low, activation), ::activated(high, activation), which);
      if (mirrored) {
        _mm512_store_ps(sums + 32 * i, low);
        _mm512_store_ps(sums + 32 * i + 16, high);
        if (i % 16 == 15 || i == rows - 1) store_columns(i / 16 * 16, mirrored);
      }
    }
  }
  void store_columns(int64_t i, bf16* to) const {  // of rows [i, i + 16)
    for (int64_t j = 0; j < columns; j += 16) {
      __m512i r[16];
      for (int64_t n = 0; n < 16; ++n) r[n] = _mm512_load_si512(sums + 32 * (i + n) + j);
      transpose16(r);
      for (int64_t n = 0; n < std::min<int64_t>(16, columns - j); ++n)
        store(to + (j + n) * stride + i, (__m512)r[n], first(rows - i));
    }
  }
  void fetch_rows(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < std::min(end, turned ? columns : rows); ++i) __builtin_prefetch(to + i * stride, 1);
  }
};

// now.sums = or += `steps` packed steps of both operands, while `before` is stored. The left
// strip is read again for every column and stays in the first-level cache: the right one's loads pass that by.
inline void square(int64_t steps, const bf16* a, const bf16* b, bool add, const Result& now, const Result& before) {
  const int64_t share = (32 + steps - 1) / steps;
  load_sums(now.sums, 32, !add);
  for (int64_t k = 0; k < steps; ++k, a += kStep, b += kStep) {
    _tile_loadd(4, a, 64);
    _tile_stream_loadd(6, b, 64);
    _tile_stream_loadd(7, b + kStep / 2, 64);
    _tile_loadd(5, a + kStep / 2, 64);
    add_products();
    before.store_rows(k * share, (k + 1) * share);
    now.fetch_rows(k * share, (k + 1) * share);
  }
  store_sums(now.sums, 32);
}

// What else comes of a product C.
struct Extras {
  bool turned = false;         // C is stored as its transpose
  bf16* sums = nullptr;        // over the depth, (M) of a turned A; (N) of B where C is turned; or null
  const bf16* bias = nullptr;  // (N), added to C, or null
  bf16* activated = nullptr;   // (M, N), the activation of C, or null
  Activation activation = Activation::none;
  bool symmetric = false;       // C is: half of it is computed
  const bf16* added = nullptr;  // (M, N): C = scale A B + added_scale added; or null
  float scale = 1, added_scale = 0;
};

// C (M, N), dense, = A (M, K) B (K, N).
void gemm(int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b, bf16* c, const Extras& extras,
          int64_t threads) {
  const int64_t steps = round_up(K, 32) / 32, panels = round_up(N, 32) / 32;
  const Blocks& sizes = steps <= kOnePass.depth ? kOnePass : kPasses;
  const int64_t passes = (steps + sizes.depth - 1) / sizes.depth, most = (steps + passes - 1) / passes;
  const int64_t blocks = round_up((M + sizes.rows - 1) / sizes.rows, threads);  // as many for every thread
  const int64_t block = std::max<int64_t>(round_up((M + blocks - 1) / blocks, 32), 32);
  const int64_t group = std::min(panels, sizes.columns / 32);
  const int64_t width = std::min<int64_t>(round_up((N + threads - 1) / threads, 32), sizes.columns);
  bf16* const left_sums = extras.turned ? nullptr : extras.sums;
  bf16* const right_sums = extras.turned ? extras.sums : nullptr;
  Buffer<bf16> right(panels * steps * kStep);
#pragma omp parallel num_threads(threads)
  {
    FlushToZero flush;
    Tiles tiles;
    Strip strip(std::max({block, width, 32 * most}));
    Buffer<bf16> left(block / 32 * most * kStep);
    Buffer<float> sums(passes == 1 ? 2 * 1024 : block * group * 32);
    Buffer<float> totals(std::max(block, width));
    if (b.turned) {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t start = 0; start < steps; start += most) {
          const int64_t depth = std::min(most, steps - start);
          strip.fetch(b, N, K, 32 * p, 32 * start, 32 * depth);
          for (int64_t k = 0; k < depth; ++k) paired_columns(strip, 32 * k, right + (p * steps + start + k) * kStep);
        }
    } else {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < N; j += width) {
        std::fill_n(totals + 0, width, 0.0f);
        for (int64_t k = 0; k < steps; ++k) {
          strip.fetch(b, K, N, 32 * k, j, width);
          if (right_sums) add_rows(strip, width, totals);
          for (int64_t i = 0; i < std::min(width, 32 * panels - j); i += 32)
            paired_rows(strip, i, right + ((j + i) / 32 * steps + k) * kStep);
        }
        if (right_sums) store_row_sums(totals, std::min(width, N - j), right_sums + j);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t top = 0; top < M; top += block) {
      const int64_t squares = (std::min(block, M - top) + 31) / 32;
      std::fill_n(totals + 0, block, 0.0f);
      Result waiting;
      for (int64_t start = 0; start < panels; start += group)
        for (int64_t k = 0; k < steps; k += most) {
          const int64_t depth = std::min(most, steps - k);
          if (passes > 1 || start == 0) {
            if (a.turned) {
              for (int64_t s = 0; s < depth; ++s) {
                strip.fetch(a, K, M, 32 * (k + s), top, 32 * squares);
                if (left_sums && start == 0) add_rows(strip, 32 * squares, totals);
                for (int64_t m = 0; m < squares; ++m) columns(strip, 32 * m, left + (m * depth + s) * kStep);
              }
            } else {
              for (int64_t m = 0; m < squares; ++m) {
                strip.fetch(a, M, K, top + 32 * m, 32 * k, 32 * depth);
                for (int64_t s = 0; s < depth; ++s) rows(strip, 32 * s, left + (m * depth + s) * kStep);
              }
            }
          }
          int64_t index = 0;
          for (int64_t m = 0; m < squares; ++m)
            for (int64_t p = start; p < std::min(start + group, panels); ++p, ++index) {
              const int64_t i = top + 32 * m, j = 32 * p;
              if (extras.symmetric && j < i) continue;
              Result now{sums + 1024 * (passes == 1 ? index % 2 : index)};
              if (k + depth == steps)
                now = {now.sums,
                       extras.turned ? c + j * M + i : c + i * N + j,
                       extras.turned ? M : N,
                       std::min<int64_t>(32, M - i),
                       std::min<int64_t>(32, N - j),
                       extras.turned,
                       extras.symmetric && i < j ? c + j * N + i : nullptr,
                       extras.added ? extras.added + i * N + j : nullptr,
                       extras.scale,
                       extras.added_scale,
                       extras.bias ? extras.bias + j : nullptr,
                       extras.activated ? extras.activated + i * N + j : nullptr,
                       extras.activation};
              square(depth, left + m * depth * kStep, right + (p * steps + k) * kStep, k > 0, now, waiting);
              waiting = now;
            }
          waiting.store_rows(0, 32);
          waiting = {};
        }
      if (left_sums) store_row_sums(totals, std::min(block, M - top), left_sums + top);
    }
  }
}
