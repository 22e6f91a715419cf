#include "run.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../simd/levels.h"
#include "../thread_pool.h"

namespace flashlm {
namespace {

constexpr std::size_t TASK_BYTES = 64 << 10;       // about 5 us of memory time: less is not worth waking a thread for
constexpr std::size_t ROW_TASKS_PER_THREAD = 8;    // small tasks even out threads that the system slows down
constexpr std::size_t COLUMN_TASKS_PER_THREAD = 2; // each task sweeps all rows, so its pieces of a row should stay long
constexpr std::size_t COLUMN_UNIT = 128;           // whole cache lines of rows and y, whole panels
constexpr std::size_t TOKENS_PER_PASS = 4;         // beyond these, arithmetic and not memory sets the time

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

// The length of a task: an even share for `tasks_per_thread`, in whole units, and worth at least TASK_BYTES.
std::size_t task_length(std::size_t length, std::size_t unit, std::size_t cost_bytes, std::size_t tasks_per_thread) {
    const std::size_t most = std::max<std::size_t>(cost_bytes / TASK_BYTES, 1);
    const std::size_t threads = num_threads();
    const std::size_t num_tasks = threads == 1 ? 1 : std::min(most, threads * tasks_per_thread);
    return ceil_div(ceil_div(length, num_tasks), unit) * unit;
}

std::size_t cost_bytes(const Rows& rows, EncodingCode code, std::size_t num_tokens) {
    return rows.num_rows * part_bytes(code, rows.hidden_size) * ceil_div(num_tokens, TOKENS_PER_PASS);
}

// What columns are cut at: whole groups, too.
std::size_t column_unit(EncodingCode code) { return std::max(COLUMN_UNIT, ENCODINGS[code].group_elements); }

template <class Args>
struct Job {
    const Args& args;
    void (*kernel)(const Args&, std::size_t, std::size_t);
    std::size_t length, task_length;
};

template <class Args>
void run(const Job<Args>& job) {
    parallel_for(
        ceil_div(job.length, job.task_length),
        [](const void* context, std::size_t task) {
            const auto& j = *static_cast<const Job<Args>*>(context);
            const std::size_t begin = task * j.task_length;
            j.kernel(j.args, begin, std::min(begin + j.task_length, j.length));
        },
        &job);
}

// What a product is cut along: so many rows or columns, in whole units.
struct Range {
    std::size_t length, unit;
};

std::size_t tokens_of(const ProjectArgs& args) { return args.num_tokens; }
std::size_t tokens_of(const AccumulateArgs& args) { return args.num_tokens; }
std::size_t tokens_of(const Int8ProjectArgs& args) { return args.x.num_tokens; }

// Several products in one job, in as many tasks as one product of their joint cost would have; each product its share.
template <class Args, class RangeOf>
void run_many(EncodingCode code, const Args* products, std::size_t num_products,
              void (*kernel)(const Args&, std::size_t, std::size_t), std::size_t tasks_per_thread, RangeOf range_of) {
    struct Task {
        const Args* product;
        std::size_t begin, end;
    };
    std::size_t total = 0;
    for (std::size_t i = 0; i < num_products; ++i) total += cost_bytes(products[i].rows, code, tokens_of(products[i]));
    const std::size_t threads = num_threads(), most = std::max<std::size_t>(total / TASK_BYTES, 1);
    const std::size_t share =
        std::max<std::size_t>(total / (threads == 1 ? 1 : std::min(most, threads * tasks_per_thread)), 1);
    std::vector<Task> tasks;
    for (std::size_t i = 0; i < num_products; ++i) {
        const Args& product = products[i];
        const Range range = range_of(product);
        const std::size_t pieces = ceil_div(cost_bytes(product.rows, code, tokens_of(product)), share);
        const std::size_t length =
            ceil_div(ceil_div(range.length, std::max<std::size_t>(pieces, 1)), range.unit) * range.unit;
        for (std::size_t begin = 0; begin < range.length; begin += length) {
            tasks.push_back({&product, begin, std::min(begin + length, range.length)});
        }
    }
    struct Context {
        const Task* tasks;
        void (*kernel)(const Args&, std::size_t, std::size_t);
    } context{tasks.data(), kernel};
    parallel_for(
        tasks.size(),
        [](const void* opaque, std::size_t index) {
            const auto& c = *static_cast<const Context*>(opaque);
            const Task& task = c.tasks[index];
            c.kernel(*task.product, task.begin, task.end);
        },
        &context);
}

}  // namespace

void run_project(EncodingCode code, const ProjectArgs& args) {
    const std::size_t num_rows = args.rows.num_rows, unit = args.num_tokens < TOKENS_PER_PASS ? 4 : 6;
    if (num_rows == 0) return;
    const std::size_t cost = cost_bytes(args.rows, code, args.num_tokens);
    run(Job<ProjectArgs>{args, level().rows.of[code].project, num_rows,
                         task_length(num_rows, unit, cost, ROW_TASKS_PER_THREAD)});
}

void run_projects(EncodingCode code, const ProjectArgs* products, std::size_t num_products) {
    run_many(code, products, num_products, level().rows.of[code].project, ROW_TASKS_PER_THREAD, [](const ProjectArgs& each) {
        return Range{each.rows.num_rows, each.num_tokens < TOKENS_PER_PASS ? 4u : 6u};
    });
}

bool has_int8(EncodingCode code) { return level().int8.of[code] != nullptr; }

void run_project_int8(EncodingCode code, const Int8ProjectArgs& args) {
    const std::size_t num_rows = args.rows.num_rows;
    if (num_rows == 0) return;
    const std::size_t cost = cost_bytes(args.rows, code, args.x.num_tokens);
    run(Job<Int8ProjectArgs>{args, level().int8.of[code], num_rows, task_length(num_rows, 4, cost, ROW_TASKS_PER_THREAD)});
}

void run_projects_int8(EncodingCode code, const Int8ProjectArgs* products, std::size_t num_products) {
    run_many(code, products, num_products, level().int8.of[code], ROW_TASKS_PER_THREAD,
             [](const Int8ProjectArgs& each) { return Range{each.rows.num_rows, 4}; });
}

void run_quantize_tokens(const QuantizeTokensArgs& args) {
    constexpr std::size_t PARTS = 1024;  // of 32 elements: some 10 us
    run(Job<QuantizeTokensArgs>{args,
                                [](const QuantizeTokensArgs& all, std::size_t begin, std::size_t end) {
                                    quantize_tokens({all.source + begin * 32, end - begin, all.quants + begin * 32,
                                                     all.scales + begin, all.sums + begin});
                                },
                                args.num_parts, PARTS});
}

bool has_int8_matrix(EncodingCode code) { return level().matrices.of[code].multiply != nullptr; }

void run_multiply_int8(EncodingCode code, const Int8ProjectArgs& args) {
    const Int8Matrices& matrices = level().matrices;
    const Int8Matrix& matrix = matrices.of[code];
    if (args.rows.num_rows == 0) return;
    const std::size_t num_starts = args.x.num_tokens * args.rows.hidden_size / matrix.scaled_elements;
    const auto starts = std::make_unique_for_overwrite<std::int32_t[]>(num_starts);
    struct Starts {
        const std::int8_t* quants;
        std::int32_t* starts;
        std::size_t scaled_elements;
        int lift;
    };
    const Starts summed{args.x.quants, starts.get(), matrix.scaled_elements, matrix.lift};
    run(Job<Starts>{summed,
                    [](const Starts& s, std::size_t begin, std::size_t end) {
                        for (std::size_t i = begin; i < end; ++i) {
                            std::int32_t sum = 0;
                            for (std::size_t k = 0; k < s.scaled_elements; ++k) sum += s.quants[i * s.scaled_elements + k];
                            s.starts[i] = -s.lift * sum;
                        }
                    },
                    num_starts, TASK_BYTES / matrix.scaled_elements});
    const Int8MatrixArgs all{args.rows, args.x, args.out, args.out_stride, args.bias, starts.get()};
    run(Job<Int8MatrixArgs>{all, matrix.multiply, args.rows.num_rows, matrices.unit});
}

void run_accumulate(EncodingCode code, const AccumulateArgs& args) {
    const std::size_t hidden = args.rows.hidden_size;
    if (args.rows.num_rows == 0) return;
    const std::size_t cost = cost_bytes(args.rows, code, args.num_tokens);
    run(Job<AccumulateArgs>{args, level().rows.of[code].accumulate, hidden,
                            task_length(hidden, column_unit(code), cost, COLUMN_TASKS_PER_THREAD)});
}

void run_accumulates(EncodingCode code, const AccumulateArgs* products, std::size_t num_products) {
    run_many(code, products, num_products, level().rows.of[code].accumulate, COLUMN_TASKS_PER_THREAD,
             [code](const AccumulateArgs& each) { return Range{each.rows.hidden_size, column_unit(code)}; });
}

void run_widen(EncodingCode code, const WidenArgs& args) {
    const std::size_t num_rows = args.rows.num_rows;
    if (num_rows == 0) return;
    const std::size_t cost = cost_bytes(args.rows, code, 1);
    run(Job<WidenArgs>{args, level().rows.of[code].widen, num_rows, task_length(num_rows, 4, cost, ROW_TASKS_PER_THREAD)});
}

}  // namespace flashlm
