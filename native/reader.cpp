#include "reader.h"

#include <errno.h>

#include <algorithm>

namespace flashlm {

namespace {

constexpr unsigned MAX_RESTARTS = 16;  // a bad address gives EFAULT, too
constexpr unsigned MAX_RETRIES = 1000;  // of what passes by itself (EAGAIN, EINTR), without a byte: about a second
constexpr unsigned MAX_QUICK_RETRIES = 16;  // the others pause before
constexpr std::size_t MAX_PARTS = 1024;  // IOV_MAX of Linux and macOS

// Drops the first `landed` bytes of a scattered read's destinations.
void advance(std::vector<iovec>& parts, std::uint64_t landed) {
    std::size_t done = 0;
    while (done < parts.size() && landed >= parts[done].iov_len) landed -= parts[done++].iov_len;
    parts.erase(parts.begin(), parts.begin() + static_cast<std::ptrdiff_t>(done));
    if (landed == 0 || parts.empty()) return;
    parts[0].iov_base = static_cast<unsigned char*>(parts[0].iov_base) + landed;
    parts[0].iov_len -= landed;
}

struct FileCloser {
    void operator()(File* file) const {
        close_file(*file);
        delete file;
    }
};

std::atomic<std::uint64_t> num_readers = 0;

}  // namespace

Reader::Reader(std::size_t queue_depth, std::size_t piece_bytes)
    : queue_depth_(queue_depth), piece_bytes_(piece_bytes), id_(++num_readers) {}

std::uint64_t Reader::add_file(File file) {
    std::shared_ptr<File> shared(new File(std::move(file)), FileCloser());
    Lock lock(mutex_);
    files_[next_file_] = std::move(shared);
    return next_file_++;
}

std::shared_ptr<const File> Reader::file(std::uint64_t file_id) {
    Lock lock(mutex_);
    const auto found = files_.find(file_id);
    if (found == files_.end()) throw std::invalid_argument("the file is closed");
    return found->second;
}

void Reader::remove_file(std::uint64_t file_id) {
    Lock lock(mutex_);
    files_.erase(file_id);
}

const std::shared_ptr<File>& Reader::check(const Request& request, std::size_t index) const {
    const auto found = files_.find(request.file_id);
    if (found == files_.end()) throw RefusedRequest(index, "the file is closed");
    const File& file = *found->second;
    const bool is_aligned = request.offset % file.alignment == 0 && request.length % file.alignment == 0 &&
                            request.address % file.memory_alignment == 0;
    if (is_aligned && request.length > 0 && request.address != 0) return found->second;
    throw RefusedRequest(index, "misaligned or empty: offset and length must be multiples of " +
                                    std::to_string(file.alignment) + ", the address of " +
                                    std::to_string(file.memory_alignment) + "; the address is " +
                                    std::to_string(request.address));
}

void Reader::check(const Ticket& ticket, bool may_be_new) const {
    if (ticket.reader_id == id_ || (may_be_new && ticket.reader_id == 0)) return;
    throw std::invalid_argument(ticket.reader_id ? "the ticket is of another reader" : "nothing was begun for this ticket");
}

// From here on the ticket answers for what is begun.
void Reader::own(Ticket& ticket, Memory memory) const {
    for (auto& each : memory) ticket.memory.push_back(std::move(each));
    ticket.reader_id = id_;
}

void Reader::submit(const std::shared_ptr<Ticket>& ticket, const std::vector<Request>& requests, Memory memory) {
    Lock lock(mutex_);
    if (is_drained_) throw std::invalid_argument("the reader is closed");
    check(*ticket, true);
    for (std::size_t index = 0; index < requests.size(); ++index) check(requests[index], index);
    own(*ticket, std::move(memory));
    for (const Request& request : requests) {
        const auto& file = files_[request.file_id];
        for (std::uint64_t done = 0; done < request.length; done += piece_bytes_) {
            const std::uint64_t length = std::min<std::uint64_t>(piece_bytes_, request.length - done);
            auto* address = reinterpret_cast<unsigned char*>(request.address + done);
            pending_.push_back(std::make_unique<Piece>(Piece{file, ticket, request.offset + done, length, address}));
            ++ticket->pieces_left;
        }
    }
    start_pieces(lock);
}

void Reader::submit_scatter(const std::shared_ptr<Ticket>& ticket, std::vector<ScatterRequest> requests, Memory memory) {
    Lock lock(mutex_);
    if (is_drained_) throw std::invalid_argument("the reader is closed");
    check(*ticket, true);
    std::vector<std::uint64_t> lengths(requests.size(), 0);
    for (std::size_t index = 0; index < requests.size(); ++index) {
        const ScatterRequest& request = requests[index];
        if (request.parts.empty() || request.parts.size() > MAX_PARTS) {
            throw RefusedRequest(index, "a scattered read has 1 to " + std::to_string(MAX_PARTS) + " parts");
        }
        std::uint64_t offset = request.offset;
        for (const iovec& part : request.parts) {
            check({request.file_id, offset, part.iov_len, reinterpret_cast<std::uint64_t>(part.iov_base)}, index);
            offset += part.iov_len;
        }
        lengths[index] = offset - request.offset;
    }
    own(*ticket, std::move(memory));
    for (std::size_t index = 0; index < requests.size(); ++index) {
        ScatterRequest& request = requests[index];
        const auto& file = files_[request.file_id];
        pending_.push_back(std::make_unique<Piece>(
            Piece{file, ticket, request.offset, lengths[index], nullptr, 0, 0, 0, std::move(request.parts)}));
        ++ticket->pieces_left;
    }
    start_pieces(lock);
}

bool Reader::is_done(const Ticket& ticket) {
    Lock lock(mutex_);
    check(ticket, false);
    if (ticket.pieces_left) make_progress(lock, std::chrono::milliseconds(0));
    return ticket.pieces_left == 0;
}

WaitResult Reader::wait(const Ticket& ticket, std::chrono::milliseconds timeout, Failure& failure) {
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    Lock lock(mutex_);
    check(ticket, false);
    while (ticket.pieces_left) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline -
                                                                                std::chrono::steady_clock::now());
        if (left.count() <= 0) return WaitResult::timed_out;
        make_progress(lock, left);
    }
    if (!ticket.has_failed) return WaitResult::done;
    failure = ticket.failure;
    return WaitResult::failed;
}

void Reader::drain() {
    Lock lock(mutex_);
    is_drained_ = true;
    cancel_pending();
    while (in_flight_) {
        make_progress(lock, std::chrono::milliseconds(100));
        cancel_pending();  // rests of partial reads
    }
    files_.clear();
}

void Reader::cancel_pending() {
    for (const auto& piece : pending_) fail(*piece, ECANCELED, piece->landed);
    pending_.clear();
    landed_.notify_all();
}

bool Reader::land(Piece& piece, long result) {
    if ((result == -EINTR || result == -EAGAIN) && piece.num_retries < MAX_RETRIES) {
        ++piece.num_retries;
        return true;
    }
    // io_uring fails reads so whose submitting thread ended before they did; another thread begins them again.
    const bool is_orphaned = result == -ECANCELED || result == -EFAULT;
    if (is_orphaned && piece.num_restarts < MAX_RESTARTS) {
        ++piece.num_restarts;
        return true;
    }
    ++num_reads_;
    const std::uint64_t wanted = piece.length - piece.landed;
    if (result > 0) {
        std::uint64_t usable = static_cast<std::uint64_t>(result);
        bytes_read_ += usable;
        if (usable < wanted) usable -= usable % piece.file->alignment;  // go on where a read may start
        piece.landed += usable;
        piece.num_retries = 0;
        if (!piece.address) advance(piece.parts, usable);
        if (piece.landed == piece.length) {
            finish_piece(*piece.ticket);
            return false;
        }
        if (usable > 0) return true;
    }
    fail(piece, result < 0 ? static_cast<int>(-result) : 0,
         piece.landed + (result > 0 ? static_cast<std::uint64_t>(result) : 0));
    return false;
}

void Reader::fail(const Piece& piece, int error, std::uint64_t got) {
    Ticket& ticket = *piece.ticket;
    // The first place of a file: where it ended, or where its device begins to fail.
    const bool is_earlier = ticket.failure.path == piece.file->path && ticket.failure.offset > piece.offset;
    if (!ticket.has_failed || is_earlier) ticket.failure = {error, piece.file->path, piece.offset, piece.length, got};
    ticket.has_failed = true;
    finish_piece(ticket);
}

void Reader::finish_piece(Ticket& ticket) {
    if (--ticket.pieces_left == 0) ticket.memory.clear();
}

bool Reader::needs_pause(const Piece& piece) { return piece.num_retries > MAX_QUICK_RETRIES; }

std::uint64_t Reader::bytes_read() {
    Lock lock(mutex_);
    return bytes_read_;
}

std::uint64_t Reader::num_reads() {
    Lock lock(mutex_);
    return num_reads_;
}

}  // namespace flashlm
