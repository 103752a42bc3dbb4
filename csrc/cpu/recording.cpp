// A recorded pass: each thread runs the whole recorded sequence of calls on its share of the batch, some images at a time. Nothing waits for the slowest
// thread between two operations, and what one leaves for the next is still in the core's own cache.
#include "parallel.h"
#include "product.h"

namespace {

struct Call {
  void (*run)(const void* params, Part part);
  const void* params;
};

}  // namespace

// tokens: of an image; cost: arithmetic operations of all calls for one image.
extern "C" void smi_run_recording(const Call* calls, int64_t count, int64_t images, int64_t tokens, double cost) {
  const int64_t together = 0 < tokens && tokens < ROWS ? (ROWS + tokens / 2) / tokens : 1;  // images of about as many rows as an operation passes over at a time
  share(images, cost, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += together) {
      const int64_t last = first + together < end ? first + together : end;
      for (int64_t i = 0; i < count; ++i) calls[i].run(calls[i].params, {first, last, images});
    }
  });
}
