#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(DI_HAVE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace di {
namespace {

#ifdef DI_EMULATED_ISA  // a build for tests: instructions that the processor may lack are functions
bool runs_avx512() { return true; }
bool runs_avx512_bf16() { return true; }
bool runs_amx() { return true; }
#else
#ifdef DI_HAVE_AVX512
// These also say whether the system saves the registers.
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#ifdef DI_HAVE_AMX
// The processor has tiles for bf16 and int8, the system saves them (XCR0), and lets this process use them: Linux wants
// to be asked, as every thread that uses tiles needs 8 KiB more for its registers.
bool may_use_tiles() {
#ifdef __linux__
  constexpr unsigned kOsSaves = 1u << 27, kTiles = 1u << 22 | 1u << 24 | 1u << 25, kTileState = 3u << 17;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsSaves)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
  unsigned saved, high;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & kTileState) != kTileState) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Asked once: a permission holds for the whole process, and its children have it too.
bool runs_amx() {
  static const bool usable = runs_avx512_bf16() && may_use_tiles();
  return usable;
}
#endif
#endif

struct Level {
  const char* name;
  bool (*runnable)();
  const KernelTable& (*table)();
};

// Best first. A further level is one row here and one translation unit.
const Level kLevels[] = {
#ifdef DI_HAVE_AMX
    {"amx", runs_amx, amx_kernels},
#endif
#ifdef DI_HAVE_AVX512
    {"avx512_bf16", runs_avx512_bf16, avx512_bf16_kernels},
    {"avx512", runs_avx512, avx512_kernels},
#endif
#ifdef DI_HAVE_AVX2
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2_kernels},
#endif
    {"generic", [] { return true; }, generic_kernels},
};

const Level& best_level() {
  for (const Level& level : kLevels)
    if (level.runnable()) return level;
  throw std::logic_error("the generic kernels run everywhere");
}

std::atomic<const KernelTable*> g_current{nullptr};

}  // namespace

std::vector<std::string> runnable_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels)
    if (level.runnable()) names.emplace_back(level.name);
  return names;
}

const KernelTable& kernels() {
  const KernelTable* table = g_current.load(std::memory_order_acquire);
  if (!table) {
    table = &best_level().table();
    g_current.store(table, std::memory_order_release);
  }
  return *table;
}

void set_level(const std::string& name) {
  if (name == "auto") {
    g_current.store(&best_level().table());
    return;
  }
  std::string known;
  for (const Level& level : kLevels) {
    if (!level.runnable()) continue;
    if (name == level.name) {
      g_current.store(&level.table());
      return;
    }
    known += level.name + std::string(", ");
  }
  throw std::invalid_argument("kernel level '" + name + "' cannot run here; choose one of: " + known + "auto");
}

}  // namespace di
