// Python face of the row kernels: blocks of rows, and products with tensors, whose types and shapes are checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings_arrays.h"
#include "rows/quantize.h"
#include "rows/run.h"
#include "simd/levels.h"
#include "slab.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashlm {
namespace {

using std::size_t;
using std::string;
using std::to_string;

constexpr size_t MAX_PARTS = 16;

// What rows are made of, checked once: parts of one width, each with its encoding and its place within a row.
class RowFormat {
  public:
    using Parts = std::vector<std::pair<unsigned, size_t>>;

    RowFormat(size_t row_stride_bytes, size_t width, const Parts& parts)
        : stride_bytes_(row_stride_bytes), width_(width), num_parts_(parts.size()) {
        if (parts.empty() || parts.size() > MAX_PARTS) {
            throw Refused("num_parts must be 1 to 16, got " + to_string(parts.size()));
        }
        for (size_t i = 0; i < num_parts_; ++i) {
            const auto [code, offset] = parts[i];
            if (code >= NUM_ENCODINGS) throw Refused("encoding must be 0 to " + to_string(NUM_ENCODINGS - 1));
            const Encoding& meaning = ENCODINGS[code];
            if (!width || width % meaning.group_elements || width > SIZE_MAX / 16) {
                throw Refused("a part of " + to_string(width) + " elements is not made of whole groups of " +
                              to_string(meaning.group_elements) + " (" + meaning.name + ")");
            }
            parts_[i] = {static_cast<EncodingCode>(code), offset};
            const size_t num_bytes = part_bytes(parts_[i].encoding, width);
            if (offset > row_stride_bytes || num_bytes > row_stride_bytes - offset) {
                throw Refused("a part of " + to_string(num_bytes) + " bytes at " + to_string(offset) +
                              " does not fit a row stride of " + to_string(row_stride_bytes) + " bytes");
            }
            used_bytes_ = std::max(used_bytes_, offset + num_bytes);
        }
    }
    // Parts of one encoding, side by side.
    static RowFormat alike(size_t row_stride_bytes, size_t width, unsigned encoding, size_t num_parts) {
        if (encoding >= NUM_ENCODINGS) throw Refused("encoding must be 0 to " + to_string(NUM_ENCODINGS - 1));
        Parts parts;
        const bool is_sane = num_parts <= MAX_PARTS && width <= SIZE_MAX / 64;  // else refused where the format is made
        const size_t num_bytes = is_sane ? part_bytes(static_cast<EncodingCode>(encoding), width) : 0;
        for (size_t i = 0; i < std::min(num_parts, MAX_PARTS + 1); ++i) parts.emplace_back(encoding, i * num_bytes);
        return RowFormat(row_stride_bytes, width, parts);
    }

    size_t stride_bytes() const { return stride_bytes_; }
    size_t width() const { return width_; }
    size_t num_parts() const { return num_parts_; }
    size_t used_bytes() const { return used_bytes_; }  // of a row: to the end of its last part
    EncodingCode encoding(size_t part) const { return checked(part).encoding; }
    size_t offset(size_t part) const { return checked(part).offset; }
    bool operator==(const RowFormat& other) const {
        if (width_ != other.width_ || num_parts_ != other.num_parts_) return false;
        for (size_t i = 0; i < num_parts_; ++i) {
            if (parts_[i].encoding != other.parts_[i].encoding) return false;
        }
        return true;
    }

  private:
    struct Part {
        EncodingCode encoding;
        size_t offset;
    };
    const Part& checked(size_t part) const {
        if (part < num_parts_) return parts_[part];
        throw Refused("part must be 0 to " + to_string(num_parts_ - 1) + ", got " + to_string(part));
    }

    size_t stride_bytes_, width_, num_parts_, used_bytes_ = 0;
    Part parts_[MAX_PARTS];
};

// Rows in memory that this object keeps, checked once: whatever a kernel reads of them lies inside.
class RowBlock {
  public:
    RowBlock(const SlotRef& at, size_t num_rows, const RowFormat& format, nb::handle slots)
        : memory_(at.slab->buffer.share()), format_(format) {
        const Device device = at.slab->device;  // here kernels of other devices will be chosen
        if (device != Device::cpu) throw Refused(string("there are no row kernels on device ") + name_of(device));
        check(at.data(), at.room(), num_rows, slots);
    }
    RowBlock(nb::handle matrix, size_t num_rows, const RowFormat& format, nb::handle slots)
        : format_(format), owner_(nb::borrow(matrix)) {
        const Array array(matrix, "rows");
        if (!array.is_on_cpu()) throw Refused("rows must be on the CPU, got " + array.described());
        check(array.data<unsigned char>(), array.extent_bytes(), num_rows, slots);
    }

    // The rows of a matrix of plain elements, (num_rows, num_parts * width), side by side.
    static RowBlock of_matrix(nb::handle matrix, size_t num_parts, nb::handle slots) {
        const Array array(matrix, "rows");
        const unsigned encoding = array.encoding();
        if (encoding == NUM_ENCODINGS || array.num_dims() != 2 || (array.size(1) > 1 && array.stride(1) != 1)) {
            throw Refused("rows must be bfloat16, float16 or float32, elements side by side, on the CPU, got " +
                          array.described());
        }
        const size_t num_rows = slots.is_none() ? array.size(0) : Array(slots, "slots").num_elements();
        return RowBlock(matrix, num_rows,
                        RowFormat::alike(array.stride(0) * array.element_bytes(),
                                         array.size(1) / std::max<size_t>(num_parts, 1), encoding, num_parts),
                        slots);
    }

    size_t num_rows() const { return rows_.num_rows; }
    size_t width() const { return format_.width(); }
    size_t num_parts() const { return format_.num_parts(); }
    size_t stride_bytes() const { return rows_.stride_bytes; }
    EncodingCode encoding(size_t part) const { return format_.encoding(part); }
    bool has_slots() const { return rows_.slots != nullptr; }
    bool is_like(const RowBlock& other) const {
        return format_ == other.format_ && rows_.num_rows == other.rows_.num_rows;
    }
    Rows part(size_t part) const {
        Rows rows = rows_;
        rows.base += format_.offset(part);
        return rows;
    }
    size_t down() const { return num_parts() - 1; }

  private:
    void check(const unsigned char* base, size_t room, size_t num_rows, nb::handle slots) {
        size_t num_stored = num_rows;
        const std::uint32_t* places = nullptr;
        if (!slots.is_none()) {
            const Array array(slots, "slots");
            if (!array.is_plain<std::int32_t>() || !array.has_shape({num_rows})) {
                throw Refused("slots must be contiguous int32 (" + to_string(num_rows) + ",), got " + array.described());
            }
            places = array.data<const std::uint32_t>();
            std::uint32_t last = 0;  // a negative slot counts as a very high one
            for (size_t i = 0; i < num_rows; ++i) last = std::max(last, places[i]);
            num_stored = num_rows ? size_t{last} + 1 : 0;
            slots_ = nb::borrow(slots);
        }
        const size_t row_bytes = format_.used_bytes(), stride_bytes = format_.stride_bytes();
        if (num_stored && (row_bytes > room || num_stored - 1 > (room - row_bytes) / stride_bytes)) {
            throw Refused("the block of " + to_string(num_stored) + " rows ends beyond its memory of " +
                          to_string(room) + " bytes");
        }
        rows_ = {base, stride_bytes, num_rows ? places : nullptr, num_rows, format_.width()};
    }

    std::shared_ptr<const void> memory_;
    RowFormat format_;
    Rows rows_{};
    nb::object owner_, slots_;
};

void check_tokens(size_t num_tokens) {
    if (num_tokens > MAX_TOKENS) {
        throw Refused("the row kernels take at most " + to_string(MAX_TOKENS) + " tokens, got " +
                      to_string(num_tokens));
    }
}

// Tokens (num_tokens, width) that a block's parts meet; returns how many.
size_t checked_tokens(const Array& tokens, const RowBlock& block) {
    const size_t width = block.width();
    if (!tokens.is_plain<float>() || tokens.num_dims() != 2 || tokens.size(1) != width) {
        throw Refused("tokens must be contiguous float32 (num_tokens, " + to_string(width) + "), got " +
                      tokens.described());
    }
    check_tokens(tokens.size(0));
    return tokens.size(0);
}

// (num_tokens, num_rows) with rows side by side; returns the elements from token to token.
size_t checked_stride(const char* name, const Array& h, size_t num_tokens, size_t num_rows) {
    const bool fits = h.holds<float>() && h.has_shape({num_tokens, num_rows});
    if (!fits || (num_rows > 1 && h.stride(1) != 1) || (num_tokens > 1 && h.stride(0) < num_rows)) {
        throw Refused(string(name) + " must be float32 " + shape_text({num_tokens, num_rows}) +
                      " with rows side by side, got " + h.described());
    }
    return h.stride(0);
}

const float* checked_bias(nb::handle bias, size_t num_rows) {
    if (bias.is_none()) return nullptr;
    const Array array(bias, "bias");
    if (!array.is_plain<float>() || !array.has_shape({num_rows})) {
        throw Refused("bias must be contiguous float32 (" + to_string(num_rows) + ",), got " + array.described());
    }
    return array.data<const float>();
}

void project(nb::handle x, const RowBlock& block, size_t part, nb::handle out, nb::handle bias) {
    const Array tokens(x, "x"), outputs(out, "out");
    const size_t num_rows = block.num_rows(), num_tokens = checked_tokens(tokens, block);
    const size_t stride = checked_stride("out", outputs, num_tokens, num_rows);
    const ProjectArgs args{block.part(part),       tokens.data<const float>(), num_tokens, outputs.data<float>(),
                           stride, checked_bias(bias, num_rows)};
    if (!num_tokens || !num_rows) return;
    nb::gil_scoped_release release;
    run_project(block.encoding(part), args);
}

// Tokens in 8 bits, and as they were: parts of encodings that 8 bits do not suit meet these.
class QuantizedTokens {
  public:
    explicit QuantizedTokens(nb::handle x) : tokens_(nb::borrow(x)) {
        const Array array(x, "x");
        if (!array.is_plain<float>() || array.num_dims() != 2 || array.size(1) == 0 || array.size(1) % PART) {
            throw Refused("tokens must be contiguous float32 (num_tokens, width) of whole groups of " + to_string(PART) +
                          ", got " + array.described());
        }
        num_tokens_ = array.size(0), width_ = array.size(1);
        const size_t num_parts = array.num_elements() / PART;
        quants_ = std::make_unique_for_overwrite<std::int8_t[]>(array.num_elements());
        scales_ = std::make_unique_for_overwrite<float[]>(num_parts);
        sums_ = std::make_unique_for_overwrite<float[]>(num_parts);
        const QuantizeTokensArgs args{array.data<const float>(), num_parts, quants_.get(), scales_.get(), sums_.get()};
        nb::gil_scoped_release release;
        run_quantize_tokens(args);
    }

    void project(const RowBlock& block, size_t part, nb::handle out, nb::handle bias) const {
        const EncodingCode encoding = block.encoding(part);
        const bool are_many = num_tokens_ > MAX_TOKENS;
        if (!(are_many ? has_int8_matrix(encoding) : has_int8(encoding))) {
            return flashlm::project(tokens_, block, part, out, bias);
        }
        const Array outputs(out, "out");
        const size_t num_rows = block.num_rows();
        if (width_ != block.width()) {
            throw Refused("tokens are " + to_string(width_) + " wide, the rows " + to_string(block.width()));
        }
        const size_t stride = checked_stride("out", outputs, num_tokens_, num_rows);
        if (!are_many) spread();
        const Int8ProjectArgs args{block.part(part),
                                   tokens(0, num_tokens_),
                                   outputs.data<float>(),
                                   stride,
                                   checked_bias(bias, num_rows)};
        if (!num_tokens_ || !num_rows) return;
        nb::gil_scoped_release release;
        (are_many ? run_multiply_int8 : run_project_int8)(encoding, args);
    }

    // As `project_blocks`.
    void project_blocks(const std::vector<const RowBlock*>& blocks, size_t part, nb::handle out,
                        const std::vector<nb::handle>& biases) const;

    void widen(nb::handle out) const {
        const Array target(out, "out");
        if (!target.is_plain<float>() || !target.has_shape({num_tokens_, width_})) {
            throw Refused("out must be contiguous float32 " + shape_text({num_tokens_, width_}) + ", got " +
                          target.described());
        }
        for (size_t i = 0; i < num_tokens_ * width_; ++i) target.data<float>()[i] = scales_[i / PART] * quants_[i];
    }

  private:
    // What row kernels take beside quants and scales, made when the first of them comes. The GIL is held.
    void spread() const {
        if (wide_scales_) return;
        const size_t num_parts = num_tokens_ * width_ / PART;
        fours_ = std::make_unique_for_overwrite<std::int32_t[]>(num_parts * 8);
        wide_scales_ = std::make_unique_for_overwrite<float[]>(num_parts * 8);
        spread_tokens({nullptr, num_parts, quants_.get(), scales_.get(), sums_.get()}, wide_scales_.get(), fours_.get());
    }
    Int8Tokens tokens(size_t first, size_t count) const {
        const size_t part = first * width_ / PART;
        const bool is_spread = wide_scales_ != nullptr;
        return {quants_.get() + first * width_,
                scales_.get() + part,
                sums_.get() + part,
                is_spread ? wide_scales_.get() + part * 8 : nullptr,
                is_spread ? fours_.get() + part * 8 : nullptr,
                count};
    }

    static constexpr size_t PART = 32;
    nb::object tokens_;
    size_t num_tokens_, width_;
    std::unique_ptr<std::int8_t[]> quants_;
    std::unique_ptr<float[]> scales_, sums_;  // of each part
    mutable std::unique_ptr<float[]> wide_scales_;  // see `spread`
    mutable std::unique_ptr<std::int32_t[]> fours_;
};

void accumulate(nb::handle h, const RowBlock& block, nb::handle y) {
    const Array hidden(h, "h"), sums(y, "y");
    const size_t num_rows = block.num_rows(), num_tokens = checked_tokens(sums, block);
    const size_t stride = checked_stride("h", hidden, num_tokens, num_rows);
    if (!num_tokens || !num_rows) return;
    const AccumulateArgs args{block.part(block.down()), hidden.data<const float>(), stride, num_tokens, sums.data<float>()};
    nb::gil_scoped_release release;
    run_accumulate(block.encoding(block.down()), args);
}

void widen(const RowBlock& block, size_t part, nb::handle dst) {
    const Array target(dst, "dst");
    const size_t num_rows = block.num_rows(), width = block.width();
    const WidenArgs args{block.part(part), target.data<float>()};
    if (!target.is_plain<float>() || !target.has_shape({num_rows, width})) {
        throw Refused("dst must be contiguous float32 " + shape_text({num_rows, width}) + ", got " + target.described());
    }
    if (!num_rows) return;
    nb::gil_scoped_release release;
    run_widen(block.encoding(part), args);
}

void quantize_rows(nb::handle source, nb::handle target) {
    const Array from(source, "source"), to(target, "target");
    const Encoding& meaning = ENCODINGS[Q8_0];
    if (!from.is_plain<float>() || from.num_dims() != 2 || from.size(1) % meaning.group_elements) {
        throw Refused("source must be contiguous float32 (num_rows, width) of whole groups of " +
                      to_string(meaning.group_elements) + ", got " + from.described());
    }
    const size_t num_rows = from.size(0), width = from.size(1), num_bytes = part_bytes(Q8_0, width);
    const bool fits = to.holds<std::uint8_t>() && to.has_shape({num_rows, num_bytes});
    if (!fits || (num_bytes > 1 && to.stride(1) != 1) || (num_rows > 1 && to.stride(0) < num_bytes)) {
        throw Refused("target must be uint8 " + shape_text({num_rows, num_bytes}) + " with rows apart, got " +
                      to.described());
    }
    const QuantizeArgs args{from.data<const float>(), num_rows, width, to.data<unsigned char>(), to.stride(0)};
    bool is_done;
    {
        nb::gil_scoped_release release;
        is_done = quantize_q8_0(args);
    }
    if (!is_done) throw Refused("q8_0 holds no infinity, no NaN, and nothing above 8.3e6");
}

// x, weight and bias in one type as a resident layer has them, fp32 out; one call, where widening apart takes several.
void linear(nb::handle x, nb::handle weight, nb::handle bias, nb::handle out) {
    const Array tokens(x, "x"), matrix(weight, "weight"), outputs(out, "out");
    const unsigned encoding = matrix.encoding();
    if (encoding == NUM_ENCODINGS || matrix.num_dims() != 2 || !matrix.size(1) || !matrix.is_contiguous()) {
        throw Refused("weight must be contiguous (out_features, in_features) of 16 or 32 bits, got " +
                      matrix.described());
    }
    const size_t num_rows = matrix.size(0), width = matrix.size(1);
    const bool fits = tokens.num_dims() && tokens.encoding() == encoding && tokens.size(tokens.num_dims() - 1) == width;
    const size_t num_tokens = tokens.num_elements() / width;
    if (!fits || !tokens.is_contiguous() || num_tokens > MAX_TOKENS) {
        throw Refused("contiguous " + string(ENCODINGS[encoding].name) + " (up to " + to_string(MAX_TOKENS) + ", " +
                      to_string(width) + ") on the CPU expected, got " + tokens.described());
    }
    if (!outputs.is_plain<float>() || outputs.num_elements() != num_tokens * num_rows) {
        throw Refused("out must be contiguous float32 of " + to_string(num_tokens * num_rows) + " elements, got " +
                      outputs.described());
    }
    const auto code = static_cast<EncodingCode>(encoding);
    const size_t stride_bytes = part_bytes(code, width);
    const void* narrow_bias = nullptr;
    if (!bias.is_none()) {
        const Array array(bias, "bias");
        if (array.encoding() != encoding || !array.has_shape({num_rows}) || !array.is_contiguous()) {
            throw Refused("bias must be contiguous " + string(ENCODINGS[encoding].name) + " (" + to_string(num_rows) +
                          ",), got " + array.described());
        }
        narrow_bias = array.data();
    }
    if (!num_tokens || !num_rows) return;
    nb::gil_scoped_release release;
    const auto widened = [code](const void* from, size_t count, size_t size, std::vector<float>& to) {
        if (to.size() < count * size) to.resize(count * size);
        const auto* base = static_cast<const unsigned char*>(from);
        level().rows.of[code].widen({{base, part_bytes(code, size), nullptr, count, size}, to.data()}, 0, count);
        return static_cast<const float*>(to.data());
    };
    static thread_local std::vector<float> wide_x, wide_bias;
    const float* wide = widened(tokens.data(), num_tokens, width, wide_x);
    const float* added = narrow_bias ? widened(narrow_bias, 1, num_rows, wide_bias) : nullptr;
    run_project(code, {{matrix.data<const unsigned char>(), stride_bytes, nullptr, num_rows, width}, wide, num_tokens,
                       outputs.data<float>(), num_rows, added});
}

// Blocks of one shape without slots, of which `vectors` has `count` rows and `activations` one for each.
void check_blocks(const std::vector<const RowBlock*>& blocks, const Array& vectors, size_t count,
                  const Array& activations) {
    if (blocks.empty()) throw Refused("at least one block is needed");
    const RowBlock& first = *blocks.front();
    for (const RowBlock* each : blocks) {
        if (!each->is_like(first) || each->has_slots()) throw Refused("the blocks must be alike, and without slots");
    }
    const auto check = [](const Array& array, size_t rows, size_t columns) {
        if (array.is_plain<float>() && array.has_shape({rows, columns})) return;
        throw Refused("contiguous float32 " + shape_text({rows, columns}) + " expected, got " + array.described());
    };
    check(vectors, count, first.width());
    check(activations, blocks.size(), first.num_rows());
}

std::vector<const float*> checked_biases(const std::vector<nb::handle>& biases, size_t num_blocks, size_t num_rows) {
    if (!biases.empty() && biases.size() != num_blocks) {
        throw Refused(to_string(biases.size()) + " biases for " + to_string(num_blocks) + " blocks");
    }
    std::vector<const float*> found(num_blocks, nullptr);
    for (size_t i = 0; i < biases.size(); ++i) found[i] = checked_bias(biases[i], num_rows);
    return found;
}

void project_blocks(nb::handle x, const std::vector<const RowBlock*>& blocks, size_t part, nb::handle out,
                    const std::vector<nb::handle>& bias) {
    const Array tokens(x, "x"), outputs(out, "out");
    const bool is_shared = tokens.num_dims() != 2 || tokens.size(0) == 1;  // else each block has a token of its own
    check_blocks(blocks, tokens, is_shared ? 1 : blocks.size(), outputs);
    const size_t num_rows = blocks.front()->num_rows(), step = is_shared ? 0 : blocks.front()->width();
    const auto biases = checked_biases(bias, blocks.size(), num_rows);
    std::vector<ProjectArgs> products;
    products.reserve(blocks.size());
    for (size_t i = 0; i < blocks.size(); ++i) {
        products.push_back({blocks[i]->part(part), tokens.data<const float>() + i * step, 1,
                            outputs.data<float>() + i * num_rows, num_rows, biases[i]});
    }
    nb::gil_scoped_release release;
    run_projects(blocks.front()->encoding(part), products.data(), products.size());
}

void QuantizedTokens::project_blocks(const std::vector<const RowBlock*>& blocks, size_t part, nb::handle out,
                                     const std::vector<nb::handle>& bias) const {
    const Array outputs(out, "out");
    const size_t num_tokens = num_tokens_ == 1 ? 1 : blocks.size();
    check_blocks(blocks, Array(tokens_, "x"), num_tokens, outputs);
    const EncodingCode encoding = blocks.front()->encoding(part);
    if (!has_int8(encoding)) return flashlm::project_blocks(tokens_, blocks, part, out, bias);
    spread();
    const size_t num_rows = blocks.front()->num_rows(), step = num_tokens_ == 1 ? 0 : 1;
    const auto biases = checked_biases(bias, blocks.size(), num_rows);
    std::vector<Int8ProjectArgs> products;
    products.reserve(blocks.size());
    for (size_t i = 0; i < blocks.size(); ++i) {
        const size_t token = i * step;
        products.push_back({blocks[i]->part(part),
                            tokens(token, 1),
                            outputs.data<float>() + i * num_rows, num_rows, biases[i]});
    }
    nb::gil_scoped_release release;
    run_projects_int8(encoding, products.data(), products.size());
}

void accumulate_blocks(nb::handle h, const std::vector<const RowBlock*>& blocks, nb::handle y) {
    const Array hidden(h, "h"), sums(y, "y");
    check_blocks(blocks, sums, blocks.size(), hidden);
    const size_t num_rows = blocks.front()->num_rows(), width = blocks.front()->width();
    std::vector<AccumulateArgs> products;
    products.reserve(blocks.size());
    for (size_t i = 0; i < blocks.size(); ++i) {
        products.push_back({blocks[i]->part(blocks[i]->down()), hidden.data<const float>() + i * num_rows, num_rows, 1,
                            sums.data<float>() + i * width});
    }
    nb::gil_scoped_release release;
    run_accumulates(blocks.front()->encoding(blocks.front()->down()), products.data(), products.size());
}

// Flat fp32 of at least num_tokens times so many elements.
float* checked_flat(const char* name, const Array& array, size_t num_tokens, size_t size) {
    if (!array.is_plain<float>() || array.num_elements() < num_tokens * size) {
        throw Refused(string(name) + " must be contiguous float32 of " + to_string(num_tokens) + " x " +
                      to_string(size) + ", got " + array.described());
    }
    return array.data<float>();
}

void check_some_tokens(size_t num_tokens) {
    if (num_tokens < 1 || num_tokens > MAX_TOKENS) {
        throw Refused("1 to " + to_string(MAX_TOKENS) + " tokens at a time, got " + to_string(num_tokens));
    }
}

// Products with several matrices, whose owner in Python keeps them.
class ProductTable {
  public:
    ProductTable(const std::vector<nb::handle>& weights, const std::vector<std::pair<size_t, size_t>>& starts,
                 const std::vector<nb::handle>& biases) {
        if (weights.empty() || starts.size() != weights.size() || biases.size() != weights.size()) {
            throw Refused("as many starts and biases as matrices are needed, and at least one");
        }
        for (size_t i = 0; i < weights.size(); ++i) {
            const Array weight(weights[i], "weight");
            const unsigned encoding = weight.encoding();
            const bool has_rows = weight.num_dims() == 2 && (weight.size(1) <= 1 || weight.stride(1) == 1);
            if (encoding == NUM_ENCODINGS || !has_rows || (i && encoding != encoding_)) {
                throw Refused("the matrices must have one dtype and contiguous rows, on the CPU, got " +
                              weight.described());
            }
            encoding_ = static_cast<EncodingCode>(encoding);
            const size_t num_rows = weight.size(0), width = weight.size(1);
            const Rows rows{weight.data<const unsigned char>(), weight.stride(0) * weight.element_bytes(), nullptr,
                            num_rows, width};
            const float* bias = nullptr;
            if (!biases[i].is_none()) {
                const Array array(biases[i], "bias");
                if (!array.is_plain<float>() || !array.has_shape({num_rows})) {
                    throw Refused("the biases must be contiguous float32, on the CPU, one for each row, got " +
                                  array.described());
                }
                bias = array.data<const float>();
            }
            const auto [x_start, out_start] = starts[i];
            products_.push_back({rows, x_start, out_start, bias});
            x_size_ = std::max(x_size_, x_start + width);
            out_size_ = std::max(out_size_, out_start + num_rows);
        }
    }

    void project(nb::handle x, nb::handle out) const {
        const Array tokens(x, "x"), outputs(out, "out");
        if (outputs.num_dims() != 2) throw Refused("out must be (num_tokens, all outputs), got " + outputs.described());
        const size_t num_tokens = outputs.size(0);
        const float* from = checked_flat("x", tokens, num_tokens, x_size_);
        float* to = checked_flat("out", outputs, num_tokens, out_size_);
        check_some_tokens(num_tokens);
        std::vector<ProjectArgs> products;
        products.reserve(products_.size());
        for (const Product& each : products_) {
            products.push_back({each.rows, from + num_tokens * each.x_start, num_tokens, to + each.out_start,
                                outputs.size(1), each.bias});
        }
        nb::gil_scoped_release release;
        run_projects(encoding_, products.data(), products.size());
    }

  private:
    struct Product {
        Rows rows;
        size_t x_start, out_start;
        const float* bias;
    };
    EncodingCode encoding_{};
    std::vector<Product> products_;
    size_t x_size_ = 0, out_size_ = 0;
};

// Products of groups of tokens with a matrix each, (groups, d, n), whose owner in Python keeps them.
class GroupTable {
  public:
    explicit GroupTable(nb::handle weight) {
        const Array array(weight, "weight");
        if (array.encoding() == NUM_ENCODINGS || array.num_dims() != 3 || !array.is_contiguous() ||
            array.num_elements() == 0) {
            throw Refused("contiguous (groups, d, n) of 16 or 32 bits expected, got " + array.described());
        }
        encoding_ = static_cast<EncodingCode>(array.encoding());
        base_ = array.data<const unsigned char>();
        groups_ = array.size(0), size_ = array.size(1), width_ = array.size(2);
    }

    // out[j, t] += x[t, j] @ weight[j]
    void accumulate(nb::handle x, nb::handle out) const {
        const Array tokens(x, "x"), sums(out, "out");
        const size_t num_tokens = tokens.num_dims() ? tokens.size(0) : 0;
        const auto check = [](const char* name, const Array& array, std::initializer_list<size_t> shape) {
            if (array.is_plain<float>() && array.has_shape(shape)) return;
            throw Refused(string(name) + " must be contiguous float32 " + shape_text(shape) + ", got " +
                          array.described());
        };
        check("x", tokens, {num_tokens, groups_ * size_});
        check("out", sums, {groups_, num_tokens, width_});
        check_some_tokens(num_tokens);
        const size_t row_bytes = part_bytes(encoding_, width_);
        std::vector<AccumulateArgs> products;
        products.reserve(groups_);
        for (size_t j = 0; j < groups_; ++j) {
            // zeros are taken too: an infinite or NaN weight must show, as it does in torch's products
            products.push_back({{base_ + j * size_ * row_bytes, row_bytes, nullptr, size_, width_},
                                tokens.data<const float>() + j * size_, groups_ * size_, num_tokens,
                                sums.data<float>() + j * num_tokens * width_, true});
        }
        nb::gil_scoped_release release;
        run_accumulates(encoding_, products.data(), products.size());
    }

  private:
    EncodingCode encoding_{};
    const unsigned char* base_ = nullptr;
    size_t groups_ = 0, size_ = 0, width_ = 0;
};

std::vector<std::tuple<string, size_t, size_t>> encodings() {
    std::vector<std::tuple<string, size_t, size_t>> all;
    for (const Encoding& each : ENCODINGS) all.emplace_back(each.name, each.group_elements, each.group_bytes);
    return all;
}

}  // namespace

void bind_rows(nb::module_& m) {
    m.attr("MAX_TOKENS") = MAX_TOKENS;
    m.def("encodings", &encodings, "(name, elements of a group, bytes of a group) of each, by code.");
    using Slots = nb::handle;
    nb::class_<RowFormat>(m, "RowFormat", "What rows are made of.")
        .def(nb::init<size_t, size_t, const RowFormat::Parts&>(), "row_stride_bytes"_a, "width"_a, "parts"_a)
        .def_static("alike", &RowFormat::alike, "row_stride_bytes"_a, "width"_a, "encoding"_a, "num_parts"_a)
        .def_prop_ro("width", &RowFormat::width)
        .def_prop_ro("row_stride_bytes", &RowFormat::stride_bytes)
        .def_prop_ro("num_parts", &RowFormat::num_parts);
    nb::class_<RowBlock>(m, "RowBlock", "Rows in memory, which it keeps.")
        .def(nb::init<const SlotRef&, size_t, const RowFormat&, Slots>(), "memory"_a, "num_rows"_a, "format"_a,
             "slots"_a.none() = nb::none())
        .def(nb::init<nb::handle, size_t, const RowFormat&, Slots>(), "memory"_a, "num_rows"_a, "format"_a,
             "slots"_a.none() = nb::none())
        .def_prop_ro("num_rows", &RowBlock::num_rows)
        .def_prop_ro("width", &RowBlock::width)
        .def_prop_ro("row_stride_bytes", &RowBlock::stride_bytes)
        .def_prop_ro("num_parts", &RowBlock::num_parts);
    m.def("has_int8_matrix",
          [](unsigned code) { return code < NUM_ENCODINGS && has_int8_matrix(static_cast<EncodingCode>(code)); }, "encoding"_a,
          "Whether more than MAX_TOKENS tokens in 8 bits can be multiplied with parts of an encoding.");
    m.def("matrix_rows", &RowBlock::of_matrix, "matrix"_a, "num_parts"_a, "slots"_a.none(), "The rows of a matrix.");
    m.def("project", &project, "x"_a, "rows"_a, "part"_a, "out"_a, "bias"_a.none() = nb::none(),
          "out[t, r] = x[t] . row[r].part (+ bias[r])");
    nb::class_<QuantizedTokens>(m, "QuantizedTokens", "Tokens in 8 bits, each 32 elements with an fp32 scale.")
        .def(nb::init<nb::handle>(), "x"_a)
        .def("project", &QuantizedTokens::project, "rows"_a, "part"_a, "out"_a, "bias"_a.none() = nb::none(),
             "out[t, r] = token t . row[r].part (+ bias[r])")
        .def("project_blocks", &QuantizedTokens::project_blocks, "blocks"_a, "part"_a, "out"_a, "biases"_a,
             "As `project_blocks`.")
        .def("widen", &QuantizedTokens::widen, "out"_a, "out[t] = token t as float32");
    m.def("accumulate", &accumulate, "h"_a, "rows"_a, "y"_a, "y[t] += sum over r of h[t, r] * row[r].down");
    m.def("widen", &widen, "rows"_a, "part"_a, "dst"_a, "dst[r] = row[r].part as float32");
    m.def("quantize_q8_0", &quantize_rows, "source"_a, "target"_a, "target[r] = source[r] as q8_0");
    m.def("linear", &linear, "x"_a, "weight"_a, "bias"_a.none(), "out"_a, "out[t, r] = x[t] . weight[r] (+ bias[r])");
    m.def("project_blocks", &project_blocks, "x"_a, "blocks"_a, "part"_a, "out"_a, "biases"_a,
          "out[b, r] = x or x[b] . row[r].part (+ bias[r]) of several blocks, in one job");
    m.def("accumulate_blocks", &accumulate_blocks, "h"_a, "blocks"_a, "y"_a,
          "y[b] += sum over r of h[b, r] * row[r].down of several blocks, in one job");
    nb::class_<ProductTable>(m, "ProductTable")
        .def(nb::init<const std::vector<nb::handle>&, const std::vector<std::pair<size_t, size_t>>&,
                      const std::vector<nb::handle>&>(),
             "weights"_a, "starts"_a, "biases"_a)
        .def("project", &ProductTable::project, "x"_a, "out"_a);
    nb::class_<GroupTable>(m, "GroupTable")
        .def(nb::init<nb::handle>(), "weight"_a)
        .def("accumulate", &GroupTable::accumulate, "x"_a, "out"_a);
    m.def("simd_level", [] { return string(level().name); }, "Name of the instruction set in use.");
    m.def("simd_levels", &simd_levels, "Instruction sets that this machine supports, best first.");
    m.def("set_simd_level", [](nb::object name) { set_simd_level(name.is_none() ? "" : nb::cast<string>(name)); },
          "name"_a.none(), nb::sig("def set_simd_level(name: str | None) -> None"),
          "Use this instruction set; None: the default one again.");
    m.def("num_threads", &num_threads, "Threads that a kernel may use, the caller included.");
    m.def("set_num_threads", &set_num_threads, "num_threads"_a, "Set them; at least 1.");
}

}  // namespace flashlm
