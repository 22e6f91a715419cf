// The neuron cache's bookkeeping: which row of which layer is in which slot, and which goes when room is needed.
//
// Slots are numbers; memory and reads are the caller's. A layer's slots are its own: its capacity is fixed. Rows 0 to
// num_pinned - 1 have the slots of the same number for good. The others are kept by last use: policy `window(k)` drops, at
// every step, what none of the last k steps used (the paper's §3.1); without a window (k = 0) rows stay until their slot is
// needed, the least recently used one first (LRU). Not thread-safe: one pass at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace flashlm {

class RowCache {
  public:
    struct LayerSpec {
        std::uint32_t num_rows;
        std::uint32_t capacity;    // slots, pinned ones included
        std::uint32_t num_pinned;  // at most the capacity
    };

    // Throws std::invalid_argument where a layer's numbers do not fit.
    RowCache(const std::vector<LayerSpec>& specs, std::uint32_t window);

    std::size_t num_layers() const { return layers_.size(); }
    // Rows that fit at once beside the pinned ones.
    std::size_t room(std::size_t layer) const;
    // Rows held, pinned ones included.
    std::size_t occupancy(std::size_t layer) const;

    // One step of a layer: gives every row of `rows` (ascending, distinct) a slot.
    //   slots[i]: of rows[i].
    //   order: a permutation of 0 .. num_rows - 1, those that were held first, each group ascending.
    // Returns how many were held; the others' slots have been given away and must be filled. Throws
    // std::invalid_argument, having changed nothing, where they do not fit or a row is out of range. With
    // `is_same_step` the call continues the step of the one before.
    std::size_t acquire(std::size_t layer, const std::int32_t* rows, std::size_t num_rows, std::int32_t* slots,
                        std::int32_t* order, bool is_same_step);

    // Forgets rows, whose slots hold nothing (a read failed). Pinned ones stay.
    void forget(std::size_t layer, const std::int32_t* rows, std::size_t num_rows);

  private:
    struct Layer {
        LayerSpec spec;
        std::uint64_t step = 0;
        std::vector<std::int32_t> slot_of;      // by row; -1: not held
        std::vector<std::int32_t> row_of;       // by slot
        std::vector<std::uint64_t> last_used;   // by slot: step
        std::vector<std::int32_t> prev, next;   // by slot: the list from least to most recently used; the last entry of
                                                // each is the list's head and tail
        std::vector<std::int32_t> free;         // slots
    };

    static void unlink(Layer& layer, std::int32_t slot);
    static void append(Layer& layer, std::int32_t slot);
    static void drop(Layer& layer, std::int32_t slot);
    Layer& at(std::size_t layer);

    std::vector<Layer> layers_;
    std::uint32_t window_;
};

}  // namespace flashlm
