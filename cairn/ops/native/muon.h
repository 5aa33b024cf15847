// Muon (Jordan and others 2024, kellerjordan.github.io/posts/muon). In a step each matrix is one thread's.
#pragma once

#include "adamw.h"
#include "gemm.h"

// x (R, C) = the update with its singular values brought to about 1: the quintic of Jordan and others, `steps` times over.
// The square products are symmetric, and only half of each is computed.
inline void orthogonalise(int64_t R, int64_t C, int64_t steps, const float* update, bf16* x, int64_t threads) {
  const bool wide = R <= C;
  const int64_t n = std::min(R, C), depth = std::max(R, C);
  const __m512 size = _mm512_set1_ps(norm_of(R * C, update, threads) + 1e-7f);
  for_sixteens(R * C, threads, [&](int64_t i, __mmask16 which) {
    store(x + i, _mm512_div_ps(load(update + i, which), size), which);
  });
  Buffer<bf16> gram(n * n), polynomial(n * n), other(R * C);
  bf16 *from = x, *to = other;
  for (int64_t step = 0; step < steps; ++step, std::swap(from, to)) {
    gemm(n, n, depth, {from, C, !wide}, {from, C, wide}, gram, {.symmetric = true}, threads);
    gemm(n, n, n, {gram, n, 0}, {gram, n, 0}, polynomial,
         {.symmetric = true, .added = gram, .scale = 2.0315f, .added_scale = -4.7750f}, threads);
    const Extras sum{.added = from, .added_scale = 3.4445f};
    if (wide) gemm(R, C, n, {polynomial, n, 0}, {from, C, 0}, to, sum, threads);
    else gemm(R, C, n, {from, C, 0}, {polynomial, n, 0}, to, sum, threads);
  }
  if (from != x) std::memcpy(x, from, R * C * sizeof(bf16));
}

// Tall matrices, whose outputs outnumber their inputs, take larger steps.
inline float reach(int64_t R, int64_t C) { return std::sqrt(std::max(1.0f, float(R) / C)); }

// The same in fp32, and as large as a step takes it.
inline void orthogonalised(int64_t R, int64_t C, int64_t steps, const float* update, float* result, int64_t threads) {
  Buffer<bf16> x(R * C);
  orthogonalise(R, C, steps, update, x, threads);
  const __m512 scale = _mm512_set1_ps(reach(R, C));
  for_sixteens(R * C, threads, [&](int64_t i, __mmask16 which) {
    _mm512_mask_storeu_ps(result + i, which, _mm512_mul_ps(load(x + i, which), scale));
  });
}

struct Muon {
  int64_t matrices;
  float clip;  // what the gradient is multiplied by
  float lr, momentum, weight_decay;
  int64_t steps, threads;
};

struct MuonMatrix {  // all dense; the gradient is bf16 where `half` is set, else fp32
  int64_t rows, columns, half;
  float* weight;
  const void* grad;
  float* momentum;
  bf16* copy;
};

template <typename Gradient>
void nesterov(const Muon& s, int64_t n, const Gradient* grad, float* momentum, float* update) {
  const __m512 clip = _mm512_set1_ps(s.clip), kept = _mm512_set1_ps(s.momentum), fresh = _mm512_set1_ps(1 - s.momentum);
  for_sixteens(n, 1, [&](int64_t i, __mmask16 which) {
    const __m512 g = _mm512_mul_ps(load(grad + i, which), clip);
    __m512 m = load(momentum + i, which);
    m = _mm512_fmadd_ps(_mm512_sub_ps(g, m), fresh, m);
    _mm512_mask_storeu_ps(momentum + i, which, m);
    _mm512_mask_storeu_ps(update + i, which, _mm512_fmadd_ps(_mm512_sub_ps(m, g), kept, g));
  });
}

inline void muon(const Muon& s, const MuonMatrix* matrices) {
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
  for (int64_t index = 0; index < s.matrices; ++index) {
    const MuonMatrix& matrix = matrices[index];
    const int64_t n = matrix.rows * matrix.columns;
    Buffer<float> update(n);
    Buffer<bf16> x(n);
    if (matrix.half) nesterov(s, n, static_cast<const bf16*>(matrix.grad), matrix.momentum, update);
    else nesterov(s, n, static_cast<const float*>(matrix.grad), matrix.momentum, update);
    orthogonalise(matrix.rows, matrix.columns, s.steps, update, x, 1);
    const __m512 kept = _mm512_set1_ps(1 - s.lr * s.weight_decay);
    const __m512 step = _mm512_set1_ps(s.lr * reach(matrix.rows, matrix.columns));
    for_sixteens(n, 1, [&](int64_t i, __mmask16 which) {
      const __m512 w = _mm512_mul_ps(load(matrix.weight + i, which), kept);
      const __m512 stepped = _mm512_fnmadd_ps(load(x + i, which), step, w);
      _mm512_mask_storeu_ps(matrix.weight + i, which, stepped);
      store(matrix.copy + i, stepped, which);
    });
  }
}
