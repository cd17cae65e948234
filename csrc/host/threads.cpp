// The threads of a block as system threads, for the thread sanitizer, which reports a missing barrier as a race.
#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "block.h"

namespace apt::host {
namespace {

struct Block {
    std::barrier<> all, between;
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    std::unique_ptr<char[]> shared, exchanges;

    Block(int threads, int shared_bytes)
        : all(threads), between(threads), shared(new char[shared_bytes]),
          exchanges(new char[threads * 2 * kExchangeBytes]) {
        for (int i = 0; i < threads; i += 32) {
            warps.push_back(std::make_unique<std::barrier<>>(threads - i < 32 ? threads - i : 32));
        }
    }
};

Block* now;
thread_local int my_thread, my_block, my_exchanges;

}  // namespace

int thread() { return my_thread; }
int block() { return my_block; }
char* shared_memory() { return now->shared.get(); }
void meet_block() { now->all.arrive_and_wait(); }
void meet_warp() { now->warps[my_thread / 32]->arrive_and_wait(); }
char* next_exchange() {
    const int turn = my_exchanges++ % 2;
    return now->exchanges.get() + (my_thread / 32 * 2 + turn) * 32 * kExchangeBytes;
}

void run_blocks(int blocks, int threads, int shared, const std::function<void()>& kernel) {
    Block block(threads, shared);
    now = &block;
    auto run = [&](int index) {
        my_thread = index;
        my_exchanges = 0;
        for (my_block = 0; my_block < blocks; ++my_block) {
            block.between.arrive_and_wait();
            if (index == 0) {
                std::memset(block.shared.get(), 0xff, shared);
            }
            block.between.arrive_and_wait();
            kernel();
        }
    };
    std::vector<std::thread> all;
    for (int i = 0; i < threads; ++i) {
        all.emplace_back(run, i);
    }
    for (std::thread& thread : all) {
        thread.join();
    }
}

}  // namespace apt::host
