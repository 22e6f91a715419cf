#include "reader.h"

#include <errno.h>

#include <algorithm>
#include <stdexcept>

namespace flashlm {

namespace {

struct FileCloser {
    void operator()(File* file) const {
        close_file(*file);
        delete file;
    }
};

}  // namespace

std::uint64_t Reader::add_file(File file) {
    std::shared_ptr<File> shared(new File(std::move(file)), FileCloser());
    Lock lock(mutex_);
    files_[next_file_] = std::move(shared);
    return next_file_++;
}

const File& Reader::file(std::uint64_t file_id) {
    Lock lock(mutex_);
    const auto found = files_.find(file_id);
    if (found == files_.end()) throw std::invalid_argument("the file is closed");
    return *found->second;
}

void Reader::remove_file(std::uint64_t file_id) {
    Lock lock(mutex_);
    files_.erase(file_id);
}

void Reader::check(const Request& request, const File& file) const {
    const bool is_aligned = request.offset % file.alignment == 0 && request.length % file.alignment == 0 &&
                            request.address % file.memory_alignment == 0;
    if (is_aligned && request.length > 0 && request.address != 0) return;
    throw std::invalid_argument(file.path + ": misaligned read of " + std::to_string(request.length) +
                                " bytes at offset " + std::to_string(request.offset) + " to address " +
                                std::to_string(request.address) + ": offset and length must be multiples of " +
                                std::to_string(file.alignment) + ", the address of " +
                                std::to_string(file.memory_alignment) + ", and nothing may be empty");
}

std::uint64_t Reader::submit(const std::vector<Request>& requests) {
    Lock lock(mutex_);
    for (const Request& request : requests) {
        const auto found = files_.find(request.file_id);
        if (found == files_.end()) throw std::invalid_argument("the file is closed");
        check(request, *found->second);
    }
    auto ticket = std::make_shared<Ticket>();
    for (const Request& request : requests) {
        const auto& file = files_[request.file_id];
        for (std::uint64_t done = 0; done < request.length; done += piece_bytes_) {
            const std::uint64_t length = std::min<std::uint64_t>(piece_bytes_, request.length - done);
            auto* address = reinterpret_cast<unsigned char*>(request.address + done);
            pending_.push_back(std::make_unique<Piece>(Piece{file, ticket, request.offset + done, length, address}));
            ++ticket->pieces_left;
        }
    }
    const std::uint64_t id = next_ticket_++;
    tickets_[id] = std::move(ticket);
    start_pieces(lock);
    return id;
}

bool Reader::is_done(std::uint64_t id) {
    Lock lock(mutex_);
    const auto found = tickets_.find(id);
    if (found == tickets_.end()) return true;
    if (found->second->pieces_left) make_progress(lock, std::chrono::milliseconds(0));
    return found->second->pieces_left == 0;
}

WaitResult Reader::wait(std::uint64_t id, std::chrono::milliseconds timeout, Failure& failure) {
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    Lock lock(mutex_);
    const auto found = tickets_.find(id);
    if (found == tickets_.end()) return WaitResult::done;
    const std::shared_ptr<Ticket> ticket = found->second;
    while (ticket->pieces_left) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline -
                                                                                std::chrono::steady_clock::now());
        if (left.count() <= 0) return WaitResult::timed_out;
        make_progress(lock, left);
    }
    tickets_.erase(id);
    if (!ticket->has_failed) return WaitResult::done;
    failure = ticket->failure;
    return WaitResult::failed;
}

void Reader::drain() {
    Lock lock(mutex_);
    pending_.clear();
    while (in_flight_) {
        make_progress(lock, std::chrono::milliseconds(100));
        pending_.clear();  // rests of partial reads
    }
}

bool Reader::land(Piece& piece, long result) {
    if (result == -EINTR || result == -EAGAIN) return true;
    ++num_reads_;
    const std::uint64_t wanted = piece.length - piece.landed;
    if (result > 0) {
        std::uint64_t usable = static_cast<std::uint64_t>(result);
        bytes_read_ += usable;
        if (usable < wanted) usable -= usable % piece.file->alignment;  // go on where a read may start
        piece.landed += usable;
        if (piece.landed == piece.length) {
            --piece.ticket->pieces_left;
            return false;
        }
        if (usable > 0) return true;
    }
    if (!piece.ticket->has_failed) {
        const std::uint64_t got = piece.landed + (result > 0 ? static_cast<std::uint64_t>(result) : 0);
        piece.ticket->has_failed = true;
        piece.ticket->failure = {result < 0 ? static_cast<int>(-result) : 0, piece.file->path, piece.offset,
                                 piece.length, got};
    }
    --piece.ticket->pieces_left;
    return false;
}

std::uint64_t Reader::bytes_read() {
    Lock lock(mutex_);
    return bytes_read_;
}

std::uint64_t Reader::num_reads() {
    Lock lock(mutex_);
    return num_reads_;
}

}  // namespace flashlm
