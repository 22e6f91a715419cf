// Python face of memory: buffers, slabs and places in them; `flashlm.storage.slab` counts them against the budget.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "bindings_arrays.h"
#include "slab.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashlm {
namespace {

using Bytes = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;

// Python's object of a slab: references to its slots outlive it.
struct SlabHandle {
    std::shared_ptr<const Slab> slab;
};

Device device_named(const std::string& name) {
    if (name == "cpu") return Device::cpu;
    throw Refused("memory on device '" + name + "' can't be had: slabs are in DRAM ('cpu')");
}

void init_slab(SlabHandle* self, const AlignedBuffer& buffer, std::size_t buffer_offset, std::size_t num_bytes,
               std::size_t slot_bytes, const std::string& device) {
    if (buffer_offset > buffer.num_bytes() || num_bytes > buffer.num_bytes() - buffer_offset) {
        throw Refused(std::to_string(num_bytes) + " bytes at " + std::to_string(buffer_offset) +
                      " do not fit a buffer of " + std::to_string(buffer.num_bytes()) + " bytes");
    }
    if (!slot_bytes) throw Refused("slot_bytes must be at least 1, got 0");
    const std::size_t num_slots = num_bytes / slot_bytes + (num_bytes % slot_bytes != 0);
    new (self) SlabHandle{std::make_shared<const Slab>(
        Slab{buffer, buffer_offset, num_bytes, slot_bytes, num_slots, device_named(device)})};
}

SlotRef slot_of(const SlabHandle& self, std::size_t slot) {
    if (slot >= self.slab->num_slots) {
        throw Refused("slot " + std::to_string(slot) + " of a slab of " + std::to_string(self.slab->num_slots));
    }
    return {self.slab, slot, 0};
}

SlotRef at(const SlotRef& self, std::size_t offset_bytes) {
    if (offset_bytes > self.room()) {
        throw Refused("a place " + std::to_string(offset_bytes) + " bytes on, with " + std::to_string(self.room()) +
                      " left in the slab");
    }
    return {self.slab, self.slot, self.offset + offset_bytes};
}

Bytes bytes_of(const SlotRef& self, std::size_t num_bytes) {
    if (num_bytes > self.room()) {
        throw Refused(std::to_string(num_bytes) + " bytes asked for, with " + std::to_string(self.room()) +
                      " left in the slab");
    }
    using Share = std::shared_ptr<const void>;
    nb::capsule owner(new Share(self.slab->buffer.share()), [](void* share) noexcept { delete static_cast<Share*>(share); });
    return Bytes(self.data(), {num_bytes}, owner);
}

}  // namespace

void bind_slab(nb::module_& m) {
    nb::class_<Account>(m, "Account", "Counts the bytes of the buffers that are charged to it.")
        .def(nb::init<>())
        .def_prop_ro("held_bytes", &Account::held_bytes);
    nb::class_<AlignedBuffer>(m, "AlignedBuffer")
        .def(nb::init<std::size_t, bool, const Account*>(), "num_bytes"_a, "huge_pages"_a = true,
             "account"_a.none() = nb::none())
        .def_prop_ro("num_bytes", &AlignedBuffer::num_bytes)
        .def("numpy", [](AlignedBuffer& self) {
                 return Bytes(self.data(), {self.num_bytes()}, nb::find(&self));
             },
             nb::rv_policy::reference_internal, "The memory as uint8 (num_bytes,), without a copy.");
    nb::class_<SlotRef>(m, "SlotRef", "A place in a slab, which it keeps.")
        .def_prop_ro("slot", [](const SlotRef& self) { return self.slot; })
        .def_prop_ro("offset_bytes", [](const SlotRef& self) { return self.offset; })
        .def_prop_ro("buffer", [](const SlotRef& self) { return self.slab->buffer; })
        .def_prop_ro("buffer_offset", [](const SlotRef& self) { return self.slab->buffer_offset + self.position(); })
        .def("at", &at, "offset_bytes"_a, "The place so many bytes on, in this slot or a later one.")
        .def("numpy", &bytes_of, "num_bytes"_a, "The bytes from here on as uint8 (num_bytes,), without a copy.");
    nb::class_<SlabHandle>(m, "Slab", "Memory on a device, cut into slots.")
        .def("__init__", &init_slab, "buffer"_a, "buffer_offset"_a, "num_bytes"_a, "slot_bytes"_a, "device"_a = "cpu")
        .def_prop_ro("device", [](const SlabHandle& self) { return name_of(self.slab->device); })
        .def_prop_ro("num_bytes", [](const SlabHandle& self) { return self.slab->num_bytes; })
        .def_prop_ro("slot_bytes", [](const SlabHandle& self) { return self.slab->slot_bytes; })
        .def_prop_ro("num_slots", [](const SlabHandle& self) { return self.slab->num_slots; })
        .def("slot", &slot_of, "slot"_a, "The beginning of a slot.");
}

}  // namespace flashlm
