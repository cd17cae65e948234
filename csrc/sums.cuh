// Backward: gradients that are summed element by element: of a gate by query, of the bias, of indexed gate rows.
#pragma once

#include "gradients.cuh"

namespace apt {

// Along each dimension of the scores, how many tiles (heads, batch rows) one element of the result sums, and how many
// elements' tiles there are. The gate's is [B, T, M] beside the heads; the bias's has its own shape.
template <class C, bool GATE>
struct Summed {
    int columns, column_sums, rows, row_sums, heads, head_sums, batches, batch_sums;

    APT_DEVICE Summed(const Problem& p) {
        const int64_t* s = p.sums.stride;
        const int row_tiles = tiles_of(p.queries, C::ROWS), column_tiles = tiles_of(GATE ? p.length : p.keys, C::COLS);
        column_sums = !GATE && s[3] == 0 ? column_tiles : 1;
        row_sums = !GATE && s[2] == 0 ? row_tiles : 1;
        head_sums = GATE || s[1] == 0 ? int(p.heads) : 1;
        batch_sums = !GATE && s[0] == 0 ? int(p.batch) : 1;
        columns = column_tiles / column_sums;
        rows = row_tiles / row_sums;
        heads = int(p.heads) / head_sums;
        batches = int(p.batch) / batch_sums;
    }
    APT_DEVICE int blocks() const { return columns * rows * heads * batches; }
    APT_DEVICE int terms() const { return column_sums * row_sums * head_sums * batch_sums; }
};

// One tile of the gradient of a gate by query, a sum over heads, or of the bias, a sum over what it was broadcast along.
template <class T, int WIDTH, bool GATE>
APT_KERNEL((Cut<T, WIDTH, true>::THREADS)) summed_gradient(APT_PROBLEM p) {
    if constexpr (kRuns<T>) {
        using C = Cut<T, WIDTH, true>;
        constexpr int STRIDE = C::COLS + 1;
        static_assert(C::ROWS * STRIDE * int(sizeof(float)) <= C::SHARED, "the sum does not fit the tiles' memory");
        APT_SHARED(shared);
        T* const s_query = reinterpret_cast<T*>(shared);
        T* const s_grad = s_query + C::ROWS * C::STRIDE;
        T* const s_key = s_grad + C::ROWS * C::STRIDE;
        T* const s_value = s_key + C::COLS * C::STRIDE;
        float* const s_sum = reinterpret_cast<float*>(shared);
        const Lane lane;
        const Summed<C, GATE> summed(p);
        const int length = static_cast<int>(GATE ? p.length : p.keys);
        const int dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
        const bool tensors = has_mask_tensors(p);
        const int block_column = block_index() % summed.columns, block_row = block_index() / summed.columns % summed.rows;
        const int block_head = block_index() / summed.columns / summed.rows % summed.heads;
        const int block_batch = block_index() / summed.columns / summed.rows / summed.heads;
        float sum[C::TILES][4];
        clear(sum);
        for (int i = 0; i < summed.terms(); ++i) {
            int rest = i;
            const int first = (block_column + rest % summed.column_sums) * C::COLS;
            rest /= summed.column_sums;
            const int tile_row = (block_row + rest % summed.row_sums) * C::ROWS;
            rest /= summed.row_sums;
            const Place at(p, block_batch + rest / summed.head_sums, block_head + rest % summed.head_sums);
            if constexpr (!GATE) {
                const int last = (tile_row + C::ROWS < p.queries ? tile_row + C::ROWS : int(p.queries)) - 1;
                if (first >= end_key(p, at.base, last) || first + C::COLS <= first_key(p, at.base, tile_row)) {
                    continue;
                }
            }
            load_tile<C>(s_query, p.query, at.b, at.h, tile_row, C::ROWS, p.queries, dim);
            load_tile<C>(s_grad, p.grad_out, at.b, at.h, tile_row, C::ROWS, p.queries, value_dim);
            const int b = GATE ? 0 : at.b;
            load_tile<C>(s_key, GATE ? p.prefix_key : p.key, b, at.kv, first, C::COLS, length, dim);
            load_tile<C>(s_value, GATE ? p.prefix_value : p.value, b, at.kv, first, C::COLS, length, value_dim);
            commit_copies();
            wait_for_copies<0>();
            sync_block();
            const int row = tile_row + lane.warp * kWarpRows;
            if (row < p.queries) {
                const Query q[2] = {query_row<true>(p, at, row + lane.row), query_row<true>(p, at, row + lane.row + 8)};
                float c[C::TILES][4], r[C::TILES][4];
                multiply_both<C>(c, r, s_query, s_key, dim, s_grad, s_value, value_dim);
                APT_UNROLL
                for (int j = 0; j < C::TILES; ++j) {
                    APT_UNROLL
                    for (int e = 0; e < 4; ++e) {
                        const int n = first + 8 * j + lane.column + e % 2;
                        const Query& own = q[e / 2];
                        if constexpr (GATE) {
                            const float g = weight(p, at.b, own.t, n);
                            sum[j][e] += prefix_gradient(p, own, n, g, c[j][e], r[j][e]).dg;
                        } else {
                            sum[j][e] += token_gradient(p, at, own, n, c[j][e], r[j][e], true, tensors).dz;
                        }
                    }
                }
            }
            sync_block();
        }
        APT_UNROLL
        for (int j = 0; j < C::TILES; ++j) {
            APT_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int row = lane.warp * kWarpRows + lane.row + e / 2 * 8;
                s_sum[row * STRIDE + 8 * j + lane.column + e % 2] = sum[j][e];
            }
        }
        sync_block();
        // Each result sums its rows and columns of the tile in order; a gate has nothing left to sum.
        const int over_rows = !GATE && p.sums.stride[2] == 0 ? C::ROWS : 1;
        const int over_columns = !GATE && p.sums.stride[3] == 0 ? C::COLS : 1;
        const int rows = C::ROWS / over_rows, columns = C::COLS / over_columns;
        const int64_t* s = p.sums.stride;
        float* const out = reinterpret_cast<float*>(p.sums.data) + block_batch * s[0] + (GATE ? 0 : block_head * s[1]);
        for (int i = thread_index(); i < rows * columns; i += C::THREADS) {
            const int row = i / columns, column = i % columns;
            const int t = block_row * C::ROWS + row, n = block_column * C::COLS + column;
            float total = 0;
            for (int k = 0; k < over_rows * over_columns; ++k) {
                total += s_sum[(row + k / over_columns) * STRIDE + column + k % over_columns];
            }
            if (t < (over_rows > 1 ? 1 : p.queries) && n < (over_columns > 1 ? 1 : length)) {
                out[t * s[2] + n * s[3]] = total;
            }
        }
    }
}

constexpr int kRowThreads = 128;

// delta = sum(dO * O) - dL of one query and head; a warp each.
template <class T>
APT_KERNEL((kRowThreads)) row_deltas(APT_PROBLEM p) {
    const Lane lane;
    const int64_t row = int64_t(block_index()) * (kRowThreads / 32) + lane.warp;
    if (row >= p.batch * p.heads * p.queries) {
        return;
    }
    const int64_t t = row % p.queries, h = row / p.queries % p.heads, b = row / p.queries / p.heads;
    auto start = [&](const Array& a) {
        return reinterpret_cast<const T*>(a.data) + b * a.stride[0] + h * a.stride[1] + t * a.stride[2];
    };
    const T *out = start(p.out), *grad = start(p.grad_out);
    float sum = 0;
    for (int i = lane.lane; i < p.value_dim; i += 32) {
        sum += to_float(out[i]) * to_float(grad[i]);
    }
    for (int mask = 16; mask; mask /= 2) {
        sum += shuffle_xor(sum, mask);
    }
    if (lane.lane == 0) {
        if (p.grad_logsumexp.data) {
            sum -= reinterpret_cast<const float*>(p.grad_logsumexp.data)[row];
        }
        reinterpret_cast<float*>(p.delta.data)[row] = sum;
    }
}

// The gradient of gate row block / tiles: the sum, in order, of those of the rows [B, T or 1, M] in `delta` that picked
// it. `queries` is T or 1.
template <class Number>
APT_KERNEL((kRowThreads)) indexed_sum(APT_PROBLEM p) {
    const int tiles = tiles_of(p.length, kRowThreads);
    const int64_t g = block_index() / tiles;
    const int m = block_index() % tiles * kRowThreads + thread_index();
    const int64_t* index = reinterpret_cast<const int64_t*>(p.gate_index.data);
    const Number* rows = reinterpret_cast<const Number*>(p.delta.data);
    if (m >= p.length) {
        return;
    }
    Number sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t t = 0; t < p.queries; ++t) {
            if (index[b * p.gate_index.stride[2] + t * p.gate_index.stride[3]] == g) {
                sum += rows[b * p.delta.stride[1] + t * p.delta.stride[2] + m * p.delta.stride[3]];
            }
        }
    }
    reinterpret_cast<Number*>(p.sums.data)[g * p.sums.stride[2] + m * p.sums.stride[3]] = sum;
}

}  // namespace apt
