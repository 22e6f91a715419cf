// io_uring straight on the kernel's interface: two shared rings and two system calls, nothing to install.
//
// The kernel carries reads while the caller computes; nobody has to call in for them to land. One thread at a time waits in
// the kernel; others wait for it to say that something landed.
#include "reader.h"

#include <errno.h>

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#define FLASHLM_HAS_URING 1
#include <linux/io_uring.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/time_types.h>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <thread>
#endif

namespace flashlm {

#ifdef FLASHLM_HAS_URING
namespace {

unsigned load_acquire(unsigned* value) { return std::atomic_ref<unsigned>(*value).load(std::memory_order_acquire); }
void store_release(unsigned* value, unsigned to) {
    std::atomic_ref<unsigned>(*value).store(to, std::memory_order_release);
}

// The rings, mapped and unmapped.
class Ring {
  public:
    explicit Ring(unsigned num_entries) {
        io_uring_params params = {};
        params.flags = IORING_SETUP_CQSIZE;
        params.cq_entries = 2 * num_entries;
        fd_ = static_cast<int>(syscall(SYS_io_uring_setup, num_entries, &params));
        if (fd_ < 0) {
            error_ = errno;
            return;
        }
        // Single mapping and extended waits have been there since Linux 5.11; older kernels take the threads.
        const unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_EXT_ARG | IORING_FEAT_NODROP;
        if ((params.features & needed) != needed) {
            error_ = ENOSYS;
            return;
        }
        map(params);
    }
    ~Ring() {
        if (entries_) munmap(entries_, entries_bytes_);
        if (rings_) munmap(rings_, rings_bytes_);
        if (fd_ >= 0) close(fd_);
    }
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    int error() const { return error_; }

    // `opcode` decides what `address` and `length` are: a buffer and its bytes, or iovecs and how many.
    void push(std::uint8_t opcode, int fd, const void* address, std::uint32_t length, std::uint64_t offset,
              std::uint64_t tag) {
        const unsigned tail = *sq_tail_;
        const unsigned index = tail & *sq_mask_;
        io_uring_sqe& entry = entries_[index];
        std::memset(&entry, 0, sizeof entry);
        entry.opcode = opcode;
        entry.fd = fd;
        entry.addr = reinterpret_cast<std::uint64_t>(address);
        entry.len = length;
        entry.off = offset;
        entry.user_data = tag;
        sq_array_[index] = index;
        store_release(sq_tail_, tail + 1);
    }

    // Entries that the kernel has not taken yet.
    unsigned num_unsubmitted() { return *sq_tail_ - load_acquire(sq_head_); }

    // Hands new entries over and, with a timeout, waits for one completion. Returns 0 or an errno.
    int enter(unsigned to_submit, bool wait, std::chrono::milliseconds timeout) {
        __kernel_timespec time = {timeout.count() / 1000, (timeout.count() % 1000) * 1000000};
        io_uring_getevents_arg argument = {};
        argument.sigmask_sz = _NSIG / 8;
        argument.ts = reinterpret_cast<std::uint64_t>(&time);
        const unsigned flags = wait ? IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG : 0;
        const long result = syscall(SYS_io_uring_enter, fd_, to_submit, wait ? 1 : 0, flags, wait ? &argument : nullptr,
                                    wait ? sizeof argument : 0);
        return result < 0 ? errno : 0;
    }

    bool pop(std::uint64_t& tag, int& result) {
        const unsigned head = *cq_head_;
        if (head == load_acquire(cq_tail_)) return false;
        const io_uring_cqe& completion = completions_[head & *cq_mask_];
        tag = completion.user_data;
        result = completion.res;
        store_release(cq_head_, head + 1);
        return true;
    }

  private:
    void map(const io_uring_params& params) {
        const std::size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
        const std::size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
        rings_bytes_ = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
        entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
        const int flags = MAP_SHARED | MAP_POPULATE;
        void* rings = mmap(nullptr, rings_bytes_, PROT_READ | PROT_WRITE, flags, fd_, IORING_OFF_SQ_RING);
        void* entries = mmap(nullptr, entries_bytes_, PROT_READ | PROT_WRITE, flags, fd_, IORING_OFF_SQES);
        if (rings != MAP_FAILED) rings_ = static_cast<unsigned char*>(rings);
        if (entries != MAP_FAILED) entries_ = static_cast<io_uring_sqe*>(entries);
        if (!rings_ || !entries_) {
            error_ = ENOMEM;
            return;
        }
        const auto at = [&](std::uint32_t offset) { return reinterpret_cast<unsigned*>(rings_ + offset); };
        sq_head_ = at(params.sq_off.head);
        sq_tail_ = at(params.sq_off.tail);
        sq_mask_ = at(params.sq_off.ring_mask);
        sq_array_ = at(params.sq_off.array);
        cq_head_ = at(params.cq_off.head);
        cq_tail_ = at(params.cq_off.tail);
        cq_mask_ = at(params.cq_off.ring_mask);
        completions_ = reinterpret_cast<io_uring_cqe*>(rings_ + params.cq_off.cqes);
    }

    int fd_ = -1;
    int error_ = 0;
    unsigned char* rings_ = nullptr;
    std::size_t rings_bytes_ = 0;
    io_uring_sqe* entries_ = nullptr;
    std::size_t entries_bytes_ = 0;
    unsigned *sq_head_ = nullptr, *sq_tail_ = nullptr, *sq_mask_ = nullptr, *sq_array_ = nullptr;
    unsigned *cq_head_ = nullptr, *cq_tail_ = nullptr, *cq_mask_ = nullptr;
    io_uring_cqe* completions_ = nullptr;
};

class UringReader final : public Reader {
  public:
    UringReader(std::size_t queue_depth, std::size_t piece_bytes)
        : Reader(queue_depth, piece_bytes), ring_(static_cast<unsigned>(queue_depth)) {}
    ~UringReader() override { drain(); }

    const char* backend() const override { return "io_uring"; }
    int error() const { return ring_.error(); }

  protected:
    void start_pieces(Lock&) override {
        while (in_flight_ < queue_depth_ && !pending_.empty()) {
            push(pending_.front().release());
            pending_.pop_front();
            ++in_flight_;
        }
        // EAGAIN or EBUSY leave entries in the ring; the next call hands them over.
        if (const unsigned count = ring_.num_unsubmitted()) ring_.enter(count, false, std::chrono::milliseconds(0));
    }

    void make_progress(Lock& lock, std::chrono::milliseconds timeout) override {
        // Completions are left to the thread that waits in the kernel: taken from under it, it would sleep on.
        if (is_polled_) {
            if (timeout.count()) landed_.wait_for(lock, timeout);
            return;
        }
        if (reap(lock)) landed_.notify_all();
        else if (timeout.count()) poll(lock, timeout);
    }

  private:
    void poll(Lock& lock, std::chrono::milliseconds timeout) {
        is_polled_ = true;
        const unsigned to_submit = ring_.num_unsubmitted();
        lock.unlock();
        const int error = ring_.enter(to_submit, true, timeout);
        lock.lock();
        is_polled_ = false;
        reap(lock);
        landed_.notify_all();
        // ETIME and EINTR only end the wait; EAGAIN and EBUSY pass by themselves.
        if (error && error != ETIME && error != EINTR && error != EAGAIN && error != EBUSY) {
            throw std::runtime_error(std::string("io_uring_enter: ") + std::strerror(error));
        }
    }

    void push(Piece* piece) {
        const std::uint64_t left = piece->length - piece->landed, offset = piece->offset + piece->landed;
        const auto tag = reinterpret_cast<std::uint64_t>(piece);
        if (piece->address) {
            ring_.push(IORING_OP_READ, piece->file->fd, piece->address + piece->landed, static_cast<std::uint32_t>(left),
                       offset, tag);
        } else if (piece->parts.size() == 1) {
            const iovec& part = piece->parts[0];
            ring_.push(IORING_OP_READ, piece->file->fd, part.iov_base, static_cast<std::uint32_t>(part.iov_len), offset,
                       tag);
        } else {
            ring_.push(IORING_OP_READV, piece->file->fd, piece->parts.data(),
                       static_cast<std::uint32_t>(piece->parts.size()), offset, tag);
        }
    }

    // Takes all completions; returns whether there was one.
    bool reap(Lock& lock) {
        bool any = false, is_refused = false;
        std::uint64_t tag;
        int result;
        while (ring_.pop(tag, result)) {
            any = true;
            auto* piece = reinterpret_cast<Piece*>(tag);
            --in_flight_;
            if (land(*piece, result)) {
                is_refused |= needs_pause(*piece);
                pending_.emplace_front(piece);
            } else {
                delete piece;
            }
        }
        if (is_refused) std::this_thread::sleep_for(RETRY_PAUSE);  // with the lock: nothing else could be begun either
        if (any) start_pieces(lock);
        return any;
    }

    Ring ring_;
    bool is_polled_ = false;
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(std::size_t queue_depth, std::size_t piece_bytes, int& error) {
    auto reader = std::make_unique<UringReader>(queue_depth, piece_bytes);
    error = reader->error();
    if (error) return nullptr;
    return reader;
}

#else

std::unique_ptr<Reader> make_uring_reader(std::size_t, std::size_t, int& error) {
    error = ENOSYS;
    return nullptr;
}

#endif

}  // namespace flashlm
