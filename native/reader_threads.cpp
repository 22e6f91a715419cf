// A pool of threads with `pread`, for kernels and containers that refuse io_uring and for systems other than Linux.
#include "reader.h"

#include <errno.h>
#include <unistd.h>

#include <thread>

namespace flashlm {

namespace {

class ThreadReader final : public Reader {
  public:
    ThreadReader(std::size_t num_threads, std::size_t piece_bytes) : Reader(num_threads, piece_bytes) {
        try {
            for (std::size_t index = 0; index < num_threads; ++index) threads_.emplace_back([this] { serve(); });
        } catch (...) {
            end_threads();  // a running thread that is not joined would end the process
            throw;
        }
    }
    ~ThreadReader() override {
        drain();
        end_threads();
    }

    const char* backend() const override { return "threads"; }

  protected:
    void start_pieces(Lock&) override { wanted_.notify_all(); }

    void make_progress(Lock& lock, std::chrono::milliseconds timeout) override {
        if (timeout.count()) landed_.wait_for(lock, timeout);
    }

  private:
    void end_threads() {
        {
            Lock lock(mutex_);
            is_closing_ = true;
        }
        wanted_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    void serve() {
        Lock lock(mutex_);
        for (;;) {
            wanted_.wait(lock, [this] { return is_closing_ || !pending_.empty(); });
            if (pending_.empty()) return;
            std::unique_ptr<Piece> piece = std::move(pending_.front());
            pending_.pop_front();
            ++in_flight_;
            bool goes_on = true;
            while (goes_on) {
                lock.unlock();
                if (needs_pause(*piece)) std::this_thread::sleep_for(RETRY_PAUSE);
                const auto offset = static_cast<off_t>(piece->offset + piece->landed);
                const ssize_t count =
                    piece->address ? pread(piece->file->fd, piece->address + piece->landed,
                                           piece->length - piece->landed, offset)
                                   : preadv(piece->file->fd, piece->parts.data(), static_cast<int>(piece->parts.size()),
                                            offset);
                const long result = count < 0 ? -errno : static_cast<long>(count);
                lock.lock();
                goes_on = land(*piece, result);
            }
            --in_flight_;
            landed_.notify_all();
        }
    }

    std::condition_variable wanted_;
    bool is_closing_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Reader> make_thread_reader(std::size_t num_threads, std::size_t piece_bytes) {
    return std::make_unique<ThreadReader>(num_threads, piece_bytes);
}

}  // namespace flashlm
