// The operators, through torch's stable ABI: one library for every Python and every torch from 2.11 on. No symbol of
// torch's CUDA library is referenced, so that it loads beside a CPU build too.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"

#ifndef APT_LIBRARY
#define APT_LIBRARY apt_kernels_cuda
#endif

namespace {

using torch::stable::Tensor;

apt::Array as_array(const Tensor& tensor) {
    apt::Array array{};
    const int64_t dims = tensor.dim();
    if (dims > 4) {
        throw std::runtime_error("apt_kernels: a tensor has more than four dimensions");
    }
    array.data = static_cast<char*>(tensor.data_ptr());
    array.type = static_cast<int32_t>(tensor.scalar_type());
    const int64_t size = static_cast<int64_t>(tensor.element_size());
    array.vectors = reinterpret_cast<uintptr_t>(array.data) % 16 == 0;
    for (int64_t i = 0; i < dims; ++i) {
        const int64_t stride = tensor.size(i) == 1 ? 0 : tensor.stride(i);
        array.stride[4 - dims + i] = stride;
        array.vectors &= i == dims - 1 || stride * size % 16 == 0;
    }
    return array;
}

std::string fields() {
    return ""
#define APT_NAME(name) #name " "
        APT_TENSORS(APT_NAME) ";" APT_INTEGERS(APT_NAME) ";" APT_REALS(APT_NAME) ";" APT_KERNELS(APT_NAME)
#undef APT_NAME
        ;
}

apt::Problem as_problem(const std::vector<std::optional<Tensor>>& tensors, const std::vector<int64_t>& integers,
                        const std::vector<double>& reals) {
    apt::Problem problem{};
    size_t count = 0;
    auto expect = [](size_t have, size_t need, const char* what) {
        if (have != need) {
            throw std::runtime_error(std::string("apt_kernels: ") + what + ": has " + std::to_string(have) +
                                     ", needs " + std::to_string(need));
        }
    };
#define APT_ONE(name) +1
    expect(tensors.size(), APT_TENSORS(APT_ONE), "tensors");
    expect(integers.size(), APT_INTEGERS(APT_ONE), "integers");
    expect(reals.size(), APT_REALS(APT_ONE), "reals");
#undef APT_ONE
#define APT_TAKE(name)                              \
    if (tensors[count]) {                           \
        problem.name = as_array(*tensors[count]);   \
    }                                               \
    ++count;
    APT_TENSORS(APT_TAKE)
#undef APT_TAKE
    count = 0;
#define APT_TAKE(name) problem.name = integers[count++];
    APT_INTEGERS(APT_TAKE)
#undef APT_TAKE
    count = 0;
#define APT_TAKE(name) problem.name = static_cast<float>(reals[count++]);
    APT_REALS(APT_TAKE)
#undef APT_TAKE
    return problem;
}

// Call `function` with the type and padded width of an instance as compile-time values.
template <class Function>
auto with_instance(int64_t type, int64_t dim, Function function) {
    auto with_width = [&](auto zero) {
        using T = decltype(zero);
        if (dim <= 64) {
            return function.template operator()<T, 64>();
        }
        if (dim <= 128) {
            return function.template operator()<T, 128>();
        }
        return function.template operator()<T, 256>();
    };
    switch (type) {
        case apt::kFloat:
            return with_width(float{});
        case apt::kHalf:
            return with_width(apt::half_t{});
        case apt::kBFloat16:
            return with_width(apt::bfloat_t{});
    }
    throw std::runtime_error("apt_kernels: query needs float32, float16 or bfloat16");
}

void run_kernel(int64_t kernel, int64_t type, std::vector<std::optional<Tensor>> tensors, std::vector<int64_t> integers,
                std::vector<double> reals, int64_t stream) {
    const apt::Problem problem = as_problem(tensors, integers, reals);
    const int64_t dim = problem.head_dim > problem.value_dim ? problem.head_dim : problem.value_dim;
    with_instance(type, dim, [&]<class T, int WIDTH>() {
        apt::run<T, WIDTH>(static_cast<apt::Kernel>(kernel), problem, reinterpret_cast<void*>(stream));
    });
}

std::vector<int64_t> tile_of(int64_t kernel, int64_t type, int64_t dim) {
    return with_instance(type, dim, [&]<class T, int WIDTH>() {
        const apt::Tile tile = apt::tile<T, WIDTH>(static_cast<apt::Kernel>(kernel));
        return std::vector<int64_t>{tile.rows, tile.columns, tile.shared, tile.plain[0], tile.plain[1]};
    });
}

// Whether straight loops compute a kernel of a call.
bool is_plain(int64_t kernel, int64_t type, std::vector<std::optional<Tensor>> tensors, std::vector<int64_t> integers,
              std::vector<double> reals) {
    const apt::Problem problem = as_problem(tensors, integers, reals);
    const int64_t dim = problem.head_dim > problem.value_dim ? problem.head_dim : problem.value_dim;
    return with_instance(type, dim, [&]<class T, int WIDTH>() {
        return apt::is_plain<T, WIDTH>(static_cast<apt::Kernel>(kernel), problem);
    });
}

std::string architectures() { return APT_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY(APT_LIBRARY, m) {
    m.def("run(int kernel, int type, Tensor?[] tensors, int[] integers, float[] reals, int stream) -> ()");
    m.def("tile(int kernel, int type, int dim) -> int[]");
    m.def("is_plain(int kernel, int type, Tensor?[] tensors, int[] integers, float[] reals) -> bool");
    m.def("fields() -> str");
    m.def("architectures() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(APT_LIBRARY, CompositeExplicitAutograd, m) {
    m.impl("run", TORCH_BOX(&run_kernel));
    m.impl("tile", TORCH_BOX(&tile_of));
    m.impl("is_plain", TORCH_BOX(&is_plain));
    m.impl("fields", TORCH_BOX(&fields));
    m.impl("architectures", TORCH_BOX(&architectures));
}
