// What is done to each row of a tensor: norms, and the rotation of positions.
#pragma once

#include "amx.h"

struct Norm {
  int64_t n[3], D;
  float eps;
  int64_t centred;  // LayerNorm, else RMSNorm
  int64_t threads;

  int64_t rows() const { return n[0] * n[1] * n[2]; }
  bf16* at(const Rows& x, int64_t row) const {
    return x.at(row / (n[1] * n[2]), row / n[2] % n[1], row % n[2]);
  }
};

constexpr int64_t kRowsOfSum = 256;  // whose share in a gradient of the scale is added up first, whoever does it

// sum = x + branch, y = norm(sum) * scale + shift; without a branch there is no sum. Statistics (rows) are kept.
void norm_forward(const Norm& s, const Rows& x, const Rows& branch, const Rows& sum, const bf16* scale,
                  const bf16* shift, const Rows& y, float* mean, float* inverse) {
  const int64_t D = s.D, padded = round_up(D, 16);
#pragma omp parallel num_threads(s.threads)
  {
    FlushToZero flush;
    Buffer<float> row(padded);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.rows(); ++i) {
      const bf16* from = s.at(x, i);
      __m512 total = _mm512_setzero_ps();
      for (int64_t j = 0; j < D; j += 16) {
        const __mmask16 which = first(D - j);
        __m512 v = load(from + j, which);
        if (branch.data) {
          const __m256i both = rounded(_mm512_add_ps(v, load(s.at(branch, i) + j, which)));
          _mm256_mask_storeu_epi16(s.at(sum, i) + j, which, both);
          v = widened(both);
        }
        _mm512_store_ps(row + j, v);
        total = _mm512_add_ps(total, v);
      }
      const float centre = s.centred ? _mm512_reduce_add_ps(total) / D : 0;
      __m512 squares = _mm512_setzero_ps();
      for (int64_t j = 0; j < D; j += 16) {
        const __m512 v = _mm512_maskz_sub_ps(first(D - j), _mm512_load_ps(row + j), _mm512_set1_ps(centre));
        squares = _mm512_fmadd_ps(v, v, squares);
      }
      const float scaling = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / D + s.eps);
      mean[i] = centre, inverse[i] = scaling;
      bf16* to = s.at(y, i);
      for (int64_t j = 0; j < D; j += 16) {
        const __mmask16 which = first(D - j);
        __m512 v = _mm512_sub_ps(_mm512_load_ps(row + j), _mm512_set1_ps(centre));
        v = _mm512_mul_ps(v, _mm512_set1_ps(scaling));
        if (scale) v = _mm512_mul_ps(v, load(scale + j, which));
        if (shift) v = _mm512_add_ps(v, load(shift + j, which));
        store(to + j, v, which);
      }
    }
  }
}

// The gradient dx of the normed rows x from that of the result, plus `beside`, what x got from elsewhere (or null); and
// those of scale and shift (D), which may be null.
void norm_backward(const Norm& s, const Rows& x, const Rows& grad, const Rows& beside, const bf16* scale,
                   const float* mean, const float* inverse, const Rows& dx, bf16* dscale, bf16* dshift) {
  const int64_t D = s.D, padded = round_up(D, 16), pieces = (s.rows() + kRowsOfSum - 1) / kRowsOfSum;
  Buffer<float> sums(dscale ? 2 * pieces * padded : 16);
#pragma omp parallel num_threads(s.threads)
  {
    FlushToZero flush;
    Buffer<float> normed(padded), scaled(padded);
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      float *dw = sums + 2 * piece * padded, *db = dw + padded;
      if (dscale) std::memset(dw, 0, 2 * padded * 4);
      for (int64_t i = piece * kRowsOfSum; i < std::min((piece + 1) * kRowsOfSum, s.rows()); ++i) {
        const bf16 *from = s.at(x, i), *g = s.at(grad, i);
        const __m512 centre = _mm512_set1_ps(mean[i]), scaling = _mm512_set1_ps(inverse[i]);
        __m512 total = _mm512_setzero_ps(), product = _mm512_setzero_ps();
        for (int64_t j = 0; j < D; j += 16) {
          const __mmask16 which = first(D - j);
          const __m512 v = _mm512_maskz_mul_ps(which, _mm512_sub_ps(load(from + j, which), centre), scaling);
          __m512 h = load(g + j, which);
          if (dscale) {
            _mm512_store_ps(dw + j, _mm512_fmadd_ps(h, v, _mm512_load_ps(dw + j)));
            if (dshift) _mm512_store_ps(db + j, _mm512_add_ps(h, _mm512_load_ps(db + j)));
          }
          if (scale) h = _mm512_mul_ps(h, load(scale + j, which));
          _mm512_store_ps(normed + j, v);
          _mm512_store_ps(scaled + j, h);
          total = _mm512_add_ps(total, h);
          product = _mm512_fmadd_ps(h, v, product);
        }
        const __m512 offset = _mm512_set1_ps(s.centred ? _mm512_reduce_add_ps(total) / D : 0);
        const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(product) / D);
        bf16* to = s.at(dx, i);
        for (int64_t j = 0; j < D; j += 16) {
          const __mmask16 which = first(D - j);
          __m512 h = _mm512_sub_ps(_mm512_load_ps(scaled + j), offset);
          h = _mm512_mul_ps(_mm512_fnmadd_ps(_mm512_load_ps(normed + j), along, h), scaling);
          if (beside.data) h = _mm512_add_ps(h, load(s.at(beside, i) + j, which));
          store(to + j, h, which);
        }
      }
    }
  }
  if (!dscale) return;
  for (int64_t j = 0; j < D; j += 16) {
    __m512 dw = _mm512_setzero_ps(), db = _mm512_setzero_ps();
    for (int64_t piece = 0; piece < pieces; ++piece) {
      dw = _mm512_add_ps(dw, _mm512_load_ps(sums + 2 * piece * padded + j));
      if (dshift) db = _mm512_add_ps(db, _mm512_load_ps(sums + (2 * piece + 1) * padded + j));
    }
    store(dscale + j, dw, first(D - j));
    if (dshift) store(dshift + j, db, first(D - j));
  }
}

// Pairs (x[i], x[i + D / 2]) of x (B, H, T, D) turned by the angle whose cosine and sine (T, D / 2) are given; the
// other way round with `back`.
struct Turn {
  int64_t B, H, T, D, back, threads;
};

void rotate(const Turn& s, const Rows& x, const float* cosine, const float* sine, const Rows& y) {
  const int64_t half = s.D / 2;
#pragma omp parallel for collapse(2) num_threads(s.threads) schedule(static)
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t h = 0; h < s.H; ++h) {
        const bf16* from = x.at(b, h, t);
        bf16* to = y.at(b, h, t);
        for (int64_t j = 0; j < half; j += 16) {
          const __mmask16 which = first(half - j);
          const __m512 c = _mm512_maskz_loadu_ps(which, cosine + t * half + j);
          __m512 n = _mm512_maskz_loadu_ps(which, sine + t * half + j);
          if (s.back) n = _mm512_sub_ps(_mm512_setzero_ps(), n);
          const __m512 p = load(from + j, which), q = load(from + half + j, which);
          store(to + j, _mm512_fmsub_ps(p, c, _mm512_mul_ps(q, n)), which);
          store(to + half + j, _mm512_fmadd_ps(q, c, _mm512_mul_ps(p, n)), which);
        }
      }
}
