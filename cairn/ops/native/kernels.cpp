// What Python calls, through ctypes. Sizes and strides count elements.
#include <cmath>

#include "adamw.h"
#include "attention.h"
#include "few.h"
#include "gemm.h"
#include "muon.h"
#include "rows.h"

extern "C" {

int cairn_request_tiles() { return request_tiles(); }

void cairn_attention_forward(const Shape* shape, const Rows* q, const Rows* k, const Rows* v, const int32_t* low,
                             const int32_t* high, const int64_t* seed, const Rows* out, float* lse) {
  attention_forward(*shape, *q, *k, *v, low, high, seed, *out, lse);
}

void cairn_attention_backward(const Shape* shape, const Rows* q, const Rows* k, const Rows* v, const int32_t* low,
                              const int32_t* high, const int64_t* seed, const Rows* out, const float* lse,
                              const Rows* grad, const Rows* dq, const Rows* dk, const Rows* dv) {
  attention_backward(*shape, *q, *k, *v, low, high, seed, *out, lse, *grad, *dq, *dk, *dv);
}

// c (M, N) = x (M, K) weight (N, K)^T + bias (N), and where it is wanted its activation. Bias and `activated` may be null.
void cairn_linear(int64_t M, int64_t N, int64_t K, const bf16* x, int64_t x_stride, const bf16* weight,
                  int64_t weight_stride, const bf16* bias, bf16* c, bf16* activated, int64_t activation,
                  int64_t threads) {
  if (!activated && has_few_rows(M, N, K)) few_rows(M, N, K, x, x_stride, weight, weight_stride, bias, c, threads);
  else gemm(M, N, K, {x, x_stride, 0}, {weight, weight_stride, 1}, c, {.bias = bias, .activated = activated, .activation = Activation(activation)},
            threads);
}

// The gradient (N, K) of a weight, and (N) of its bias if that is not null, from x (M, K) and the gradient (M, N) of the
// result. The smaller operand is on the right, which is read again and again.
void cairn_weight_gradient(int64_t M, int64_t N, int64_t K, const bf16* grad, int64_t grad_stride, const bf16* x,
                           int64_t x_stride, bf16* weight, bf16* bias, int64_t threads) {
  const Matrix turned_grad{grad, grad_stride, 1}, turned_x{x, x_stride, 1};
  if (N < K) gemm(K, N, M, turned_x, {grad, grad_stride, 0}, weight, {.turned = true, .sums = bias}, threads);
  else gemm(N, K, M, turned_grad, {x, x_stride, 0}, weight, {.sums = bias}, threads);
}

void cairn_activation_gradient(int64_t n, const bf16* grad, const bf16* x, bf16* to, int64_t activation,
                               int64_t threads) {
  activation_gradient(n, grad, x, to, Activation(activation), threads);
}

void cairn_cross_entropy(const CrossEntropy* shape, bf16* logits, const bf16* bias, const int64_t* labels, float* loss) {
  cross_entropy(*shape, logits, bias, labels, loss);
}

void cairn_norm_forward(const Norm* shape, const Rows* x, const Rows* branch, const Rows* sum, const bf16* scale,
                        const bf16* shift, const Rows* y, float* mean, float* inverse) {
  norm_forward(*shape, *x, *branch, *sum, scale, shift, *y, mean, inverse);
}

void cairn_norm_backward(const Norm* shape, const Rows* x, const Rows* grad, const Rows* beside, const bf16* scale,
                         const float* mean, const float* inverse, const Rows* dx, bf16* dscale, bf16* dshift) {
  norm_backward(*shape, *x, *grad, *beside, scale, mean, inverse, *dx, dscale, dshift);
}

void cairn_rotate(const Turn* shape, const Rows* x, const float* cosine, const float* sine, const Rows* y) {
  rotate(*shape, *x, cosine, sine, *y);
}

// Of gradients in bf16 where `half` is set, else in fp32.
void cairn_adamw(const AdamW* step, int64_t half, float* weight, const void* grad, float* mean, float* square,
                 bf16* copy) {
  if (half) adamw(*step, weight, static_cast<const bf16*>(grad), mean, square, copy);
  else adamw(*step, weight, static_cast<const float*>(grad), mean, square, copy);
}

void cairn_norm_of(int64_t n, int64_t half, const void* x, float* norm, int64_t threads) {
  *norm = half ? norm_of(n, static_cast<const bf16*>(x), threads) : norm_of(n, static_cast<const float*>(x), threads);
}

void cairn_muon(const Muon* step, const MuonMatrix* matrices) { muon(*step, matrices); }

void cairn_orthogonalise(int64_t rows, int64_t columns, int64_t steps, const float* update, float* result,
                         int64_t threads) {
  orthogonalised(rows, columns, steps, update, result, threads);
}
}
