// Packed weights from files, by the threads that will read them in every step.
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>

#include "packed_weight.h"
#include "pool.h"

namespace di {
namespace {

constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15u;

std::uint64_t mix(std::uint64_t h, std::uint64_t word) { return std::rotl(h ^ word, 29) * kOdd; }

// Four independent chains hide the latency of the multiplication. Every step is a bijection of h, so that no change of
// a single word is lost. Panels are multiples of 32 bytes.
std::uint64_t panel_checksum(const char* data, std::int64_t bytes, std::uint64_t seed) {
  std::uint64_t h[4] = {seed, seed + 1, seed + 2, seed + 3};
  for (std::int64_t at = 0; at < bytes; at += 32) {
    std::uint64_t words[4];
    std::memcpy(words, data + at, sizeof words);
    for (int i = 0; i < 4; ++i) h[i] = mix(h[i], words[i]);
  }
  return mix(mix(mix(h[0], h[1]), h[2]), h[3]);
}

int read_all(int fd, char* to, std::int64_t bytes, std::int64_t offset) {
  while (bytes > 0) {
    const ssize_t n = pread(fd, to, static_cast<std::size_t>(bytes), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : -1;
    to += n;
    bytes -= n;
    offset += n;
  }
  return 0;
}

}  // namespace

std::uint64_t PackedWeight::checksum() const {
  struct Context {
    const PackedWeight& w;
    std::atomic<std::uint64_t> sum{0};
  } context{*this};
  run_tasks(
      num_panels,
      [](void* c, int panel, int) {
        auto& [w, sum] = *static_cast<Context*>(c);
        const auto* data = static_cast<const char*>(w.panels.data) + panel * w.panel_bytes();
        sum += panel_checksum(data, w.panel_bytes(), (static_cast<std::uint64_t>(panel) + 1) * kOdd);
      },
      &context);
  return context.sum;
}

int PackedWeight::read(int fd, std::int64_t offset) const {
  struct Context {
    const PackedWeight& w;
    int fd;
    std::int64_t offset;
    std::atomic<int> error{0};
  } context{*this, fd, offset};
  run_tasks(
      num_panels,
      [](void* c, int panel, int) {
        auto& [w, file, start, error] = *static_cast<Context*>(c);
        if (error) return;
        const std::int64_t at = panel * w.panel_bytes();
        const int result = read_all(file, static_cast<char*>(w.panels.data) + at, w.panel_bytes(), start + at);
        if (result) error = result;
      },
      &context);
  return context.error;
}

}  // namespace di
