// The Python module: `bindings_*.cpp` fill it.
#include <nanobind/nanobind.h>

namespace flashlm {
void bind_reader(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);
void bind_cache(nanobind::module_& m);
void bind_turn(nanobind::module_& m);
void bind_threads(nanobind::module_& m);
}  // namespace flashlm

NB_MODULE(_native, m) {
    // Buffers live until the interpreter ends wherever a traceback or a global holds a model; that is no leak.
    nanobind::set_leak_warnings(false);
    m.doc() = "Direct reads, row kernels and the neuron cache; use flashlm.storage, flashlm.rows.kernels and flashlm.memory.";
    flashlm::bind_reader(m);
    flashlm::bind_kernels(m);
    flashlm::bind_cache(m);
    flashlm::bind_turn(m);
    flashlm::bind_threads(m);
}
