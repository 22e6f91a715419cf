// Python face of the reader: numbers in, numbers out; `flashlm.storage.reader` gives them types and errors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "bindings_arrays.h"
#include "buffer.h"
#include "reader.h"
#include "row_reads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashlm {
namespace {

// File id, offset, length, buffer, offset in the buffer.
using RawRequest = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, const AlignedBuffer*, std::uint64_t>;

constexpr std::chrono::milliseconds SIGNAL_CHECK_EVERY{100};

// Owns a native reader; `close` ends it early, and every later call says so. `reader_` changes hands under the GIL only; a
// call that releases the GIL holds a share, so a `close` by another thread does not take the reader from under it.
//
// A forked child has neither the threads nor a ring of its own: taking a completion there would rob the parent. It may not
// use the reader and leaves it alone when it ends.
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
        backend_ = reader_->backend();
    }
    ~ReaderHandle() {
        if (is_forked()) new std::shared_ptr<Reader>(std::move(reader_));
    }
    ReaderHandle(const ReaderHandle&) = delete;
    ReaderHandle& operator=(const ReaderHandle&) = delete;

    std::shared_ptr<Reader> get() const {
        if (is_forked()) throw std::invalid_argument("the reader belongs to the process that this one was forked from");
        if (!reader_) throw std::invalid_argument("the reader is closed");
        return reader_;
    }
    bool is_usable() const { return reader_ && !is_forked(); }
    std::string backend() const { return backend_; }
    std::string refusal() const { return refusal_ ? std::strerror(refusal_) : ""; }
    void close() {
        if (!is_usable()) return;
        std::shared_ptr<Reader> reader = reader_;
        {
            nb::gil_scoped_release release;
            reader->drain();
        }
        if (!reader_) return;  // another thread closed it meanwhile
        bytes_read_ = reader->bytes_read();
        num_reads_ = reader->num_reads();
        reader_.reset();
    }
    std::uint64_t bytes_read() const { return is_usable() ? reader_->bytes_read() : bytes_read_; }
    std::uint64_t num_reads() const { return is_usable() ? reader_->num_reads() : num_reads_; }

  private:
    bool is_forked() const { return getpid() != pid_; }

    const pid_t pid_ = getpid();
    int refusal_ = 0;
    std::string backend_;
    std::shared_ptr<Reader> reader_;
    std::uint64_t bytes_read_ = 0;  // of a closed reader
    std::uint64_t num_reads_ = 0;
};

std::tuple<int, std::uint64_t> open(ReaderHandle& handle, const std::string& path, bool direct) {
    const std::shared_ptr<Reader> reader = handle.get();
    nb::gil_scoped_release release;
    File file;
    if (const int error = open_file(path, direct, file)) return {error, 0};
    return {0, reader->add_file(std::move(file))};
}

// Closing the reader has closed its files.
void close_file_of(ReaderHandle& handle, std::uint64_t file_id) {
    if (handle.is_usable()) handle.get()->remove_file(file_id);
}

std::tuple<std::uint64_t, bool, std::uint32_t> file_info(ReaderHandle& handle, std::uint64_t file_id) {
    const std::shared_ptr<const File> file = handle.get()->file(file_id);
    return {file->num_bytes, file->is_direct, file->alignment};
}

// What Python holds of a ticket. Pieces in flight share the state and not this object: they end on other threads, which
// may not touch a reference count of Python's.
struct TicketHandle {
    const std::shared_ptr<Ticket> state = std::make_shared<Ticket>();
    std::uint64_t num_reads = 0;  // of scattered rows: what they became
    std::uint64_t num_bytes = 0;  // gaps that are read through included
};

std::uint64_t address_in(const AlignedBuffer* buffer, std::uint64_t offset, std::uint64_t length) {
    if (!buffer || offset > buffer->num_bytes() || length > buffer->num_bytes() - offset) {
        throw std::invalid_argument("a read must land within its buffer");
    }
    return reinterpret_cast<std::uint64_t>(buffer->data()) + offset;
}

// Raises ValueError(why, index of the refused request).
void begin(ReaderHandle& handle, const TicketHandle& ticket, const std::vector<Request>& requests, Memory memory) {
    const std::shared_ptr<Reader> reader = handle.get();
    try {
        nb::gil_scoped_release release;
        reader->submit(ticket.state, requests, std::move(memory));
    } catch (const RefusedRequest& refused) {
        PyErr_SetObject(PyExc_ValueError, nb::make_tuple(refused.what(), refused.index).ptr());
        throw nb::python_error();
    }
}

void submit(ReaderHandle& handle, const TicketHandle& ticket, const std::vector<RawRequest>& raw) {
    std::vector<Request> requests;
    requests.reserve(raw.size());
    Memory memory;
    const AlignedBuffer* last = nullptr;
    for (const auto& [file_id, offset, length, buffer, at] : raw) {
        requests.push_back({file_id, offset, length, address_in(buffer, at, length)});
        if (buffer != last) memory.push_back(buffer->share());
        last = buffer;
    }
    begin(handle, ticket, requests, std::move(memory));
}

void submit_one(ReaderHandle& handle, const TicketHandle& ticket, std::uint64_t file_id, std::uint64_t offset,
                std::uint64_t length, const AlignedBuffer& buffer, std::uint64_t at) {
    begin(handle, ticket, {{file_id, offset, length, address_in(&buffer, at, length)}}, {buffer.share()});
}

// Rows to buffer + buffer_offset + slot * row_stride, gaps to the buffer's last row_stride bytes. Raises ValueError like `begin`.
void submit_rows(ReaderHandle& handle, TicketHandle& ticket, std::uint64_t file_id, std::uint64_t row_stride,
                 std::uint64_t block_rows, std::uint64_t block_stride, nb::handle rows, nb::handle slots,
                 const AlignedBuffer& buffer, std::uint64_t buffer_offset, std::size_t max_gap, std::size_t max_bytes) {
    const std::shared_ptr<Reader> reader = handle.get();
    if (!row_stride || !block_rows) throw std::invalid_argument("row_stride and block_rows must be above zero");
    const Array wanted(rows, "rows"), places(slots, "slots");
    for (const auto& [array, name] : {std::pair(&wanted, "rows"), std::pair(&places, "slots")}) {
        if (array->is_plain<std::int32_t>() && array->num_dims() == 1) continue;
        throw Refused(std::string(name) + " must be contiguous int32 (num_rows,), got " + array->described());
    }
    const std::size_t num_rows = wanted.size(0);
    if (places.size(0) != num_rows || !num_rows) {
        throw Refused(std::to_string(num_rows) + " rows and " + std::to_string(places.size(0)) +
                      " slots: they must be as many, and at least one");
    }
    const auto* row = wanted.data<const std::int32_t>();
    const auto* slot = places.data<const std::int32_t>();
    const auto [low, high] = std::minmax_element(slot, slot + num_rows);
    const std::uint64_t before_scratch = buffer.num_bytes() >= row_stride ? buffer.num_bytes() - row_stride : 0;
    const std::uint64_t room = buffer_offset <= before_scratch ? (before_scratch - buffer_offset) / row_stride : 0;
    if (*low < 0 || static_cast<std::uint64_t>(*high) >= room) {
        throw Refused("slots " + std::to_string(*low) + " to " + std::to_string(*high) + " do not fit a buffer of " +
                      std::to_string(buffer.num_bytes()) + " bytes");
    }
    const std::uint64_t slab = address_in(&buffer, buffer_offset, 0);
    const std::uint64_t scratch = address_in(&buffer, before_scratch, row_stride);
    try {
        nb::gil_scoped_release release;
        RowReads reads = plan_row_reads({file_id, row_stride, block_rows, block_stride},
                                        row, slot, num_rows, reinterpret_cast<unsigned char*>(slab),
                                        reinterpret_cast<unsigned char*>(scratch), max_gap, max_bytes);
        const std::size_t num_reads = reads.requests.size();
        reader->submit_scatter(ticket.state, std::move(reads.requests), {buffer.share()});
        ticket.num_reads += num_reads;
        ticket.num_bytes += reads.num_bytes;
    } catch (const RefusedRequest& refused) {
        PyErr_SetObject(PyExc_ValueError, nb::make_tuple(refused.what(), refused.index).ptr());
        throw nb::python_error();
    }
}

bool is_done(ReaderHandle& handle, const TicketHandle& ticket) {
    const std::shared_ptr<Reader> reader = handle.get();
    nb::gil_scoped_release release;
    return reader->is_done(*ticket.state);
}

// Returns None, or (errno, path, offset, wanted, got) of the ticket's first failure. Signals are served meanwhile.
nb::object wait(ReaderHandle& handle, const TicketHandle& ticket) {
    const std::shared_ptr<Reader> reader = handle.get();
    Failure failure;
    for (;;) {
        WaitResult result;
        {
            nb::gil_scoped_release release;
            result = reader->wait(*ticket.state, SIGNAL_CHECK_EVERY, failure);
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
    nb::class_<TicketHandle>(m, "Ticket")
        .def(nb::init<>())
        .def_prop_ro("is_in_flight", [](const TicketHandle& self) { return self.state->pieces_left != 0; })
        .def_ro("num_reads", &TicketHandle::num_reads)
        .def_ro("num_bytes", &TicketHandle::num_bytes);
    nb::class_<ReaderHandle>(m, "Reader")
        .def(nb::init<const std::string&, std::size_t, std::size_t, std::size_t>(), "backend"_a, "queue_depth"_a,
             "num_threads"_a, "piece_bytes"_a)
        .def_prop_ro("backend", &ReaderHandle::backend)
        .def_prop_ro("refusal", &ReaderHandle::refusal)
        .def_prop_ro("bytes_read", &ReaderHandle::bytes_read)
        .def_prop_ro("num_reads", &ReaderHandle::num_reads)
        .def("open", &open, "path"_a, "direct"_a, "(errno, 0) or (0, file id).")
        .def("file_info", &file_info, "file_id"_a, "(bytes, is direct, alignment).")
        .def("close_file", &close_file_of, "file_id"_a)
        .def("submit", &submit, "ticket"_a, "requests"_a)
        .def("submit_one", &submit_one, "ticket"_a, "file_id"_a, "offset"_a, "length"_a, "buffer"_a, "buffer_offset"_a)
        .def("submit_rows", &submit_rows, "ticket"_a, "file_id"_a, "row_stride"_a, "block_rows"_a, "block_stride"_a,
             "rows"_a, "slots"_a, "buffer"_a, "buffer_offset"_a, "max_gap"_a, "max_bytes"_a)
        .def("is_done", &is_done, "ticket"_a)
        .def("wait", &wait, "ticket"_a)
        .def("close", &ReaderHandle::close);
}

}  // namespace flashlm
