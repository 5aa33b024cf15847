// softmax(q k^T / sqrt(D)) v and its gradient, for queries that each see one range of keys.
//
// As in FlashAttention-2 (arXiv 2307.08691) the probabilities are not kept but made again from each row's log-sum-exp;
// a row of scores fits a core's cache, so it is made whole. One thread works on one head: no sum depends on how many
// threads there are.
#pragma once

#include "elementwise.h"

constexpr int64_t kRows = 64;  // queries of a block

struct Shape {
  int64_t B, H, Hkv, T, S, D;
  int64_t range_stride;  // T where each sequence has its own ranges, else 0
  float scale;
  float dropout;  // of the probabilities
  int64_t threads;
};

// Drops probabilities by a hash of the seed, their row and their key, so that the backward pass finds the same ones.
class Dropout {
 public:
  Dropout(const int64_t* seed, float rate)
      : seed_(seed ? *seed : 0), least_(_mm512_set1_epi32(int32_t(uint32_t(rate * 4294967296.0)))), some_(seed != nullptr) {}

  void begin(uint64_t row) {  // splitmix64 (Steele, Lea and Flood, OOPSLA 2014)
    uint64_t z = seed_ + (row + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    z ^= z >> 31;
    low_ = _mm512_set1_epi32(int32_t(z)), high_ = _mm512_set1_epi32(int32_t(z >> 32));
  }
  // Which of sixteen keys from j on are kept in the row; the mixing is MurmurHash3's, of 32 bits.
  __mmask16 kept(int64_t j) const {
    if (!some_) return 0xFFFF;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i x = _mm512_xor_si512(_mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(j))), low_);
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(int32_t(0x85EBCA6B)));
    x = _mm512_add_epi32(x, high_);
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 13)), _mm512_set1_epi32(int32_t(0xC2B2AE35)));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    return _mm512_cmpge_epu32_mask(x, least_);
  }

 private:
  uint64_t seed_;
  __m512i least_, low_, high_;
  bool some_;
};

// Rows of a head into a dense, zero-padded matrix (rows, width). They lie far apart, where no hardware looks ahead.
inline void gather(const bf16* from, int64_t stride, int64_t n, int64_t D, int64_t rows, int64_t width, bf16* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; j += 32) {
      const __mmask32 which = i >= n || j >= D ? 0 : D - j >= 32 ? ~0u : (1u << (D - j)) - 1;
      _mm_prefetch(from + (i + 16) * stride + j, _MM_HINT_T0);
      _mm512_store_si512(to + i * width + j, _mm512_maskz_loadu_epi16(which, from + i * stride + j));
    }
}

// (rows, width) dense -> paired (rows / 2, width).
inline void pair_rows(const bf16* from, int64_t rows, int64_t width, pair* to) {
  for (int64_t i = 0; i < rows; i += 2, from += 2 * width, to += width)
    for (int64_t j = 0; j < width; j += 16)
      _mm512_store_si512(to + j, paired(_mm256_load_si256((const __m256i*)(from + j)),
                                        _mm256_load_si256((const __m256i*)(from + width + j))));
}

// (rows, columns) words -> (columns, rows), rows and columns multiples of 16.
inline void transpose(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* to, int64_t ldo) {
  __m512i r[16];
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16) {
      for (int k = 0; k < 16; ++k) r[k] = _mm512_loadu_si512(from + (i + k) * columns + j);
      transpose16(r);
      for (int k = 0; k < 16; ++k) _mm512_storeu_si512(to + (j + k) * ldo + i, r[k]);
    }
}

struct Span {  // keys of a block of queries, in multiples of 32
  int64_t start = 0, stop = 0;
  int64_t size() const { return stop - start; }
};

inline Span span(const int32_t* low, const int32_t* high, int64_t begin, int64_t end) {
  int64_t start = INT32_MAX, stop = 0;
  for (int64_t i = begin; i < end; ++i)
    if (low[i] < high[i]) start = std::min<int64_t>(start, low[i]), stop = std::max<int64_t>(stop, high[i]);
  if (stop == 0) return {};
  return {start / 32 * 32, round_up(stop, 32)};
}

// Tensors are (B, H, T, D); ranges (B or 1, T); the seed is of dropout, null without it.
void attention_forward(const Shape& s, const Rows& q, const Rows& k, const Rows& v, const int32_t* low, const int32_t* high, const int64_t* seed,
                       const Rows& out, float* lse) {
  const int64_t Sp = round_up(s.S, 32), Dp = round_up(s.D, 32), ld = Sp + 16, ldp = ld + 16;
  const __m512 c = _mm512_set1_ps(s.scale * kLog2E);
#pragma omp parallel num_threads(s.threads)
  {
    FlushToZero flush;
    Tiles tiles;
    Dropout dropout(seed, s.dropout);
    Buffer<bf16> dense(Sp * Dp), qb(kRows * Dp), p(kRows * ldp);
    Buffer<pair> kt(Dp / 2 * ld), vp(Sp / 2 * Dp);
    Buffer<float> scores(kRows * ld), o(kRows * Dp);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.B * s.H; ++task) {
      const int64_t b = task / s.H, h = task % s.H, hkv = h / (s.H / s.Hkv);
      const int32_t *lo = low + b * s.range_stride, *hi = high + b * s.range_stride;
      gather(k.at(b, hkv, 0), k.stride[2], s.S, s.D, Sp, Dp, dense);
      transpose((const uint32_t*)(bf16*)dense, Sp, Dp / 2, kt, ld);
      gather(v.at(b, hkv, 0), v.stride[2], s.S, s.D, Sp, Dp, dense);
      pair_rows(dense, Sp, Dp, vp);
      for (int64_t begin = 0; begin < s.T; begin += kRows) {
        const int64_t end = std::min(begin + kRows, s.T), rows = round_up(end - begin, 32);
        const Span keys = span(lo, hi, begin, end);
        gather(q.at(b, h, begin), q.stride[2], end - begin, s.D, rows, Dp, qb);
        product(rows, keys.size(), Dp, qb, Dp, kt + keys.start, ld, scores, ld, false);
        float inverse[kRows];
        for (int64_t i = 0; i < rows; ++i) {
          const bool real = begin + i < end;
          const int64_t l = real ? lo[begin + i] - keys.start : 0, u = real ? hi[begin + i] - keys.start : 0;
          const float* row = scores + i * ld;
          __m512 top = _mm512_set1_ps(-INFINITY);
          for (int64_t j = std::max<int64_t>(l, 0) / 16 * 16; j < u; j += 16) {
            const __mmask16 which = within(l - j, u - j);
            top = _mm512_mask_max_ps(top, which, top, _mm512_load_ps(row + j));
          }
          const float m = _mm512_reduce_max_ps(top) * s.scale * kLog2E;
          const __m512 shift = _mm512_set1_ps(m);
          __m512 total = _mm512_setzero_ps();
          dropout.begin((b * s.H + h) * s.T + begin + i);
          for (int64_t j = 0; j < keys.size(); j += 16) {
            const __mmask16 which = within(l - j, u - j);
            __m512 e = _mm512_setzero_ps();
            if (which) e = _mm512_maskz_mov_ps(which, exp2(_mm512_fmsub_ps(_mm512_load_ps(row + j), c, shift)));
            total = _mm512_add_ps(total, e);
            store(p + i * ldp + j, _mm512_maskz_mov_ps(dropout.kept(keys.start + j), e));
          }
          const float sum = _mm512_reduce_add_ps(total);
          inverse[i] = l < u ? 1 / (sum * (1 - s.dropout)) : 0;
          if (real) lse[(b * s.H + h) * s.T + begin + i] = l < u ? m + std::log2(sum) : INFINITY;
        }
        product(rows, Dp, keys.size(), p, ldp, vp + keys.start / 2 * Dp, Dp, o, Dp, false);
        for (int64_t i = 0; i < end - begin; ++i)
          for (int64_t j = 0; j < s.D; j += 16)
            store(out.at(b, h, begin + i) + j,
                  _mm512_mul_ps(_mm512_load_ps(o + i * Dp + j), _mm512_set1_ps(inverse[i])), first(s.D - j));
      }
    }
  }
}

void attention_backward(const Shape& s, const Rows& q, const Rows& k, const Rows& v, const int32_t* low, const int32_t* high, const int64_t* seed,
                        const Rows& out, const float* lse, const Rows& grad, const Rows& dq, const Rows& dk, const Rows& dv) {
  const int64_t Sp = round_up(s.S, 32), Dp = round_up(s.D, 32), ld = Sp + 16, ldr = kRows + 16, ldp = ld + 16;
  const __m512 c = _mm512_set1_ps(s.scale * kLog2E), raised = _mm512_set1_ps(1 / (1 - s.dropout));
#pragma omp parallel num_threads(s.threads)
  {
    FlushToZero flush;
    Tiles tiles;
    Dropout dropout[2]{{seed, s.dropout}, {seed, s.dropout}};  // of two rows
    Buffer<bf16> dense(Sp * Dp), qb(kRows * Dp), gb(kRows * Dp), ob(kRows * Dp), ds(kRows * ldp);
    Buffer<pair> kt(Dp / 2 * ld), vt(Dp / 2 * ld), kp(Sp / 2 * Dp), words(kRows / 2 * Dp);
    Buffer<pair> qt(Dp * ldr / 2), gt(Dp * ldr / 2), dsp(kRows / 2 * ld), pp(kRows / 2 * ld);
    Buffer<float> scores(kRows * ld), dp(kRows * ld), o(kRows * Dp), dkt(Dp * ld), dvt(Dp * ld);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.B * s.Hkv; ++task) {
      const int64_t b = task / s.Hkv, hkv = task % s.Hkv, groups = s.H / s.Hkv;
      const int32_t *lo = low + b * s.range_stride, *hi = high + b * s.range_stride;
      gather(v.at(b, hkv, 0), v.stride[2], s.S, s.D, Sp, Dp, dense);
      transpose((const uint32_t*)(bf16*)dense, Sp, Dp / 2, vt, ld);
      gather(k.at(b, hkv, 0), k.stride[2], s.S, s.D, Sp, Dp, dense);
      transpose((const uint32_t*)(bf16*)dense, Sp, Dp / 2, kt, ld);
      pair_rows(dense, Sp, Dp, kp);
      std::memset(dkt, 0, Dp * ld * 4);
      std::memset(dvt, 0, Dp * ld * 4);
      for (int64_t h = hkv * groups; h < (hkv + 1) * groups; ++h)
        for (int64_t begin = 0; begin < s.T; begin += kRows) {
          const int64_t end = std::min(begin + kRows, s.T), rows = round_up(end - begin, 32);
          const Span keys = span(lo, hi, begin, end);
          gather(q.at(b, h, begin), q.stride[2], end - begin, s.D, rows, Dp, qb);
          gather(grad.at(b, h, begin), grad.stride[2], end - begin, s.D, rows, Dp, gb);
          gather(out.at(b, h, begin), out.stride[2], end - begin, s.D, rows, Dp, ob);
          pair_rows(qb, rows, Dp, words);
          transpose(words, rows / 2, Dp, qt, ldr / 2);
          pair_rows(gb, rows, Dp, words);
          transpose(words, rows / 2, Dp, gt, ldr / 2);
          product(rows, keys.size(), Dp, qb, Dp, kt + keys.start, ld, scores, ld, false);
          product(rows, keys.size(), Dp, gb, Dp, vt + keys.start, ld, dp, ld, false);
          for (int64_t i = 0; i < rows; i += 2) {
            __m512 top[2], delta[2];
            int64_t l[2], u[2];
            for (int r = 0; r < 2; ++r) {
              const int64_t t = begin + i + r;
              const bool real = t < end;
              dropout[r].begin((b * s.H + h) * s.T + t);
              l[r] = real ? lo[t] - keys.start : 0, u[r] = real ? hi[t] - keys.start : 0;
              top[r] = _mm512_set1_ps(real ? lse[(b * s.H + h) * s.T + t] : INFINITY);
              __m512 dot = _mm512_setzero_ps();
              for (int64_t j = 0; j < Dp; j += 16)
                dot = _mm512_fmadd_ps(load(ob + (i + r) * Dp + j), load(gb + (i + r) * Dp + j), dot);
              delta[r] = _mm512_set1_ps(_mm512_reduce_add_ps(dot));
            }
            for (int64_t j = 0; j < keys.size(); j += 16) {
              __m256i probs[2], slopes[2];
              for (int r = 0; r < 2; ++r) {
                const __mmask16 which = within(l[r] - j, u[r] - j);
                const float* at = scores + (i + r) * ld + j;
                const __m512 e = _mm512_maskz_mov_ps(which, exp2(_mm512_fmsub_ps(_mm512_load_ps(at), c, top[r])));
                const __mmask16 kept = dropout[r].kept(keys.start + j);
                const __m512 passed = _mm512_maskz_mul_ps(kept, _mm512_load_ps(dp + (i + r) * ld + j), raised);
                const __m512 g = _mm512_sub_ps(passed, delta[r]);
                probs[r] = rounded(_mm512_maskz_mul_ps(kept, e, raised));
                slopes[r] = rounded(_mm512_mul_ps(_mm512_mul_ps(e, g), _mm512_set1_ps(s.scale)));
                _mm256_store_si256((__m256i*)(ds + (i + r) * ldp + j), slopes[r]);
              }
              _mm512_store_si512(pp + i / 2 * ld + j, paired(probs[0], probs[1]));
              _mm512_store_si512(dsp + i / 2 * ld + j, paired(slopes[0], slopes[1]));
            }
          }
          product(rows, Dp, keys.size(), ds, ldp, kp + keys.start / 2 * Dp, Dp, o, Dp, false);
          for (int64_t i = 0; i < end - begin; ++i)
            for (int64_t j = 0; j < s.D; j += 16)
              store(dq.at(b, h, begin + i) + j, _mm512_load_ps(o + i * Dp + j), first(s.D - j));
          product(Dp, keys.size(), rows, (const bf16*)(pair*)qt, ldr, dsp, ld, dkt + keys.start, ld, true);
          product(Dp, keys.size(), rows, (const bf16*)(pair*)gt, ldr, pp, ld, dvt + keys.start, ld, true);
        }
      for (const auto& [from, to] : {std::pair<float*, Rows>(dkt, dk), std::pair<float*, Rows>(dvt, dv)})
        for (int64_t i = 0; i < s.S; i += 16)
          for (int64_t j = 0; j < s.D; j += 16) {
            __m512i r[16];
            for (int n = 0; n < 16; ++n) r[n] = _mm512_loadu_si512(from + (j + n) * ld + i);
            transpose16(r);
            for (int n = 0; n < 16 && i + n < s.S; ++n)
              store(to.at(b, hkv, i + n) + j, _mm512_castsi512_ps(r[n]), first(s.D - j));
          }
    }
  }
}
