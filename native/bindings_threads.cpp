// A hold on the OpenMP threads of one thread: how torch computes there, and nowhere else.
//
// `torch.set_num_threads` also sets what every thread that is born meanwhile starts with, so a pass that lowers it for
// itself would leave others at one thread for good. OpenMP's and MKL's own settings belong to the calling thread alone.
// The hold is a context manager in C++ because an interrupt is seen between two steps of Python only: none fits between
// entering and being entered, or between leaving and having left.
#include <nanobind/nanobind.h>

#include <cstdint>

namespace nb = nanobind;
using namespace nb::literals;

namespace flashlm {
namespace {

class ThreadHold {
public:
    ThreadHold(std::uintptr_t omp_get_max_threads, std::uintptr_t omp_set_num_threads,
               std::uintptr_t mkl_set_num_threads_local, int num_threads)
        : get_omp_(reinterpret_cast<int (*)()>(omp_get_max_threads)),
          set_omp_(reinterpret_cast<void (*)(int)>(omp_set_num_threads)),
          set_mkl_(reinterpret_cast<int (*)(int)>(mkl_set_num_threads_local)),
          num_threads_(num_threads) {}

    void enter() {
        if (get_omp_ == nullptr || set_omp_ == nullptr) return;  // a torch without OpenMP: nothing to hold
        omp_before_ = get_omp_();
        if (set_mkl_ != nullptr) mkl_before_ = set_mkl_(num_threads_);
        set_omp_(num_threads_);
        is_held_ = true;
    }

    void leave() {
        if (!is_held_) return;
        is_held_ = false;
        // Somebody who has set another number meanwhile, by torch, meant what comes after, too.
        if (get_omp_() != num_threads_) return;
        set_omp_(omp_before_);
        if (set_mkl_ != nullptr) set_mkl_(mkl_before_);
    }

    // Calls with the threads held; nothing of Python runs between the call and the leaving.
    nb::object run(const nb::callable& call) {
        struct Leaving {
            ThreadHold& hold;
            ~Leaving() { hold.leave(); }
        };
        enter();
        const Leaving leaving{*this};
        return call();
    }

private:
    int (*get_omp_)();
    void (*set_omp_)(int);
    int (*set_mkl_)(int);  // returns the thread's setting before, 0 where it had none
    int num_threads_;
    int omp_before_ = 0;
    int mkl_before_ = 0;
    bool is_held_ = false;
};

}  // namespace

void bind_threads(nb::module_& m) {
    nb::class_<ThreadHold>(m, "ThreadHold", "Holds the calling thread's OpenMP and MKL to a number of threads.")
        .def(nb::init<std::uintptr_t, std::uintptr_t, std::uintptr_t, int>(), "omp_get_max_threads"_a,
             "omp_set_num_threads"_a, "mkl_set_num_threads_local"_a, "num_threads"_a,
             "Addresses of the libraries' functions, 0 for one that is not there.")
        .def("run", &ThreadHold::run, "call"_a, "Return what call() returns, with the threads held meanwhile.")
        .def("__enter__", &ThreadHold::enter)
        .def("__exit__", [](ThreadHold& hold, nb::args) { hold.leave(); });
}

}  // namespace flashlm
