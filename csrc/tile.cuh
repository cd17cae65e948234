// Tiles in shared memory, and their products.
//
// A warp owns 16 rows of a product. Its accumulators have the tensor cores' layout, for every type: element e of
// column tile j, at row lane / 4 + 8 * (e / 2), column 8 * j + 2 * (lane % 4) + e % 2.
#pragma once

#include "scores.cuh"

namespace apt {

constexpr int kWarpRows = 16;

// Tile sizes: a block owns ROWS rows and iterates over COLS columns at a time; all fit into the 64 KiB of 7.5.
template <class T, int WIDTH, bool BACKWARD>
struct Cut {
    static constexpr int BYTES = WIDTH * int(sizeof(T));
    static constexpr int HEAD = WIDTH;
    static constexpr bool HALF = sizeof(T) == 2;
    static constexpr int ROWS = BACKWARD ? (BYTES <= 256 ? 64 : BYTES == 512 ? 32 : 16) : (BYTES <= 512 ? 64 : 32);
    static constexpr int COLS = HALF ? (WIDTH == 64 ? 64 : WIDTH == 128 ? (BACKWARD ? 32 : 64) : 16)
                                     : (WIDTH == 64 ? 32 : WIDTH == 128 ? 16 : 8);
    static constexpr int WARPS = ROWS / kWarpRows;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int TILES = COLS / 8;
    static constexpr int VECTOR = 16 / int(sizeof(T));
    // Sixteen bytes more than a row: the rows of an 8x8 tile then lie in different banks.
    static constexpr int STRIDE = WIDTH + VECTOR;
    // float32 passes probabilities to the second product through shared memory, 16-bit types in registers.
    static constexpr int SCRATCH_STRIDE = COLS + 4;
    static constexpr int SCRATCH = HALF ? 0 : kWarpRows * SCRATCH_STRIDE;
    static constexpr int OWNED = BACKWARD ? 2 : 1;
    static constexpr int SHARED =
        (OWNED * ROWS + 2 * COLS) * STRIDE * int(sizeof(T)) + WARPS * SCRATCH * int(sizeof(float)) +
        COLS * (BACKWARD ? int(sizeof(Query)) : 3 * int(sizeof(float)));
    static_assert(SHARED <= 64 * 1024 - 2048, "a tile is too large for compute capability 7.5");
};

// The rows and columns of a thread in its warp's tile.
struct Lane {
    int warp, lane, row, column;
    APT_DEVICE Lane() : warp(thread_index() / 32), lane(thread_index() % 32), row(lane / 4), column(lane % 4 * 2) {}
};

APT_DEVICE float dot(float4 a, float4 b, float c) {
    c += a.x * b.x;
    c += a.y * b.y;
    c += a.z * b.z;
    return c + a.w * b.w;
}

// Load `rows` rows of a head from row `first`; zero past row `limit` and column `dim`, to the next multiple of 16.
template <class C, class T>
APT_DEVICE void load_tile(T* tile, const Array& from, int b, int h, int first, int rows, int limit, int dim) {
    constexpr int VECTORS = (C::STRIDE - C::VECTOR) / C::VECTOR;
    const T* source = reinterpret_cast<const T*>(from.data) + b * from.stride[0] + h * from.stride[1];
    const int width = (dim + 15) & ~15;
    for (int i = thread_index(); i < rows * VECTORS; i += C::THREADS) {
        const int row = i / VECTORS, column = i % VECTORS * C::VECTOR;
        if (column >= width) {
            continue;
        }
        T* to = tile + row * C::STRIDE + column;
        const T* at = source + (first + row) * from.stride[2] + column;
        if (first + row < limit && from.vectors && column + C::VECTOR <= dim) {
            copy_vector(to, at);
        } else {
            for (int e = 0; e < C::VECTOR; ++e) {
                to[e] = first + row < limit && column + e < dim ? at[e] : T{};
            }
        }
    }
}

// c += a b over sixteen inner elements; registers as load_matrices leaves them.
template <class T>
APT_DEVICE void multiply_step(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (by_eights<T>()) {
        multiply_k8<T>(c, a[0], a[1], b0);
        multiply_k8<T>(c, a[2], a[3], b1);
    } else {
        multiply_k16<T>(c, a, b0, b1);
    }
}

// Sixteen rows in shared memory, the left side of a warp's products.
template <class C, class T>
struct Rows {
    const T* rows;
    APT_DEVICE void load(uint32_t (&r)[4], int k) const {
        const Lane at;
        load_matrices(r, rows + at.lane % 16 * C::STRIDE + at.lane / 16 * 8 + k);
    }
};

// The same of a 16-bit type, held in registers.
template <class C, class T>
struct HeldRows {
    uint32_t held[C::HEAD / 16][4];
    APT_DEVICE HeldRows(const T* rows) {
        APT_UNROLL
        for (int k = 0; k < C::HEAD; k += 16) {
            Rows<C, T>{rows}.load(held[k / 16], k);
        }
    }
    APT_DEVICE void load(uint32_t (&r)[4], int k) const {
        APT_UNROLL
        for (int e = 0; e < 4; ++e) {
            r[e] = held[k / 16][e];
        }
    }
};

// c += a b^T: 16 rows of a, `Rows` or `HeldRows`, and 8 * TILES rows of b in shared memory, over `dim` columns: all of
// the instance if WHOLE.
template <class C, bool WHOLE = false, class Left, class T, int TILES>
APT_DEVICE void multiply_transposed(float (&c)[TILES][4], const Left& left, const T* b, int dim) {
    const Lane at;
    if constexpr (C::HALF) {
        b += (at.lane % 8 + at.lane / 16 * 8) * C::STRIDE + at.lane / 8 % 2 * 8;
        auto step = [&](int k) {
            uint32_t ra[4];
            left.load(ra, k);
            APT_UNROLL
            for (int j = 0; j < TILES; j += 2) {
                uint32_t rb[4];
                load_matrices(rb, b + 8 * j * C::STRIDE + k);
                multiply_step<T>(c[j], ra, rb[0], rb[1]);
                multiply_step<T>(c[j + 1], ra, rb[2], rb[3]);
            }
        };
        if constexpr (WHOLE) {
            APT_UNROLL
            for (int k = 0; k < C::HEAD; k += 16) {
                step(k);
            }
        } else {
            for (int k = 0; k < dim; k += 16) {
                step(k);
            }
        }
    } else {
        const T* a = left.rows + at.row * C::STRIDE;
        b += at.column * C::STRIDE;
        APT_UNROLL_BY_TWO
        for (int k = 0; k < dim; k += 4) {
            const float4 upper = load_float4(a + k), lower = load_float4(a + 8 * C::STRIDE + k);
            APT_UNROLL
            for (int j = 0; j < TILES; ++j) {
                const float4 left = load_float4(b + 8 * j * C::STRIDE + k);
                const float4 right = load_float4(b + (8 * j + 1) * C::STRIDE + k);
                c[j][0] = dot(upper, left, c[j][0]);
                c[j][1] = dot(upper, right, c[j][1]);
                c[j][2] = dot(lower, left, c[j][2]);
                c[j][3] = dot(lower, right, c[j][3]);
            }
        }
    }
}

// c += a b: a is a product of this warp, in registers and rounded to T; b has 8 * TILES rows in shared memory, of which
// the first `dim` columns count. `scratch` belongs to the warp.
template <class C, class T, int TILES, int COLUMNS>
APT_DEVICE void multiply(float (&c)[COLUMNS][4], const float (&a)[TILES][4], const T* b, int dim, float* scratch) {
    const Lane at;
    if constexpr (C::HALF) {
        b += (at.lane % 8 + at.lane / 8 % 2 * 8) * C::STRIDE + at.lane / 16 * 8;
        APT_UNROLL
        for (int k = 0; k < TILES; k += 2) {
            const uint32_t ra[4] = {pack<T>(a[k][0], a[k][1]), pack<T>(a[k][2], a[k][3]),
                                    pack<T>(a[k + 1][0], a[k + 1][1]), pack<T>(a[k + 1][2], a[k + 1][3])};
            APT_UNROLL
            for (int j = 0; j < COLUMNS; j += 2) {
                if (8 * j < dim) {
                    uint32_t rb[4];
                    load_matrices_transposed(rb, b + 8 * k * C::STRIDE + 8 * j);
                    multiply_step<T>(c[j], ra, rb[0], rb[1]);
                    multiply_step<T>(c[j + 1], ra, rb[2], rb[3]);
                }
            }
        }
    } else {
        APT_UNROLL
        for (int j = 0; j < TILES; ++j) {
            APT_UNROLL
            for (int e = 0; e < 4; ++e) {
                scratch[(at.row + e / 2 * 8) * C::SCRATCH_STRIDE + 8 * j + at.column + e % 2] = a[j][e];
            }
        }
        sync_warp();
        const float* left = scratch + at.row * C::SCRATCH_STRIDE;
        APT_UNROLL_BY_TWO
        for (int k = 0; k < 8 * TILES; k += 4) {
            const float4 upper = load_float4(left + k), lower = load_float4(left + 8 * C::SCRATCH_STRIDE + k);
            const float rows[4][2] = {{upper.x, lower.x}, {upper.y, lower.y}, {upper.z, lower.z}, {upper.w, lower.w}};
            APT_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float* right = b + (k + i) * C::STRIDE + at.column;
                APT_UNROLL
                for (int j = 0; j < COLUMNS; ++j) {
                    if (8 * j < dim) {
                        const float2 pair = load_float2(right + 8 * j);
                        c[j][0] += rows[i][0] * pair.x;
                        c[j][1] += rows[i][0] * pair.y;
                        c[j][2] += rows[i][1] * pair.x;
                        c[j][3] += rows[i][1] * pair.y;
                    }
                }
            }
        }
        sync_warp();
    }
}

// Store 16 rows from row `first`, times `factor`, up to row `limit` and column `dim`; `column` is the first one's number.
template <class To, int COLUMNS>
APT_DEVICE void store_rows(const Array& to, int b, int h, int first, int limit, int column, int dim,
                           const float (&c)[COLUMNS][4], const float (&factor)[2]) {
    const Lane at;
    APT_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = first + at.row + 8 * half;
        if (row >= limit) {
            continue;
        }
        To* out = reinterpret_cast<To*>(to.data) + b * to.stride[0] + h * to.stride[1] + row * to.stride[2] + column;
        APT_UNROLL
        for (int j = 0; j < COLUMNS; ++j) {
            APT_UNROLL
            for (int e = 0; e < 2; ++e) {
                const int o = 8 * j + at.column + e;
                if (column + o < dim) {
                    out[o] = from_float<To>(c[j][2 * half + e] * factor[half]);
                }
            }
        }
    }
}

template <int COLUMNS>
APT_DEVICE void clear(float (&c)[COLUMNS][4]) {
    APT_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
        APT_UNROLL
        for (int e = 0; e < 4; ++e) {
            c[j][e] = 0;
        }
    }
}

template <int COLUMNS>
APT_DEVICE void multiply_rows(float (&c)[COLUMNS][4], const float (&factor)[2]) {
    APT_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
        APT_UNROLL
        for (int e = 0; e < 4; ++e) {
            c[j][e] *= factor[e / 2];
        }
    }
}

// The sum, or the largest, over the four lanes that share a row of a product.
APT_DEVICE float sum_over_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
APT_DEVICE float max_over_row(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

}  // namespace apt
