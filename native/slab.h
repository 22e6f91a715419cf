// Memory on a device, cut into slots of one size, and references to places in it.
#pragma once

#include <cstddef>
#include <memory>

#include "buffer.h"

namespace flashlm {

// Where memory lies. Kernels are chosen by it; memory on CUDA devices can be named, and is refused by name.
enum class Device : unsigned char { cpu, cuda };
constexpr const char* name_of(Device device) { return device == Device::cpu ? "cpu" : "cuda"; }

// Slots 0 to num_slots - 1, one behind the other; the last one may be cut short. Several slabs may share one buffer.
struct Slab {
    AlignedBuffer buffer;
    std::size_t buffer_offset;  // where slot 0 begins
    std::size_t num_bytes;      // of all slots
    std::size_t slot_bytes;
    std::size_t num_slots;
    Device device;
};

// A place in a slab: `offset` bytes after the beginning of a slot. It keeps the memory.
struct SlotRef {
    std::shared_ptr<const Slab> slab;
    std::size_t slot;
    std::size_t offset;

    std::size_t position() const { return slot * slab->slot_bytes + offset; }  // from the slab's beginning
    std::size_t room() const { return slab->num_bytes - position(); }           // to the slab's end
    unsigned char* data() const {
        return static_cast<unsigned char*>(slab->buffer.data()) + slab->buffer_offset + position();
    }
};

}  // namespace flashlm
