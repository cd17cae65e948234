// The threads of a block as fibers of one system thread: fast and deterministic, but races do not show.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "block.h"

namespace apt::host {
namespace {

constexpr size_t kStack = 256 * 1024;

// Threads that have arrived, and how often all of them did.
struct Meeting {
    int arrived = 0, times = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    int exchanges = 0;
    bool running = false;
};

struct Block {
    int index = 0, threads = 0, current = 0, running = 0, idle = 0;
    Meeting all;
    std::vector<Meeting> warps;
    std::vector<Fiber> fibers;
    std::unique_ptr<char[]> shared, exchanges;
    const std::function<void()>* kernel = nullptr;
    ucontext_t outside;
} now;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "apt_kernels: block %d, thread %d: %s\n", now.index, now.current, what);
    std::abort();
}

// Switch to the next fiber, or to the caller when all have ended.
void yield() {
    const int from = now.current;
    if (now.running == 0) {
        setcontext(&now.outside);
    }
    do {
        now.current = (now.current + 1) % now.threads;
    } while (!now.fibers[now.current].running);
    if (now.current != from) {
        swapcontext(&now.fibers[from].context, &now.fibers[now.current].context);
    }
}

void meet(Meeting& meeting, int members) {
    const int times = meeting.times;
    if (++meeting.arrived == members) {
        meeting.arrived = 0;
        ++meeting.times;
        now.idle = 0;
        return;
    }
    while (meeting.times == times) {
        if (++now.idle > 2 * now.threads + 2) {
            fail("threads wait for others that do not come");
        }
        yield();
    }
}

void body() {
    (*now.kernel)();
    now.fibers[now.current].running = false;
    --now.running;
    now.idle = 0;
    yield();
}

}  // namespace

int thread() { return now.current; }
int block() { return now.index; }
char* shared_memory() { return now.shared.get(); }
void meet_block() { meet(now.all, now.threads); }
void meet_warp() { meet(now.warps[now.current / 32], 32); }
char* next_exchange() {
    const int turn = now.fibers[now.current].exchanges++ % 2;
    return now.exchanges.get() + (now.current / 32 * 2 + turn) * 32 * kExchangeBytes;
}

void run_blocks(int blocks, int threads, int shared, const std::function<void()>& kernel) {
    now = Block{};
    now.threads = threads;
    now.kernel = &kernel;
    now.fibers = std::vector<Fiber>(threads);
    now.exchanges.reset(new char[threads * 2 * kExchangeBytes]);
    for (now.index = 0; now.index < blocks; ++now.index) {
        now.shared.reset(new char[shared]);
        std::memset(now.shared.get(), 0xff, shared);
        now.all = {};
        now.warps.assign((threads + 31) / 32, {});
        for (Fiber& fiber : now.fibers) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = nullptr;
            fiber.exchanges = 0;
            fiber.running = true;
            makecontext(&fiber.context, body, 0);
        }
        now.running = threads;
        now.current = 0;
        swapcontext(&now.outside, &now.fibers[0].context);
    }
    now = Block{};
}

}  // namespace apt::host
