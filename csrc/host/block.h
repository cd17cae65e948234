// A block of threads on the host: indices and barriers.
#pragma once

#include <functional>

namespace apt::host {

// Space for the data that one lane passes to its warp.
constexpr int kExchangeBytes = 64;

int thread();
int block();
char* shared_memory();

// Wait for every thread of the block, or of the warp. Threads that diverge at a barrier end the process.
void meet_block();
void meet_warp();

// The warp's buffer for an exchange, `kExchangeBytes` per lane; two alternate, so that one barrier each suffices.
char* next_exchange();

// Run `kernel` in every thread of every block, block after block, each with `shared` bytes of memory that holds NaN.
void run_blocks(int blocks, int threads, int shared, const std::function<void()>& kernel);

}  // namespace apt::host
