// The instances of the kernels, by element type and padded head size.
#pragma once

#include "problem.h"

namespace apt {

constexpr int kWidths[] = {64, 128, 256};

struct Tile {
    int rows, columns, shared;  // shared memory in bytes
    int plain[2];               // that of the straight loops: before 8.0, and from then on
};

// The tile sizes of a kernel of this instance.
template <class T, int WIDTH>
Tile tile(Kernel kernel);

// The most bytes between rows of what straight loops read.
constexpr int64_t kFarthestRow = 0x7fffffff;

// Whether straight loops compute a kernel of a call: no soft-cap, dropout or mask tensor, heads as wide as the instance,
// rows at multiples of 16 bytes and at most `kFarthestRow` apart, gates whose columns are adjacent, and a positive scale,
// so that the largest product of a row gives its largest logit. Heads over 128 columns leave too few registers, and
// before 8.0 those over 64 with a gate for each query. dk and dv: from 8.0 on; of the prefix: up to 64 columns.
template <class T, int WIDTH>
bool is_plain(Kernel kernel, const Problem& problem);

// Launch a kernel of this instance; throws std::runtime_error where the device refuses it.
template <class T, int WIDTH>
void run(Kernel kernel, const Problem& problem, void* stream);

}  // namespace apt
