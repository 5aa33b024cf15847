// What is done to each number or row on its own: activations, and the softmax of the language-model loss.
#pragma once

#include "amx.h"

enum class Activation : int64_t { none, gelu, gelu_tanh, relu, relu2 };  // as in cairn/ops/activations.py

constexpr float kLog2E = 1.4426950408889634f;

// 1 / (1 + e^-x)
inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  x = _mm512_min_ps(_mm512_set1_ps(200.0f), _mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)));  // in this order nan stays nan
  return _mm512_div_ps(one, _mm512_add_ps(one, exp2(x)));
}

inline __m512 tanh(__m512 x) {
  return _mm512_fmsub_ps(sigmoid(_mm512_add_ps(x, x)), _mm512_set1_ps(2.0f), _mm512_set1_ps(1.0f));
}

// The normal distribution's Phi(x), by Abramowitz and Stegun 7.1.26 (error 1.5e-7), and its density.
inline void normal(__m512 x, __m512& cumulative, __m512& density) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 bell = exp2(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * kLog2E)));
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.3275911f * 0.70710678f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(p, t), bell), _mm512_set1_ps(0.5f));  // Phi(-|x|)
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  cumulative = _mm512_mask_mov_ps(_mm512_sub_ps(one, tail), negative, tail);
  density = _mm512_mul_ps(bell, _mm512_set1_ps(0.3989422804f));
}

constexpr float kTanh = 2 * 0.7978845608f, kCubic = 0.044715f;  // gelu_tanh is x sigmoid(kTanh (x + kCubic x^3))

inline __m512 activated(__m512 x, Activation kind) {
  const __m512 zero = _mm512_setzero_ps();
  switch (kind) {
    case Activation::none:
      return x;
    case Activation::gelu: {
      __m512 cumulative, density;
      normal(x, cumulative, density);
      return _mm512_mul_ps(x, cumulative);
    }
    case Activation::gelu_tanh: {
      const __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(kTanh * kCubic), _mm512_set1_ps(kTanh));
      return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(x, inner)));
    }
    case Activation::relu:
      return _mm512_max_ps(zero, x);
    case Activation::relu2: {
      const __m512 y = _mm512_max_ps(zero, x);
      return _mm512_mul_ps(y, y);
    }
  }
  __builtin_unreachable();
}

inline __m512 slope(__m512 x, Activation kind) {
  const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
  switch (kind) {
    case Activation::none:
      return one;
    case Activation::gelu: {
      __m512 cumulative, density;
      normal(x, cumulative, density);
      return _mm512_fmadd_ps(x, density, cumulative);
    }
    case Activation::gelu_tanh: {
      const __m512 square = _mm512_mul_ps(x, x);
      const __m512 inner = _mm512_fmadd_ps(square, _mm512_set1_ps(kTanh * kCubic), _mm512_set1_ps(kTanh));
      const __m512 steep = _mm512_fmadd_ps(square, _mm512_set1_ps(3 * kTanh * kCubic), _mm512_set1_ps(kTanh));
      const __m512 s = sigmoid(_mm512_mul_ps(x, inner));
      return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_mul_ps(x, steep), s), _mm512_sub_ps(one, s), s);
    }
    case Activation::relu:
      return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ), one);
    case Activation::relu2:
      return _mm512_max_ps(zero, _mm512_add_ps(x, x));
  }
  __builtin_unreachable();
}

// to = grad times the slope of the activation at x, n numbers.
void activation_gradient(int64_t n, const bf16* grad, const bf16* x, bf16* to, Activation kind, int64_t threads) {
  for_sixteens(n, threads, [&](int64_t i, __mmask16 which) {
    store(to + i, _mm512_mul_ps(load(grad + i, which), slope(load(x + i, which), kind)), which);
  });
}

struct CrossEntropy {
  int64_t rows, vocab, ignore;  // a label that means: no loss here
  float softcap;                // or 0
  int64_t train, threads;
};

// loss[i] = -log softmax(cap(logits[i] + bias))[labels[i]]; when training, logits become the gradient of the loss's sum.
void cross_entropy(const CrossEntropy& s, bf16* logits, const bf16* bias, const int64_t* labels, float* loss) {
  const int64_t V = s.vocab;
  const __m512 cap = _mm512_set1_ps(s.softcap), inverse_cap = _mm512_set1_ps(s.softcap ? 1 / s.softcap : 0);
#pragma omp parallel num_threads(s.threads)
  {
    FlushToZero flush;
    Buffer<float> z(round_up(V, 16)), slopes(s.softcap ? round_up(V, 16) : 16);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.rows; ++i) {
      bf16* row = logits + i * V;
      const bool real = labels[i] != s.ignore;
      if (!real) {
        loss[i] = 0;
        if (s.train) std::memset(row, 0, V * 2);
        continue;
      }
      __m512 top = _mm512_set1_ps(-INFINITY);
      for (int64_t j = 0; j < V; j += 16) {
        const __mmask16 which = first(V - j);
        __m512 x = load(row + j, which);
        if (bias) x = _mm512_add_ps(x, load(bias + j, which));
        if (s.softcap) {
          const __m512 t = tanh(_mm512_mul_ps(x, inverse_cap));
          _mm512_store_ps(slopes + j, _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.0f)));
          x = _mm512_mul_ps(t, cap);
        }
        _mm512_store_ps(z + j, x);
        top = _mm512_mask_max_ps(top, which, top, x);
      }
      const float highest = _mm512_reduce_max_ps(top), target = z[labels[i]];
      const __m512 shift = _mm512_set1_ps(highest * kLog2E);
      __m512 total = _mm512_setzero_ps();
      for (int64_t j = 0; j < V; j += 16) {
        const __m512 e = exp2(_mm512_fmsub_ps(_mm512_load_ps(z + j), _mm512_set1_ps(kLog2E), shift));
        _mm512_store_ps(z + j, e);
        total = _mm512_mask_add_ps(total, first(V - j), total, e);
      }
      const float sum = _mm512_reduce_add_ps(total);
      loss[i] = std::log(sum) + highest - target;
      if (!s.train) continue;
      const __m512 scale = _mm512_set1_ps(1 / sum);
      z[labels[i]] -= sum;
      for (int64_t j = 0; j < V; j += 16) {
        __m512 g = _mm512_mul_ps(_mm512_load_ps(z + j), scale);
        if (s.softcap) g = _mm512_mul_ps(g, _mm512_load_ps(slopes + j));
        store(row + j, g, first(V - j));
      }
    }
  }
}
