// Tensors and arrays as arguments of native functions: typed views, checked here and nowhere above.
//
// torch tensors give their shape and place by DLPack's C exchange table (torch 2.10 and later), some 30 ns each; nanobind's own
// `ndarray` calls Python's `__dlpack__`, which takes torch 2.5 us, more than a small product. Whatever has no such
// table (numpy, older torch) takes that way here, too.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "rows/encodings.h"

namespace flashlm {

// A caller's mistake; Python sees flashlm.errors.ConfigError.
struct Refused : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// An array of any element type that the caller keeps alive during the call. Other devices than the CPU give no address.
class Array {
  public:
    // Views a tensor or array. Throws Refused where `source` is neither.
    Array(nanobind::handle source, const char* name);

    std::size_t num_dims() const { return num_dims_; }
    std::size_t size(std::size_t dim) const { return static_cast<std::size_t>(shape_[dim]); }
    std::size_t stride(std::size_t dim) const { return static_cast<std::size_t>(strides_[dim]); }  // elements
    std::size_t num_elements() const;
    std::size_t element_bytes() const { return dtype_.bits / 8u; }
    bool has_shape(std::initializer_list<std::size_t> shape) const;
    bool is_contiguous() const;
    bool is_on_cpu() const { return is_on_cpu_; }
    // The bytes from the first element to the end of the last one.
    std::size_t extent_bytes() const;

    template <class T>
    bool holds() const {
        return is_on_cpu_ && dtype_ == nanobind::dtype<T>();
    }
    bool holds_bf16() const { return is_on_cpu_ && dtype_ == nanobind::dlpack::dtype{4, 16, 1}; }
    bool holds_fp16() const { return is_on_cpu_ && dtype_ == nanobind::dlpack::dtype{2, 16, 1}; }
    // Whether native code may go through it as an array of T: contiguous, on the CPU.
    template <class T>
    bool is_plain() const {
        return holds<T>() && is_contiguous();
    }
    // The encoding of plain elements of 16 or 32 bits, on the CPU; NUM_ENCODINGS where it has another type.
    unsigned encoding() const {
        return holds<float>() ? FP32 : holds_bf16() ? BF16 : holds_fp16() ? FP16 : NUM_ENCODINGS;
    }

    template <class T = void>
    T* data() const {
        return static_cast<T*>(data_);
    }
    // Type, shape, device and strides, for messages.
    std::string described() const;

  private:
    static constexpr std::size_t MAX_DIMS = 8;

    bool view(nanobind::handle source);
    bool view_tensor(const nanobind::dlpack::dltensor& tensor);

    nanobind::handle source_;
    nanobind::object owner_;  // of what was made for this view
    void* data_ = nullptr;
    nanobind::dlpack::dtype dtype_{};
    std::size_t num_dims_ = 0;
    std::int64_t shape_[MAX_DIMS] = {}, strides_[MAX_DIMS] = {};
    bool is_on_cpu_ = false;
};

std::string shape_text(std::initializer_list<std::size_t> shape);

// Makes `Refused` flashlm.errors.ConfigError.
void register_refusals();

}  // namespace flashlm
