// Batches of reads, (file, offset, length -> address), in flight together: the part that is the same for every back end.
//
// A batch belongs to a ticket, which its owner makes before: whatever cuts the owner off while reads are begun, it holds what
// to wait for. Requests are cut into pieces; as many as the queue depth allows are given to the back end at once, the others
// follow as pieces land. A piece that comes back partial is continued; at the end of the file, or on an error, its ticket
// fails with what was wanted and got, and no other ticket is touched. All calls are thread-safe.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "file.h"

namespace flashlm {

struct Request {
    std::uint64_t file_id;
    std::uint64_t offset;
    std::uint64_t length;
    std::uint64_t address;
};

// One stretch of a file that lands in several places, in order. Its length is the sum of the parts'.
struct ScatterRequest {
    std::uint64_t file_id;
    std::uint64_t offset;
    std::vector<iovec> parts;
};

struct Failure {
    int error = 0;  // errno; 0: the file ended too early
    std::string path;
    std::uint64_t offset = 0;
    std::uint64_t wanted = 0;
    std::uint64_t got = 0;
};

// A request that can't be begun; nothing of its batch was.
struct RefusedRequest : std::invalid_argument {
    RefusedRequest(std::size_t index, const std::string& why) : std::invalid_argument(why), index(index) {}
    std::size_t index;  // in its batch
};

enum class WaitResult { done, failed, timed_out };

using Memory = std::vector<std::shared_ptr<const void>>;  // shares of buffers

// Reads under way, of one batch or several. The reader's lock guards it, but for `pieces_left`.
struct Ticket {
    std::atomic<std::uint64_t> pieces_left = 0;
    std::uint64_t reader_id = 0;  // whose reads they are; 0: none was begun
    bool has_failed = false;
    Failure failure;
    Memory memory;  // what reads land in, held until all have
};

class Reader {
  public:
    virtual ~Reader() = default;
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    virtual const char* backend() const = 0;

    std::uint64_t add_file(File file);
    std::shared_ptr<const File> file(std::uint64_t file_id);  // throws std::invalid_argument for an unknown or closed one
    void remove_file(std::uint64_t file_id);  // its descriptor is closed when its last read has landed

    // Begins a batch of `ticket`, which may have others of this reader. `memory` is what it lands in. Throws RefusedRequest
    // for an unknown file or a request that is not aligned as its file needs; nothing of the batch was begun then.
    void submit(const std::shared_ptr<Ticket>& ticket, const std::vector<Request>& requests, Memory memory);
    // The same for stretches with several destinations. They are not cut: each is one read.
    void submit_scatter(const std::shared_ptr<Ticket>& ticket, std::vector<ScatterRequest> requests, Memory memory);
    // Both throw std::invalid_argument for a ticket that has no reads of this reader. Waiting again gives the same again.
    bool is_done(const Ticket& ticket);
    WaitResult wait(const Ticket& ticket, std::chrono::milliseconds timeout, Failure& failure);
    // Lets what is in flight land; what has not been begun fails with ECANCELED, so nobody waits for it for ever. Nothing
    // can be begun afterwards. Called by the destructors of the back ends.
    void drain();

    std::uint64_t bytes_read();
    std::uint64_t num_reads();

  protected:
    struct Piece {
        std::shared_ptr<File> file;
        std::shared_ptr<Ticket> ticket;
        std::uint64_t offset;
        std::uint64_t length;
        unsigned char* address;
        std::uint64_t landed = 0;
        unsigned num_restarts = 0;
        unsigned num_retries = 0;  // refusals that pass by themselves, since something landed
        std::vector<iovec> parts = {};  // what has not landed of a scattered read; `address` is null then
    };
    using Lock = std::unique_lock<std::mutex>;

    Reader(std::size_t queue_depth, std::size_t piece_bytes);

    virtual void start_pieces(Lock& lock) = 0;                                   // begin pending pieces, up to the depth
    virtual void make_progress(Lock& lock, std::chrono::milliseconds timeout) = 0;  // wait for something to land

    // Takes note of a read's result (bytes, or -errno). Returns true if the piece has to be begun again for its rest.
    bool land(Piece& piece, long result);
    // Whether a piece has been refused so often that the next try should wait for RETRY_PAUSE.
    static bool needs_pause(const Piece& piece);
    static constexpr std::chrono::milliseconds RETRY_PAUSE{1};

    const std::size_t queue_depth_;
    const std::size_t piece_bytes_;
    std::mutex mutex_;
    std::condition_variable landed_;
    std::deque<std::unique_ptr<Piece>> pending_;
    std::size_t in_flight_ = 0;

  private:
    const std::shared_ptr<File>& check(const Request& request, std::size_t index) const;
    void check(const Ticket& ticket, bool may_be_new) const;
    void own(Ticket& ticket, Memory memory) const;
    void cancel_pending();
    static void finish_piece(Ticket& ticket);
    static void fail(const Piece& piece, int error, std::uint64_t got);

    std::unordered_map<std::uint64_t, std::shared_ptr<File>> files_;
    const std::uint64_t id_;  // of all readers there ever were: an address may come again
    std::uint64_t next_file_ = 1;
    std::uint64_t bytes_read_ = 0;
    std::uint64_t num_reads_ = 0;
    bool is_drained_ = false;
};

// Returns null where the kernel or the container refuses io_uring; `error` then says why.
std::unique_ptr<Reader> make_uring_reader(std::size_t queue_depth, std::size_t piece_bytes, int& error);
std::unique_ptr<Reader> make_thread_reader(std::size_t num_threads, std::size_t piece_bytes);

}  // namespace flashlm
