// A small pool for the kernels: the caller and num_threads - 1 workers take the tasks of one job from a counter.
//
// A worker that is late costs nothing: the caller goes on alone and waits only for tasks that a worker has begun, so a
// core that torch's OpenMP threads hold does not stall us. One job runs at a time; a second caller meanwhile runs its own
// tasks alone. Workers spin for half a millisecond (more than Python takes between two kernels of a layer), then sleep. They
// start with the first job, also in a forked child, and are never joined: at exit they sleep in the kernel, owning nothing.
#pragma once

#include <cstddef>

namespace flashlm {

// Threads that jobs may use, the caller included; by default the cores that this process may run on.
std::size_t num_threads();

// Sets it; at least 1. Throws std::invalid_argument on 0.
void set_num_threads(std::size_t num_threads);

// Calls run(context, task) once for every task in [0, num_tasks), in any order, and returns when all have returned.
// `run` must not throw.
void parallel_for(std::size_t num_tasks, void (*run)(const void* context, std::size_t task), const void* context);

}  // namespace flashlm
