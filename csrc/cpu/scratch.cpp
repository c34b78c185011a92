#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

#include "cpu/pages.h"

namespace peftkern {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKept = size_t{64} << 20;

struct Buffer {
  void* data = nullptr;
  size_t capacity = 0;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* scratch(size_t bytes) {
  thread_local Buffer buffer;
  const bool shrink = buffer.capacity > kKept && bytes <= kKept;
  if (buffer.data && bytes <= buffer.capacity && !shrink) return buffer.data;
  if (bytes > static_cast<size_t>(-1) - kAlignment) throw std::bad_alloc();
  const size_t capacity = (bytes + kAlignment) / kAlignment * kAlignment;
  std::free(buffer.data);
  buffer.capacity = 0;
  buffer.data = std::aligned_alloc(kAlignment, capacity);
  if (!buffer.data) throw std::bad_alloc();
  prefer_huge_pages(buffer.data, capacity);
  buffer.capacity = capacity;
  return buffer.data;
}

}  // namespace peftkern
