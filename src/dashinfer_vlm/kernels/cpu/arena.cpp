#include "arena.h"

#include <sys/mman.h>
#ifdef __linux__
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cerrno>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <utility>

namespace di {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kChunk = std::size_t{64} << 20;

std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

// One bit per memory node, as the kernel takes them.
using NodeMask = std::vector<unsigned long>;
constexpr std::size_t kMaskBits = 8 * sizeof(unsigned long);

NodeMask mask_of(const std::vector<int>& nodes) {
  NodeMask mask;
  for (int node : nodes) {
    const std::size_t word = static_cast<std::size_t>(node) / kMaskBits;
    if (mask.size() <= word) mask.resize(word + 1);
    mask[word] |= 1ul << (static_cast<std::size_t>(node) % kMaskBits);
  }
  return mask;
}

// 0, or what mbind(2) says. A page that was written before stays where it is.
int spread([[maybe_unused]] const HugeBuffer& buffer, [[maybe_unused]] const NodeMask& mask) {
#ifdef __linux__
  // A policy that ended inside a huge page would break it; the mapping of a large buffer reaches to the page's end.
  const std::size_t bytes = round_up(buffer.bytes(), buffer.bytes() >= kHugePage / 2 ? kHugePage : 4096);
  const unsigned long bits = mask.size() * kMaskBits + 1;  // the kernel reads one bit less than it is told
  return syscall(SYS_mbind, buffer.data(), bytes, MPOL_INTERLEAVE, mask.data(), bits, 0) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

struct Arena {
  std::mutex mutex;
  std::shared_ptr<HugeBuffer> chunk;
  std::size_t used = 0;
  NodeMask nodes;  // empty: pages lie where they are first written
};

Arena& arena() {
  static Arena a;
  return a;
}

std::shared_ptr<HugeBuffer> placed_buffer(std::size_t bytes, const NodeMask& nodes) {
  auto buffer = std::make_shared<HugeBuffer>(bytes);
  if (!nodes.empty()) spread(*buffer, nodes);  // set_memory_nodes has tried it: only a full node can refuse now
  return buffer;
}

}  // namespace

void set_memory_nodes(const std::vector<int>& nodes) {
  const NodeMask mask = mask_of(nodes);
  if (!mask.empty())
    if (const int error = spread(HugeBuffer(4096), mask)) throw std::system_error(error, std::generic_category());
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  a.nodes = mask;
  a.chunk = nullptr;  // what is left of it lies elsewhere
  a.used = 0;
}

HugeBuffer::HugeBuffer(std::size_t bytes) {
  bytes_ = round_up(bytes, 64);
  // A small buffer stays on small pages: a huge page for it would be mostly empty.
  const bool huge = bytes_ >= kHugePage / 2;
  mapped_ = huge ? round_up(bytes_, kHugePage) + kHugePage : round_up(bytes_, 4096);
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw std::bad_alloc();
  }
  data_ = mapping_;
  if (huge) {
    data_ = reinterpret_cast<void*>(round_up(reinterpret_cast<std::uintptr_t>(mapping_), kHugePage));
#ifdef MADV_HUGEPAGE
    madvise(data_, round_up(bytes_, kHugePage), MADV_HUGEPAGE);  // refused where the kernel has none: small pages work
#endif
  }
}

HugeBuffer::~HugeBuffer() {
  if (mapping_) munmap(mapping_, mapped_);
}

HugeBuffer::HugeBuffer(HugeBuffer&& other) noexcept { *this = std::move(other); }

HugeBuffer& HugeBuffer::operator=(HugeBuffer&& other) noexcept {
  std::swap(mapping_, other.mapping_);
  std::swap(mapped_, other.mapped_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

ArenaPiece arena_allocate(std::size_t bytes) {
  Arena& a = arena();
  bytes = round_up(bytes, 64);
  std::lock_guard<std::mutex> lock(a.mutex);
  if (bytes > kChunk / 2) {
    auto own = placed_buffer(bytes, a.nodes);
    return {own, own->data()};
  }
  if (!a.chunk || a.used + bytes > a.chunk->bytes()) {
    a.chunk = placed_buffer(kChunk, a.nodes);
    a.used = 0;
  }
  void* data = static_cast<char*>(a.chunk->data()) + a.used;
  a.used += bytes;
  return {a.chunk, data};
}

}  // namespace di
