// Products of large matrices. Both operands are laid out anew as whole tiles, in the order in which they are read: the
// right one once, for all threads; the left one a cache-sized block at a time, by the thread that works on it.
//
// A thread owns the rows of a block, and every sum is taken in the same order whatever their number.
#pragma once

#include "elementwise.h"

// What is read again and again fits a core's caches: 32 rows of the left operand the first, the columns the second.
constexpr int64_t kBlock = 256;         // rows of the left operand at once
constexpr int64_t kOnePass = 768 / 32;  // steps along the depth that are taken at once
constexpr int64_t kDepth = 512 / 32;    // and in each pass, where there are more
constexpr int64_t kColumns = 768;       // columns of the right operand at once
constexpr int64_t kStep = 1024;    // elements of two neighbouring tiles: what one step of 32 along the depth reads

struct Matrix {  // row-major, element (i, j) at data[i * stride + j]; `turned` means that its transpose is meant
  const bf16* data;
  int64_t stride;
  int64_t turned;
};

// 16 rows of 32 elements, zero outside (n rows, m columns) of what is there.
inline void left_tile(const bf16* from, int64_t stride, int64_t n, int64_t m, bf16* to) {
  const __mmask32 which = m >= 32 ? ~0u : m <= 0 ? 0 : (1u << m) - 1;
  for (int64_t i = 0; i < 16; ++i, to += 32)
    _mm512_store_si512(to, _mm512_maskz_loadu_epi16(i < n ? which : 0, from + i * stride));
}

// Pairs of rows: 16 words of (2i, 2i + 1) in each of 16 rows; from 32 rows of 16 elements.
inline void rows_as_pairs(const bf16* from, int64_t stride, int64_t n, int64_t m, __m512i r[16]) {
  const __mmask16 which = first(m);
  for (int64_t i = 0; i < 16; ++i) {
    const __m256i even = _mm256_maskz_loadu_epi16(2 * i < n ? which : 0, from + 2 * i * stride);
    const __m256i odd = _mm256_maskz_loadu_epi16(2 * i + 1 < n ? which : 0, from + (2 * i + 1) * stride);
    r[i] = paired(even, odd);
  }
}

// Rows [i, i + 32) and depth [k, k + 32) of a left operand (M, K) as two tiles; adds up 32 rows of a turned one.
inline void pack_left(const Matrix& a, int64_t M, int64_t K, int64_t i, int64_t k, bf16* to, float* row_sums) {
  for (int64_t half = 0; half < 2; ++half, i += 16, to += kStep / 2) {
    if (!a.turned) {
      left_tile(a.data + i * a.stride + k, a.stride, M - i, K - k, to);
      continue;
    }
    __m512i r[16];
    rows_as_pairs(a.data + k * a.stride + i, a.stride, K - k, M - i, r);
    if (row_sums) {
      __m512 sum = _mm512_load_ps(row_sums + 16 * half);
      for (int j = 0; j < 16; ++j) {
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(r[j], 16)));
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_and_si512(r[j], _mm512_set1_epi32(0xFFFF0000))));
      }
      _mm512_store_ps(row_sums + 16 * half, sum);
    }
    transpose16(r);
    for (int j = 0; j < 16; ++j) _mm512_store_si512(to + 32 * j, r[j]);
  }
}

// Depth [k, k + 32) and columns [j, j + 32) of a right operand (K, N) as two tiles.
inline void pack_right(const Matrix& b, int64_t K, int64_t N, int64_t k, int64_t j, bf16* to) {
  for (int64_t half = 0; half < 2; ++half, j += 16, to += kStep / 2) {
    __m512i r[16];
    if (b.turned) {
      alignas(64) bf16 rows[512];
      left_tile(b.data + j * b.stride + k, b.stride, N - j, K - k, rows);
      for (int n = 0; n < 16; ++n) r[n] = _mm512_load_si512(rows + 32 * n);
      transpose16(r);
    } else {
      rows_as_pairs(b.data + k * b.stride + j, b.stride, K - k, N - j, r);
    }
    for (int n = 0; n < 16; ++n) _mm512_store_si512(to + 32 * n, r[n]);
  }
}

// Sums (32, 32) on their way to memory: they are rounded and stored a few rows at a time between the tile instructions
// of the next ones, which leave the vector units idle.
struct Result {
  float* sums = nullptr;
  bf16* to = nullptr;
  int64_t stride = 0, rows = 0, columns = 0;
  const bf16* bias = nullptr;  // of these columns, or null
  bf16* activated = nullptr;   // where the activation's value goes, or null
  Activation activation = Activation::none;

  void store_rows(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < std::min(end, rows); ++i)
      for (int64_t j = 0; j < columns; j += 16) {
        __m512 x = _mm512_load_ps(sums + 32 * i + j);
        if (bias) x = _mm512_add_ps(x, load(bias + j, first(columns - j)));
        store(to + i * stride + j, x, first(columns - j));
        if (activated) store(activated + i * stride + j, ::activated(x, activation), first(columns - j));
      }
  }
  void fetch_rows(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < std::min(end, rows); ++i) __builtin_prefetch(to + i * stride, 1);
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

// What else comes of a product C; any of them may be null.
struct Extras {
  const bf16* bias = nullptr;  // (N), added to C
  bf16* activated = nullptr;   // (M, N), the activation of C
  Activation activation = Activation::none;
  bf16* row_sums = nullptr;  // (M), of a turned left operand
};

// C (M, N), rows dense, = A (M, K) B (K, N).
void gemm(int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b, bf16* c, const Extras& extras,
          int64_t threads) {
  bf16* const row_sums = extras.row_sums;
  const int64_t steps = round_up(K, 32) / 32, panels = round_up(N, 32) / 32;
  const int64_t passes = steps <= kOnePass ? 1 : (steps + kDepth - 1) / kDepth, most = (steps + passes - 1) / passes;
  const int64_t block = std::clamp<int64_t>(round_up((M + threads - 1) / threads, 32), 32, kBlock);
  const int64_t group = std::min(panels, kColumns / 32);
  Buffer<bf16> right(panels * steps * kStep);
#pragma omp parallel num_threads(threads)
  {
    FlushToZero flush;
    Tiles tiles;
    Buffer<bf16> left(block / 32 * most * kStep);
    Buffer<float> sums(passes == 1 ? 2 * 1024 : block * group * 32);
    // Either operand is read along its rows.
#pragma omp for schedule(static)
    for (int64_t outer = 0; outer < (b.turned ? panels : steps); ++outer)
      for (int64_t inner = 0; inner < (b.turned ? steps : panels); ++inner) {
        const int64_t p = b.turned ? outer : inner, k = b.turned ? inner : outer;
        pack_right(b, K, N, 32 * k, 32 * p, right + (p * steps + k) * kStep);
      }
#pragma omp for schedule(dynamic)
    for (int64_t top = 0; top < M; top += block) {
      const int64_t squares = (std::min(block, M - top) + 31) / 32;
      alignas(64) float totals[kBlock] = {};
      Result waiting;
      for (int64_t start = 0; start < panels; start += group)
        for (int64_t k = 0; k < steps; k += most) {
          const int64_t depth = std::min(most, steps - k);
          if (passes > 1 || start == 0)
            for (int64_t outer = 0; outer < (a.turned ? depth : squares); ++outer)
              for (int64_t inner = 0; inner < (a.turned ? squares : depth); ++inner) {
                const int64_t m = a.turned ? inner : outer, s = a.turned ? outer : inner;
                pack_left(a, M, K, top + 32 * m, 32 * (k + s), left + (m * depth + s) * kStep,
                          row_sums && start == 0 ? totals + 32 * m : nullptr);
              }
          int64_t index = 0;
          for (int64_t m = 0; m < squares; ++m)
            for (int64_t p = start; p < std::min(start + group, panels); ++p, ++index) {
              const int64_t i = top + 32 * m, j = 32 * p;
              Result now{sums + 1024 * (passes == 1 ? index % 2 : index)};
              if (k + depth == steps)
                now = {now.sums,
                       c + i * N + j,
                       N,
                       std::min<int64_t>(32, M - i),
                       std::min<int64_t>(32, N - j),
                       extras.bias ? extras.bias + j : nullptr,
                       extras.activated ? extras.activated + i * N + j : nullptr,
                       extras.activation};
              square(depth, left + m * depth * kStep, right + (p * steps + k) * kStep, k > 0, now, waiting);
              waiting = now;
            }
          waiting.store_rows(0, 32);
          waiting = {};
        }
      for (int64_t i = 0; row_sums && i < std::min(block, M - top); i += 16)
        store(row_sums + top + i, _mm512_load_ps(totals + i), first(M - top - i));
    }
  }
}
