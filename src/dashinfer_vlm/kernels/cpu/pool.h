// One persistent set of threads for all kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace di {

using TaskFn = void (*)(void* context, int task, int thread);

// Held for the length of one kernel call: everything below it belongs to one caller at a time.
std::mutex& kernel_mutex();

// Number of threads that take part in a region, the caller included; the processors of this process's affinity mask
// until it is set.
int num_threads();
// Takes effect at the next region. Throws std::invalid_argument below 1.
void set_num_threads(int n);

// Thread t of a region runs on core cores[t % size] alone, from the next region on; empty: wherever the system puts it.
// The caller's own thread is left as it is: it is not the pool's. Where threads cannot be pinned this does nothing.
void set_cores(std::vector<int> cores);

// Runs fn(context, task, thread) for every task in [0, num_tasks) and returns when all are done. The caller takes part
// as thread 0. Tasks must not open a region. Where one throws the others are done all the same, then the first exception
// is thrown here. Throws std::runtime_error where the threads cannot be started.
void run_tasks(int num_tasks, TaskFn fn, void* context);

// A 64-byte aligned buffer of the given thread, kept between calls; valid until the thread's next request.
void* thread_scratch(int thread, std::size_t bytes);

// The same for all threads of a kernel together; only the caller of run_tasks asks for it. Buffer 1 is for a kernel that
// calls another one, which has buffer 0, and buffer 2 for whoever calls several.
void* shared_scratch(std::size_t bytes, int index = 0);

}  // namespace di
