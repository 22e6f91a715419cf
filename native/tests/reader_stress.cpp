// Many threads on one reader and on the thread pool, for the sanitizers: reader_stress [SECONDS [FOLDER]].
//
// Plain and scattered reads, a file that ends too early, files that come and go with reads in flight, threads that end before
// their reads land, tickets and buffers that are dropped in flight, passes that are broken off and settled, two waits at once,
// refused requests, and a drain under load; with io_uring (where the kernel has it) and with threads. Every byte is checked.
// Ends by itself: a wait that never ends is cut by SIGALRM and fails the run.
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "buffer.h"
#include "reader.h"
#include "thread_pool.h"

namespace {

using namespace flashlm;
using Clock = std::chrono::steady_clock;

constexpr std::size_t STEP = 4096;  // a multiple of what any of the usual file systems asks of direct reads
constexpr std::size_t FILE_BYTES = 256 * STEP;
constexpr std::size_t SHORT_BYTES = 5 * STEP + 100;
constexpr std::size_t BUFFER_BYTES = 32 * STEP;
constexpr std::size_t NUM_FILES = 4;
constexpr std::size_t NUM_WORKERS = 32;
constexpr std::size_t QUEUE_DEPTH = 8;  // fewer than there are workers, so requests wait for room
constexpr std::size_t PIECE_BYTES = 4 * STEP;
constexpr std::chrono::seconds PATIENCE{30};

std::atomic<std::uint64_t> num_right{0}, num_wrong{0};

void expect(bool is_right, const char* what) {
    (is_right ? num_right : num_wrong).fetch_add(1);
    if (!is_right) std::fprintf(stderr, "WRONG: %s\n", what);
}

// Element `index` of file `number`, as eight bytes: no two places hold the same.
std::uint64_t content(std::size_t number, std::size_t index) { return (number << 48) ^ (index * 0x9E3779B97F4A7C15ull); }

std::string write_file(const std::string& folder, std::size_t number, std::size_t num_bytes) {
    const std::string path = folder + "/" + std::to_string(number);
    std::vector<std::uint64_t> words((num_bytes + 7) / 8);
    for (std::size_t index = 0; index < words.size(); ++index) words[index] = content(number, index);
    std::FILE* file = std::fopen(path.c_str(), "wb");
    if (!file || std::fwrite(words.data(), 1, num_bytes, file) != num_bytes || std::fclose(file)) std::abort();
    return path;
}

bool holds(const unsigned char* at, std::size_t number, std::size_t offset, std::size_t num_bytes) {
    for (std::size_t done = 0; done < num_bytes; done += 8) {
        std::uint64_t word;
        std::memcpy(&word, at + done, 8);
        if (word != content(number, (offset + done) / 8)) return false;
    }
    return true;
}

struct Shared {
    Reader& reader;
    Reader& other;  // that knows nothing of the first's tickets
    std::vector<std::string> paths;
    std::vector<std::uint64_t> files;
    std::uint64_t short_file;
    std::atomic<bool> is_drained{false};
    Clock::time_point ends;
};

template <class Call>
bool is_refused(const Call& call) {
    try {
        call();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

// One worker: rounds of everything until the time is up or the reader is drained.
class Worker {
  public:
    Worker(Shared& shared, std::uint64_t seed) : shared_(shared), random_(seed) {}

    void run() {
        while (Clock::now() < shared_.ends) {
            try {
                switch (pick(8)) {
                    case 0: plain(false); break;
                    case 1: plain(true); break;
                    case 2: scattered(); break;
                    case 3: short_file(); break;
                    case 4: passing_file(); break;
                    case 5: dropped(); break;
                    case 6: settled(); break;
                    default: refused(); break;
                }
            } catch (const RefusedRequest&) {
                expect(false, "a sound request was refused");
            } catch (const std::invalid_argument&) {  // "the reader is closed": only after the drain
                expect(shared_.is_drained, "the reader refuses before it was drained");
                return;
            }
        }
    }

  private:
    struct Wanted {
        std::size_t number, offset, length, at;
    };
    using Places = std::vector<Wanted>;

    static std::unique_ptr<AlignedBuffer> new_buffer() { return std::make_unique<AlignedBuffer>(BUFFER_BYTES, false); }
    static unsigned char* data(const AlignedBuffer& buffer) { return static_cast<unsigned char*>(buffer.data()); }
    unsigned char* data() { return data(*buffer_); }
    std::size_t pick(std::size_t limit) { return std::uniform_int_distribution<std::size_t>(0, limit - 1)(random_); }

    // Places of the files, for the bytes from `at` to `end` of the buffer, which are overwritten.
    Places choose(std::size_t at = 0, std::size_t end = BUFFER_BYTES) {
        std::memset(data() + at, 0xEE, end - at);
        Places wanted;
        for (const std::size_t count = 1 + pick(6); wanted.size() < count && at < end;) {
            const std::size_t length = STEP * (1 + pick(std::min<std::size_t>(9, (end - at) / STEP)));
            wanted.push_back({pick(NUM_FILES), STEP * pick((FILE_BYTES - length) / STEP + 1), length, at});
            at += length;
        }
        return wanted;
    }

    void submit(const std::shared_ptr<Ticket>& ticket, const std::vector<std::uint64_t>& files, const Places& wanted) {
        std::vector<Request> requests;
        for (const Wanted& one : wanted) {
            requests.push_back({files[one.number], one.offset, one.length, reinterpret_cast<std::uint64_t>(data() + one.at)});
        }
        shared_.reader.submit(ticket, requests, {buffer_->share()});
    }

    static void check_bytes(const AlignedBuffer& buffer, const Places& wanted) {
        for (const Wanted& one : wanted) {
            expect(holds(data(buffer) + one.at, one.number, one.offset, one.length), "other bytes than the file's");
        }
    }

    // Waits twice, sometimes both at once, which has to give the same. Returns whether all has landed.
    bool wait(const Ticket& ticket) {
        Failure failure, again;
        WaitResult result, next;
        if (pick(4) == 0) {
            std::thread other([&] { next = shared_.reader.wait(ticket, PATIENCE, again); });
            result = shared_.reader.wait(ticket, PATIENCE, failure);
            other.join();
        } else {
            result = shared_.reader.wait(ticket, PATIENCE, failure);
            next = shared_.reader.wait(ticket, PATIENCE, again);
        }
        expect(result != WaitResult::timed_out, "a read did not land in time");
        expect(next == result && again.error == failure.error && again.path == failure.path &&
                   again.offset == failure.offset && again.wanted == failure.wanted && again.got == failure.got,
               "a ticket waited for twice gave two answers");
        expect(ticket.pieces_left == 0, "a ticket that was waited for is in flight");
        const bool was_cancelled = shared_.is_drained && failure.error == ECANCELED;
        expect(result != WaitResult::failed || was_cancelled, "a read failed that had no reason to");
        return result == WaitResult::done;
    }

    void finish(const Ticket& ticket, const Places& wanted) {
        if (pick(2)) {  // ask before waiting, as a caller does that has something else to do
            for (int tries = 0; tries < 50 && !shared_.reader.is_done(ticket); ++tries) std::this_thread::yield();
        }
        if (wait(ticket)) check_bytes(*buffer_, wanted);
    }

    // Where `by_another`, a thread submits the reads and ends: io_uring gives up what a dead thread began.
    void plain(bool by_another) {
        const Places wanted = choose();
        const auto ticket = std::make_shared<Ticket>();
        std::exception_ptr raised;
        const auto begin = [&] {
            try {
                submit(ticket, shared_.files, wanted);
            } catch (...) {
                raised = std::current_exception();
            }
        };
        if (by_another) {
            std::thread(begin).join();
        } else {
            begin();
        }
        if (raised) std::rethrow_exception(raised);
        finish(*ticket, wanted);
    }

    void scattered() {
        // One stretch of a file, its parts in descending order in memory.
        const std::size_t number = pick(NUM_FILES), num_parts = 1 + pick(8), offset = STEP * pick(FILE_BYTES / STEP - num_parts);
        std::memset(data(), 0xEE, BUFFER_BYTES);
        Places wanted;
        ScatterRequest request{shared_.files[number], offset, {}};
        for (std::size_t part = 0; part < num_parts; ++part) {
            const std::size_t at = STEP * 2 * (num_parts - 1 - part);
            request.parts.push_back({data() + at, STEP});
            wanted.push_back({number, offset + part * STEP, STEP, at});
        }
        const auto ticket = std::make_shared<Ticket>();
        shared_.reader.submit_scatter(ticket, {request}, {buffer_->share()});
        finish(*ticket, wanted);
    }

    void short_file() {
        const std::uint64_t length = (SHORT_BYTES / STEP + 2) * STEP;
        const auto ticket = std::make_shared<Ticket>();
        shared_.reader.submit(ticket, {{shared_.short_file, 0, length, reinterpret_cast<std::uint64_t>(data())}},
                              {buffer_->share()});
        for (int times = 0; times < 2; ++times) {
            Failure failure;
            expect(shared_.reader.wait(*ticket, PATIENCE, failure) == WaitResult::failed, "a read beyond the end succeeded");
            expect(failure.error == 0 || shared_.is_drained, "a read beyond the end failed for another reason");
        }
    }

    // A file that is opened for one batch, and given up while its reads are in flight.
    void passing_file() {
        std::vector<std::uint64_t> files;
        for (const std::string& path : shared_.paths) {
            File file;
            if (open_file(path, pick(2) != 0, file)) std::abort();
            files.push_back(shared_.reader.add_file(std::move(file)));
        }
        const Places wanted = choose();
        const auto ticket = std::make_shared<Ticket>();
        submit(ticket, files, wanted);
        for (const std::uint64_t file : files) shared_.reader.remove_file(file);
        finish(*ticket, wanted);
    }

    // The owner of a ticket, of its buffer or of both is gone while reads are in flight: they hold what they need, and no
    // longer than they need it.
    void dropped() {
        const Places wanted = choose();
        auto ticket = std::make_shared<Ticket>();
        submit(ticket, shared_.files, wanted);
        const std::weak_ptr<const void> memory = buffer_->share();
        const std::weak_ptr<Ticket> begun = ticket;
        std::unique_ptr<AlignedBuffer> kept = std::exchange(buffer_, new_buffer());
        const bool drops_ticket = pick(2), drops_buffer = !drops_ticket || pick(2);
        if (drops_buffer) kept.reset();
        if (drops_ticket) {
            ticket.reset();
            const auto deadline = Clock::now() + PATIENCE;
            while (!begun.expired() && Clock::now() < deadline) plain(false);  // who waits for its own lets all land
            expect(begun.expired(), "a ticket that nobody holds stays for ever");
            shared_.reader.num_reads();  // its lock orders what landed before what is looked at here
            if (kept && !shared_.is_drained) check_bytes(*kept, wanted);
        } else {
            for (int tries = 0; tries < 50; ++tries) {
                const bool is_held = !memory.expired();  // looked at first: memory goes after the last piece
                expect(is_held || ticket->pieces_left == 0, "the memory of reads in flight was given back");
                std::this_thread::yield();
            }
            wait(*ticket);
        }
        expect(memory.expired() == drops_buffer, "the memory of reads that landed is not its owner's alone");
    }

    // A pass that is broken off, with two batches begun for one ticket: whatever state it is in, its memory may be used
    // again once nothing is in flight.
    void settled() {
        const auto ticket = std::make_shared<Ticket>();
        const Places first = choose(0, BUFFER_BYTES / 2);
        submit(ticket, shared_.files, first);
        const Places second = choose(BUFFER_BYTES / 2, BUFFER_BYTES);
        submit(ticket, shared_.files, second);
        Failure failure;
        if (shared_.reader.wait(*ticket, std::chrono::milliseconds(0), failure) == WaitResult::done) {
            expect(ticket->pieces_left == 0, "a ticket that was waited for is in flight");
        }
        // Sometimes the count alone tells, without the reader's lock.
        for (std::size_t tries = 50 * pick(2); tries && ticket->pieces_left; --tries) std::this_thread::yield();
        if (ticket->pieces_left) wait(*ticket);
        if (!shared_.is_drained) {
            check_bytes(*buffer_, first);
            check_bytes(*buffer_, second);
        }
        const Places next = choose();
        const auto fresh = std::make_shared<Ticket>();
        submit(fresh, shared_.files, next);
        finish(*fresh, next);
    }

    void refused() {
        const auto ticket = std::make_shared<Ticket>();
        Reader &reader = shared_.reader, &other = shared_.other;
        const std::uint64_t address = reinterpret_cast<std::uint64_t>(data());
        try {
            reader.submit(ticket, {{shared_.files[0] + 1000000, 0, STEP, address}}, {buffer_->share()});
            expect(false, "an unknown file was taken");
        } catch (const RefusedRequest&) {
            expect(ticket->memory.empty() && ticket->reader_id == 0, "a refused batch left something behind");
        }
        Failure failure;
        expect(is_refused([&] { reader.is_done(*ticket); }), "a ticket of nothing is done");
        expect(is_refused([&] { reader.wait(*ticket, PATIENCE, failure); }), "a ticket of nothing was waited for");

        const Places wanted = choose();
        submit(ticket, shared_.files, wanted);
        expect(is_refused([&] { other.wait(*ticket, PATIENCE, failure); }), "another reader's ticket was waited for");
        expect(is_refused([&] { other.submit(ticket, {}, {}); }), "another reader's ticket was taken");
        finish(*ticket, wanted);
    }

    Shared& shared_;
    std::mt19937_64 random_;
    std::unique_ptr<AlignedBuffer> buffer_ = new_buffer();
};

void stress_reader(std::unique_ptr<Reader> reader, const std::string& folder, double seconds) {
    std::vector<std::string> paths;
    std::vector<std::uint64_t> files;
    const auto add = [&](std::size_t number, std::size_t num_bytes) {
        File file;
        paths.push_back(write_file(folder, number, num_bytes));
        if (open_file(paths.back(), true, file)) std::abort();
        return reader->add_file(std::move(file));
    };
    for (std::size_t number = 0; number < NUM_FILES; ++number) files.push_back(add(number, FILE_BYTES));
    const std::uint64_t short_file = add(NUM_FILES, SHORT_BYTES);
    paths.pop_back();
    const auto load = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    const auto other = make_thread_reader(1, PIECE_BYTES);
    Shared shared{*reader, *other, paths, files, short_file, {}, Clock::now() + 2 * load};

    std::vector<std::thread> workers;
    for (std::size_t index = 0; index < NUM_WORKERS; ++index) {
        workers.emplace_back([&shared, index] { Worker(shared, 1000 + index).run(); });
    }
    std::this_thread::sleep_for(load);
    shared.is_drained = true;
    reader->drain();  // while all of them go on
    for (std::thread& worker : workers) worker.join();
    std::printf("%s: %llu reads, %llu bytes\n", reader->backend(), static_cast<unsigned long long>(reader->num_reads()),
                static_cast<unsigned long long>(reader->bytes_read()));
}

// Callers that share the pool: each task of each job runs once, on whatever threads.
void stress_pool(double seconds) {
    const auto ends = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    const std::size_t before = num_threads();
    std::vector<std::thread> callers;
    for (std::size_t caller = 0; caller < 4; ++caller) {
        callers.emplace_back([caller, ends] {
            for (std::size_t job = 0; Clock::now() < ends; ++job) {
                std::vector<unsigned> times(1 + (caller * 31 + job) % 64, 0);
                parallel_for(
                    times.size(),
                    [](const void* context, std::size_t task) {
                        ++(*static_cast<std::vector<unsigned>*>(const_cast<void*>(context)))[task];
                    },
                    &times);
                for (const unsigned count : times) expect(count == 1, "a task did not run exactly once");
                if (caller == 0 && job % 64 == 0) set_num_threads(1 + job / 64 % 4);
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    set_num_threads(before);
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
    alarm(static_cast<unsigned>(8 * seconds) + 120);
    std::string folder = std::string(argc > 2 ? argv[2] : ".") + "/reader_stress.XXXXXX";
    if (!mkdtemp(folder.data())) return std::perror(folder.c_str()), 2;

    int error = 0;
    if (auto reader = make_uring_reader(QUEUE_DEPTH, PIECE_BYTES, error)) {
        stress_reader(std::move(reader), folder, seconds);
    } else {
        std::printf("io_uring: not tried, the kernel refuses it (%s)\n", std::strerror(error));
    }
    stress_reader(make_thread_reader(QUEUE_DEPTH, PIECE_BYTES), folder, seconds);
    stress_pool(seconds / 2);

    for (std::size_t number = 0; number <= NUM_FILES; ++number) unlink((folder + "/" + std::to_string(number)).c_str());
    rmdir(folder.c_str());
    std::printf("%llu passed, %llu failed\n", static_cast<unsigned long long>(num_right.load()),
                static_cast<unsigned long long>(num_wrong.load()));
    return num_wrong != 0 || num_right == 0;
}
