// Threads and scratch memory. The threads are PyTorch's own: `torch_parallel_for` of its stable C interface, handed over when the library is loaded.
#pragma once

#include <cstdint>
#include <cstdlib>

using Range = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range function, void* context);
extern ParallelFor parallel_for;

constexpr double WORTH = 2e6;  // arithmetic operations that make a thread worth waking: some 20 microseconds

// Calls body(begin, end) on parts of [0, count), in as many threads as PyTorch uses and the work is worth. each: arithmetic operations of one of count.
template <class Body>
void share(int64_t count, double each, Body body) {
  const double enough = WORTH / each;
  const int64_t grain = enough < 1 ? 1 : enough < double(count) ? int64_t(enough) + 1 : count;
  if (count > 0) parallel_for(0, count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

// Half-open range [begin, end) of `of` images, mapped to their rows or heads, of which every image has as many. {0, 1, 1} is everything.
struct Part {
  int64_t begin, end, of;
  int64_t first(int64_t count) const { return count * begin / of; }
  int64_t last(int64_t count) const { return count * end / of; }
};

// Memory that a thread keeps from call to call, aligned to a cache line.
inline float* scratch(size_t floats) {
  struct Block {
    float* at = nullptr;
    size_t size = 0;
    ~Block() { free(at); }
  };
  static thread_local Block block;
  if (block.size < floats) {
    free(block.at);
    block.size = (floats + 1023) / 1024 * 1024;
    block.at = static_cast<float*>(aligned_alloc(64, block.size * sizeof(float)));
    if (!block.at) abort();
  }
  return block.at;
}

// Such memory, given out part by part.
struct Room {
  float* rest;
  template <class T>
  T* take(int64_t numbers) {
    static_assert(sizeof(T) == sizeof(float));
    float* part = rest;
    rest += numbers;
    return reinterpret_cast<T*>(part);
  }
};
