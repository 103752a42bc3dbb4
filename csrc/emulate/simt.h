// A multiprocessor in miniature: runs one block of a CUDA kernel on the host, every CUDA thread a fiber of one host thread.
// Fibers give way to each other only where threads of a block must meet. Besides running the kernel it finds what a GPU would not tell:
//   - copies are carried out only when their thread waits for them, and shared memory starts as NaN, so a missing wait or barrier shows;
//   - a warp runs as far as it can before the next one does, in ascending or descending order, or for a random while, so a missing barrier, and a
//     result that depends on the order, show;
//   - shared addresses are checked for bounds and alignment, and bank conflicts are counted.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulate {

struct Copy {
    uint32_t to;
    unsigned char bytes[16];
};

// A place where `size` threads meet; the last to arrive performs `action`.
struct Meeting {
    int size, arrived = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    int id = 0;
    bool done = false;
    std::vector<Copy> uncommitted;
    std::deque<std::vector<Copy>> groups;
};

struct Counters {
    int64_t matrix_loads = 0, matrix_conflicts = 0;  // 8x8 matrices read; extra passes because rows shared a bank
    int64_t stores = 0, store_conflicts = 0;         // the same for a warp's 4-byte stores to shared memory
    int64_t products = 0;                            // m16n8k16
};

enum class Order { ascending, descending, shuffled };

class Block {
public:
    int head = 0, image = 0;
    Counters counters;
    std::string error;
    static constexpr uint32_t SHARED_START = 1024;  // as on the device: aligned, and not zero

    void run(int head, int image, int threads, int shared_bytes, Order order, const std::function<void()>& kernel);
    Fiber& me() { return fibers_[current_]; }
    void sync_block() { meet(block_meeting_, [] {}); }
    template <class Action>
    void meet(Meeting& meeting, Action action);
    Meeting& warp() { return warps_[me().id / 32]; }
    void*& slot(int lane) { return slots_[me().id / 32 * 32 + lane]; }  // where a lane leaves its operands for its warp
    unsigned char* shared(uint32_t address, int bytes);
    void fail(const std::string& what);

private:
    std::vector<Fiber> fibers_;
    std::vector<Meeting> warps_;
    std::vector<void*> slots_;
    std::vector<unsigned char> shared_;
    unsigned char sink_[16] = {};
    Meeting block_meeting_{0};
    ucontext_t scheduler_;
    int current_ = 0;
    bool progress_ = false;
    const std::function<void()>* kernel_ = nullptr;

    void yield() { swapcontext(&me().context, &scheduler_); }
    static void enter();
};

inline Block*& block() {
    static Block* running = nullptr;
    return running;
}

inline void Block::fail(const std::string& what) {
    if (error.empty()) error = what + " (image " + std::to_string(image) + ", head " + std::to_string(head) + ", thread " + std::to_string(me().id) + ")";
}

inline unsigned char* Block::shared(uint32_t address, int bytes) {
    if (address < SHARED_START || address - SHARED_START + bytes > shared_.size()) {
        fail("shared memory address " + std::to_string(int64_t(address) - SHARED_START) + " is outside of " + std::to_string(shared_.size()) + " bytes");
        return sink_;
    }
    if (address % bytes != 0) fail("shared memory address " + std::to_string(address) + " is not aligned to " + std::to_string(bytes));
    return shared_.data() + (address - SHARED_START);
}

template <class Action>
void Block::meet(Meeting& meeting, Action action) {
    const int generation = meeting.generation;
    if (++meeting.arrived == meeting.size) {
        action();
        meeting.arrived = 0;
        meeting.generation++;
        progress_ = true;
        return;
    }
    while (meeting.generation == generation) yield();
}

inline void Block::enter() {
    Block& b = *block();
    (*b.kernel_)();
    b.me().done = true;
    b.progress_ = true;
    // A thread that has ended no longer takes part in its block's barriers.
    if (--b.block_meeting_.size > 0 && b.block_meeting_.arrived == b.block_meeting_.size) {
        b.block_meeting_.arrived = 0;
        b.block_meeting_.generation++;
    }
    b.yield();
}

inline void Block::run(int head, int image, int threads, int shared_bytes, Order order, const std::function<void()>& kernel) {
    constexpr size_t STACK = 256 * 1024;
    constexpr int STUCK_SWEEPS = 200;  // shuffled sweeps can miss the one warp that could move
    block() = this;
    this->head = head;
    this->image = image;
    kernel_ = &kernel;
    fibers_.resize(threads);
    slots_.assign(threads, nullptr);
    warps_.assign(threads / 32, Meeting{32});
    block_meeting_ = Meeting{threads};
    shared_.assign(shared_bytes, 0xff);  // NaN in every format
    for (int i = 0; i < threads; i++) {
        Fiber& f = fibers_[i];
        f.id = i;
        f.done = false;
        f.uncommitted.clear();
        f.groups.clear();
        if (!f.stack) f.stack.reset(new unsigned char[STACK]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    uint32_t random = 12345u + head + 977u * image;
    bool moved = false;
    int stuck = 0;
    for (int alive = threads; alive > 0; moved = false) {
        for (int i = 0; i < threads / 32; i++) {
            random = random * 1664525u + 1013904223u;
            const int warp = order == Order::ascending ? i : order == Order::descending ? threads / 32 - 1 - i : (random >> 8) % (threads / 32);
            const int rounds = order == Order::shuffled ? 1 + (random >> 16) % 50 : 1 << 30;
            progress_ = true;
            for (int round = 0; round < rounds && progress_; round++) {
                progress_ = false;
                for (int lane = 0; lane < 32; lane++) {
                    current_ = 32 * warp + (order == Order::descending ? 31 - lane : lane);
                    if (me().done) continue;
                    swapcontext(&scheduler_, &me().context);
                    alive -= me().done;
                }
                moved |= progress_;
            }
        }
        if (alive > 0 && !moved && ++stuck > STUCK_SWEEPS) return fail("threads wait for others that never come");
        if (moved) stuck = 0;
    }
}

}  // namespace emulate
