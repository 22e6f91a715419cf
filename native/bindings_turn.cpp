// A lock for one pass at a time that no exception of Python's can leave locked.
//
// Python raises KeyboardInterrupt (and whatever a debugger, a signal handler or another thread injects) between any two of its
// instructions, so also between taking a lock and the place that would give it back. Here both are native, with the calls
// that belong to them: `with turn.take(enter, leave, *args) as value` takes the turn, calls enter(*args), gives its result to
// the body, calls leave(value, has_failed), and gives the turn back whatever either raised.
//
// A turn that is held still (its `with` was cut off before its end) goes back when the object is gone, and is taken over by the
// next pass of the same thread. A pass that was overtaken gives nothing back.
#include <nanobind/nanobind.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

namespace nb = nanobind;
using namespace nb::literals;

namespace flashlm {
namespace {

constexpr std::chrono::milliseconds SIGNAL_CHECK_EVERY{100};

// Whose turn it is. A holder is known by the address of its `Held`, and by its thread.
class Turn {
  public:
    // Returns false at the timeout.
    bool take(const void* holder, std::chrono::milliseconds timeout) {
        std::unique_lock<std::mutex> lock(mutex_);
        const auto me = std::this_thread::get_id();
        if (!given_back_.wait_for(lock, timeout, [&] { return !holder_ || thread_ == me; })) return false;
        holder_ = holder;
        thread_ = me;
        return true;
    }
    void give_back(const void* holder) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (holder_ != holder) return;  // overtaken, or given back already
            holder_ = nullptr;
        }
        given_back_.notify_one();
    }

  private:
    std::mutex mutex_;
    std::condition_variable given_back_;
    const void* holder_ = nullptr;
    std::thread::id thread_;
};

// One pass's hold on a turn: the context manager.
class Held {
  public:
    Held(std::shared_ptr<Turn> turn, nb::object enter, nb::object leave, nb::args arguments)
        : turn_(std::move(turn)), enter_(std::move(enter)), leave_(std::move(leave)), arguments_(std::move(arguments)) {}
    ~Held() { turn_->give_back(this); }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

    nb::object enter() {
        while (!take()) {
            if (PyErr_CheckSignals() != 0) throw nb::python_error();
        }
        GiveBack unless_entered{*this};
        value_ = enter_(*arguments_);
        unless_entered.is_wanted = false;
        return value_;
    }
    void exit(nb::handle type, nb::handle, nb::handle) {
        const GiveBack always{*this};
        leave_(value_, !type.is_none());
    }

  private:
    struct GiveBack {
        Held& held;
        bool is_wanted = true;
        ~GiveBack() {
            if (is_wanted) held.turn_->give_back(&held);
        }
    };

    bool take() {
        if (turn_->take(this, std::chrono::milliseconds(0))) return true;
        nb::gil_scoped_release release;
        return turn_->take(this, SIGNAL_CHECK_EVERY);
    }

    std::shared_ptr<Turn> turn_;
    nb::object enter_, leave_;
    nb::args arguments_;
    nb::object value_;
};

// The lock outlives its Python object while a pass holds it.
struct TurnHandle {
    const std::shared_ptr<Turn> turn = std::make_shared<Turn>();
};

}  // namespace

void bind_turn(nb::module_& m) {
    nb::class_<Held>(m, "Held")
        .def("__enter__", &Held::enter)
        .def("__exit__", &Held::exit, "kind"_a.none(), "error"_a.none(), "trace"_a.none());
    nb::class_<TurnHandle>(m, "Turn")
        .def(nb::init<>())
        .def("take",
             [](const TurnHandle& self, nb::object enter, nb::object leave, nb::args arguments) {
                 return new Held(self.turn, std::move(enter), std::move(leave), std::move(arguments));
             },
             "enter"_a, "leave"_a, "args"_a, nb::rv_policy::take_ownership,
             "A context manager: enter(*args) gives its value, leave(value, has_failed) ends it.");
}

}  // namespace flashlm
