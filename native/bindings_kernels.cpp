// Python face of the row kernels: raw addresses, checked as far as numbers can be; `flashlm.rows.kernels` checks tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/run.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashlm {
namespace {

using std::size_t;

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

template <class T>
T* pointer(size_t address) {
    return reinterpret_cast<T*>(address);
}

DType checked_dtype(unsigned dtype) {
    require(dtype < NUM_DTYPES, "dtype must be 0 (bfloat16), 1 (float16) or 2 (float32)");
    return static_cast<DType>(dtype);
}

void check_tokens(size_t num_tokens) {
    if (num_tokens == 0 || num_tokens > MAX_TOKENS) {
        throw std::invalid_argument("num_tokens must be 1 to " + std::to_string(MAX_TOKENS) + ", got " +
                                    std::to_string(num_tokens));
    }
}

Rows checked_rows(DType dtype, size_t address, size_t num_rows, size_t row_stride_bytes, size_t part_offset_bytes,
                  size_t hidden_size, size_t slots_address) {
    const size_t part_bytes = hidden_size * (dtype == FP32 ? 4 : 2);
    require(hidden_size > 0, "hidden_size must be at least 1, got 0");
    require(address != 0 || num_rows == 0, "block_address is null");
    require(part_offset_bytes + part_bytes <= row_stride_bytes, "the part ends beyond the row stride");
    return {pointer<const unsigned char>(address + part_offset_bytes), row_stride_bytes,
            pointer<const std::uint32_t>(slots_address), num_rows, hidden_size};
}

void project(unsigned dtype, size_t block_address, size_t num_rows, size_t row_stride_bytes, size_t part_offset_bytes,
             size_t hidden_size, size_t x_address, size_t num_tokens, size_t out_address, size_t out_stride,
             size_t bias_address, size_t slots_address) {
    const DType type = checked_dtype(dtype);
    check_tokens(num_tokens);
    require(x_address != 0 && out_address != 0, "x_address or out_address is null");
    require(num_tokens == 1 || out_stride >= num_rows, "out_stride is less than num_rows");
    run_project(type, {checked_rows(type, block_address, num_rows, row_stride_bytes, part_offset_bytes, hidden_size,
                                    slots_address),
                       pointer<const float>(x_address), num_tokens, pointer<float>(out_address), out_stride,
                       pointer<const float>(bias_address)});
}

// A row of the table: address, num_rows, row_stride_bytes, hidden_size, x_address, out_address, out_stride, bias_address.
constexpr size_t TABLE_COLUMNS = 8;

void project_many(unsigned dtype, size_t table_address, size_t num_products, size_t num_tokens) {
    const DType type = checked_dtype(dtype);
    check_tokens(num_tokens);
    require(table_address != 0, "table_address is null");
    std::vector<ProjectArgs> products;
    products.reserve(num_products);
    for (size_t i = 0; i < num_products; ++i) {
        const auto* row = pointer<const std::uint64_t>(table_address) + i * TABLE_COLUMNS;
        require(row[4] != 0 && row[5] != 0, "x_address or out_address is null");
        require(num_tokens == 1 || row[6] >= row[1], "out_stride is less than num_rows");
        products.push_back({checked_rows(type, row[0], row[1], row[2], 0, row[3], 0), pointer<const float>(row[4]),
                            num_tokens, pointer<float>(row[5]), row[6], pointer<const float>(row[7])});
    }
    run_projects(type, products.data(), products.size());
}

// A row of the table: address, num_rows, row_stride_bytes, hidden_size, h_address, y_address.
constexpr size_t ACCUMULATE_COLUMNS = 6;

void accumulate_many(unsigned dtype, size_t table_address, size_t num_products, size_t num_tokens, size_t h_stride,
                     bool takes_zeros) {
    const DType type = checked_dtype(dtype);
    check_tokens(num_tokens);
    require(table_address != 0, "table_address is null");
    std::vector<AccumulateArgs> products;
    products.reserve(num_products);
    for (size_t i = 0; i < num_products; ++i) {
        const auto* row = pointer<const std::uint64_t>(table_address) + i * ACCUMULATE_COLUMNS;
        require(row[4] != 0 && row[5] != 0, "h_address or y_address is null");
        require(num_tokens == 1 || h_stride >= row[1], "h_stride is less than num_rows");
        products.push_back({checked_rows(type, row[0], row[1], row[2], 0, row[3], 0), pointer<const float>(row[4]),
                            h_stride, num_tokens, pointer<float>(row[5]), takes_zeros});
    }
    run_accumulates(type, products.data(), products.size());
}

void lstm_gates(size_t input_address, size_t context_address, size_t c_address, size_t h_next_address,
                size_t c_next_address, size_t batch, size_t size) {
    require(input_address && context_address && c_address && h_next_address && c_next_address, "an address is null");
    require(size > 0, "size must be at least 1, got 0");
    if (!batch) return;
    run_gates(FP32, {pointer<const void>(input_address), pointer<const float>(context_address),
                     pointer<const float>(c_address), nullptr, pointer<float>(h_next_address),
                     pointer<float>(c_next_address), nullptr, batch, size});
}

// On the calling thread: between two products of torch its threads spin on the cores that ours would want.
void lstm_forward(unsigned dtype, size_t gates_address, size_t c_address, size_t activations_address,
                  size_t h_next_address, size_t c_next_address, size_t h_low_address, size_t batch, size_t size) {
    const auto kernel = kernels().gates_forward[checked_dtype(dtype)];
    require(kernel, "dtype must be 0 (bfloat16) or 2 (float32)");
    require(gates_address && c_address && h_next_address && c_next_address, "an address is null");
    require(size > 0, "size must be at least 1, got 0");
    kernel({pointer<const void>(gates_address), nullptr, pointer<const float>(c_address),
            pointer<float>(activations_address), pointer<float>(h_next_address), pointer<float>(c_next_address),
            pointer<void>(h_low_address), batch, size},
           0, batch);
}

void lstm_backward(unsigned dtype, size_t activations_address, size_t c_address, size_t c_next_address,
                   size_t grad_h_address, size_t grad_h_next_address, size_t grad_c_address, size_t grad_gates_address,
                   size_t grad_c_before_address, size_t batch, size_t size) {
    const auto kernel = kernels().gates_backward[checked_dtype(dtype)];
    require(kernel, "dtype must be 0 (bfloat16) or 2 (float32)");
    require(activations_address && c_address && c_next_address && grad_h_address && grad_h_next_address &&
                grad_c_address && grad_gates_address && grad_c_before_address,
            "an address is null");
    require(size > 0, "size must be at least 1, got 0");
    kernel({pointer<const float>(activations_address), pointer<const float>(c_address),
            pointer<const float>(c_next_address), pointer<const float>(grad_h_address),
            pointer<const void>(grad_h_next_address), pointer<const float>(grad_c_address),
            pointer<void>(grad_gates_address), pointer<float>(grad_c_before_address), batch, size},
           0, batch);
}

void accumulate(unsigned dtype, size_t block_address, size_t num_rows, size_t row_stride_bytes, size_t part_offset_bytes,
                size_t hidden_size, size_t h_address, size_t h_stride, size_t num_tokens, size_t y_address,
                size_t slots_address) {
    const DType type = checked_dtype(dtype);
    check_tokens(num_tokens);
    require(h_address != 0 && y_address != 0, "h_address or y_address is null");
    require(num_tokens == 1 || h_stride >= num_rows, "h_stride is less than num_rows");
    run_accumulate(type, {checked_rows(type, block_address, num_rows, row_stride_bytes, part_offset_bytes, hidden_size,
                                       slots_address),
                          pointer<const float>(h_address), h_stride, num_tokens, pointer<float>(y_address)});
}

// x, weight and bias in one dtype as a resident layer has them, fp32 out; one call, where widening apart takes several.
void linear(unsigned dtype, size_t weight_address, size_t num_rows, size_t hidden_size, size_t x_address,
            size_t num_tokens, size_t out_address, size_t bias_address) {
    const DType type = checked_dtype(dtype);
    check_tokens(num_tokens);
    require(x_address != 0 && out_address != 0, "x_address or out_address is null");
    const auto widened = [type](size_t address, size_t count, size_t size, std::vector<float>& to) {
        if (to.size() < count * size) to.resize(count * size);
        const WidenArgs args{checked_rows(type, address, count, size * (type == FP32 ? 4 : 2), 0, size, 0), to.data()};
        kernels().widen[type](args, 0, count);
        return static_cast<const float*>(to.data());
    };
    static thread_local std::vector<float> wide_x, wide_bias;
    const float* x = widened(x_address, num_tokens, hidden_size, wide_x);
    const float* bias = bias_address && num_rows ? widened(bias_address, 1, num_rows, wide_bias) : nullptr;
    const size_t stride_bytes = hidden_size * (type == FP32 ? 4 : 2);
    run_project(type, {checked_rows(type, weight_address, num_rows, stride_bytes, 0, hidden_size, 0), x, num_tokens,
                       pointer<float>(out_address), num_rows, bias});
}

void widen(unsigned dtype, size_t block_address, size_t num_rows, size_t row_stride_bytes, size_t part_offset_bytes,
           size_t hidden_size, size_t dst_address, size_t slots_address) {
    const DType type = checked_dtype(dtype);
    require(dst_address != 0, "dst_address is null");
    run_widen(type, {checked_rows(type, block_address, num_rows, row_stride_bytes, part_offset_bytes, hidden_size,
                                  slots_address),
                     pointer<float>(dst_address)});
}

}  // namespace

void bind_kernels(nb::module_& m) {
    using Release = nb::call_guard<nb::gil_scoped_release>;
    m.attr("MAX_TOKENS") = MAX_TOKENS;
    m.def("project", &project, "dtype"_a, "block_address"_a, "num_rows"_a, "row_stride_bytes"_a, "part_offset_bytes"_a,
          "hidden_size"_a, "x_address"_a, "num_tokens"_a, "out_address"_a, "out_stride"_a, "bias_address"_a = 0,
          "slots_address"_a = 0, Release(), "out[t, r] = x[t] . row[r].part (+ bias[r])");
    m.def("project_many", &project_many, "dtype"_a, "table_address"_a, "num_products"_a, "num_tokens"_a, Release(),
          "Several products in one job; the table has int64 rows: address, num_rows, row_stride_bytes, hidden_size, "
          "x_address, out_address, out_stride, bias_address.");
    m.def("lstm_gates", &lstm_gates, "input_address"_a, "context_address"_a, "c_address"_a, "h_next_address"_a,
          "c_next_address"_a, "batch"_a, "size"_a, Release(), "h' and c' from the sum of two arrays of gates i, f, g, o");
    m.def("lstm_forward", &lstm_forward, "dtype"_a, "gates_address"_a, "c_address"_a, "activations_address"_a,
          "h_next_address"_a, "c_next_address"_a, "h_low_address"_a, "batch"_a, "size"_a, Release(),
          "h', c' and the activations of gates i, f, g, o, on the calling thread");
    m.def("lstm_backward", &lstm_backward, "dtype"_a, "activations_address"_a, "c_address"_a, "c_next_address"_a,
          "grad_h_address"_a, "grad_h_next_address"_a, "grad_c_address"_a, "grad_gates_address"_a,
          "grad_c_before_address"_a, "batch"_a, "size"_a, Release(), "the gradients of lstm_forward");
    m.def("accumulate", &accumulate, "dtype"_a, "block_address"_a, "num_rows"_a, "row_stride_bytes"_a,
          "part_offset_bytes"_a, "hidden_size"_a, "h_address"_a, "h_stride"_a, "num_tokens"_a, "y_address"_a,
          "slots_address"_a = 0, Release(), "y[t] += sum over r of h[t, r] * row[r].part");
    m.def("accumulate_many", &accumulate_many, "dtype"_a, "table_address"_a, "num_products"_a, "num_tokens"_a = 1,
          "h_stride"_a = 0, "takes_zeros"_a = false, Release(),
          "Several in one job, their tokens h_stride apart; the table has int64 rows: address, num_rows, row_stride_bytes, "
          "hidden_size, h_address, y_address. With takes_zeros rows whose h is 0 are read too.");
    m.def("linear", &linear, "dtype"_a, "weight_address"_a, "num_rows"_a, "hidden_size"_a, "x_address"_a, "num_tokens"_a,
          "out_address"_a, "bias_address"_a = 0, Release(),
          "out[t, r] = x[t] . weight[r] (+ bias[r]), out in float32, the others in dtype, all contiguous");
    m.def("widen", &widen, "dtype"_a, "block_address"_a, "num_rows"_a, "row_stride_bytes"_a, "part_offset_bytes"_a,
          "hidden_size"_a, "dst_address"_a, "slots_address"_a = 0, Release(), "dst[r] = row[r].part as float32");
    m.def("simd_level", [] { return std::string(kernels().name); }, "Name of the instruction set in use.");
    m.def("simd_levels", &simd_levels, "Instruction sets that this machine supports, best first.");
    m.def("set_simd_level", [](nb::object name) { set_simd_level(name.is_none() ? "" : nb::cast<std::string>(name)); },
          "name"_a.none(), nb::sig("def set_simd_level(name: str | None) -> None"),
          "Use this instruction set; None: the default one again.");
    m.def("num_threads", &num_threads, "Threads that a kernel may use, the caller included.");
    m.def("set_num_threads", &set_num_threads, "num_threads"_a, "Set them; at least 1.");
}

}  // namespace flashlm
