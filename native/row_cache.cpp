#include "row_cache.h"

#include <stdexcept>
#include <string>

namespace flashlm {

RowCache::RowCache(const std::vector<LayerSpec>& specs, std::uint32_t window) : window_(window) {
    constexpr std::uint32_t MAX_ROWS = std::uint32_t{1} << 30;
    for (const LayerSpec& spec : specs) {
        if (spec.num_rows == 0 || spec.num_rows > MAX_ROWS || spec.capacity > spec.num_rows || spec.capacity == 0 ||
            spec.num_pinned > spec.capacity) {
            throw std::invalid_argument("a layer needs 1 <= capacity <= rows and pinned <= capacity; got capacity " +
                                        std::to_string(spec.capacity) + ", rows " + std::to_string(spec.num_rows) +
                                        ", pinned " + std::to_string(spec.num_pinned));
        }
        Layer layer;
        layer.spec = spec;
        layer.slot_of.assign(spec.num_rows, -1);
        layer.row_of.assign(spec.capacity, -1);
        layer.last_used.assign(spec.capacity, 0);
        const auto ends = static_cast<std::int32_t>(spec.capacity);
        layer.prev.assign(spec.capacity + 1, ends);
        layer.next.assign(spec.capacity + 1, ends);
        for (std::uint32_t row = 0; row < spec.num_pinned; ++row) {
            layer.slot_of[row] = static_cast<std::int32_t>(row);
            layer.row_of[row] = static_cast<std::int32_t>(row);
        }
        for (std::uint32_t slot = spec.capacity; slot > spec.num_pinned; --slot) {
            layer.free.push_back(static_cast<std::int32_t>(slot - 1));
        }
        layers_.push_back(std::move(layer));
    }
}

RowCache::Layer& RowCache::at(std::size_t layer) {
    if (layer >= layers_.size()) throw std::invalid_argument("there is no layer " + std::to_string(layer));
    return layers_[layer];
}

std::size_t RowCache::room(std::size_t layer) const {
    const LayerSpec& spec = layers_.at(layer).spec;
    return spec.capacity - spec.num_pinned;
}

std::size_t RowCache::occupancy(std::size_t layer) const {
    return layers_.at(layer).spec.capacity - layers_.at(layer).free.size();
}

void RowCache::unlink(Layer& layer, std::int32_t slot) {
    layer.next[layer.prev[slot]] = layer.next[slot];
    layer.prev[layer.next[slot]] = layer.prev[slot];
}

void RowCache::append(Layer& layer, std::int32_t slot) {
    const auto ends = static_cast<std::int32_t>(layer.spec.capacity);
    layer.prev[slot] = layer.prev[ends];
    layer.next[slot] = ends;
    layer.next[layer.prev[ends]] = slot;
    layer.prev[ends] = slot;
}

void RowCache::drop(Layer& layer, std::int32_t slot) {
    unlink(layer, slot);
    layer.slot_of[layer.row_of[slot]] = -1;
    layer.row_of[slot] = -1;
    layer.free.push_back(slot);
}

std::size_t RowCache::acquire(std::size_t index, const std::int32_t* rows, std::size_t num_rows, std::int32_t* slots,
                              std::int32_t* order, bool is_same_step) {
    Layer& layer = at(index);
    const auto pinned = static_cast<std::int32_t>(layer.spec.num_pinned);
    const auto ends = static_cast<std::int32_t>(layer.spec.capacity);
    std::size_t num_unpinned = 0;
    std::int32_t last = -1;
    for (std::size_t i = 0; i < num_rows; ++i) {
        if (rows[i] <= last || static_cast<std::uint32_t>(rows[i]) >= layer.spec.num_rows) {
            throw std::invalid_argument("rows must ascend within the layer; got " + std::to_string(rows[i]) + " after " +
                                        std::to_string(last));
        }
        last = rows[i];
        num_unpinned += rows[i] >= pinned;
    }
    if (num_unpinned > room(index)) {
        throw std::invalid_argument(std::to_string(num_unpinned) + " rows do not fit into the layer's " +
                                    std::to_string(room(index)) + " slots");
    }
    if (!is_same_step) ++layer.step;
    std::size_t num_held = 0;
    for (std::size_t i = 0; i < num_rows; ++i) {
        const std::int32_t slot = layer.slot_of[rows[i]];
        slots[i] = slot;
        if (slot < 0) continue;
        order[num_held++] = static_cast<std::int32_t>(i);
        if (slot < pinned) continue;
        layer.last_used[slot] = layer.step;
        unlink(layer, slot);
        append(layer, slot);
    }
    if (window_ > 0) {
        for (std::int32_t oldest = layer.next[ends]; oldest != ends && layer.last_used[oldest] + window_ <= layer.step;
             oldest = layer.next[ends]) {
            drop(layer, oldest);
        }
    }
    std::size_t position = num_held;
    for (std::size_t i = 0; i < num_rows; ++i) {
        if (slots[i] >= 0) continue;
        order[position++] = static_cast<std::int32_t>(i);
        if (layer.free.empty()) drop(layer, layer.next[ends]);
        const std::int32_t slot = layer.free.back();
        layer.free.pop_back();
        layer.slot_of[rows[i]] = slot;
        layer.row_of[slot] = rows[i];
        layer.last_used[slot] = layer.step;
        append(layer, slot);
        slots[i] = slot;
    }
    return num_held;
}

void RowCache::forget(std::size_t index, const std::int32_t* rows, std::size_t num_rows) {
    Layer& layer = at(index);
    const auto pinned = static_cast<std::int32_t>(layer.spec.num_pinned);
    for (std::size_t i = 0; i < num_rows; ++i) {
        if (rows[i] < pinned || static_cast<std::uint32_t>(rows[i]) >= layer.spec.num_rows) continue;
        if (layer.slot_of[rows[i]] >= 0) drop(layer, layer.slot_of[rows[i]]);
    }
}

}  // namespace flashlm
