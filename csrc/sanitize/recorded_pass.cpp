// A recorded pass under ThreadSanitizer, in threads of its own: PyTorch's are not instrumented. bench/gates/sanitizers.py compiles this with cpu/.
//
// One block of a Vision Transformer, forward and backward, and the attention of a last block: recorded, run in one thread and in several, and twice at
// once from two threads of the caller. All give the same bits.
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "../cpu/attention.h"
#include "../cpu/parallel.h"

// As in the sources; kernels/ has them in Python.
struct Linear {
  const float *x, *packed, *bias, *residual, *gamma;
  float *slope, *y;
  int64_t m, k, n, ldx;
  int32_t epilogue, activation;
};
enum Epilogue : int32_t { NONE, RESIDUAL, ACTIVATION, DERIVATIVE, TIMES };
struct Norm {
  const float *x, *residual, *weight, *bias;
  float *s, *y, *mean, *rstd;
  const float *grad, *grad_s;
  float* found;
  int64_t m, d;
  float eps;
};
struct Cls {
  const float *q, *kv;
  int64_t stride[4];
  float *out, *row, *weights;
  const float *grad, *grad_row;
  float *dq, *dkv;
  int64_t batch, queries, tokens, heads, width;
  float scale;
};
struct Tokens {
  const float* from;
  float* to;
  int64_t batch, tokens, few, width;
};
struct Call {
  void (*run)(const void*, Part);
  const void* params;
};

extern "C" {
void smi_use_threads(ParallelFor);
int64_t smi_packed_numbers(int64_t k, int64_t n);
void smi_pack_float32(const float* from, int64_t row, int64_t column, const float* scale, int64_t k, int64_t n, float* packed);
void smi_linear_float32(const Linear*, Part);
void smi_layer_norm_forward_float32(const Norm*, Part);
void smi_layer_norm_backward_float32(const Norm*, Part);
void smi_attention_forward_float32(const AttentionParams*, Part);
void smi_attention_backward_float32(const AttentionParams*, Part);
void smi_cls_attention_forward_float32(const Cls*, Part);
void smi_cls_attention_backward_float32(const Cls*, Part);
void smi_take_tokens_float32(const Tokens*, Part);
void smi_add_tokens_float32(const Tokens*, Part);
void smi_run_recording(const Call* calls, int64_t count, int64_t images, int64_t tokens, double cost);
}

static int threads = 1;
static thread_local bool inside = false;  // as in PyTorch, what is shared out within a thread stays in it

static int32_t in_threads(int64_t begin, int64_t end, int64_t grain, Range function, void* context) {
  const int64_t most = (end - begin + grain - 1) / grain, count = inside ? 1 : most < threads ? most : threads;
  if (count <= 1) return function(begin, end, context), 0;
  std::vector<std::thread> running;
  for (int64_t i = 0; i < count; ++i)
    running.emplace_back([=] {
      inside = true;
      function(begin + (end - begin) * i / count, begin + (end - begin) * (i + 1) / count, context);
    });
  for (auto& each : running) each.join();
  return 0;
}

constexpr int64_t WIDTH = 16, HEADS = 3, D = WIDTH * HEADS, HIDDEN = 100, QUERIES = 2;

struct Block {
  int64_t images, tokens;
  std::mt19937 random{1};
  std::deque<std::vector<float>> memory;
  std::deque<Linear> linears;
  std::deque<Norm> norms;
  std::deque<AttentionParams> attentions;
  std::deque<Cls> last;
  std::deque<Tokens> moves;
  std::vector<Call> calls;
  std::vector<std::pair<float*, int64_t>> results;

  Block(int64_t images, int64_t tokens) : images(images), tokens(tokens) { record(); }

  float* numbers(int64_t count, bool drawn = false) {
    auto& made = memory.emplace_back(count);
    std::normal_distribution<float> normal(0, 0.3f);
    for (float& x : made) x = drawn ? normal(random) : 0;
    return made.data();
  }
  float* result(int64_t count) { return results.emplace_back(numbers(count), count).first; }
  template <class T>
  void call(void (*run)(const T*, Part), const T* params) {
    calls.push_back({reinterpret_cast<void (*)(const void*, Part)>(run), params});
  }

  struct Packed {
    const float *there, *back;
  };
  Packed matrix(int64_t k, int64_t n) {
    const float* w = numbers(k * n, true);
    float *there = numbers(smi_packed_numbers(k, n)), *back = numbers(smi_packed_numbers(n, k));
    smi_pack_float32(w, n, 1, nullptr, k, n, there);
    smi_pack_float32(w, 1, n, nullptr, n, k, back);
    return {there, back};
  }
  float* linear(const float* x, const float* packed, int64_t rows, int64_t k, int64_t n, Epilogue epilogue = NONE, const float* residual = nullptr,
                float* slope = nullptr) {
    float* y = result(rows * n);
    const float *bias = epilogue == TIMES ? nullptr : numbers(n, true), *gamma = epilogue == RESIDUAL ? numbers(n, true) : nullptr;
    linears.push_back({x, packed, bias, residual, gamma, slope, y, rows, k, n, k, epilogue, 0});
    call(smi_linear_float32, &linears.back());
    return y;
  }

  void record() {
    const int64_t rows = images * tokens;
    const float *x = numbers(rows * D, true), *grad = numbers(rows * D, true);
    const Packed qkv_w = matrix(D, 3 * D), proj_w = matrix(D, D), fc1 = matrix(D, HIDDEN), fc2 = matrix(HIDDEN, D), kv_w = matrix(D, 2 * D);
    Norm& norm = norms.emplace_back(
        Norm{x, nullptr, numbers(D, true), numbers(D, true), nullptr, result(rows * D), result(rows), result(rows), nullptr, nullptr, nullptr, rows, D, 1e-6f});
    call(smi_layer_norm_forward_float32, &norm);
    float* qkv = linear(norm.y, qkv_w.there, rows, D, 3 * D);
    AttentionParams& attention = attentions.emplace_back();
    attention.qkv = qkv;
    const int64_t stride[4] = {tokens * 3 * D, 3 * D, D, WIDTH};
    memcpy(attention.stride, stride, sizeof stride);
    attention.batch = images, attention.rows = attention.n = tokens, attention.heads = HEADS, attention.width = WIDTH, attention.scale = 0.25f;
    float* attended = result(rows * D);
    attention.out = attended, attention.lse = result(images * HEADS * tokens);
    call(smi_attention_forward_float32, &attention);
    float *mid = linear(attended, proj_w.there, rows, D, D, RESIDUAL, x), *slope = result(rows * HIDDEN);
    float* hidden = linear(mid, fc1.there, rows, D, HIDDEN, ACTIVATION, nullptr, slope);
    float* out = linear(hidden, fc2.there, rows, HIDDEN, D, RESIDUAL, mid);

    // The last block: queries of the first tokens alone.
    float *few = result(images * QUERIES * D), *kv = linear(out, kv_w.there, rows, D, 2 * D);
    call(smi_take_tokens_float32, &moves.emplace_back(Tokens{out, few, images, tokens, QUERIES, D}));
    Cls& cls = last.emplace_back(Cls{few, kv, {tokens * 2 * D, 2 * D, D, WIDTH}, result(images * QUERIES * D), result(images * tokens),
                                     result(images * HEADS * QUERIES * tokens), nullptr, nullptr, nullptr, nullptr, images, QUERIES, tokens, HEADS, WIDTH, 0.25f});
    call(smi_cls_attention_forward_float32, &cls);
    Cls& back = last.emplace_back(cls);
    back.grad = numbers(images * QUERIES * D, true), back.dq = result(images * QUERIES * D), back.dkv = result(rows * 2 * D);
    call(smi_cls_attention_backward_float32, &back);
    float* grad_out = linear(back.dkv, kv_w.back, rows, 2 * D, D);
    call(smi_add_tokens_float32, &moves.emplace_back(Tokens{back.dq, grad_out, images, tokens, QUERIES, D}));

    float* grad_hidden = linear(grad_out, fc2.back, rows, D, HIDDEN, TIMES, nullptr, slope);
    float* grad_mid = linear(grad_hidden, fc1.back, rows, HIDDEN, D);
    float* grad_attended = linear(grad_mid, proj_w.back, rows, D, D);
    AttentionParams& attention_back = attentions.emplace_back(attention);
    attention_back.grad = grad_attended, attention_back.dqkv = result(rows * 3 * D);
    call(smi_attention_backward_float32, &attention_back);
    Norm& norm_back = norms.emplace_back(norm);
    norm_back.grad = linear(static_cast<float*>(attention_back.dqkv), qkv_w.back, rows, 3 * D, D), norm_back.grad_s = grad, norm_back.found = result(rows * D);
    call(smi_layer_norm_backward_float32, &norm_back);
  }

  std::vector<float> run() {
    for (auto [at, count] : results) std::fill(at, at + count, NAN);
    smi_run_recording(calls.data(), int64_t(calls.size()), images, tokens, 1e8);
    std::vector<float> found;
    for (auto [at, count] : results) found.insert(found.end(), at, at + count);
    return found;
  }
};

static bool same(const std::vector<float>& a, const std::vector<float>& b) {
  bool numbers = true;
  for (float x : a) numbers &= x == x;
  return numbers && a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

int main() {
  smi_use_threads(in_threads);
  for (int64_t images : {1, 2, 5, 8})
    for (int64_t tokens : {1, 2, 7, 50, 99}) {
      if (tokens < QUERIES) continue;
      threads = 1;
      Block block(images, tokens), other(images, tokens);
      const std::vector<float> want = block.run();
      threads = 4;
      if (!same(block.run(), want)) return std::printf("%d images of %d tokens: other bits in four threads\n", int(images), int(tokens)), 1;
      std::vector<float> found[2];
      std::thread one([&] { found[0] = block.run(); }), two([&] { found[1] = other.run(); });
      one.join(), two.join();
      if (!same(found[0], want) || !same(found[1], want))
        return std::printf("%d images of %d tokens: other bits of two passes at once\n", int(images), int(tokens)), 1;
    }
  std::puts("the recorded pass gives the same bits in one thread and in four, alone and beside another");
}
