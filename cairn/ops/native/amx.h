// Products of bf16 matrices on a core's AMX tiles, and the packing that they want.
//
// A tile holds 16 rows of 64 bytes. The right operand of a product comes "paired": a 32-bit word holds the bf16 of rows
// 2k and 2k + 1 of one column. All sizes here are multiples of 32, with zeros where the caller's data ends.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

using bf16 = uint16_t;
using pair = uint32_t;  // of bf16, of rows 2k (low half) and 2k + 1

constexpr int64_t kPiece = 1 << 14;  // numbers that a thread takes at once

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Asks the kernel for the tiles' registers; false where there are none.
inline bool request_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// While it lives, the calling thread takes numbers below 2^-126 as zero: with them, each operation takes a hundred times
// as long, and softmaxes and activations are full of them.
class FlushToZero {
 public:
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

// Holds the calling thread's tiles, all of 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t columns[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.columns[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// A cache-aligned array that lives as long as its owner.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(std::aligned_alloc(64, round_up(size * sizeof(T), 64)))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

struct Rows {  // a tensor of four dimensions, the last of which is dense; null where there is none
  bf16* data;
  int64_t stride[3];

  bf16* at(int64_t i, int64_t j, int64_t k) const { return data + i * stride[0] + j * stride[1] + k * stride[2]; }
};

inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 load(const bf16* from) { return widened(_mm256_loadu_si256((const __m256i*)from)); }  // 16 numbers
inline __m512 load(const bf16* from, __mmask16 which) { return widened(_mm256_maskz_loadu_epi16(which, from)); }
inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, rounded(x)); }
inline void store(bf16* to, __m512 x, __mmask16 which) { _mm256_mask_storeu_epi16(to, which, rounded(x)); }
inline __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1; }
inline __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }
inline void store(bf16* to, __m512 low, __m512 high, __mmask32 which) {  // 32 numbers
  _mm512_mask_storeu_epi16(to, which, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
inline __mmask16 within(int64_t low, int64_t high) { return first(high) & ~first(low); }  // lanes low <= i < high
inline __m512i paired(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// f(i, which) for every sixteen of n numbers from i on, those of `which`, on so many threads.
template <typename F>
void for_sixteens(int64_t n, int64_t threads, const F& f) {
#pragma omp parallel num_threads(threads)
  {
    FlushToZero flush;
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < n; begin += kPiece)
      for (int64_t i = begin; i < std::min(begin + kPiece, n); i += 16) f(i, first(n - i));
  }
}

// 2^x: polynomial of the fraction (relative error 1e-7), exponent set by scalef; nan stays nan.
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.32669704e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.67545975e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55074262e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40221218e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93146949e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.00000007f));
  return _mm512_scalef_ps(p, whole);
}

// rows x 16 words, transposed in registers: r[i] lane j becomes r[j] lane i.
inline void transpose16(__m512i r[16]) {
  alignas(64) static const auto index = [] {
    struct {
      int32_t of[4][2][16];
    } table;
    for (int round = 0; round < 4; ++round)
      for (int i = 0, s = 1 << round; i < 16; ++i) {
        table.of[round][0][i] = i & s ? 16 + i - s : i;
        table.of[round][1][i] = i & s ? 16 + i : i + s;
      }
    return table;
  }();
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    const int s = 1 << round;
    const __m512i low = _mm512_load_si512(index.of[round][0]), high = _mm512_load_si512(index.of[round][1]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & s) continue;
      const __m512i a = r[i], b = r[i + s];
      r[i] = _mm512_permutex2var_epi32(a, low, b);
      r[i + s] = _mm512_permutex2var_epi32(a, high, b);
    }
  }
}

// Sums (32, 32) from memory, or zero, into tiles 0 to 3, and back. Leading dimensions count elements (words of `pair`).
inline void load_sums(const float* c, int64_t ld, bool zero) {
  if (zero) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, c, ld * 4);
  _tile_loadd(1, c + 16, ld * 4);
  _tile_loadd(2, c + 16 * ld, ld * 4);
  _tile_loadd(3, c + 16 * ld + 16, ld * 4);
}
inline void store_sums(float* c, int64_t ld) {
  _tile_stored(0, c, ld * 4);
  _tile_stored(1, c + 16, ld * 4);
  _tile_stored(2, c + 16 * ld, ld * 4);
  _tile_stored(3, c + 16 * ld + 16, ld * 4);
}

// Adds the products of the left tiles 4 and 5 with the right ones, 6 and 7.
inline void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// C (M, N) fp32 = or += A (M, K) bf16 times B (K, N) paired.
inline void product(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t lda, const pair* B, int64_t ldb, float* C,
                    int64_t ldc, bool add) {
  for (int64_t n = 0; n < N; n += 32)
    for (int64_t m = 0; m < M; m += 32) {
      float* c = C + m * ldc + n;
      const bf16* a = A + m * lda;
      const pair* b = B + n;
      load_sums(c, ldc, !add);
      for (int64_t k = 0; k < K; k += 32, a += 32, b += 16 * ldb) {
        _tile_loadd(4, a, lda * 2);
        _tile_loadd(6, b, ldb * 4);
        _tile_loadd(7, b + 16, ldb * 4);
        _tile_loadd(5, a + 16 * lda, lda * 2);
        add_products();
      }
      store_sums(c, ldc);
    }
}
