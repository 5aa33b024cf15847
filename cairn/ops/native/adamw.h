// AdamW (arXiv 1711.05101) in one pass: clipping, the moments, the fp32 weight and its bf16 copy. Gradients are bf16 or fp32.
#pragma once

#include "amx.h"

inline __m512 load(const float* from, __mmask16 which) { return _mm512_maskz_loadu_ps(which, from); }

struct AdamW {
  int64_t n;
  float clip;  // what the gradient is multiplied by
  float lr, beta1, beta2, eps, weight_decay;
  float correction1, correction2;  // 1 - beta^t
  int64_t threads;
};

template <typename Gradient>
void adamw(const AdamW& s, float* weight, const Gradient* grad, float* mean, float* square, bf16* copy) {
  const __m512 clip = _mm512_set1_ps(s.clip), beta2 = _mm512_set1_ps(s.beta2), eps = _mm512_set1_ps(s.eps);
  const __m512 new1 = _mm512_set1_ps(1 - s.beta1), new2 = _mm512_set1_ps(1 - s.beta2);
  const __m512 kept = _mm512_set1_ps(1 - s.lr * s.weight_decay), step = _mm512_set1_ps(s.lr / s.correction1);
  const __m512 root = _mm512_set1_ps(std::sqrt(s.correction2));
  for_sixteens(s.n, s.threads, [&](int64_t i, __mmask16 which) {
    const __m512 g = _mm512_mul_ps(load(grad + i, which), clip);
    __m512 m = load(mean + i, which), v = load(square + i, which);
    m = _mm512_fmadd_ps(_mm512_sub_ps(g, m), new1, m);
    v = _mm512_fmadd_ps(v, beta2, _mm512_mul_ps(_mm512_mul_ps(g, g), new2));
    const __m512 size = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(v), root), eps);
    __m512 w = _mm512_mul_ps(load(weight + i, which), kept);
    w = _mm512_fnmadd_ps(step, _mm512_div_ps(m, size), w);
    _mm512_mask_storeu_ps(mean + i, which, m);
    _mm512_mask_storeu_ps(square + i, which, v);
    _mm512_mask_storeu_ps(weight + i, which, w);
    store(copy + i, w, which);
  });
}

// The 2-norm, whose sum is taken in the same order whatever the number of threads.
template <typename Gradient>
float norm_of(int64_t n, const Gradient* x, int64_t threads) {
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  Buffer<double> sums(pieces);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t end = std::min((piece + 1) * kPiece, n);
    __m512 sum[4] = {};
    for (int64_t i = piece * kPiece; i < end; i += 64)
      for (int64_t j = 0; j < 4; ++j) {
        const __m512 v = load(x + i + 16 * j, first(end - i - 16 * j));
        sum[j] = _mm512_fmadd_ps(v, v, sum[j]);
      }
    sums[piece] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
  }
  double total = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece];
  return std::sqrt(total);
}
