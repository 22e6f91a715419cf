// Python face of the reader: numbers in, numbers out; `flashlm.storage.reader` gives them types and errors.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <tuple>

#include "buffer.h"
#include "reader.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashlm {
namespace {

using Bytes = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;
using RawRequest = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>;

constexpr std::chrono::milliseconds SIGNAL_CHECK_EVERY{100};

// Owns a native reader; `close` ends it early, and every later call says so.
class ReaderHandle {
  public:
    ReaderHandle(const std::string& backend, std::size_t queue_depth, std::size_t num_threads,
                 std::size_t piece_bytes) {
        if (!queue_depth || queue_depth > 4096 || !num_threads || num_threads > 1024 || piece_bytes < 4096 ||
            piece_bytes % 4096 || piece_bytes > (std::size_t{1} << 30)) {
            throw std::invalid_argument("queue_depth 1 to 4096, num_threads 1 to 1024, piece_bytes a multiple of 4096");
        }
        if (backend != "auto" && backend != "io_uring" && backend != "threads") {
            throw std::invalid_argument("backend must be auto, io_uring or threads");
        }
        if (backend != "threads") reader_ = make_uring_reader(queue_depth, piece_bytes, refusal_);
        if (!reader_ && backend == "io_uring") {
            throw std::runtime_error(std::string("io_uring is refused here: ") + std::strerror(refusal_));
        }
        if (!reader_) reader_ = make_thread_reader(num_threads, piece_bytes);
    }

    Reader& get() const {
        if (!reader_) throw std::invalid_argument("the reader is closed");
        return *reader_;
    }
    std::string refusal() const { return refusal_ ? std::strerror(refusal_) : ""; }
    void close() { reader_.reset(); }

  private:
    int refusal_ = 0;
    std::unique_ptr<Reader> reader_;
};

std::tuple<int, std::uint64_t> open(ReaderHandle& handle, const std::string& path, bool direct) {
    File file;
    if (const int error = open_file(path, direct, file)) return {error, 0};
    return {0, handle.get().add_file(std::move(file))};
}

std::tuple<std::uint64_t, bool, std::uint32_t> file_info(ReaderHandle& handle, std::uint64_t file_id) {
    const File& file = handle.get().file(file_id);
    return {file.num_bytes, file.is_direct, file.alignment};
}

std::uint64_t submit(ReaderHandle& handle, const std::vector<RawRequest>& raw) {
    std::vector<Request> requests;
    requests.reserve(raw.size());
    for (const auto& [file_id, offset, length, address] : raw) requests.push_back({file_id, offset, length, address});
    nb::gil_scoped_release release;
    return handle.get().submit(requests);
}

std::uint64_t submit_one(ReaderHandle& handle, std::uint64_t file_id, std::uint64_t offset, std::uint64_t length,
                         std::uint64_t address) {
    nb::gil_scoped_release release;
    return handle.get().submit({{file_id, offset, length, address}});
}

// Returns None, or (errno, path, offset, wanted, got) of the ticket's first failure. Signals are served meanwhile.
nb::object wait(ReaderHandle& handle, std::uint64_t ticket) {
    Failure failure;
    for (;;) {
        WaitResult result;
        {
            nb::gil_scoped_release release;
            result = handle.get().wait(ticket, SIGNAL_CHECK_EVERY, failure);
        }
        if (result == WaitResult::done) return nb::none();
        if (result == WaitResult::failed) {
            return nb::make_tuple(failure.error, failure.path, failure.offset, failure.wanted, failure.got);
        }
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
}

}  // namespace

void bind_reader(nb::module_& m) {
    using Release = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<AlignedBuffer>(m, "AlignedBuffer")
        .def(nb::init<std::size_t, bool>(), "num_bytes"_a, "huge_pages"_a = true)
        .def_prop_ro("address", [](const AlignedBuffer& self) { return reinterpret_cast<std::size_t>(self.data()); })
        .def_prop_ro("num_bytes", &AlignedBuffer::num_bytes)
        .def("numpy", [](AlignedBuffer& self) { return Bytes(self.data(), {self.num_bytes()}, nb::find(&self)); },
             nb::rv_policy::reference_internal, "The memory as uint8 (num_bytes,), without a copy.");
    nb::class_<ReaderHandle>(m, "Reader")
        .def(nb::init<const std::string&, std::size_t, std::size_t, std::size_t>(), "backend"_a, "queue_depth"_a,
             "num_threads"_a, "piece_bytes"_a)
        .def_prop_ro("backend", [](const ReaderHandle& self) { return std::string(self.get().backend()); })
        .def_prop_ro("refusal", &ReaderHandle::refusal)
        .def_prop_ro("bytes_read", [](const ReaderHandle& self) { return self.get().bytes_read(); })
        .def_prop_ro("num_reads", [](const ReaderHandle& self) { return self.get().num_reads(); })
        .def("open", &open, "path"_a, "direct"_a, "(errno, 0) or (0, file id).")
        .def("file_info", &file_info, "file_id"_a, "(bytes, is direct, alignment).")
        .def("close_file", [](ReaderHandle& self, std::uint64_t id) { self.get().remove_file(id); }, "file_id"_a)
        .def("submit", &submit, "requests"_a)
        .def("submit_one", &submit_one, "file_id"_a, "offset"_a, "length"_a, "address"_a)
        .def("is_done", [](ReaderHandle& self, std::uint64_t id) { return self.get().is_done(id); }, "ticket"_a,
             Release())
        .def("wait", &wait, "ticket"_a)
        .def("close", &ReaderHandle::close, Release());
}

}  // namespace flashlm
