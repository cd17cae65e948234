// The instances of the kernels, by element type and padded head size.
#pragma once

#include "problem.h"

namespace apt {

constexpr int kWidths[] = {64, 128, 256};

struct Tile {
    int rows, columns, shared;  // shared memory in bytes
};

// The tile sizes of a kernel of this instance.
template <class T, int WIDTH>
Tile tile(Kernel kernel);

// Launch a kernel of this instance; throws std::runtime_error where the device refuses it.
template <class T, int WIDTH>
void run(Kernel kernel, const Problem& problem, void* stream);

}  // namespace apt
