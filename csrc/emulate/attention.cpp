// The attention kernels on the host: a C interface that tests call through ctypes. Compiled with -DSMI_EMULATE.
#include "../cuda/attention_launch.cuh"

namespace {

struct Outcome {
    emulate::Counters counters;
    std::string error;
} outcome;

smi::Room room{};  // of the device that is emulated

int run(smi::AttentionParams p, const smi::Launch& launch, emulate::Order order) {
    p.warps = launch.warps;
    p.spans = launch.spans;
    emulate::Block block;
    for (int image = 0; image < p.batch; image++)
        for (int head = 0; head < p.heads && block.error.empty(); head++)
            block.run(head, image, 32 * launch.warps, launch.bytes, order, [&] { launch.kernel(p); });
    outcome = {block.counters, block.error};
    return block.error.empty() ? 0 : 1;
}

// SMI_EMULATE_ONE_WIDTH compiles a single width, for tests that compile often.
template <class F>
auto with_width([[maybe_unused]] int width, F f) {
#ifdef SMI_EMULATE_ONE_WIDTH
    return f.template operator()<SMI_EMULATE_ONE_WIDTH>();
#else
    return smi::with_compiled_width(width, f);
#endif
}

}  // namespace

extern "C" {

void smi_room(int block, int multiprocessor) { room = {block, multiprocessor}; }

int smi_attention(const smi::AttentionParams* p, int backward, int order) {
    const smi::Launch launch = with_width(p->width, [&]<int BD>() { return smi::launch_of<BD>(*p, backward, room); });
    return run(*p, launch, static_cast<emulate::Order>(order));
}
int smi_most_tokens(int width) {
    return with_width(width, []<int BD>() { return smi::most_tokens(BD); });
}
int smi_shared_bytes(int tokens, int width, int backward) {
    smi::AttentionParams p{};
    p.tokens = tokens;
    return with_width(width, [&]<int BD>() { return smi::launch_of<BD>(p, backward, room).bytes; });
}
const char* smi_error() { return outcome.error.c_str(); }
const emulate::Counters* smi_counters() { return &outcome.counters; }

}
