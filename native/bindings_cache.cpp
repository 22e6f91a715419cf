// Python face of the neuron cache's bookkeeping: addresses of int32 arrays; `flashlm.memory.neuron_cache` checks them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "row_cache.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashlm {
namespace {

using std::size_t;
using Spec = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>;

const std::int32_t* rows_at(size_t address) { return reinterpret_cast<const std::int32_t*>(address); }

}  // namespace

void bind_cache(nb::module_& m) {
    nb::class_<RowCache>(m, "RowCache")
        .def("__init__",
             [](RowCache* self, const std::vector<Spec>& raw, std::uint32_t window) {
                 std::vector<RowCache::LayerSpec> specs;
                 for (const auto& [num_rows, capacity, num_pinned] : raw) specs.push_back({num_rows, capacity, num_pinned});
                 new (self) RowCache(specs, window);
             },
             "layers"_a, "window"_a, "layers: (rows, capacity, pinned) of each; window 0: LRU.")
        .def_prop_ro("num_layers", &RowCache::num_layers)
        .def("room", &RowCache::room, "layer"_a)
        .def("occupancy", &RowCache::occupancy, "layer"_a)
        .def("acquire",
             [](RowCache& self, size_t layer, size_t rows, size_t num_rows, size_t slots, size_t order, bool same_step) {
                 return self.acquire(layer, rows_at(rows), num_rows, reinterpret_cast<std::int32_t*>(slots),
                                     reinterpret_cast<std::int32_t*>(order), same_step);
             },
             "layer"_a, "rows_address"_a, "num_rows"_a, "slots_address"_a, "order_address"_a, "is_same_step"_a)
        .def("forget", [](RowCache& self, size_t layer, size_t rows, size_t n) { self.forget(layer, rows_at(rows), n); },
             "layer"_a, "rows_address"_a, "num_rows"_a);
}

}  // namespace flashlm
