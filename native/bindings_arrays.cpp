#include "bindings_arrays.h"

#include <cstring>

namespace nb = nanobind;

namespace flashlm {
namespace {

// The beginning of DLPack's exchange table, as version 1 of that standard lays it out.
struct ExchangeTable {
    struct Header {
        std::uint32_t major, minor;
        Header* older;
    } header;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*tensor_from_object)(void* object, nb::dlpack::dltensor* out);  // borrows; 0, or -1 and a Python error
};

const ExchangeTable* find_table(PyTypeObject* type) {
    PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    if (!capsule) {
        PyErr_Clear();
        return nullptr;
    }
    const auto* header = static_cast<ExchangeTable::Header*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);  // the table itself lives as long as the process
    if (!header) PyErr_Clear();
    while (header && header->major != 1) header = header->older;
    return reinterpret_cast<const ExchangeTable*>(header);
}

// The tables of the types seen last; a type is kept, so that its address can't become another one's. Under the GIL.
const ExchangeTable* table_of(PyTypeObject* type) {
    struct Known {
        PyTypeObject* type;
        const ExchangeTable* table;
    };
    static Known known[4] = {};
    static std::size_t next = 0;
    for (const Known& each : known) {
        if (each.type == type) return each.table;
    }
    Known& place = known[next++ % 4];
    PyTypeObject* before = place.type;
    Py_INCREF(type);
    place = {type, find_table(type)};
    const ExchangeTable* found = place.table;
    Py_XDECREF(before);
    return found;
}

}  // namespace

bool Array::view_tensor(const nb::dlpack::dltensor& tensor) {
    num_dims_ = static_cast<std::size_t>(tensor.ndim);
    if (num_dims_ > MAX_DIMS) return false;
    dtype_ = tensor.dtype;
    is_on_cpu_ = tensor.device.device_type == nb::device::cpu::value;
    data_ = is_on_cpu_ && tensor.data ? static_cast<char*>(tensor.data) + tensor.byte_offset : nullptr;
    std::int64_t stride = 1;
    for (std::size_t dim = num_dims_; dim-- > 0;) {
        shape_[dim] = tensor.shape[dim];
        strides_[dim] = tensor.strides ? tensor.strides[dim] : stride;
        stride *= shape_[dim];
    }
    return true;
}

Array::Array(nb::handle source, const char* name) : source_(source) {
    if (!view(source)) {
        throw Refused(std::string(name) + " must be a tensor, got " + nb::str(source.type()).c_str());
    }
}

bool Array::view(nb::handle source) {
    if (const ExchangeTable* table = table_of(Py_TYPE(source.ptr()))) {
        nb::dlpack::dltensor tensor;
        if (table->tensor_from_object(source.ptr(), &tensor) == 0) return view_tensor(tensor);
        PyErr_Clear();  // a tensor of a device that DLPack does not know, or without memory
        return true;
    }
    if (source.is_none()) return false;
    nb::object plain = nb::borrow(source);
    if (nb::hasattr(source, "detach")) plain = source.attr("detach")();  // `__dlpack__` refuses what wants gradients
    nb::ndarray<> array;
    if (!nb::try_cast(plain, array, false)) return nb::hasattr(source, "__dlpack__");
    nb::dlpack::dltensor tensor{};
    tensor.data = array.data();
    tensor.device = {array.device_type(), array.device_id()};
    tensor.ndim = static_cast<std::int32_t>(array.ndim());
    tensor.dtype = array.dtype();
    tensor.shape = const_cast<std::int64_t*>(array.shape_ptr());
    tensor.strides = const_cast<std::int64_t*>(array.stride_ptr());
    if (!view_tensor(tensor)) return false;
    owner_ = std::move(plain);
    return true;
}

std::size_t Array::num_elements() const {
    std::size_t count = 1;
    for (std::size_t dim = 0; dim < num_dims_; ++dim) count *= size(dim);
    return count;
}

bool Array::has_shape(std::initializer_list<std::size_t> shape) const {
    if (shape.size() != num_dims_) return false;
    std::size_t dim = 0;
    for (const std::size_t wanted : shape) {
        if (size(dim++) != wanted) return false;
    }
    return true;
}

bool Array::is_contiguous() const {
    std::int64_t stride = 1;
    bool is = true;
    for (std::size_t dim = num_dims_; dim-- > 0;) {
        is &= shape_[dim] == 1 || strides_[dim] == stride;
        stride *= shape_[dim];
    }
    return is || stride == 0;  // without elements in any case
}

std::size_t Array::extent_bytes() const {
    std::size_t last = 0;
    for (std::size_t dim = 0; dim < num_dims_; ++dim) {
        if (shape_[dim] == 0) return 0;
        if (strides_[dim] > 0) last += (size(dim) - 1) * stride(dim);
    }
    return (last + 1) * element_bytes();
}

std::string Array::described() const {
    const auto text = [](nb::handle value) { return std::string(nb::str(value).c_str()); };
    try {
        std::string shape;
        std::size_t num_dims = 0;
        for (const nb::handle size : source_.attr("shape")) shape += (num_dims++ ? ", " : "") + text(size);
        std::string found = text(source_.attr("dtype")) + " (" + shape + (num_dims == 1 ? ",)" : ")");
        if (nb::hasattr(source_, "device")) found += " on " + text(source_.attr("device"));
        if (nb::hasattr(source_, "stride")) found += " with strides " + text(source_.attr("stride")());
        return found;
    } catch (nb::python_error&) {
        return text(source_.type());
    }
}

std::string shape_text(std::initializer_list<std::size_t> shape) {
    std::string text = "(";
    for (const std::size_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + (shape.size() == 1 ? ",)" : ")");
}

void register_refusals() {
    nb::register_exception_translator(
        [](const std::exception_ptr& error, void*) {
            try {
                std::rethrow_exception(error);
            } catch (const Refused& refused) {
                PyErr_SetString(nb::module_::import_("flashlm.errors").attr("ConfigError").ptr(), refused.what());
            }
        });
}

}  // namespace flashlm
