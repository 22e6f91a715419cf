// Python face of the neuron cache's bookkeeping: int32 arrays, whose types and shapes are checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "bindings_arrays.h"
#include "row_cache.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashlm {
namespace {

using std::size_t;
using Spec = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>;

// Contiguous int32 (count,); any number of them where `count` is null.
std::int32_t* checked(const Array& array, const char* name, const size_t* count = nullptr) {
    const bool fits = array.is_plain<std::int32_t>() && array.num_dims() == 1 && (!count || array.size(0) == *count);
    if (!fits) throw Refused(std::string(name) + " must be contiguous int32 (num_rows,), got " + array.described());
    return array.data<std::int32_t>();
}

size_t acquire(RowCache& self, size_t layer, nb::handle rows, nb::handle slots, nb::handle order, bool is_same_step) {
    const Array asked(rows, "rows"), given(slots, "slots"), ordered(order, "order");
    const std::int32_t* first = checked(asked, "rows");
    const size_t count = asked.size(0);
    return self.acquire(layer, first, count, checked(given, "slots", &count), checked(ordered, "order", &count),
                        is_same_step);
}

void forget(RowCache& self, size_t layer, nb::handle rows) {
    const Array lost(rows, "rows");
    const std::int32_t* first = checked(lost, "rows");
    self.forget(layer, first, lost.size(0));
}

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
        .def("acquire", &acquire, "layer"_a, "rows"_a, "slots"_a, "order"_a, "is_same_step"_a)
        .def("forget", &forget, "layer"_a, "rows"_a);
}

}  // namespace flashlm
