#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "direct_alignment.h"

namespace flashlm {

namespace {

constexpr std::uint32_t CANDIDATES[] = {512, 4096, 65536};
constexpr std::uint32_t MEMORY_ALIGNMENT = 4096;

// Finds by trying the smallest alignment that a direct read accepts, where the kernel does not tell. 0: none does.
std::uint32_t probe_alignment(int fd) {
    void* memory = nullptr;
    if (posix_memalign(&memory, CANDIDATES[2], CANDIDATES[2]) != 0) return 0;
    std::uint32_t found = 0;
    for (std::uint32_t candidate : CANDIDATES) {
        if (pread(fd, memory, candidate, 0) >= 0) {
            found = candidate;
            break;
        }
        if (errno != EINVAL) break;
    }
    free(memory);
    return found;
}

// Turns direct reads on for an open file if its file system has them.
void make_direct(File& file) {
#ifdef __APPLE__
    file.is_direct = fcntl(file.fd, F_NOCACHE, 1) == 0;  // no alignment rules; written for, not tested
#elif defined(O_DIRECT)
    // On the descriptor that was looked at: opened again by its path, it could be another file.
    if (fcntl(file.fd, F_SETFL, O_DIRECT) != 0) return;
    DirectAlignment told;
    const bool is_told = ask_direct_alignment(file.fd, told);
    const std::uint32_t alignment = is_told ? told.offset : probe_alignment(file.fd);
    if (alignment == 0) {
        fcntl(file.fd, F_SETFL, 0);
        return;
    }
    file.is_direct = true;
    file.alignment = alignment;
    file.memory_alignment = is_told ? told.memory : MEMORY_ALIGNMENT;
#endif
}

}  // namespace

int open_file(const std::string& path, bool want_direct, File& file) {
    file.path = path;
    file.fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO would wait for its writer
    if (file.fd < 0) return errno;
    struct stat status;
    if (fstat(file.fd, &status) != 0) {
        const int error = errno;
        close_file(file);
        return error;
    }
    if (!S_ISREG(status.st_mode)) {
        close_file(file);
        return S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
    }
    fcntl(file.fd, F_SETFL, 0);  // blocking: io_uring answers EAGAIN on some file systems otherwise
    file.num_bytes = static_cast<std::uint64_t>(status.st_size);
    if (want_direct) make_direct(file);
    return 0;
}

void close_file(File& file) {
    if (file.fd >= 0) close(file.fd);
    file.fd = -1;
}

}  // namespace flashlm
