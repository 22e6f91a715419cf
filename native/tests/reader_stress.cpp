// Many threads on one reader and on the thread pool, for the sanitizers: reader_stress [SECONDS [FOLDER]].
//
// Plain and scattered reads, a file that ends too early, files that come and go with reads in flight, threads that end before
// their reads land, refused requests, and a drain under load; with io_uring (where the kernel has it) and with threads. Every
// byte is checked. Ends by itself: a wait that never ends is cut by SIGALRM and fails the run.
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
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
constexpr std::size_t NUM_WORKERS = 16;
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
    std::vector<std::string> paths;
    std::vector<std::uint64_t> files;
    std::uint64_t short_file;
    std::atomic<bool> is_drained{false};
    Clock::time_point ends;
};

// One worker: rounds of everything until the time is up or the reader is drained.
class Worker {
  public:
    Worker(Shared& shared, std::uint64_t seed) : shared_(shared), random_(seed), buffer_(BUFFER_BYTES, false) {}

    void run() {
        while (Clock::now() < shared_.ends) {
            try {
                switch (pick(6)) {
                    case 0: plain(shared_.files, false); break;
                    case 1: scattered(); break;
                    case 2: short_file(); break;
                    case 3: passing_file(); break;
                    case 4: plain(shared_.files, true); break;
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

    std::size_t pick(std::size_t limit) { return std::uniform_int_distribution<std::size_t>(0, limit - 1)(random_); }
    unsigned char* data() { return static_cast<unsigned char*>(buffer_.data()); }

    std::vector<Wanted> choose() {
        std::memset(data(), 0xEE, BUFFER_BYTES);
        std::vector<Wanted> wanted;
        for (std::size_t at = 0, count = 1 + pick(6); wanted.size() < count && at < BUFFER_BYTES;) {
            const std::size_t length = STEP * (1 + pick(std::min<std::size_t>(9, (BUFFER_BYTES - at) / STEP)));
            wanted.push_back({pick(NUM_FILES), STEP * pick((FILE_BYTES - length) / STEP + 1), length, at});
            at += length;
        }
        return wanted;
    }

    void finish(std::uint64_t ticket, const std::vector<Wanted>& wanted) {
        if (pick(2)) {  // ask before waiting, as a caller does that has something else to do
            for (int tries = 0; tries < 50 && !shared_.reader.is_done(ticket); ++tries) std::this_thread::yield();
        }
        Failure failure;
        const WaitResult result = shared_.reader.wait(ticket, PATIENCE, failure);
        if (result == WaitResult::failed) {
            expect(shared_.is_drained && failure.error == ECANCELED, "a read failed that had no reason to");
            return;
        }
        expect(result == WaitResult::done, "a read did not land in time");
        for (const Wanted& one : wanted) {
            expect(holds(data() + one.at, one.number, one.offset, one.length), "other bytes than the file's");
        }
        expect(shared_.reader.wait(ticket, PATIENCE, failure) == WaitResult::done, "a ticket was not forgotten");
    }

    // Where `by_another`, a thread submits the reads and ends: io_uring gives up what a dead thread began.
    void plain(const std::vector<std::uint64_t>& files, bool by_another) {
        const std::vector<Wanted> wanted = choose();
        std::vector<Request> requests;
        for (const Wanted& one : wanted) {
            requests.push_back({files[one.number], one.offset, one.length, reinterpret_cast<std::uint64_t>(data() + one.at)});
        }
        std::uint64_t ticket = 0;
        std::exception_ptr raised;
        const auto submit = [&] {
            try {
                ticket = shared_.reader.submit(requests);
            } catch (...) {
                raised = std::current_exception();
            }
        };
        if (by_another) {
            std::thread(submit).join();
        } else {
            submit();
        }
        if (raised) std::rethrow_exception(raised);
        finish(ticket, wanted);
    }

    void scattered() {
        // One stretch of a file, its parts in descending order in memory.
        const std::size_t number = pick(NUM_FILES), num_parts = 1 + pick(8), offset = STEP * pick(FILE_BYTES / STEP - num_parts);
        std::memset(data(), 0xEE, BUFFER_BYTES);
        std::vector<Wanted> wanted;
        ScatterRequest request{shared_.files[number], offset, {}};
        for (std::size_t part = 0; part < num_parts; ++part) {
            const std::size_t at = STEP * 2 * (num_parts - 1 - part);
            request.parts.push_back({data() + at, STEP});
            wanted.push_back({number, offset + part * STEP, STEP, at});
        }
        finish(shared_.reader.submit_scatter({request}), wanted);
    }

    void short_file() {
        const std::uint64_t length = (SHORT_BYTES / STEP + 2) * STEP;
        const std::uint64_t ticket =
            shared_.reader.submit({{shared_.short_file, 0, length, reinterpret_cast<std::uint64_t>(data())}});
        Failure failure;
        expect(shared_.reader.wait(ticket, PATIENCE, failure) == WaitResult::failed, "a read beyond the end succeeded");
        expect(failure.error == 0 || shared_.is_drained, "a read beyond the end failed for another reason");
    }

    // A file that is opened for one batch, and given up while its reads are in flight.
    void passing_file() {
        std::vector<std::uint64_t> files;
        for (const std::string& path : shared_.paths) {
            File file;
            if (open_file(path, pick(2) != 0, file)) std::abort();
            files.push_back(shared_.reader.add_file(std::move(file)));
        }
        const std::vector<Wanted> wanted = choose();
        std::vector<Request> requests;
        for (const Wanted& one : wanted) {
            requests.push_back({files[one.number], one.offset, one.length, reinterpret_cast<std::uint64_t>(data() + one.at)});
        }
        std::uint64_t ticket = 0;
        try {
            ticket = shared_.reader.submit(requests);
        } catch (const RefusedRequest&) {  // drain closes all files
            expect(shared_.is_drained, "a new file was refused");
            return;
        }
        for (const std::uint64_t file : files) shared_.reader.remove_file(file);
        finish(ticket, wanted);
    }

    void refused() {
        try {
            shared_.reader.submit({{shared_.files[0] + 1000000, 0, STEP, reinterpret_cast<std::uint64_t>(data())}});
            expect(false, "an unknown file was taken");
        } catch (const RefusedRequest&) {
            expect(true, "");
        }
        expect(shared_.reader.is_done(1ull << 60), "an unknown ticket is not done");
    }

    Shared& shared_;
    std::mt19937_64 random_;
    AlignedBuffer buffer_;
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
    Shared shared{*reader, paths, files, short_file, {}, Clock::now() + 2 * load};

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
