// The Python module: `bindings_reader.cpp` and `bindings_kernels.cpp` fill it.
#include <nanobind/nanobind.h>

namespace flashlm {
void bind_reader(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);
}  // namespace flashlm

NB_MODULE(_native, m) {
    // Buffers live until the interpreter ends wherever a traceback or a global holds a model; that is no leak.
    nanobind::set_leak_warnings(false);
    m.doc() = "Direct reads and row kernels; use flashlm.storage and flashlm.kernels.";
    flashlm::bind_reader(m);
    flashlm::bind_kernels(m);
}
