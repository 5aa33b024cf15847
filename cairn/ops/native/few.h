// Products of few rows with a large matrix, as when a text is generated. All time goes into reading the matrix: it is
// read once, as it lies, as the left operand of the transposed product.
#pragma once

#include "amx.h"

constexpr int64_t kFew = 32;  // rows at most

// Whether `few_rows` takes it. Fewer than 32 rows of a weight leave nothing to read ahead.
inline bool has_few_rows(int64_t M, int64_t N, int64_t K) { return M <= kFew && N >= 32 && K % 32 == 0; }

// c (M, N) = x (M, K) weight (N, K)^T + bias (N), which may be null.
void few_rows(int64_t M, int64_t N, int64_t K, const bf16* x, int64_t x_stride, const bf16* weight,
              int64_t weight_stride, const bf16* bias, bf16* c, int64_t threads) {
  Buffer<pair> right(K / 2 * kFew);  // x^T (K, 32), paired
  std::memset(right, 0, K / 2 * kFew * sizeof(pair));
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K / 2; ++k) std::memcpy(right + k * kFew + m, x + m * x_stride + 2 * k, sizeof(pair));
#pragma omp parallel num_threads(threads)
  {
    FlushToZero flush;
    Tiles tiles;
    Buffer<float> sums(32 * kFew);  // of 32 rows of the weight
#pragma omp for schedule(static)
    for (int64_t block = 0; block < N; block += 32) {
      const int64_t n = std::min(block, N - 32);  // the last block has rows of the one before
      for (int64_t i = 0; i < 32; ++i) {
        const __m512 start = _mm512_set1_ps(bias ? _mm512_cvtss_f32(load(bias + n + i, 1)) : 0.0f);
        _mm512_store_ps(sums + i * kFew, start);
        _mm512_store_ps(sums + i * kFew + 16, start);
      }
      product(32, kFew, K, weight + n * weight_stride, weight_stride, right, kFew, sums, kFew, true);
      for (int64_t half = 0; half < 32; half += 16)
        for (int64_t j = 0; j < M; j += 16) {
          __m512i r[16];
          for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_load_si512(sums + (half + i) * kFew + j);
          transpose16(r);
          for (int64_t m = j; m < std::min(M, j + 16); ++m) store(c + m * N + n + half, (__m512)r[m - j]);
        }
    }
  }
}
