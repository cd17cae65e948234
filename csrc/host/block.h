// A block of threads on the host: where they are, and where they meet.
#pragma once

#include <functional>

namespace apt::host {

// Room for what one lane hands to its warp.
constexpr int kExchangeBytes = 64;

int thread();
int block();
char* shared_memory();

// Wait for every thread of the block, or of the warp. Threads that part at one of these end the process.
void meet_block();
void meet_warp();

// The warp's buffer for an exchange, `kExchangeBytes` a lane; two take turns, so one meeting an exchange is enough.
char* next_exchange();

// Run `kernel` in every thread of every block, block after block, each with `shared` bytes of memory that holds NaN.
void run_blocks(int blocks, int threads, int shared, const std::function<void()>& kernel);

}  // namespace apt::host
