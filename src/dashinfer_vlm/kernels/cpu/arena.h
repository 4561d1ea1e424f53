// Memory on huge pages: weights are read once per step from end to end, and 4 KiB pages cost a fifth of the bandwidth.
#pragma once
#include <cstddef>
#include <memory>
#include <vector>

namespace di {

// An anonymous mapping that asks for huge pages; zero-filled, 2 MiB aligned.
class HugeBuffer {
 public:
  HugeBuffer() = default;
  explicit HugeBuffer(std::size_t bytes);  // throws std::bad_alloc
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept;
  HugeBuffer& operator=(HugeBuffer&& other) noexcept;
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* mapping_ = nullptr;
  std::size_t mapped_ = 0;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// A piece of a shared chunk; the chunk goes back to the system when its last piece is dropped.
struct ArenaPiece {
  std::shared_ptr<HugeBuffer> chunk;
  void* data = nullptr;
};

// Later chunks spread their pages over these memory nodes, one after the other: any thread may take any panel of a
// weight, so each node's memory should serve its share of every weight. Empty: a page lies on the node of the thread
// that writes it first. Throws std::system_error when the kernel refuses, and changes nothing then.
void set_memory_nodes(const std::vector<int>& nodes);

// 64-byte aligned and zero-filled; thread-safe. Throws std::bad_alloc.
ArenaPiece arena_allocate(std::size_t bytes);

}  // namespace di
