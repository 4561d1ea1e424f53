#include "pool.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "arena.h"

namespace di {
namespace {

// Longer than most gaps that Python leaves between two kernels of a step; where other processes want the cores, every
// microsecond more is taken from the thread that has the work.
constexpr auto kSpin = std::chrono::microseconds(50);

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until ready() or until the time is up; returns what ready() said last.
template <class Ready>
bool spin_until(Ready ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

// A core that has gone away since it was chosen leaves the thread where it was.
void pin_this_thread([[maybe_unused]] int core) {
#ifdef __linux__
  cpu_set_t* set = CPU_ALLOC(core + 1);
  const std::size_t bytes = CPU_ALLOC_SIZE(core + 1);
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(core, bytes, set);
  pthread_setaffinity_np(pthread_self(), bytes, set);
  CPU_FREE(set);
#endif
}

int processors_of_this_process() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);  // fails beyond 1,024 processors
#endif
  const int n = static_cast<int>(std::thread::hardware_concurrency());
  return n < 1 ? 1 : n;
}

class Pool {
 public:
  // Throws std::runtime_error where the system starts fewer threads.
  Pool(int threads, const std::vector<int>& cores) {
    try {
      for (int t = 1; t < threads; ++t) start(t, cores);
    } catch (const std::system_error& error) {
      end();
      throw std::runtime_error("only " + std::to_string(workers_.size() + 1) + " of " + std::to_string(threads) +
                               " compute threads could be started: " + error.code().message());
    }
  }

  ~Pool() { end(); }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  void run(int num_tasks, TaskFn fn, void* context) {
    fn_ = fn;
    context_ = context;
    num_tasks_ = num_tasks;
    done_.store(0, std::memory_order_relaxed);
    remaining_.store(static_cast<std::uint32_t>(num_tasks));
    if (sleepers_.load() > 0) wake();
    take_tasks(0);
    wait_for(num_tasks);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void start(int thread, const std::vector<int>& cores) {
    const int core = cores.empty() ? -1 : cores[static_cast<std::size_t>(thread) % cores.size()];
    workers_.emplace_back([this, thread, core] {
      if (core >= 0) pin_this_thread(core);
      work(thread);
    });
  }

  void end() {
    stop_.store(true);
    wake();
    for (auto& w : workers_) w.join();
  }

  void wait_for(int num_tasks) {
    if (spin_until([&] { return done_.load(std::memory_order_acquire) == num_tasks; })) return;
    // A worker that lost its core inside a task may be waiting for this one.
    for (int done = done_.load(); done != num_tasks; done = done_.load()) done_.wait(done);
  }

  // The region cannot end, and its description cannot change, between a successful decrement and the task's end.
  void take_tasks(int thread) {
    std::uint32_t left = remaining_.load(std::memory_order_acquire);
    while (left != 0) {
      if (!remaining_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
      const int num_tasks = num_tasks_;
      try {
        fn_(context_, num_tasks - static_cast<int>(left), thread);
      } catch (...) {
        keep_error();
      }
      if (done_.fetch_add(1) + 1 == num_tasks) done_.notify_one();
      left = remaining_.load(std::memory_order_acquire);
    }
  }

  // The region goes on to its end: other threads still read what its caller owns.
  void keep_error() {
    std::lock_guard<std::mutex> lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }

  void work(int thread) {
    while (!stop_.load(std::memory_order_relaxed)) {
      take_tasks(thread);
      if (spin_until([&] { return remaining_.load(std::memory_order_relaxed) != 0 || stop_.load(); })) continue;
      const std::uint32_t epoch = epoch_.load();
      sleepers_.fetch_add(1);
      if (remaining_.load() == 0 && !stop_.load()) epoch_.wait(epoch);
      sleepers_.fetch_sub(1);
    }
  }

  void wake() {
    epoch_.fetch_add(1);
    epoch_.notify_all();
  }

  TaskFn fn_ = nullptr;
  void* context_ = nullptr;
  int num_tasks_ = 0;
  std::mutex error_mutex_;
  std::exception_ptr error_;  // the first of the region's
  alignas(64) std::atomic<std::uint32_t> remaining_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

struct State {
  std::mutex mutex;
  int threads = 1;
  std::vector<int> cores;  // one per thread; empty: not pinned
  Pool* pool = nullptr;  // made at the first region, so that a process which only packs has no threads
  std::vector<HugeBuffer> scratch;
  HugeBuffer shared[3];
};

State* make_state() {
  auto* s = new State;  // never freed: threads may outlive static destructors
  s->threads = processors_of_this_process();
  s->scratch.resize(static_cast<std::size_t>(s->threads));
  return s;
}

State* g_state = nullptr;

// A fork leaves the child without the parent's threads: it starts with a new pool and forgets the old one.
void after_fork_in_child() {
  const int threads = g_state->threads;
  const std::vector<int> cores = g_state->cores;
  g_state = make_state();
  g_state->threads = threads;
  g_state->cores = cores;
  g_state->scratch.resize(static_cast<std::size_t>(threads));
}

State& state() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_state = make_state();
    pthread_atfork(nullptr, nullptr, after_fork_in_child);
  });
  return *g_state;
}

}  // namespace

std::mutex& kernel_mutex() { return state().mutex; }

int num_threads() { return state().threads; }

void set_num_threads(int n) {
  if (n < 1) throw std::invalid_argument("number of kernel threads must be at least 1, got " + std::to_string(n));
  State& s = state();
  if (n == s.threads) return;
  s.scratch.resize(static_cast<std::size_t>(n));  // first: where it throws, nothing has changed
  delete s.pool;
  s.pool = nullptr;
  s.threads = n;
}

void set_cores(std::vector<int> cores) {
  State& s = state();
  delete s.pool;
  s.pool = nullptr;
  s.cores = std::move(cores);
}

void run_tasks(int num_tasks, TaskFn fn, void* context) {
  State& s = state();
  if (num_tasks <= 1 || s.threads == 1) {
    for (int t = 0; t < num_tasks; ++t) fn(context, t, 0);
    return;
  }
  if (!s.pool) s.pool = new Pool(s.threads, s.cores);
  s.pool->run(num_tasks, fn, context);
}

void* thread_scratch(int thread, std::size_t bytes) {
  HugeBuffer& buffer = state().scratch[static_cast<std::size_t>(thread)];
  if (buffer.bytes() < bytes) buffer = HugeBuffer(bytes);
  return buffer.data();
}

void* shared_scratch(std::size_t bytes, int index) {
  HugeBuffer& buffer = state().shared[index];
  if (buffer.bytes() < bytes) buffer = HugeBuffer(bytes);
  return buffer.data();
}

}  // namespace di
