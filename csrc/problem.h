// The kernels and their argument: one plain structure of tensors and numbers. Only this file defines the order of its
// fields; Python reads it from the library.
#pragma once

#include <cstdint>

#define APT_TENSORS(X)                                                                                              \
    X(query) X(key) X(value) X(prefix_key) X(prefix_value) X(gate) X(gate_index) X(layer_scale) X(sinks) X(bias)     \
    X(dense) X(key_padding) X(query_segments) X(key_segments) X(query_offset) X(seed) X(ranges) X(out)               \
    X(logsumexp) X(grad_out) X(grad_logsumexp) X(delta) X(grad_query) X(grad_key) X(grad_value) X(sums)
#define APT_INTEGERS(X)                                                                                             \
    X(batch) X(heads) X(group) X(queries) X(keys) X(length) X(head_dim) X(value_dim) X(offset) X(left) X(right)      \
    X(threshold) X(chunk) X(splits)
#define APT_REALS(X) X(scale) X(softcap) X(kept)
#define APT_KERNELS(X) X(forward) X(delta) X(query) X(key_value) X(prefix) X(gate) X(bias) X(index)

namespace apt {

// Element types of tensors; the numbers are those of torch's ScalarType.
enum Type : int32_t { kHalf = 5, kFloat = 6, kDouble = 7, kBFloat16 = 15 };

struct half_t {
    uint16_t bits;
};
struct bfloat_t {
    uint16_t bits;
};

// A tensor of up to four dimensions, aligned to the right: stride[3] is that of the last one. Strides count elements
// and are zero along dimensions of size one. `data` is null where the tensor is not given.
struct Array {
    char* data;
    int64_t stride[4];
    int32_t type;
    bool vectors;  // rows begin at multiples of 16 bytes
};

// The shapes are those of `Inputs` in apt_kernels/impl/inputs.py: `length` is the prefix's, `left` and `right` the
// window with 2^40 for open sides. `kept` is 1 / (1 - dropout_p). `ranges` holds, for every tile of queries or keys,
// the first and the end of what padding and segments let it see. `sums` holds partial sums over heads or tiles.
// `chunk` batch rows share one partial sum of the prefix's gradient, and `splits` divide the queries of one row.
struct Problem {
#define APT_FIELD(name) Array name;
    APT_TENSORS(APT_FIELD)
#undef APT_FIELD
#define APT_FIELD(name) int64_t name;
    APT_INTEGERS(APT_FIELD)
#undef APT_FIELD
#define APT_FIELD(name) float name;
    APT_REALS(APT_FIELD)
#undef APT_FIELD
};

enum class Kernel : int32_t {
#define APT_NAME(name) name,
    APT_KERNELS(APT_NAME)
#undef APT_NAME
};

}  // namespace apt
