#include "run.h"

#include "../simd/levels.h"
#include "../thread_pool.h"

namespace flashlm {

void run_gates(GateType type, const GatesForwardArgs& args) {
    struct Job {
        const GatesForwardArgs& args;
        void (*forward)(const GatesForwardArgs&, std::size_t, std::size_t);
    } job{args, level().gates.forward[type]};
    parallel_for(
        args.batch,
        [](const void* context, std::size_t row) {
            const auto& j = *static_cast<const Job*>(context);
            j.forward(j.args, row, row + 1);
        },
        &job);
}

}  // namespace flashlm
