// The tiles of plain calls (`is_plain`): copies of them, their kinds, and the passes over those of one kind.
#pragma once

#include "forward.cuh"

namespace apt {

// The tiles of keys or values that a block copies from one head. Each thread copies the same vectors of every tile.
template <class C, class T>
struct Source {
    static constexpr int VECTORS = C::HEAD / C::VECTOR, ROWS = C::THREADS / VECTORS, STEPS = C::COLS / ROWS;
    static_assert(ROWS * VECTORS == C::THREADS, "a row of vectors is no divisor of the block");
    static_assert(STEPS * ROWS == C::COLS, "a tile is no multiple of the block's copies");

    const char* from;  // the first row of this thread
    int stride;        // in bytes
    T* to;
    int limit;
    Copy copies[STEPS];

    APT_DEVICE Source(T* tile, const Array& array, int b, int h, int64_t limit)
        : stride(static_cast<int>(array.stride[2]) * int(sizeof(T))) {
        const int row = thread_index() / VECTORS, column = thread_index() % VECTORS * C::VECTOR;
        const int64_t start = b * array.stride[0] + h * array.stride[1] + row * array.stride[2] + column;
        from = array.data + start * int64_t(sizeof(T));
        to = tile + row * C::STRIDE + column;
        this->limit = static_cast<int>(limit) - row;
    }
    // Start to copy the tile at row `first`, `stage` elements behind the first tile in shared memory. With CHECK, rows
    // past the limit become zero; they are not read.
    template <bool CHECK>
    APT_DEVICE void issue(int first, int stage = 0) {
        const char* at = from + int64_t(first) * stride;
        APT_UNROLL
        for (int k = 0; k < STEPS; ++k) {
            copies[k].issue(to + stage + k * ROWS * C::STRIDE, at, !CHECK || first + k * ROWS < limit);
            at += int64_t(ROWS) * stride;
        }
        commit_copies();
    }
    // The tile is in shared memory, for the other threads after a barrier.
    APT_DEVICE void complete(int stage = 0) {
        APT_UNROLL
        for (int k = 0; k < STEPS; ++k) {
            copies[k].complete(to + stage + k * ROWS * C::STRIDE);
        }
        wait_for_copies<0>();
    }
};

// The kinds of tiles. `prepare` runs before a barrier that precedes the others, `stage` counts the tiles that are in
// memory at once; `logits` returns the factor from c to base-2 logits; `weigh` multiplies by the gates.

// Tokens that all queries of the block see.
template <class C>
struct WholeTokens {
    static constexpr bool CHECK = false;
    float scale;
    APT_DEVICE void issue(int) {}
    APT_DEVICE void prepare(int, int = 0) {}
    APT_DEVICE float logits(float (&)[C::TILES][4], int) { return scale; }
    APT_DEVICE void weigh(float (&)[C::TILES][4]) {}
};

// Tokens at an edge of what causality and window show, or at the last key.
template <class C>
struct EdgeTokens : WholeTokens<C> {
    static constexpr bool CHECK = true;
    const Query (&q)[2];
    APT_DEVICE EdgeTokens(float scale, const Query (&q)[2]) : WholeTokens<C>{scale}, q(q) {}
    APT_DEVICE float logits(float (&c)[C::TILES][4], int first) {
        const Lane lane;
        APT_UNROLL
        for (int j = 0; j < C::TILES; ++j) {
            APT_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int n = first + 8 * j + lane.column + e % 2;
                c[j][e] = n >= q[e / 2].first && n < q[e / 2].end ? c[j][e] : -kInfinity;
            }
        }
        return this->scale;
    }
};

// Prefix columns whose gate is the same for all queries of a batch row. Each is computed once for the block: of column
// n, factor[n] from products to logits and weight[n] of the value; hidden[n] is -inf past the prefix.
template <class C>
struct RowGate {
    static constexpr bool CHECK = true;
    static constexpr int SIZE = 3 * C::COLS;
    const Problem& p;
    int b;
    float *columns, *factor;
    APT_DEVICE RowGate(const Problem& p, int b, float* columns) : p(p), b(b), columns(columns), factor(columns) {}
    APT_DEVICE void issue(int) {}
    APT_DEVICE float* hidden() { return factor + C::COLS; }
    APT_DEVICE float* weights() { return factor + 2 * C::COLS; }
    APT_DEVICE void prepare(int first, int stage = 0) {
        const int i = thread_index();
        factor = columns + stage * SIZE;
        static_assert(C::COLS <= C::THREADS, "a thread computes one column");
        if (i < C::COLS) {
            const float g = weight(p, b, 0, first + i);
            weights()[i] = g;
            factor[i] = g * p.scale * kLog2E;
            hidden()[i] = first + i < p.length ? 0 : -kInfinity;
        }
    }
    APT_DEVICE float logits(float (&c)[C::TILES][4], int) {
        const Lane lane;
        APT_UNROLL
        for (int j = 0; j < C::TILES; ++j) {
            const float2 f = load_float2(factor + 8 * j + lane.column), h = load_float2(hidden() + 8 * j + lane.column);
            c[j][0] = c[j][0] * f.x + h.x;
            c[j][1] = c[j][1] * f.y + h.y;
            c[j][2] = c[j][2] * f.x + h.x;
            c[j][3] = c[j][3] * f.y + h.y;
        }
        return 1;
    }
    APT_DEVICE void weigh(float (&c)[C::TILES][4]) {
        const Lane lane;
        APT_UNROLL
        for (int j = 0; j < C::TILES; ++j) {
            const float2 g = load_float2(weights() + 8 * j + lane.column);
            c[j][0] *= g.x;
            c[j][1] *= g.y;
            c[j][2] *= g.x;
            c[j][3] *= g.y;
        }
    }
};

// Prefix columns with a gate for each query; each is computed once.
template <class C>
struct QueryGate {
    static constexpr bool CHECK = true;
    const Problem& p;
    const float* rows[2];
    float lambda, g[C::TILES][4];
    APT_DEVICE QueryGate(const Problem& p, const Place& at, const Query (&q)[2]) : p(p), lambda(layer_scale(p)) {
        for (int i = 0; i < 2; ++i) {
            // Rows past the last query are not stored; they read the gate of the last one.
            rows[i] = gate_row(p, at.b, q[i].t < p.queries ? q[i].t : int(p.queries) - 1);
        }
    }
    APT_DEVICE void issue(int) {}
    APT_DEVICE void prepare(int, int = 0) {}
    APT_DEVICE float logits(float (&c)[C::TILES][4], int first) {
        const Lane lane;
        const int start = first + lane.column, left = static_cast<int>(p.length) - start;
        const float factor = p.scale * kLog2E;
        APT_UNROLL
        for (int j = 0; j < C::TILES; ++j) {
            APT_UNROLL
            for (int e = 0; e < 4; ++e) {
                const bool real = 8 * j + e % 2 < left;
                g[j][e] = lambda * sigmoid(real ? rows[e / 2][start + 8 * j + e % 2] : 0);
                c[j][e] = real ? c[j][e] * (g[j][e] * factor) : -kInfinity;
            }
        }
        return 1;
    }
    APT_DEVICE void weigh(float (&c)[C::TILES][4]) {
        APT_UNROLL
        for (int j = 0; j < C::TILES; ++j) {
            APT_UNROLL
            for (int e = 0; e < 4; ++e) {
                c[j][e] *= g[j][e];
            }
        }
    }
};

// Columns first .. end - 1 without those from `skip` to `resume`.
struct Span {
    int first, end, skip, resume;
    APT_DEVICE int start() const { return first == skip ? resume : first; }
    // The tile of `size` columns behind the one at column n.
    APT_DEVICE int after(int n, int size) const { return n + size == skip ? resume : n + size; }
};

// Before 8.0, where registers hold a tile on its way, wide heads leave none to hold gates: the host does not ask for it.
template <class C>
constexpr bool kTakesQueryGates = C::HEAD <= 64 || kAsynchronousCopies;

// Pass over the tiles that a tile of queries sees: those of the prefix, of tokens at an edge, and of whole tokens.
// `columns`: shared memory for the gates of a tile's columns.
template <class C, class Sum, class T>
APT_DEVICE void pass_all(Sum& sum, const Problem& p, const Place& at, int tile, const Query (&q)[2], T* s_key, T* s_value,
                         float* columns) {
    {
        Source<C, T> keys(s_key, p.prefix_key, 0, at.kv, p.length), values(s_value, p.prefix_value, 0, at.kv, p.length);
        const Span prefix{0, int(p.length), -1, -1};
        if (gate_per_query(p)) {
            if constexpr (kTakesQueryGates<C>) {
                sum.pass(prefix, keys, values, QueryGate<C>(p, at, q));
            }
        } else {
            sum.pass(prefix, keys, values, RowGate<C>(p, at.b, columns));
        }
    }
    const Walk<C> walk(p, at, tile);
    Source<C, T> keys(s_key, p.key, at.b, at.kv, p.keys), values(s_value, p.value, at.b, at.kv, p.keys);
    const float scale = p.scale * kLog2E;
    int whole = tiles_of(walk.whole, C::COLS) * C::COLS, end = walk.whole_end / C::COLS * C::COLS;
    whole = whole < end ? whole : end;
    sum.pass({walk.first, walk.end, whole, end}, keys, values, EdgeTokens<C>(scale, q));
    sum.pass({whole, end, -1, -1}, keys, values, WholeTokens<C>{scale});
}

}  // namespace apt
