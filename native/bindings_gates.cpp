// Python face of the gates of an LSTM step: tensors, whose types and shapes are checked here.
#include <nanobind/nanobind.h>

#include <string>

#include "bindings_arrays.h"
#include "gates/run.h"
#include "simd/levels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashlm {
namespace {

using std::size_t;
using std::string;
using std::to_string;

// A contiguous array of so many elements: a caller's mistake must not become a write beyond one.
template <class T>
T* checked(nb::handle source, const char* name, size_t num_elements) {
    const Array array(source, name);
    if (!array.is_plain<std::remove_const_t<T>>() || array.num_elements() != num_elements) {
        throw Refused(string(name) + " must be contiguous float32 of " + to_string(num_elements) + " elements, got " +
                      array.described());
    }
    return array.data<T>();
}

// The same in the type of the products.
void* checked_low(nb::handle source, const char* name, GateType type, size_t num_elements) {
    const Array array(source, name);
    const bool fits = type == GATE_FP32 ? array.holds<float>() : array.holds_bf16();
    if (!fits || !array.is_contiguous() || array.num_elements() != num_elements) {
        throw Refused(string(name) + " must be contiguous " + (type == GATE_FP32 ? "float32" : "bfloat16") + " of " +
                      to_string(num_elements) + " elements, got " + array.described());
    }
    return array.data();
}

GateType type_of(const Array& gates) {
    if (gates.holds<float>()) return GATE_FP32;
    if (gates.holds_bf16()) return GATE_BF16;
    throw Refused("gates must be float32 or bfloat16, on the CPU, got " + gates.described());
}

struct StateShape {
    size_t batch, size;
    size_t count() const { return batch * size; }
};

// The state (..., d) says how many sequences there are, and how many gates of each kind.
StateShape shape_of(nb::handle state) {
    const Array array(state, "c");
    if (!array.num_dims() || !array.size(array.num_dims() - 1)) {
        throw Refused("c must be (..., d) with d at least 1, got " + array.described());
    }
    const size_t size = array.size(array.num_dims() - 1);
    return {array.num_elements() / size, size};
}

void lstm_gates(nb::handle input_gates, nb::handle context_gates, nb::handle c, nb::handle h_next, nb::handle c_next) {
    const StateShape shape = shape_of(c);
    const auto gates = [&](nb::handle source, const char* name) {
        const Array array(source, name);
        if (!array.is_plain<float>() || !array.has_shape({shape.batch, 4 * shape.size})) {
            throw Refused(string(name) + " must be contiguous float32 " + shape_text({shape.batch, 4 * shape.size}) +
                          ", got " + array.described());
        }
        return array.data<const float>();
    };
    const GatesForwardArgs args{gates(input_gates, "input_gates"), gates(context_gates, "context_gates"),
                                checked<const float>(c, "c", shape.count()), nullptr,
                                checked<float>(h_next, "h_next", shape.count()),
                                checked<float>(c_next, "c_next", shape.count()), nullptr, shape.batch, shape.size};
    if (!shape.batch) return;
    nb::gil_scoped_release release;
    run_gates(GATE_FP32, args);
}

// On the calling thread: between two products of torch its threads spin on the cores that ours would want.
void lstm_forward(nb::handle gates, nb::handle c, nb::handle activations, nb::handle h_next, nb::handle c_next,
                  nb::handle h_low) {
    const StateShape shape = shape_of(c);
    const GateType type = type_of(Array(gates, "gates"));
    const size_t count = shape.count();
    const GatesForwardArgs args{
        checked_low(gates, "gates", type, 4 * count),
        nullptr,
        checked<const float>(c, "c", count),
        activations.is_none() ? nullptr : checked<float>(activations, "activations", 4 * count),
        checked<float>(h_next, "h_next", count),
        checked<float>(c_next, "c_next", count),
        h_low.is_none() ? nullptr : checked_low(h_low, "h_low", type, count),
        shape.batch,
        shape.size,
    };
    nb::gil_scoped_release release;
    level().gates.forward[type](args, 0, shape.batch);
}

void lstm_backward(nb::handle activations, nb::handle c, nb::handle c_next, nb::handle grad_h, nb::handle grad_h_next,
                   nb::handle grad_c, nb::handle grad_gates, nb::handle grad_c_before) {
    const StateShape shape = shape_of(c);
    const GateType type = type_of(Array(grad_gates, "grad_gates"));
    const size_t count = shape.count();
    const GatesBackwardArgs args{
        checked<const float>(activations, "activations", 4 * count),
        checked<const float>(c, "c", count),
        checked<const float>(c_next, "c_next", count),
        checked<const float>(grad_h, "grad_h", count),
        checked_low(grad_h_next, "grad_h_next", type, count),
        checked<const float>(grad_c, "grad_c", count),
        checked_low(grad_gates, "grad_gates", type, 4 * count),
        checked<float>(grad_c_before, "grad_c_before", count),
        shape.batch,
        shape.size,
    };
    nb::gil_scoped_release release;
    level().gates.backward[type](args, 0, shape.batch);
}

}  // namespace

void bind_gates(nb::module_& m) {
    m.def("lstm_gates", &lstm_gates, "input_gates"_a, "context_gates"_a, "c"_a, "h_next"_a, "c_next"_a,
          "h' and c' from the sum of two arrays of gates i, f, g, o");
    m.def("lstm_forward", &lstm_forward, "gates"_a, "c"_a, "activations"_a.none(), "h_next"_a, "c_next"_a,
          "h_low"_a.none(), "h', c' and the activations of gates i, f, g, o, on the calling thread");
    m.def("lstm_backward", &lstm_backward, "activations"_a, "c"_a, "c_next"_a, "grad_h"_a, "grad_h_next"_a, "grad_c"_a,
          "grad_gates"_a, "grad_c_before"_a, "the gradients of lstm_forward");
}

}  // namespace flashlm
