#include "cpu/scratch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/pages.h"

namespace peftkern {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKept = size_t{64} << 20;
// With sanitizers, each call's memory is new and full of NaNs: what is read beyond it, or unwritten, shows.
#if defined(PEFTKERN_SANITIZE)
constexpr bool kFresh = true;
#else
constexpr bool kFresh = false;
#endif

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  void* of(size_t bytes) {
    const bool shrink = capacity_ > kKept && bytes <= kKept;
    if (!data_ || bytes > capacity_ || shrink || kFresh) replace(bytes);
    if (kFresh) std::memset(data_, 0xff, capacity_);
    return data_;
  }

 private:
  void replace(size_t bytes) {
    if (bytes > static_cast<size_t>(-1) - kAlignment) throw std::bad_alloc();
    const size_t capacity = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
    std::free(data_);
    capacity_ = 0;
    data_ = std::aligned_alloc(kAlignment, capacity);
    if (!data_) throw std::bad_alloc();
    prefer_huge_pages(data_, capacity);
    capacity_ = capacity;
  }

  void* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace

void* scratch(size_t bytes) {
  thread_local Buffer buffer;
  return buffer.of(bytes);
}

void* operand_scratch(size_t bytes) {
  thread_local Buffer buffer;
  return buffer.of(bytes);
}

}  // namespace peftkern
