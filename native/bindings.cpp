// The Python module: `bindings_*.cpp` fill it.
#include <nanobind/nanobind.h>

#include "bindings_arrays.h"

namespace flashlm {
void bind_reader(nanobind::module_& m);
void bind_slab(nanobind::module_& m);
void bind_rows(nanobind::module_& m);
void bind_gates(nanobind::module_& m);
void bind_cache(nanobind::module_& m);
void bind_turn(nanobind::module_& m);
void bind_threads(nanobind::module_& m);
}  // namespace flashlm

NB_MODULE(_native, m) {
    // Buffers live until the interpreter ends wherever a traceback or a global holds a model; that is no leak.
    nanobind::set_leak_warnings(false);
    m.doc() = "Direct reads, row kernels and the neuron cache; use flashlm.storage, flashlm.rows and flashlm.memory.";
    flashlm::register_refusals();
    flashlm::bind_slab(m);
    flashlm::bind_reader(m);
    flashlm::bind_rows(m);
    flashlm::bind_gates(m);
    flashlm::bind_cache(m);
    flashlm::bind_turn(m);
    flashlm::bind_threads(m);
}
